"""The rollouts, groups and held-out samples that the page shows: chosen evenly, and cut to stated budgets."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dasd_megatron.observability.report.run_files import (
    Row,
    Run,
    file_size,
    read_list,
    read_objects,
    read_rollouts,
    saved_rollouts,
    saved_steps,
    shorten,
    to_number,
    to_text,
)

# Rollouts of long runs are terabytes. This bound keeps reading for the table of groups at some seconds.
ROLLOUT_BYTES = 200_000_000
INSPECT_BYTES = 100_000_000
GROUPS_KEPT = 30
SAMPLES_PER_GROUP = 4
SAMPLE_CHARS = 1500
PROBLEM_CHARS = 1500
ANSWER_CHARS = 200
SEEN_CHARS = 800
TOKENS_PER_ROLLOUT = 1500
LEAST_TOKENS = 30
HELDOUT_PROBLEMS = 6
HELDOUT_CHARS = 3000
END_CHARS = 100
TOKEN_CHARS = 200
MOST_REWARDS = 1000
"""Rewards of a group that the page has; its mean is of these."""
MOST_STEPS_READ = 2000
"""Saved steps that are opened in search of groups, and of rollouts with token statistics. Most hold some, and a hundred
fill the page."""


def halving_order(count: int) -> list[int]:
    """Return 0 ... count - 1 in an order of which any first part covers the range evenly: the first, the last, then
    always the middles of what lies between."""
    order, stretches = [0, count - 1][: min(count, 2)], [(0, count - 1)]
    while stretches:
        middles = [((low + high) // 2, low, high) for low, high in stretches if high - low > 1]
        order += [middle for middle, _, _ in middles]
        stretches = [part for middle, low, high in middles for part in ((low, middle), (middle, high))]
    return order


GroupKey = tuple[int, int]
"""(step, number of the group)."""


@dataclass
class Groups:
    """The groups of a run with the highest and the lowest mean reward. ``count`` is how many groups they were chosen
    from."""

    best: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    count: int
    steps_read: int
    steps_saved: int


def extreme_groups(run: Run, keep: int = GROUPS_KEPT, max_bytes: int = ROLLOUT_BYTES) -> Groups:
    """Choose the ``keep`` groups with the highest and with the lowest mean reward in the saved rollouts.

    Ties go to the later step, then to the smaller number. At most about ``max_bytes`` are read, in whole steps chosen
    evenly. Fewer than 2 * keep groups are split in two.
    """
    saved = saved_rollouts(run)
    steps = _steps_within(saved, max_bytes)
    means = _mean_rewards(run, {step: saved[step] for step in steps}, max_bytes)
    best = heapq.nsmallest(min(keep, (len(means) + 1) // 2), means, key=lambda key: (-means[key], -key[0], key[1]))
    worst = heapq.nsmallest(
        min(keep, len(means) // 2), set(means) - set(best), key=lambda key: (means[key], -key[0], key[1])
    )
    chosen: dict[GroupKey, _GroupRecord] = {}
    wanted = {*best, *worst}
    for step in sorted({step for step, _ in wanted}):
        for row in read_rollouts(run, saved[step], max_bytes):
            group = row.get("group")
            if isinstance(group, int) and (step, group) in wanted:
                chosen.setdefault((step, group), _GroupRecord.of_problem(step, row)).add(row)
    best_groups, worst_groups = ([asdict(chosen[key]) for key in keys] for keys in (best, worst))
    return Groups(best_groups, worst_groups, len(means), len(steps), len(saved))


def groups_rule(parts: Sequence[Groups]) -> str:
    """Say which groups are on the page and how many are not; empty where none is."""
    shown, count = sum(len(part.best) + len(part.worst) for part in parts), sum(part.count for part in parts)
    if not shown:
        return ""
    read, saved = sum(part.steps_read for part in parts), sum(part.steps_saved for part in parts)
    steps = f"{saved:,} saved steps" if read == saved else f"{read:,} evenly spaced of {saved:,} saved steps"
    left_out = f" {count - shown:,} groups between them are left out." if count > shown else ""
    each = " of each run" if len(parts) > 1 else ""
    return (
        f"Of {count:,} groups in {steps}, the {shown:,} with the highest or lowest mean reward{each}; among equals "
        f"the later step comes first.{left_out}"
    )


def _steps_within(saved: Mapping[int, Sequence[Path]], max_bytes: int) -> list[int]:
    """Return evenly spaced steps whose files have about ``max_bytes`` together, in ascending order; at least one step
    where there is any."""
    steps: list[int] = []
    numbers, left = list(saved), max_bytes
    for index in halving_order(len(saved)):
        step = numbers[index]
        size = sum(map(file_size, saved[step]))
        if steps and (size > left or len(steps) >= MOST_STEPS_READ):
            break
        steps.append(step)
        left -= size
    return sorted(steps)


def _mean_rewards(run: Run, files: Mapping[int, Sequence[Path]], max_bytes: int) -> dict[GroupKey, float]:
    """Return the mean of the finite rewards of each group in these steps, of which each is read up to ``max_bytes``."""
    rewards: dict[GroupKey, list[float]] = {}
    for step, paths in files.items():
        for row in read_rollouts(run, paths, max_bytes):
            reward, group = to_number(row.get("reward")), row.get("group")
            if reward is not None and math.isfinite(reward) and isinstance(group, int):
                rewards.setdefault((step, group), []).append(reward)
    return {key: sum(values) / len(values) for key, values in rewards.items()}


@dataclass
class _GroupRecord:
    """A group as the page's script reads it. Rollouts are added one by one, since all of them together may be large."""

    step: int
    group: int
    problem: str
    expected: str
    solution: str
    count: int = 0
    rewards: list[float | None] = field(default_factory=list)
    tokens: int = 0
    cut: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of_problem(cls, step: int, row: Mapping[str, Any]) -> _GroupRecord:
        """Make the record, still without rollouts, from what all rollouts of the group share."""
        return cls(
            step,
            row["group"],
            shorten(row.get("problem"), PROBLEM_CHARS),
            shorten(row.get("expected_answer"), PROBLEM_CHARS),
            shorten(row.get("reference_solution"), PROBLEM_CHARS),
        )

    def add(self, row: Mapping[str, Any]) -> None:
        """Add one rollout; the first few are kept as samples."""
        reward = to_number(row.get("reward"))
        if reward is not None and not math.isfinite(reward):
            reward = None
        self.count += 1
        if len(self.rewards) < MOST_REWARDS:
            self.rewards.append(reward)
        ids = row.get("response_ids")
        self.tokens += len(ids) if isinstance(ids, list | np.ndarray) else 0
        self.cut += row.get("finish_reason") == "length"
        if len(self.samples) < SAMPLES_PER_GROUP:
            self.samples.append(
                {
                    "text": shorten(row.get("text"), SAMPLE_CHARS),
                    "answer": shorten(row.get("predicted_answer"), ANSWER_CHARS),
                    "reward": reward,
                    "end": shorten(row.get("finish_reason"), END_CHARS),
                    **_teacher_saw(row),
                }
            )


