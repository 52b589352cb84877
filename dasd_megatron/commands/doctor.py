"""``dasd doctor``: what this machine offers a run, and what it lacks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from dasd_megatron.arguments import Parser
from dasd_megatron.commands.doctor_probe import read_answers, start_probe

if TYPE_CHECKING:
    from rich.table import Table

    from dasd_megatron.commands.doctor_checks import Check

_STYLES = {"ok": "green", "info": "dim", "warn": "yellow", "fail": "bold red"}


def diagnose(arguments: list[str]) -> None:
    """Run ``dasd doctor``, which takes no arguments.

    Raises:
        SystemExit: with status 1, where a check failed.
    """
    Parser(prog="dasd doctor", description="Say what is installed, what is missing and how to get it.").parse_args(
        arguments
    )
    status = print_doctor()
    if status:
        raise SystemExit(status)


def doctor_report() -> list[Check]:
    """Return all checks, in reading order.

    It takes some seconds, in which child processes import torch, and Megatron-Core, mbridge and transformers.
    """
    torch, stack = start_probe("torch", "cuda", "gloo"), start_probe("cpu_stack")
    # The import takes a moment, in which the children already work.
    from dasd_megatron.commands import doctor_checks as rows

    packages, optional = rows.package_rows(), rows.optional_rows()
    answers = read_answers(torch) | read_answers(stack)
    if answers["cuda"].get("ok"):
        # Both backends do not go into one process.
        answers |= read_answers(start_probe("cuda_kernels"))
    # The machine's free memory is read when the children have given theirs back.
    return [
        *packages,
        *rows.cpu_rows(answers),
        *rows.cuda_rows(answers),
        *rows.machine_rows(),
        *rows.network_rows(),
        *optional,
    ]


def exit_status(checks: list[Check]) -> int:
    """Return 0 when the CPU path can run, 1 when a check failed."""
    return int(any(check.status == "fail" for check in checks))


def print_doctor(stream: TextIO | None = None) -> int:
    """Print :func:`doctor_report` as tables and a verdict, and return the exit status of ``dasd doctor``."""
    checks = doctor_report()
    from rich.console import Console
    from rich.text import Text

    stream = stream if stream is not None else sys.stdout
    terminal = stream.isatty()
    console = Console(file=stream, highlight=False, force_terminal=terminal, width=None if terminal else 120)
    for section in dict.fromkeys(check.section for check in checks):
        console.print(_table(section, [check for check in checks if check.section == section]))
    status = exit_status(checks)
    if status:
        failed = ", ".join(check.item for check in checks if check.status == "fail")
        verdict = f"The CPU path cannot run here: {failed}. The arrows above say what to do."
        console.print(Text(verdict, style=_STYLES["fail"]))
    else:
        warned = sum(check.status == "warn" for check in checks)
        verdict = "The CPU path can run here." + (f" Warnings: {warned}." if warned else "")
        console.print(Text(verdict, style=_STYLES["ok"]))
    return status


def _table(section: str, checks: list[Check]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE, title=section, title_justify="left", title_style="bold", show_header=False, pad_edge=False
    )
    table.add_column(min_width=4, no_wrap=True)
    table.add_column(min_width=24, no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        value = Text(check.value)
        if check.hint:
            style = "dim" if check.status in ("ok", "info") else _STYLES[check.status]
            value.append(f"\n→ {check.hint}", style=style)
        table.add_row(Text(check.status, style=_STYLES[check.status]), check.item, value)
    return table
