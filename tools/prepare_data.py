#!/usr/bin/env python
"""Problem sets in this project's format from Hugging Face datasets, JSONL or Parquet; --help lists the arguments."""

import sys

from dasd_megatron.commands.prepare_data import main
from dasd_megatron.errors import report_errors

sys.exit(report_errors(lambda: main(sys.argv[1:])))
