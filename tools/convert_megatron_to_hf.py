#!/usr/bin/env python
"""The same as `dasd convert megatron-to-hf`; --help lists the arguments."""

import sys

from dasd_megatron.cli import main

sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
