"""Checks of the steps that a response writes, for generated tasks whose steps can be checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

_MINUS_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"})
_CHAIN = re.compile(r"(-?[0-9]+)((?:[+-]-?[0-9]+)*)=?")
_TERM = re.compile(r"([+-])(-?[0-9]+)")
_NUMBER_ALONE = re.compile(r"([-+]?[0-9]+)\.?")
_RESULT = re.compile(r"=[ \t]*(-?[0-9]+)")
_ANSWER = "####"


class StepCheck(NamedTuple):
    """The steps of one response."""

    correct: int
    expected: int
    """Steps of the worked solution, the answer included; at least 1."""
    first_wrong: int | None
    """Place of the first step that is wrong, missing or one too many, counted from 1; None: all are right."""


def running_sums(problem: str) -> list[int] | None:
    """Return the sums after each term but the first, for a chain like ``4-1-7=``: 3, -4. None for other problems.

    Spaces do not count.
    """
    chain = _CHAIN.fullmatch("".join(problem.split()))
    if chain is None:
        return None
    first, rest = chain.groups()
    sums = [int(first)]
    for operator, term in _TERM.findall(rest):
        sums.append(sums[-1] + int(term) if operator == "+" else sums[-1] - int(term))
    return sums[1:] or sums


def chain_sum_steps(problem: str, response: str) -> StepCheck | None:
    """Check each running sum of a ``chain_sum`` problem; None for other problems, which replayed rollouts may have.

    A line that is a number alone is a step, and so is each number behind ``=`` in other lines. The last line that
    begins with ``####`` is the answer, and nothing behind it counts.

    The answer is compared with the last sum, and the other steps with the sums at their places. So a step that is left
    out makes the steps behind it wrong. The last sum may stand once more as a step in front of the answer. Steps beyond
    the expected ones do not lower ``correct``, but the first of them is the first wrong step.
    """
    sums = running_sums(problem)
    if sums is None:
        return None
    lines = [line.strip() for line in response.translate(_MINUS_SIGNS).splitlines()]
    end = max((place for place, line in enumerate(lines) if line.startswith(_ANSWER)), default=None)
    steps = [step for line in lines[:end] for step in _steps_of(line)]
    places = sums
    right = []
    if end is not None:
        places = sums[:-1]
        right = [str(sums[-1]) in _steps_of(lines[end])[-1:]]
        if len(steps) == len(sums) and steps[-1] == str(sums[-1]):
            steps.pop()
    at_place = [step == str(value) for step, value in zip(steps, places, strict=False)]
    right = at_place + [False] * (len(places) - len(at_place)) + right
    wrong = [right.index(False) + 1] if not all(right) else []
    if len(steps) > len(places):
        wrong.append(len(places) + 1)
    return StepCheck(sum(right), len(sums), min(wrong, default=None))


def _steps_of(line: str) -> list[str]:
    """Return the numbers that a line states, in their one spelling.

    They are text, because Python refuses to make an int of thousands of digits.
    """
    alone = _NUMBER_ALONE.fullmatch(line.removeprefix(_ANSWER).strip())
    return [_spelling(number) for number in ([alone[1]] if alone else _RESULT.findall(line))]


def _spelling(number: str) -> str:
    magnitude = number.lstrip("+-").lstrip("0") or "0"
    return f"-{magnitude}" if number.startswith("-") and magnitude != "0" else magnitude


StepChecker = Callable[[str, str], StepCheck | None]
"""Function of the problem's text and the response's. It returns None where the problem's steps cannot be checked."""

STEP_CHECKERS: dict[str, StepChecker] = {"chain_sum": chain_sum_steps}
"""Checkers by the name of the generator (``data.train.generator``). A task with checkable steps registers its function
here."""
