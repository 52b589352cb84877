"""A graded rollout and its file format, which training writes and replay reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasd_megatron.files import atomic_file
from dasd_megatron.reading import JsonLine, UnreadableError, is_unicode, iterate_json_lines

LOG_PROB_TOLERANCE = 1e-3
"""Rounding may put a certain token's log-prob a little above 0."""
LARGEST_REWARD = 1e15
"""Advantages square rewards and sum the squares in float32, whose largest value is 3e38."""
_LARGEST_INTEGER = 2**63 - 1
_LARGEST_FLOAT32 = 3.4028234663852886e38


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
    feedback: str | None = None
    """What the reward function has said of the response; None where it says nothing."""
    privileged_source: str | None = None
    """Source of ``teacher.privileged`` that the teacher's text is from; None for a sample without a teacher."""
    privileged: str = ""
    """The privileged text that the teacher was shown. Training takes it from the group anew, and not from a file."""
    teacher_prompt_ids: list[int] | None = None
    """Token ids of the teacher's prompt; None for a sample without a teacher. It is in no file: whoever reads samples
    for training assigns it anew (:class:`~dasd_megatron.data.teacher_prompts.TeacherPrompts`)."""
    measures: dict[str, float] | None = None
    """Named numbers of ``verify.measures``; None where it is not set."""

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

    def copy(self) -> Sample:
        """Return a copy that shares nothing that can be changed. Functions of the user's own are given one, so that
        what they change in it changes nothing of the run."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        copied: dict[str, Any] = {name: held.copy() for name, held in values.items() if isinstance(held, (list, dict))}
        copied["weight_versions"] = [span.copy() for span in self.weight_versions]
        return dataclasses.replace(self, **copied)


def sampling_seed(*parts: int | str) -> int:
    """Return a 31-bit number that depends on ``parts`` alone, so that what is drawn again is the same."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


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
        or any(type(value) is not int or value not in (0, 1) for value in mask)
        or 1 not in mask
    ):
        return "response_mask must be null, or have a 1 or 0 for each of response_ids and at least one 1"
    if any(log_prob != 0 for log_prob, sampled in zip(log_probs, mask, strict=True) if not sampled):
        return "rollout_log_probs must be 0.0 where response_mask is 0: the policy did not sample these tokens"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_INTEGER


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_unicode(value)


def _is_number(value: Any, lowest: float, highest: float) -> bool:
    return type(value) in (int, float) and lowest <= value <= highest


def _is_log_prob(value: Any) -> bool:
    return _is_number(value, -_LARGEST_FLOAT32, LOG_PROB_TOLERANCE)


def _is_measure(value: Any) -> bool:
    return _is_number(value, -LARGEST_REWARD, LARGEST_REWARD)


def _is_stretch(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_text(value[0]) and _is_count(value[1])


def _is_list_of(value: Any, is_element: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_element, value))


_COUNT = ("a whole number from 0 on", _is_count)
_TEXT = ("a text", _is_text)
_IDS = ("a list of token ids, at least one", lambda value: _is_list_of(value, _is_count))
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("group", "sample", "position"), _COUNT),
    **dict.fromkeys(("problem_id", "problem", "expected_answer", "reference_solution", "text", "finish_reason"), _TEXT),
    **dict.fromkeys(("prompt_ids", "response_ids"), _IDS),
    "rollout_log_probs": (
        f"a list of finite numbers up to 0 (within {LOG_PROB_TOLERANCE:g})",
        lambda value: _is_list_of(value, _is_log_prob),
    ),
    "weight_versions": (
        "a list of [version, number of tokens], at least one",
        lambda value: _is_list_of(value, _is_stretch),
    ),
    "reward": (
        f"a number from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}",
        lambda value: _is_number(value, -LARGEST_REWARD, LARGEST_REWARD),
    ),
    "predicted_answer": ("a text or null", lambda value: value is None or _is_text(value)),
    "timed_out": ("true or false", lambda value: isinstance(value, bool)),
    "response_mask": ("null or a list", lambda value: value is None or isinstance(value, list)),
    "feedback": ("a text or null", lambda value: value is None or _is_text(value)),
    "privileged_source": ("a text or null", lambda value: value is None or _is_text(value)),
    "privileged": _TEXT,
    "measures": (
        "null, or finite numbers by name",
        lambda value: value is None or (isinstance(value, dict) and all(map(_is_measure, value.values()))),
    ),
}
"""What a field of a saved rollout has to be, in words and as a test."""


