#!/usr/bin/env python
"""The same as `dasd convert hf-to-megatron`; --help lists the arguments."""

import sys

from dasd_megatron.cli import main

sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
