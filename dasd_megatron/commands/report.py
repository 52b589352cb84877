"""``dasd report``: one page about a run, or about several overlaid."""

from __future__ import annotations

from pathlib import Path

from dasd_megatron.arguments import Parser
from dasd_megatron.observability.report.page import write_report
from dasd_megatron.observability.report.run_files import show_hidden


def report(arguments: list[str]) -> None:
    """Run ``dasd report``."""
    parser = Parser(prog="dasd report", description="Write one HTML page about a run, or about several overlaid.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: RUN/report.html; of several runs ./report.html"
    )
    options = parser.parse_args(arguments)
    # A name may have bytes that no terminal shows.
    print(show_hidden(write_report(options.runs, options.output).absolute()))
