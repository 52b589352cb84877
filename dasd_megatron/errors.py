"""Errors that a user can mend, and the way in which a command reports them.

Such an error is a class of this package. Its message is one line: what is wrong, where, and what to do. Any other error
is a defect and keeps its traceback.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable

from dasd_megatron import stopping

_LONGEST_LINE = 1000


def printable(text: str, limit: int | None = None) -> str:
    """Return ``text`` on one line that a terminal, a log or a page can show, cut to ``limit`` characters.

    What models, servers and files say may hold escape sequences, which would move the cursor or recolour what follows,
    marks that change the direction of writing, halves of surrogate pairs, which cannot be written as UTF-8, and
    characters that Unicode has not assigned. Each run of what ``str.isprintable`` refuses becomes one space.
    """
    cut = text if limit is None else text[: limit + 1]
    shown = _with_spaces(cut).strip()
    return shown if limit is None or len(cut) <= limit else f"{shown[:limit]}..."


def printable_lines(text: str) -> str:
    """Return text of several lines as :func:`printable` does each line; lines and their indentation stay."""
    return "\n".join(_with_spaces(line.expandtabs()).rstrip() for line in text.split("\n"))


def _with_spaces(text: str) -> str:
    runs = itertools.groupby(text, key=str.isprintable)
    return "".join("".join(characters) if shows else " " for shows, characters in runs)


def report_errors(work: Callable[[], None]) -> int:
    """Run ``work`` and return the exit status of the command.

    An error that the user can mend becomes one line on standard error and exit status 1; any other error is raised. A
    run that a signal has stopped has exit status 75, and one that the watch has stopped 76.
    """
    try:
        work()
    except stopping.StopRequested as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"dasd: {stop}", file=sys.stderr, flush=True)
        return stop.exit_status
    except Exception as error:
        # Errors that name a cause and a remedy are classes of this package. Others are defects.
        if type(error).__module__.startswith("dasd_megatron."):
            rank = os.environ.get("RANK", "0")
            message = printable_lines(str(error))
            if rank == "0":
                print(f"dasd: error: {message}", file=sys.stderr, flush=True)
            elif not getattr(error, "on_all_ranks", False):
                print(f"dasd: error on rank {rank}: {message}", file=sys.stderr, flush=True)
            return 1
        raise
    return 0


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line that names the field and the fix."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class where it has no text.

    The text may be of a file or a server from elsewhere. What would move a terminal's cursor is taken out, and of a
    long line the beginning is left.
    """
    try:
        lines = str(error).splitlines()
    # The text of an error of the user's own is made by the user's own code.
    except Exception:
        lines = []
    line = next((line for line in lines if line.strip()), type(error).__name__)
    return printable(line[:_LONGEST_LINE])


def enumerate_names(names: Iterable[str], conjunction: str) -> str:
    """Return names as people list them: ``a, b or c`` with the conjunction ``or``."""
    *others, last = names
    return f"{', '.join(others)} {conjunction} {last}" if others else last
