"""Avg@k, Pass@k and Maj@k over the outcomes of repeated samples, by NeMo-Skills' formulas, and their confidence
intervals.

All sums are of exact fractions and rounded once, so that a number depends on the counts alone, to the last bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray


def pass_at_k(outcomes: Sequence[Sequence[bool]], k: int) -> float:
    """Return the chance that at least one of ``k`` samples of a problem is correct, averaged over problems.

    Per problem with ``c`` of ``n`` samples correct this is the unbiased estimator 1 - C(n-c, k) / C(n, k) (Chen et al.,
    arXiv:2107.03374).

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
    return mean([_pass(row, k) for row in outcomes])


def avg_at_k(outcomes: Sequence[Sequence[bool]]) -> float:
    """Return the share of correct samples, averaged over problems; with k samples of each problem this is Avg@k.

    Args:
        outcomes: as for :func:`pass_at_k`.

    Raises:
        ValueError: as for :func:`pass_at_k`.
    """
    _check_outcomes(outcomes)
    return mean([_average(row) for row in outcomes])


def maj_at_k(answers: Sequence[Sequence[str | None]], outcomes: Sequence[Sequence[bool]], k: int) -> float:
    """Return the share of problems whose majority answer among the first ``k`` samples is correct.

    It counts as NeMo-Skills 0.7 does. Samples without an answer (None) do not vote, and a problem where nobody votes is
    wrong. Votes are for pairs of answer and outcome, and answers are compared as strings. Among tied pairs, a problem
    counts with the share of right ones.

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
    return mean([_majority(row, correct, k) for row, correct in zip(answers, outcomes, strict=True)])


def problem_scores(
    answers: Sequence[Sequence[str | None]], outcomes: Sequence[Sequence[bool]], ks: Sequence[int]
) -> dict[str, list[Fraction]]:
    """Return by metric the score of each problem: ``avg@n``, and ``pass@k`` and ``maj@k`` of all ``ks``.

    Every problem has n samples. The :func:`mean` of the scores is the metric.

    Raises:
        ValueError: as for :func:`maj_at_k`, or problems with different numbers of samples.
    """
    # It refuses outcomes and answers that are not sound.
    maj_at_k(answers, outcomes, min(ks))
    for k in ks:
        _check_k(outcomes, k)
    n = len(outcomes[0])
    if any(len(row) != n for row in outcomes):
        raise ValueError("problems have different numbers of samples; take as many of each")
    scores = {f"avg@{n}": [_average(row) for row in outcomes]}
    scores |= {f"pass@{k}": [_pass(row, k) for row in outcomes] for k in ks}
    scores |= {
        f"maj@{k}": [_majority(row, correct, k) for row, correct in zip(answers, outcomes, strict=True)] for k in ks
    }
    return scores


def bootstrap(
    scores: Sequence[Sequence[float | Fraction]], resamples: int, seed: int | Sequence[int]
) -> NDArray[np.float64]:
    """Return means over problems that are drawn with replacement, as many as there are.

    Args:
        scores: [problems][metrics]; one drawing of problems serves all metrics.
        resamples: how many drawings.
        seed: seed of the drawings; equal seeds give equal results.

    Returns:
        [resamples, metrics] float64.
    """
    values = np.asarray(scores, dtype=np.float64)
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples)
    return counts @ values / len(values)


def interval(means: NDArray[np.float64], confidence: float) -> NDArray[np.float64]:
    """Return the ends of the central ``confidence`` of :func:`bootstrap`'s means: [2, metrics], lower and upper."""
    ends: NDArray[np.float64] = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return ends


def nemo_skills_metrics(
    answers: Sequence[Sequence[str | None]], outcomes: Sequence[Sequence[bool]], tokens: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return the entries that NeMo-Skills 0.7 writes about one benchmark to ``metrics.json``: shares in percent, by its
    names and in its order.

    Every problem has the same number n of samples. ``pass@k``, ``pass@1[avg-of-k]`` and ``majority@k`` are there for
    every k up to n.
    """
    n, problems = len(outcomes[0]), list(zip(answers, outcomes, strict=True))
    common = {"num_entries": len(outcomes)}
    mean_tokens = mean([Fraction(sum(row), len(row)) for row in tokens])
    if mean_tokens > 0:
        common["avg_tokens"] = int(mean_tokens)

    def entry(correct: Sequence[Fraction], no_answer: Sequence[Fraction]) -> dict[str, Any]:
        return {**common, "symbolic_correct": 100 * mean(correct), "no_answer": 100 * mean(no_answer)}

    missing = [[Fraction(answer is None) for answer in row] for row in answers]
    metrics = {}
    for k in range(1, n + 1):
        none_of_k = [Fraction(all(row[:k])) for row in missing]
        metrics[f"pass@{k}"] = entry([_pass(row, k) for row in outcomes], none_of_k)
        if k == 1:
            continue
        average = metrics[f"pass@1[avg-of-{k}]"] = entry(
            [_average(row[:k]) for row in outcomes], [_average(row[:k]) for row in missing]
        )
        for name, rows in {
            "reasoning_tokens": [[0] * n] * len(tokens),
            "answer_tokens": tokens,
            "symbolic_correct": outcomes,
        }.items():
            average[f"{name}_statistics"] = _spread(np.array(rows, dtype=np.float64)[:, :k])
        metrics[f"majority@{k}"] = entry([_majority(row, correct, k) for row, correct in problems], none_of_k)
    return metrics


def _spread(values: NDArray[np.float64]) -> dict[str, float]:
    """Return NeMo-Skills' statistics of [problems, samples]: between runs, of which each has one sample of every
    problem, and between a problem's samples."""
    between_runs = float(values.mean(axis=0).std(ddof=1))
    return {
        "avg": float(values.mean()),
        "std_dev_across_runs": between_runs,
        "avg_sample_std_dev": float(values.std(axis=1, ddof=1).mean()),
        "std_err_across_runs": between_runs / math.sqrt(values.shape[1]),
    }


def mean(values: Sequence[Fraction]) -> float:
    """Return the mean of exact fractions, rounded once."""
    return float(sum(values) / len(values))


def _average(row: Sequence[bool | Fraction]) -> Fraction:
    return Fraction(sum(map(int, row)), len(row))


def _pass(row: Sequence[bool], k: int) -> Fraction:
    wrong = len(row) - sum(map(bool, row))
    return 1 - Fraction(math.comb(wrong, k), math.comb(len(row), k))


def _majority(answers: Sequence[str | None], outcomes: Sequence[bool], k: int) -> Fraction:
    pairs = zip(answers[:k], outcomes[:k], strict=True)
    votes = Counter((answer, bool(correct)) for answer, correct in pairs if answer is not None)
    most = max(votes.values(), default=0)
    tied = [correct for (_, correct), count in votes.items() if count == most]
    return Fraction(sum(tied), len(tied)) if tied else Fraction(0)


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
