"""Reasoning health: uncertainty along a response, hedging, repetition, self-correction and diversity.

There are two stages. :func:`measure` makes a table of a few numbers for each response: a dict of arrays whose first
axis is the responses. :func:`health_metrics` and :func:`health_tables` reduce a table to results. Between them,
:func:`join` puts tables of several processes or files together. "Token" means a token that the policy sampled: tokens
under a response mask are left out. Entropies and log-probs are in nats, at the temperature that they were computed
with. All arithmetic is float64 on the CPU.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dasd_megatron.config import HealthConfig
from dasd_megatron.evaluation.phrases import Phrases, find_self_correction, possible_starts, words_of
from dasd_megatron.samples import Sample
from dasd_megatron.verify.answers import normalize_answer
from dasd_megatron.verify.steps import StepCheck, StepChecker

Array = NDArray[Any]
Table = dict[str, Array]
"""A column for each number, with a row for each response."""
CALIBRATION_BINS = 10
MEASURE = "measure/"
"""In a table and in the metrics, the beginning of the names of the user's own measures."""
_HAS_MEASURE = "has_measure/"

# So few responses are measured at once that their words and tokens stay in a processor's cache.
_CHUNK = 8


class Profile(NamedTuple):
    """Sums over tokens and numbers of tokens: ``[B, 10]`` by tenth of the response, ``[B, P]`` by bin of positions."""

    decile_sum: Array
    decile_count: Array
    position_sum: Array
    position_count: Array


def token_profile(values: ArrayLike, lengths: ArrayLike, edges: Sequence[int]) -> Profile:
    """Sum the values by their place along the responses.

    Token t (from 0) of a response of L tokens is in decile ``floor(10 t / L)``: of a response with fewer than ten
    tokens, some deciles are empty. It is also in the bin of positions ``[edges[i], edges[i + 1])`` that holds t, where
    the first bin begins at 0 and the last has no end.

    Args:
        values: [N] packed tokens of B responses.
        lengths: [B] int, of sum N.
        edges: ascending positions at which a new bin begins, all above 0; P = len(edges) + 1.
    """
    values, lengths = np.asarray(values, dtype=np.float64), np.asarray(lengths, dtype=np.int64)
    responses, bins = len(lengths), len(edges) + 1
    row = np.repeat(np.arange(responses), lengths)
    position = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    decile = row * 10 + position * 10 // np.repeat(lengths, lengths)
    part = row * bins + np.searchsorted(np.asarray(edges, dtype=np.int64), position, side="right")
    return Profile(
        np.bincount(decile, values, responses * 10).reshape(responses, 10),
        np.bincount(decile, minlength=responses * 10).reshape(responses, 10),
        np.bincount(part, values, responses * bins).reshape(responses, bins),
        np.bincount(part, minlength=responses * bins).reshape(responses, bins),
    )


class Repetition(NamedTuple):
    """Repetition within each response, [B] each."""

    share: Array
    """Share of repeated n-grams, 1 - distinct / all, float64; 0 with fewer than two n-grams."""
    longest_run: Array
    """The longest repeated run in tokens, int64: the most tokens in a row that repeated n-grams cover without a gap,
    each beginning one token after the one before; 0 without any. It is at least the length of the longest passage that
    stands earlier in the response."""


