"""Avg@k, Pass@k and Maj@k over the outcomes of repeated samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def pass_at_k(outcomes: Sequence[Sequence[bool]], k: int) -> float:
    """Chance that at least one of ``k`` samples of a problem is correct, averaged over problems.

    Per problem with ``c`` of ``n`` samples correct this is the unbiased estimator 1 - C(n-c, k) / C(n, k) (Chen et al., arXiv:2107.03374).
    It is computed in integers and rounded once, so it is exact to the last bit at any n.

    Args:
        outcomes: one sequence of bools per problem, samples in order; problems may have different numbers of samples.
        k: samples allowed, at most the smallest number of samples.

    Returns:
        A value in [0, 1].

    Raises:
        ValueError: no problems, a problem without samples, an outcome that is not a bool, or k out of range.
    """
    _check_outcomes(outcomes)
    _check_k(outcomes, k)
    counts = Counter((len(row), sum(map(bool, row))) for row in outcomes)
    total = math.fsum(times * _pass_at_k_of_one(n, c, k) for (n, c), times in counts.items())
    return total / len(outcomes)


def avg_at_k(outcomes: Sequence[Sequence[bool]]) -> float:
    """Share of correct samples, averaged over problems; with k samples of each problem this is Avg@k.

    Args:
        outcomes: as for :func:`pass_at_k`.

    Raises:
        ValueError: as for :func:`pass_at_k`.
    """
    _check_outcomes(outcomes)
    return math.fsum(sum(map(bool, row)) / len(row) for row in outcomes) / len(outcomes)


def maj_at_k(answers: Sequence[Sequence[str | None]], outcomes: Sequence[Sequence[bool]], k: int) -> float:
    """Share of problems whose majority answer among the first ``k`` samples is correct.

    As NeMo-Skills counts: samples without an answer (None) do not vote, a problem where nobody votes is wrong, votes are for pairs of
    answer and outcome, answers are compared as strings, and a tie goes to the pair that sorts first (the smaller string; wrong before
    right), so that the result does not depend on the order of the samples.

    Args:
        answers: one sequence of extracted answers per problem, samples in order.
        outcomes: whether each of them is correct, of the same shape.
        k: samples that vote, at most the smallest number of samples.

    Returns:
        A value in [0, 1].

    Raises:
        ValueError: as for :func:`pass_at_k`, or answers and outcomes of different shapes.
    """
    _check_outcomes(outcomes)
    _check_k(outcomes, k)
    if [len(row) for row in answers] != [len(row) for row in outcomes]:
        raise ValueError("answers and outcomes differ in shape; give one answer (or None) for each outcome")
    return sum(_majority_is_correct(row[:k], correct[:k]) for row, correct in zip(answers, outcomes, strict=True)) / len(outcomes)


def _pass_at_k_of_one(n: int, c: int, k: int) -> float:
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def _majority_is_correct(answers: Sequence[str | None], outcomes: Sequence[bool]) -> bool:
    votes = Counter((answer, bool(correct)) for answer, correct in zip(answers, outcomes, strict=True) if answer is not None)
    if not votes:
        return False
    (_, correct), _ = min(votes.items(), key=lambda vote: (-vote[1], vote[0]))
    return correct


def _check_outcomes(outcomes: Sequence[Sequence[bool]]) -> None:
    if not len(outcomes):
        raise ValueError("outcomes is empty; give one sequence of bools per problem")
    for index, row in enumerate(outcomes):
        if not len(row):
            raise ValueError(f"problem {index} has no samples; leave it out or sample it")
        for outcome in row:
            if outcome not in (True, False):
                raise ValueError(f"problem {index} has the outcome {outcome!r}; outcomes are bools")


def _check_k(outcomes: Sequence[Sequence[bool]], k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; it must be an integer of at least 1")
    for index, row in enumerate(outcomes):
        if k > len(row):
            raise ValueError(f"k is {k}, but problem {index} has {len(row)} samples; sample more or lower k")
