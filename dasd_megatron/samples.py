"""A graded rollout and its file format, which training writes and replay reads.

What there is for each token is an array: ids are int32, log-probs float32 and masks bool, 9 bytes a token at most.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dasd_megatron.files import atomic_file
from dasd_megatron.reading import JsonLine, UnreadableError, is_unicode, iterate_json_lines

LOG_PROB_TOLERANCE = 1e-3
"""Rounding may put a certain token's log-prob a little above 0."""
LARGEST_REWARD = 1e15
"""Advantages square rewards and sum the squares in float32, whose largest value is 3e38."""
_LARGEST_INTEGER = 2**63 - 1
LARGEST_FLOAT32 = 3.4028234663852886e38

Scalar = TypeVar("Scalar", bound=np.generic)
Ids = NDArray[np.int32]
LogProbs = NDArray[np.float32]
Mask = NDArray[np.bool_]


class ReplayError(ValueError):
    """A saved batch of rollouts that cannot be trained on; the message names the file and line."""


def ids_array(values: Sequence[int] | NDArray[Any]) -> Ids:
    """Return token ids as int32 [tokens], without a copy where they are that already; raise ValueError for what is no
    list of whole numbers from 0 to 2^31 - 1."""
    array = np.asarray(values)
    if array.dtype != np.int32:
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise ValueError("token ids are a list of whole numbers")
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**31:
            raise ValueError("token ids lie between 0 and 2^31 - 1")
        array = array.astype(np.int32)
    return array


def log_probs_array(values: Sequence[float] | NDArray[Any]) -> LogProbs:
    """Return log-probs as float32 [tokens], without a copy where they are that already; raise ValueError for what is no
    list of numbers."""
    array = np.asarray(values)
    if array.dtype != np.float32:
        if array.ndim != 1 or (array.dtype.kind not in "iuf" and array.size):
            raise ValueError("log-probs are a list of numbers")
        # What float32 cannot hold becomes infinite, which the checks on log-probs refuse.
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    return array


def mask_array(values: Sequence[int] | NDArray[Any]) -> Mask:
    """Return a response_mask as bool [tokens], without a copy where it is that already; raise ValueError for what is no
    list of 1 and 0."""
    array = np.asarray(values)
    if array.dtype != np.bool_:
        if array.ndim != 1 or array.dtype.kind not in "iu" or not np.isin(array, (0, 1)).all():
            raise ValueError("a response_mask is a list of 1 and 0")
        array = array.astype(np.bool_)
    return array


def same_fields(one: Any, other: Any) -> bool:
    """Return whether two records of one dataclass, some of whose fields are arrays, have the same values."""
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray) or isinstance(theirs, np.ndarray):
            if mine is None or theirs is None or not np.array_equal(mine, theirs):
                return False
        elif mine != theirs:
            return False
    return True