def repetition(tokens: ArrayLike, lengths: ArrayLike, n: int) -> Repetition:
    """Measure how much of each response has stood in it before.

    An n-gram is ``n`` neighbouring tokens. A response of L tokens has L - n + 1 of them. An n-gram is repeated if the
    same stands earlier in the response, overlapping or not. n-grams are compared by a hash of at least 40 bits.

    Args:
        tokens: [N] packed int.
        lengths: [B], of sum N.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    code = _scramble(np.asarray(tokens))
    count = max(len(code) - n + 1, 0)
    grams = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + code[offset : offset + count]
    share, run = np.zeros(len(lengths)), np.zeros(len(lengths), dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    for index, (start, own) in enumerate(zip(starts.tolist(), (lengths - n + 1).tolist(), strict=True)):
        if own < 2:
            continue
        # The low bits have the place: a sort then groups equal n-grams with their earliest place in front.
        low = np.uint64((1 << own.bit_length()) - 1)
        keys = (grams[start : start + own] & ~low) | np.arange(own, dtype=np.uint64)
        keys.sort()
        repeated = np.zeros(own, dtype=bool)
        repeated[(keys[1:] & low)[(keys[1:] ^ keys[:-1]) <= low].astype(np.int64)] = True
        share[index] = np.count_nonzero(repeated) / own
        fresh = np.flatnonzero(~repeated)
        longest = max(int((fresh[1:] - fresh[:-1]).max(initial=0)), own - int(fresh[-1])) - 1
        run[index] = longest + n - 1 if longest else 0
    return Repetition(share, run)


def _scramble(tokens: Array) -> Array:
    """Return token ids as well mixed 64-bit numbers (splitmix64's finaliser)."""
    code = tokens.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    code = (code ^ (code >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return code ^ (code >> np.uint64(31))


def distinct_per_group(group: ArrayLike, value: ArrayLike, counts: ArrayLike | None = None) -> float:
    """Return the mean over groups of the number of different values among a group's members. Members where ``counts``
    is false have no value. [B] each."""
    keys, values = np.asarray(group), np.asarray(value)
    groups = len(np.unique(keys))
    if counts is not None:
        keys, values = keys[np.asarray(counts)], values[np.asarray(counts)]
    order = np.lexsort((values, keys))
    keys, values = keys[order], values[order]
    changes = (keys[1:] != keys[:-1]) | (values[1:] != values[:-1])
    return (int(np.count_nonzero(changes)) + min(len(keys), 1)) / groups


def auroc(score: ArrayLike, positive: ArrayLike) -> float | None:
    """Return the chance that a positive's score is above a negative's, ties counting half (Mann-Whitney U / pairs).
    None without both. [B] each."""
    score, positive = np.asarray(score, dtype=np.float64), np.asarray(positive, dtype=bool)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    # Ranks count from 1, and equal scores share the mean of their ranks.
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((rank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


class Calibration(NamedTuple):
    """Responses by bin of confidence, [bins] each."""

    responses: Array
    """Their number."""
    confidence: Array
    """Their mean confidence, NaN where there are none."""
    accuracy: Array
    """The share of them that is right, NaN where there are none."""
    error: float
    """Expected calibration error: sum over bins of responses / all * |accuracy - confidence|."""


def calibration(confidence: ArrayLike, right: ArrayLike, bins: int = CALIBRATION_BINS) -> Calibration:
    """Compare confidence with correctness in ``bins`` bins of equal width: ``[i / bins, (i + 1) / bins)``, the last
    with its end. [B] each; values in [0, 1]."""
    confidence, right = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean, accuracy = np.bincount(place, confidence, bins) / count, np.bincount(place, right, bins) / count
    error = float(np.abs(np.bincount(place, right - confidence, bins)).sum() / len(confidence))
    return Calibration(count, mean, accuracy, error)


def measure(
    samples: Sequence[Sample],
    settings: HealthConfig,
    *,
    entropy: ArrayLike | None = None,
    log_prob: ArrayLike | None = None,
    checker: StepChecker | None = None,
) -> Table:
    """Make the table of B responses.

    Args:
        entropy: [N] packed entropies of the distributions that the tokens were drawn from. None: they are not known, as
            of a server's rollouts.
        log_prob: [N] packed log-probs of the tokens. None: the samples' ``rollout_log_probs``.
        checker: checks the steps of the task (:data:`~dasd_megatron.verify.steps.STEP_CHECKERS`). None: its steps
            cannot be checked.
    """
    entropies = None if entropy is None else np.asarray(entropy, dtype=np.float64)
    log_probs = None if log_prob is None else np.asarray(log_prob, dtype=np.float64)
    bounds = np.cumsum([0, *(len(sample.sampled) for sample in samples)]).tolist()
    epistemic, corrections = Phrases(settings.epistemic_words), Phrases(settings.correction_phrases)
    parts = []
    for first in range(0, len(samples), _CHUNK):
        chosen = samples[first : first + _CHUNK]
        tokens = slice(bounds[first], bounds[first + len(chosen)])
        parts.append(
            _measure_chunk(
                chosen,
                settings,
                None if entropies is None else entropies[tokens],
                _log_probs(chosen) if log_probs is None else log_probs[tokens],
                checker,
                epistemic,
                corrections,
            )
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} | _own_measures(samples)


def _own_measures(samples: Sequence[Sample]) -> Table:
    """Return two columns for each measure of the user's own: its value, and whether the response has one."""
    columns: Table = {}
    for name in sorted({name for sample in samples for name in sample.measures or {}}):
        found = [(sample.measures or {}).get(name) for sample in samples]
        columns[MEASURE + name] = np.array([0.0 if value is None else value for value in found])
        columns[_HAS_MEASURE + name] = np.array([value is not None for value in found])
    return columns


def _log_probs(samples: Sequence[Sample]) -> Array:
    """Return the log-probs of the sampled tokens, one response after the other."""
    return np.concatenate([sample.of_sampled(sample.rollout_log_probs) for sample in samples], dtype=np.float64)


def _measure_chunk(
    samples: Sequence[Sample],
    settings: HealthConfig,
    entropy: Array | None,
    log_prob: Array,
    checker: StepChecker | None,
    epistemic: Phrases,
    corrections: Phrases,
) -> Table:
    lengths = np.array([len(sample.sampled) for sample in samples], dtype=np.int64)
    row = np.repeat(np.arange(len(samples)), lengths)
    words = [words_of(sample.text) for sample in samples]
    places = [possible_starts(own, epistemic, corrections) for own in words]
    corrected = [
        find_self_correction(sample.text, corrections.find(own, some))
        for sample, own, some in zip(samples, words, places, strict=True)
    ]
    tokens = np.concatenate([sample.of_sampled(sample.response_ids) for sample in samples])
    repeated = repetition(tokens, lengths, settings.repetition_ngram)
    uncertainty = -log_prob if entropy is None else entropy
    table = {
        "group": np.array([sample.group for sample in samples], dtype=np.int64),
        "sample": np.array([sample.sample for sample in samples], dtype=np.int64),
        "length": lengths,
        "right": np.array([sample.reward > 0 for sample in samples], dtype=bool),
        "answered": np.array([sample.predicted_answer is not None for sample in samples], dtype=bool),
        "answer": np.array(
            [_digest(normalize_answer(sample.predicted_answer or "")) for sample in samples], dtype=np.int64
        ),
        "path": np.array([_digest(_without_spaces(sample.text.lower())) for sample in samples], dtype=np.int64),
        "epistemic": np.array(
            [len(epistemic.find(own, some)) for own, some in zip(words, places, strict=True)], dtype=np.int64
        ),
        "correction_phrase": np.array([correction.has_phrase for correction in corrected], dtype=bool),
        "corrected": np.array([correction.changes_result for correction in corrected], dtype=bool),
        "repetition": repeated.share,
        "repeated_run": repeated.longest_run,
        "nll": np.bincount(row, -log_prob, len(samples)) / np.maximum(lengths, 1),
        "uncertainty": np.bincount(row, uncertainty, len(samples)) / np.maximum(lengths, 1),
        "has_entropy": np.full(len(samples), entropy is not None),
        **token_profile(uncertainty, lengths, settings.position_bins)._asdict(),
    }
    if checker is not None:
        # Steps that cannot be checked stand as 0 expected ones.
        checks = [checker(sample.problem, sample.text) or StepCheck(0, 0, None) for sample in samples]
        table["steps_correct"] = np.array([check.correct for check in checks], dtype=np.int64)
        table["steps_expected"] = np.array([check.expected for check in checks], dtype=np.int64)
        table["first_wrong"] = np.array([check.first_wrong or 0 for check in checks], dtype=np.int64)
    return table


def _without_spaces(text: str) -> str:
    return text.replace(" ", "").replace("\n", "").replace("\t", "")


def _digest(text: str) -> int:
    # Python's own hash differs from process to process. JSON and int64 both hold 63 bits.
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1


def join(tables: Sequence[Table]) -> Table:
    """Return one table of all responses, in the order of (group, sample), so that sums do not depend on how the
    responses were spread."""
    # A measure that no response of a table has is not in it.
    names = dict.fromkeys(name for table in tables for name in table)
    joined = {
        name: np.concatenate([table.get(name, np.zeros(len(table["group"]))) for table in tables]) for name in names
    }
    order = np.lexsort((joined["sample"], joined["group"]))
    return {name: column[order] for name, column in joined.items()}


def to_rows(table: Table) -> list[dict[str, Any]]:
    """Return a table as JSON objects, one for each response, for files that grow response by response."""
    columns = {name: column.tolist() for name, column in table.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def from_rows(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table behind :func:`to_rows`' objects."""
    # A measure that no response of a request had is not in its rows.
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, 0) for row in rows]) for name in names}


def health_metrics(table: Table, settings: HealthConfig) -> dict[str, float]:
    """Return results of a table by the names of ``metrics.jsonl``; docs/health.md has their formulas.

    A result without anything to compute it from is left out. The profile and the AUROC are of entropies
    (``health/entropy_...``) where the table has them. Else they are of negative log-probs of the sampled tokens
    (``health/nll_...``), whose mean is the entropy's in expectation.
    """
    tokens = int(table["length"].sum())
    kind = "entropy" if table["has_entropy"].all() else "nll"
    deciles = _means(table["decile_sum"], table["decile_count"])
    metrics: dict[str, float] = {
        f"health/{kind}_decile_{place}": value for place, value in enumerate(deciles, start=1) if value is not None
    }
    positions = _means(table["position_sum"], table["position_count"])
    starts = [0, *settings.position_bins]
    metrics |= {
        f"health/{kind}_from_{start}": value
        for start, value in zip(starts, positions, strict=True)
        if value is not None
    }
    low, middle, high = np.quantile(table["length"], [0.1, 0.5, 0.9]).tolist()
    metrics |= {
        "health/length_p10": low,
        "health/length_p50": middle,
        "health/length_p90": high,
        "health/epistemic_per_100": 100 * int(table["epistemic"].sum()) / tokens,
        "health/repetition": float(table["repetition"].mean()),
        "health/repeated_run_mean": float(table["repeated_run"].mean()),
        "health/repeated_run_max": int(table["repeated_run"].max()),
        "health/correction_phrase_share": float(table["correction_phrase"].mean()),
        "health/self_correction_share": float(table["corrected"].mean()),
        "health/distinct_answers": distinct_per_group(table["group"], table["answer"], table["answered"]),
        "health/distinct_paths": distinct_per_group(table["group"], table["path"]),
        "health/distinct_correct_paths": distinct_per_group(table["group"], table["path"], table["right"]),
        "health/calibration_error": calibration(np.exp(-table["nll"]), table["right"]).error,
    }
    area = auroc(table["uncertainty"], ~table["right"])
    if area is not None:
        metrics["health/entropy_auroc" if kind == "entropy" else "health/nll_auroc"] = area
    if "steps_correct" in table and (checked := table["steps_expected"] > 0).any():
        metrics["health/step_accuracy"] = float(
            (table["steps_correct"][checked] / table["steps_expected"][checked]).mean()
        )
        wrong = table["first_wrong"][table["first_wrong"] > 0]
        if len(wrong):
            metrics["health/first_wrong_step"] = float(wrong.mean())
    for name in sorted(name for name in table if name.startswith(MEASURE)):
        has = table[_HAS_MEASURE + name.removeprefix(MEASURE)].astype(bool)
        metrics[name] = float(table[name][has].mean())
    return metrics


def health_tables(table: Table) -> dict[str, list[dict[str, float | int | None]]]:
    """Return the results that are tables, as JSON: ``calibration``, the bins of exp(-mean NLL) with the share that is
    right in each."""
    found = calibration(np.exp(-table["nll"]), table["right"])
    rows = itertools.zip_longest(found.responses.tolist(), found.confidence.tolist(), found.accuracy.tolist())
    return {
        "calibration": [
            {
                "from": place / CALIBRATION_BINS,
                "to": (place + 1) / CALIBRATION_BINS,
                "responses": count,
                "confidence": confidence if count else None,
                "accuracy": accuracy if count else None,
            }
            for place, (count, confidence, accuracy) in enumerate(rows)
        ]
    }


def _means(sums: Array, counts: Array) -> list[float | None]:
    """Return the mean over the tokens of all responses, by column; None where there are no tokens."""
    return [
        total / count if count else None
        for total, count in zip(sums.sum(0).tolist(), counts.sum(0).tolist(), strict=True)
    ]