def _teacher_saw(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the source of a rollout's privileged text and the text, which stands on the page already where it is the
    reference solution. A rollout without a teacher has neither, and so have those of old runs."""
    source, text = row.get("privileged_source"), row.get("privileged")
    if not source or text == row.get("reference_solution"):
        return {}
    return {"source": shorten(source, END_CHARS), "seen": shorten(text, SEEN_CHARS)}


@dataclass
class Rollouts:
    """Rollouts with the statistics of their tokens, as the page's script reads them. ``count`` is how many rollouts
    they were chosen from."""

    chosen: list[dict[str, Any]]
    count: int
    steps_read: int
    steps_saved: int


def token_rollouts(run: Run, budget: int) -> Rollouts:
    """Choose rollouts of ``inspect/`` with at most about ``budget`` tokens in all: the first, the last and then evenly
    spaced saved steps until it is used up.

    Of each rollout, the first :data:`TOKENS_PER_ROLLOUT` tokens are kept. One of few tokens counts as
    :data:`LEAST_TOKENS`.
    """
    saved = saved_steps(run, "inspect", ".json")
    chosen: dict[int, list[dict[str, Any]]] = {}
    numbers, count, left_out = list(saved), 0, 0
    for place, index in enumerate(halving_order(len(saved))):
        step = numbers[index]
        if budget <= 0 or place >= MOST_STEPS_READ:
            left_out += 1
            continue
        entries = read_list(run, saved[step], INSPECT_BYTES)
        count += len(entries)
        chosen[step] = _token_records(run, step, entries, budget)
        budget -= sum(map(_cost, chosen[step]))
    read = len(saved) - left_out
    # Most runs record as many rollouts at every step: the steps that were not read are estimated by those that were.
    per_step = count / read if read else 0.0
    files = saved_rollouts(run)
    details = {step: _sample_details(run, files.get(step, []), records) for step, records in chosen.items()}
    return Rollouts(
        [
            {name: value for name, value in record.items() if name not in ("id", "text")} | detail
            for step in sorted(chosen)
            for record, detail in zip(chosen[step], details[step], strict=True)
        ],
        round(count + per_step * left_out),
        read,
        len(saved),
    )


def rollouts_rule(parts: Sequence[Rollouts], budget: int) -> str:
    """Say which rollouts are on the page and how many are not; empty where none is. ``budget``: the tokens of all."""
    shown, count = sum(len(part.chosen) for part in parts), sum(part.count for part in parts)
    if not shown:
        return ""
    read, saved = sum(part.steps_read for part in parts), sum(part.steps_saved for part in parts)
    if shown == count:
        return f"All {shown:,} rollouts whose token statistics were saved."
    return (
        f"{shown:,} of about {count:,} rollouts whose token statistics were saved, from {read:,} of {saved:,} steps: "
        f"the first, the last, and evenly spaced ones between them until {budget:,} tokens are on the page, where a "
        f"rollout counts as {LEAST_TOKENS} at least. "
        f"About {count - shown:,} are left out."
    )


def _token_records(run: Run, step: int, entries: Sequence[Row], budget: int) -> list[dict[str, Any]]:
    """Return the records of a step's first rollouts, until ``budget`` tokens are used up."""
    records: list[dict[str, Any]] = []
    for place, entry in enumerate(entries, 1):
        try:
            record = _token_record(entry, min(TOKENS_PER_ROLLOUT, max(budget, 50)))
        except (KeyError, TypeError, ValueError) as error:
            run.note(f"inspect/step_{step:06d}.json, rollout {place} was left out: {error!r}")
            continue
        if budget <= 0:
            break
        budget -= _cost(record)
        records.append({"step": step, "place": place, **record})
    return records


def _cost(record: Mapping[str, Any]) -> int:
    """Return the tokens that a rollout counts as. Its problem and solution stand beside it however short it is."""
    return max(len(record["t"]), LEAST_TOKENS)


def _token_record(entry: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Return one rollout for the page: t tokens, h entropy, d gap, w omega, a advantage, p and q probabilities of
    student and teacher."""
    tokens = entry["tokens"]
    names = {"h": "entropy", "d": "delta", "w": "omega", "p": "student_log_prob", "q": "teacher_log_prob"}
    columns = {short: [to_number(value) for value in entry[name]] for short, name in names.items()}
    # Old runs have not recorded the advantages of tokens, only the verifier's part, which is the same for all.
    advantages = entry.get("token_advantage", [entry.get("advantage")] * len(tokens))
    columns["a"] = [to_number(value) for value in advantages]
    uneven = {short: len(values) for short, values in columns.items() if len(values) != len(tokens)}
    if uneven:
        raise ValueError(f"{len(tokens)} tokens, but {uneven}")
    for short in ("p", "q"):
        columns[short] = [None if value is None else math.exp(min(value, 0.0)) for value in columns[short]]
    return {
        "id": to_text(entry.get("problem_id")),
        "text": to_text(entry.get("text")),
        "problem": shorten(entry.get("problem"), PROBLEM_CHARS),
        **{name: _round(to_number(entry.get(name))) for name in ("reward", "advantage", "tau", "sigma")},
        "whole": "token_advantage" in entry,
        "length": len(tokens),
        "t": [shorten(token, TOKEN_CHARS) for token in tokens[:limit]],
        **{short: [_round(value) for value in values[:limit]] for short, values in columns.items()},
    }


def _round(value: float | None) -> float | str | None:
    """Round to three decimals, or to two digits below them; NaN and infinities, which JSON lacks, become strings."""
    if value is None:
        return None
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e9:
        return int(value)
    return round(value, 3) if abs(value) >= 1e-3 else float(f"{value:.1e}")


def _sample_details(run: Run, paths: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return, for each of a step's records, what the step's rollouts in ``paths`` say about the same sample."""
    wanted = {(record["id"], record["text"]) for record in records}
    found: dict[tuple[str, str], Row] = {}
    if sum(map(file_size, paths)) <= ROLLOUT_BYTES:
        for row in read_rollouts(run, paths):
            key = (to_text(row.get("problem_id")), to_text(row.get("text")))
            if key not in wanted:
                continue
            found[key] = row
            if len(found) == len(wanted):
                break
    rows = [found.get((record["id"], record["text"]), {}) for record in records]
    return [
        {
            "expected": shorten(row.get("expected_answer"), PROBLEM_CHARS),
            "answer": shorten(row.get("predicted_answer"), ANSWER_CHARS),
            "solution": shorten(row.get("reference_solution"), PROBLEM_CHARS),
            "end": shorten(row.get("finish_reason"), END_CHARS),
            **_teacher_saw(row),
        }
        for row in rows
    ]


def heldout_samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the first problems of the held-out set with their first generation and all outcomes: before and after of
    one run, else the last of each run."""
    problems = _HeldoutProblems()
    for run in runs:
        evaluations = [(label, row) for label in ("before", "after") if (row := run.evaluation(label))]
        for label, row in evaluations if len(runs) == 1 else evaluations[-1:]:
            path = run.samples_path(row)
            name = label.capitalize() if len(runs) == 1 else f"{run.label}, {label}"
            for sample in read_objects(run, path):
                problems.add(name, sample, HELDOUT_CHARS // len(runs))
    return list(problems.by_key.values())


@dataclass
class _HeldoutProblems:
    """The first held-out problems, as the page's script reads them, by identifier and text."""

    by_key: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, side_name: str, sample: Row, chars: int) -> None:
        """Add one sample to its problem's record, unless there are enough problems already."""
        # Runs on other data may use the same ids, so the text of the problem is part of the key.
        key = f"{to_text(sample.get('problem_id'))} {to_text(sample.get('problem'))}"
        if key not in self.by_key and len(self.by_key) >= HELDOUT_PROBLEMS:
            return
        problem = self.by_key.setdefault(
            key,
            {
                "problem": shorten(sample.get("problem"), HELDOUT_CHARS),
                "expected": shorten(sample.get("expected_answer"), PROBLEM_CHARS),
                "sides": {},
            },
        )
        correct = bool(sample.get("symbolic_correct"))
        side = problem["sides"].setdefault(
            side_name,
            {
                "text": shorten(sample.get("generation"), chars),
                "predicted": shorten(sample.get("predicted_answer"), ANSWER_CHARS),
                "accepted": correct,
                "finish": shorten(sample.get("finish_reason"), END_CHARS),
                "correct": 0,
                "of": 0,
            },
        )
        side["of"] += 1
        side["correct"] += correct
