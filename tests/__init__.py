"""Tests of dasd_megatron; what several of them share is in :mod:`tests.support`."""