def _record_fault(record: dict[str, Any], vocab_size: int | None) -> str | None:
    """Return what keeps a saved rollout from being trained on, beginning with the field; None if nothing does.

    ``vocab_size``: number of tokens of the model, where it is known.
    """
    for name, (kind, is_sound) in _KINDS.items():
        if name not in record:
            return f"not a saved rollout: {name} is missing"
        if not is_sound(record[name]):
            return f"{name} must be {kind}, and is {record[name]!r:.80}"
    ids, log_probs = record["response_ids"], record["rollout_log_probs"]
    if len(ids) != len(log_probs):
        return (
            f"rollout_log_probs has {len(log_probs)} entries and response_ids {len(ids)}; there must be one for each "
            "token"
        )
    tokens = sum(count for _, count in record["weight_versions"])
    if tokens > len(ids):
        return f"weight_versions has {tokens} tokens, and response_ids only {len(ids)}"
    for name in ("prompt_ids", "response_ids"):
        if vocab_size is not None and max(record[name]) >= vocab_size:
            return f"{name} has token {max(record[name])}, and the model has {vocab_size} (vocab_size in config.json)"
    return mask_fault(record["response_mask"], log_probs)


_FIELDS = [field.name for field in dataclasses.fields(Sample) if field.name != "teacher_prompt_ids"]
# Older files lack these.
_ADDED_LATER = {
    field.name: field.default
    for field in dataclasses.fields(Sample)
    if field.name in ("response_mask", "feedback", "privileged_source", "privileged", "measures")
}


def rollouts_path(folder: str | Path, step: int) -> Path:
    """Return the file of the rollouts of training step ``step`` (counted from 1)."""
    return Path(folder) / f"step_{step:06d}.jsonl"


def save_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write one JSON object per line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({name: getattr(sample, name) for name in _FIELDS}) + "\n")


def read_samples(path: Path, *, vocab_size: int | None = None) -> list[Sample]:
    """Read a file of :func:`save_samples`.

    ``vocab_size``: number of tokens of the model that is to be trained on them, where it is known.

    Raises:
        ReplayError: names a broken line, or one that cannot be trained on, with the field and its value.
    """
    samples = []
    try:
        for line in iterate_json_lines(path, advice="give rollouts that a run has saved"):
            samples.append(_sample_of(line, f"{path}:{line.number}", vocab_size))
    except UnreadableError as error:
        raise ReplayError(str(error)) from error
    return samples


def _sample_of(line: JsonLine, where: str, vocab_size: int | None) -> Sample:
    if line.problem is not None:
        raise ReplayError(f"{where}: not a saved rollout ({line.problem})")
    record = {**_ADDED_LATER, **line.row}
    fault = _record_fault(record, vocab_size)
    if fault is not None:
        raise ReplayError(f"{where}: {fault}")
    return Sample(**{name: record[name] for name in _FIELDS})


def load_samples(path: Path, *, groups: int, samples_per_group: int, vocab_size: int | None = None) -> list[Sample]:
    """Read the rollouts of a step that :func:`save_samples` wrote, in order of (group, sample).

    Raises:
        ReplayError: missing file, broken or unsound line, not exactly ``samples_per_group`` rollouts of each of
            ``groups`` prompts, or a group of several prompts.
    """
    if not path.is_file():
        raise ReplayError(f"{path}: no such file; rollout.replay must hold one file for every step that is trained")
    samples = sorted(read_samples(path, vocab_size=vocab_size), key=lambda sample: (sample.group, sample.sample))
    expected = [(group, sample) for group in range(groups) for sample in range(samples_per_group)]
    if [(sample.group, sample.sample) for sample in samples] != expected:
        raise ReplayError(
            f"{path}: {len(samples)} rollouts are not {groups} groups of {samples_per_group}; "
            "set batch.groups and batch.samples_per_group as in the run that saved them"
        )
    prompts: dict[int, int] = {}
    for sample in samples:
        first = samples[sample.group * samples_per_group]
        if (sample.position, sample.problem_id) != (first.position, first.problem_id):
            raise ReplayError(
                f"{path}: group {sample.group} has the problems {first.problem_id!r} (position {first.position}) and "
                f"{sample.problem_id!r} (position {sample.position}); a group is the responses to one prompt"
            )
        if prompts.setdefault(sample.position, sample.group) != sample.group:
            raise ReplayError(
                f"{path}: groups {prompts[sample.position]} and {sample.group} have the same position "
                f"{sample.position}; no two groups share one"
            )
    return samples
