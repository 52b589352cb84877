#!/usr/bin/env python
"""Problem sets in this project's format from Hugging Face datasets and files of others; --help lists the arguments."""

import sys

from dasd_megatron.commands.prepare_data import main
from dasd_megatron.errors import report_errors

sys.exit(report_errors(lambda: main(sys.argv[1:])))
