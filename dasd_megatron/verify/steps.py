"""Whether the steps that a response writes are right, for generated tasks whose steps can be checked."""

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
    """The sums after each term but the first, for a chain like ``4-1-7=``: 3, -4. Spaces do not count. None for other
    problems."""
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

    A line that is a number alone is a step, and so is each number behind ``=`` in other lines; lines with neither are
    none. The last line that begins with ``####`` is the answer, the step behind which nothing counts. The answer is
    compared with the last sum and the others with the sums at their places, so that a step which is left out makes
    those behind it wrong; in front of the answer it may stand once more as a step. Steps beyond the expected ones do
    not lower
    ``correct``, but the first of them is the first wrong step.
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
    if not all(right):
        first_wrong = right.index(False) + 1
        if len(steps) > len(places):
            first_wrong = min(first_wrong, len(places) + 1)
    else:
        first_wrong = len(places) + 1 if len(steps) > len(places) else None
    return StepCheck(sum(right), len(sums), first_wrong)


def _steps_of(line: str) -> list[str]:
    """The numbers that a line states, in their one spelling: text, since Python refuses to make an int of thousands of
    digits."""
    alone = _NUMBER_ALONE.fullmatch(line.removeprefix(_ANSWER).strip())
    return [_spelling(number) for number in ([alone[1]] if alone else _RESULT.findall(line))]


def _spelling(number: str) -> str:
    magnitude = number.lstrip("+-").lstrip("0") or "0"
    return f"-{magnitude}" if number.startswith("-") and magnitude != "0" else magnitude


StepChecker = Callable[[str, str], StepCheck | None]
"""Takes the problem's text and the response's; None where the problem's steps cannot be checked."""

STEP_CHECKERS: dict[str, StepChecker] = {"chain_sum": chain_sum_steps}
"""By the name of the generator (``data.train.generator``). A task with checkable steps registers its function here."""
