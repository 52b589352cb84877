"""Command lines: a wrong one is refused in one line, before anything is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from dasd_megatron.errors import printable_lines


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and not all options besides."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        text = printable_lines(" ".join(message.split()))
        self.exit(2, f"dasd: error: {text} ({self.prog} --help lists the options)\n")


def port(text: str) -> int:
    """Return a TCP port, or 0 for any free one; raises ArgumentTypeError."""
    return at_least(0, 65535)(text)


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return what reads a whole number of at least ``least``; it raises ArgumentTypeError."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is no whole number {bounds}")
        return number

    return whole_number


def seconds(text: str) -> float:
    """Return a time above 0 and of at most a year; raises ArgumentTypeError."""
    return _read_number(text, 0.0, 366 * 86400.0, "number of seconds above 0, and at most a year")


def share(text: str) -> float:
    """Return a number between 0 and 1; raises ArgumentTypeError."""
    return _read_number(text, 0.0, math.nextafter(1.0, 0.0), "number between 0 and 1")


def _read_number(text: str, above: float, most: float, kind: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # The comparison is negated so that nan is refused.
    if not above < number <= most:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no {kind}")
    return number
