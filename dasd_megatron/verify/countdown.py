"""The reward of ``countdown`` problems: any chain of sums of all the numbers that gives the target is right."""

from __future__ import annotations

import re

from dasd_megatron.samples import Sample

_PROBLEM = re.compile(r"(\d+(?: \d+)+) = (\d+)")
_CHAIN = re.compile(r"\d{1,9}(?: ?[+-] ?\d{1,9})*")


def uses_all_numbers(sample: Sample) -> float:
    """Return 1.0 for a right answer to a countdown problem, else 0.0.

    The last line that begins with ``####`` has to be a chain of sums that uses each number of the problem once and
    gives the target. Named by ``verify.reward=dasd_megatron.verify.countdown:uses_all_numbers``.
    """
    problem = _PROBLEM.fullmatch(sample.problem.strip())
    if problem is None:
        raise ValueError(f"{sample.problem!r} is not a countdown problem like '4 1 7 = 2'")
    answers = [line.removeprefix("####").strip() for line in sample.text.splitlines() if line.startswith("####")]
    if not answers or _CHAIN.fullmatch(answers[-1]) is None:
        return 0.0
    terms = [int(term) for term in re.findall(r"[+-]?\d+", answers[-1].replace(" ", ""))]
    numbers = sorted(map(int, problem.group(1).split()))
    return float(sorted(map(abs, terms)) == numbers and sum(terms) == int(problem.group(2)))