@dataclass(slots=True, eq=False)
class Sample:
    """A response, its prompt and its grade.

    Only tokens that the policy sampled are trained on and counted. Ids, log-probs and masks are NumPy arrays; lists of
    numbers that a sample is made with become arrays. The samples of a group may share one array of the prompt.
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
    prompt_ids: Ids
    response_ids: Ids
    rollout_log_probs: LogProbs
    """Natural logs after temperature, one for each of ``response_ids``; 0.0 for tokens that were not sampled."""
    text: str
    """Text of the tokens that the policy sampled, which is graded. A tool's answer stands in ``response_ids`` alone."""
    finish_reason: str
    weight_versions: list[list[str | int]]
    """[version, number of tokens] of each stretch of tokens that came from the same weights, in order."""
    reward: float
    predicted_answer: str | None
    timed_out: bool
    response_mask: Mask | None = None
    """One for each of ``response_ids``: true for a token that the policy sampled, false for context like a tool's
    answer. None: it sampled all."""
    feedback: str | None = None
    """What the reward function has said of the response; None where it says nothing."""
    privileged_source: str | None = None
    """Source of ``teacher.privileged`` that the teacher's text is from; None for a sample without a teacher."""
    privileged: str = ""
    """The privileged text that the teacher was shown. Training takes it from the group anew, and not from a file."""
    teacher_prompt_ids: Ids | None = None
    """Token ids of the teacher's prompt; None for a sample without a teacher. It is in no file: whoever reads samples
    for training assigns it anew (:class:`~dasd_megatron.data.teacher_prompts.TeacherPrompts`)."""
    measures: dict[str, float] | None = None
    """Named numbers of ``verify.measures``; None where it is not set."""

    def __post_init__(self) -> None:
        self.prompt_ids, self.response_ids = ids_array(self.prompt_ids), ids_array(self.response_ids)
        self.rollout_log_probs = log_probs_array(self.rollout_log_probs)
        if self.response_mask is not None:
            self.response_mask = mask_array(self.response_mask)
        if self.teacher_prompt_ids is not None:
            self.teacher_prompt_ids = ids_array(self.teacher_prompt_ids)

    def __eq__(self, other: object) -> bool:
        return same_fields(self, other) if isinstance(other, Sample) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def sampled(self) -> Sequence[int] | NDArray[np.int64]:
        """Places in ``response_ids`` of the tokens that the policy sampled, in order."""
        if self.response_mask is None:
            return range(len(self.response_ids))
        return np.flatnonzero(self.response_mask)

    def of_sampled(self, values: NDArray[Scalar]) -> NDArray[Scalar]:
        """Return those of ``values``, one for each of ``response_ids``, that belong to tokens which the policy
        sampled."""
        return values if self.response_mask is None else values[self.response_mask]

    @property
    def weight_version(self) -> str:
        """The version of the weights behind the first token, which is the oldest."""
        return str(self.weight_versions[0][0])

    def copy(self) -> Sample:
        """Return a copy that shares nothing that can be changed. Functions of the user's own are given one, so that
        what they change in it changes nothing of the run."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        copied: dict[str, Any] = {name: held.copy() for name, held in values.items() if hasattr(held, "copy")}
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


def mask_fault(mask: Any, log_probs: NDArray[Any]) -> str | None:
    """Return what is wrong with a response_mask, a list or an array, beside a response's ``log_probs``, for an error
    message; None if nothing is."""
    if mask is None:
        return None
    is_list = isinstance(mask, list) and all(type(value) is int and value in (0, 1) for value in mask)
    is_array = isinstance(mask, np.ndarray) and mask.dtype == np.bool_ and mask.ndim == 1
    if not (is_list or is_array) or len(mask) != len(log_probs) or not any(mask):
        return "response_mask must be null, or have a 1 or 0 for each of response_ids and at least one 1"
    if log_probs[~np.asarray(mask, dtype=np.bool_)].any():
        return "rollout_log_probs must be 0.0 where response_mask is 0: the policy did not sample these tokens"
    return None


def log_probs_are_sound(log_probs: LogProbs) -> bool:
    """Return whether all are finite and at most 0, within :data:`LOG_PROB_TOLERANCE`."""
    # A comparison with NaN is false.
    return bool((log_probs >= -LARGEST_FLOAT32).all() and (log_probs <= np.float32(LOG_PROB_TOLERANCE)).all())


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_INTEGER


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_unicode(value)


def _is_number(value: Any, lowest: float, highest: float) -> bool:
    return type(value) in (int, float) and lowest <= value <= highest


def _is_log_prob(value: Any) -> bool:
    return _is_number(value, -LARGEST_FLOAT32, LOG_PROB_TOLERANCE)


def _is_measure(value: Any) -> bool:
    return _is_number(value, -LARGEST_REWARD, LARGEST_REWARD)


def _is_stretch(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_text(value[0]) and _is_count(value[1])


def _is_list_of(value: Any, is_element: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_element, value))


_COUNT = ("a whole number from 0 on", _is_count)
_TEXT = ("a text", _is_text)
_IDS = ("a list of token ids, at least one", lambda value: _is_list_of(value, _is_id))
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
    return mask_fault(record["response_mask"], np.asarray(log_probs))


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
            file.write(json.dumps(as_json(sample)) + "\n")


def as_json(sample: Sample) -> dict[str, Any]:
    """Return a sample as JSON has it, without the teacher's prompt: arrays are lists, and a mask has 1 and 0."""
    record = {name: getattr(sample, name) for name in _FIELDS}
    record = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in record.items()}
    if sample.response_mask is not None:
        record["response_mask"] = sample.response_mask.astype(int).tolist()
    return record


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
