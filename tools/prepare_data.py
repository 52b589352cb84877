#!/usr/bin/env python
"""Problem sets in this project's format from Hugging Face datasets, JSONL or Parquet; --help lists the arguments."""

import sys

from dasd_megatron.cli import report_errors
from dasd_megatron.data.prepare_data import main

sys.exit(report_errors(lambda: main(sys.argv[1:])))
