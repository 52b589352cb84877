"""One graded rollout, and its file format: the record that training reads and replay reads again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class ReplayError(ValueError):
    """A saved batch of rollouts that cannot be trained on; the message names the file and line."""


@dataclass(slots=True)
class Sample:
    """A response with what made it. ``rollout_log_probs`` are natural logs, after temperature, one per token of ``response_ids``."""

    group: int
    sample: int
    problem_id: str
    problem: str
    expected_answer: str
    reference_solution: str
    prompt_ids: list[int]
    response_ids: list[int]
    rollout_log_probs: list[float]
    text: str
    finish_reason: str
    weight_version: str
    reward: float
    predicted_answer: str | None
    timed_out: bool


_FIELDS = [field.name for field in dataclasses.fields(Sample)]


def rollouts_path(folder: str | Path, step: int) -> Path:
    """File of the rollouts of training step ``step`` (counted from 1)."""
    return Path(folder) / f"step_{step:06d}.jsonl"


def save_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write one JSON object per line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(dataclasses.asdict(sample)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def load_samples(path: Path, *, groups: int, samples_per_group: int) -> list[Sample]:
    """Read a file of :func:`save_samples` in order of (group, sample).

    Raises:
        ReplayError: missing file, broken line, or not exactly ``samples_per_group`` rollouts of each of ``groups`` prompts.
    """
    if not path.is_file():
        raise ReplayError(f"{path}: no such file; rollout.replay must hold one file for every step that is trained")
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            samples.append(Sample(**{name: record[name] for name in _FIELDS}))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ReplayError(f"{path}:{number}: not a saved rollout ({type(error).__name__}: {error})") from error
        if len(samples[-1].response_ids) != len(samples[-1].rollout_log_probs) or not samples[-1].response_ids:
            raise ReplayError(f"{path}:{number}: response_ids and rollout_log_probs must be of one length and not empty")
    samples.sort(key=lambda sample: (sample.group, sample.sample))
    expected = [(group, sample) for group in range(groups) for sample in range(samples_per_group)]
    if [(sample.group, sample.sample) for sample in samples] != expected:
        raise ReplayError(
            f"{path}: {len(samples)} rollouts are not {groups} groups of {samples_per_group}; "
            "set batch.groups and batch.samples_per_group as in the run that saved them"
        )
    return samples
