"""A graded rollout and its file format, which training writes and replay reads."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dasd_megatron.files import atomic_file, lines_of


class ReplayError(ValueError):
    """A saved batch of rollouts that cannot be trained on; the message names the file and line."""


@dataclass(slots=True)
class Sample:
    """A response, its prompt and its grade.

    Only tokens that the policy sampled are trained on and counted.
    """

    group: int
    """Place of the prompt in the batch of its step."""
    sample: int
    """Place of the response among those to its prompt."""
    position: int
    """Place of the prompt in the endless order of training problems; no two groups of a run share it."""
    problem_id: str
    problem: str
    expected_answer: str
    reference_solution: str
    prompt_ids: list[int]
    response_ids: list[int]
    rollout_log_probs: list[float]
    """Natural logs after temperature, one for each of ``response_ids``; 0.0 for tokens that were not sampled."""
    text: str
    """Text of the tokens that the policy sampled, which is graded. A tool's answer stands in ``response_ids`` alone."""
    finish_reason: str
    weight_versions: list[list[str | int]]
    """[version, number of tokens] of each stretch of tokens that came from the same weights, in order."""
    reward: float
    predicted_answer: str | None
    timed_out: bool
    response_mask: list[int] | None = None
    """One for each of ``response_ids``: 1 for a token that the policy sampled, 0 for context like a tool's answer.
    None: it sampled all."""

    @property
    def sampled(self) -> Sequence[int]:
        """Places in ``response_ids`` of the tokens that the policy sampled, in order."""
        if self.response_mask is None:
            return range(len(self.response_ids))
        return [place for place, sampled in enumerate(self.response_mask) if sampled]

    @property
    def weight_version(self) -> str:
        """The version of the weights behind the first token, which is the oldest."""
        return str(self.weight_versions[0][0])


def version_name(step: int) -> str:
    """Return the name of the weights after ``step`` training steps."""
    return f"step_{step:06d}"


def version_step(name: str) -> int:
    """Return the step of a :func:`version_name`; raise ValueError for other names."""
    if not re.fullmatch(r"step_\d{6,}", name):
        raise ValueError(f"{name!r} is not a weight version of a training run")
    return int(name.removeprefix("step_"))


def mask_fault(mask: list[int] | None, log_probs: Sequence[float]) -> str | None:
    """Return what is wrong with a response_mask beside a response's ``log_probs``, for an error message; None if
    nothing is."""
    if mask is None:
        return None
    if (
        not isinstance(mask, list)
        or len(mask) != len(log_probs)
        or any(value not in (0, 1) for value in mask)
        or 1 not in mask
    ):
        return "response_mask must be null, or have a 1 or 0 for each of response_ids and at least one 1"
    if any(log_prob != 0 for log_prob, sampled in zip(log_probs, mask, strict=True) if not sampled):
        return "rollout_log_probs must be 0.0 where response_mask is 0: the policy did not sample these tokens"
    return None


def response_fault(sample: Sample) -> str | None:
    """Return what keeps a sample made elsewhere from being trained on, for an error message; None if nothing does."""
    ids, log_probs = sample.response_ids, sample.rollout_log_probs
    if len(ids) != len(log_probs) or not ids:
        return "response_ids and rollout_log_probs must be of one length and not empty"
    if not all(map(math.isfinite, log_probs)):
        return "rollout_log_probs must be finite"
    return mask_fault(sample.response_mask, log_probs)


_FIELDS = [field.name for field in dataclasses.fields(Sample)]


def rollouts_path(folder: str | Path, step: int) -> Path:
    """Return the file of the rollouts of training step ``step`` (counted from 1)."""
    return Path(folder) / f"step_{step:06d}.jsonl"


def save_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write one JSON object per line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({name: getattr(sample, name) for name in _FIELDS}) + "\n")


def read_samples(path: Path) -> list[Sample]:
    """Read a file of :func:`save_samples`.

    Raises:
        ReplayError: names a broken line.
    """
    samples = []
    for number, line in enumerate(lines_of(path.read_bytes()), 1):
        try:
            record = json.loads(line)
            # Older files have no such field.
            record.setdefault("response_mask", None)
            sample = Sample(**{name: record[name] for name in _FIELDS})
            fault = response_fault(sample)
        # A ValueError is also the error of bytes that are not UTF-8 and of integers with thousands of digits.
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ReplayError(f"{path}:{number}: not a saved rollout ({type(error).__name__}: {error})") from error
        if fault is not None:
            raise ReplayError(f"{path}:{number}: {fault}")
        samples.append(sample)
    return samples


def load_samples(path: Path, *, groups: int, samples_per_group: int) -> list[Sample]:
    """Read the rollouts of a step that :func:`save_samples` wrote, in order of (group, sample).

    Raises:
        ReplayError: missing file, broken line, or not exactly ``samples_per_group`` rollouts of each of ``groups``
            prompts.
    """
    if not path.is_file():
        raise ReplayError(f"{path}: no such file; rollout.replay must hold one file for every step that is trained")
    samples = sorted(read_samples(path), key=lambda sample: (sample.group, sample.sample))
    expected = [(group, sample) for group in range(groups) for sample in range(samples_per_group)]
    if [(sample.group, sample.sample) for sample in samples] != expected:
        raise ReplayError(
            f"{path}: {len(samples)} rollouts are not {groups} groups of {samples_per_group}; "
            "set batch.groups and batch.samples_per_group as in the run that saved them"
        )
    return samples
