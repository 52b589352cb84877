"""A graded rollout, and what it has to be to be trained on.

What there is for each token is an array: ids are int32, log-probs float32 and masks bool, 9 bytes a token at most.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

LOG_PROB_TOLERANCE = 1e-3
"""Rounding may put a certain token's log-prob a little above 0."""
LARGEST_REWARD = 1e15
"""Advantages square rewards and sum the squares in float32, whose largest value is 3e38."""
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


def sample_fault(sample: Sample, vocab_size: int | None) -> str | None:
    """Return what keeps a saved sample from being trained on, beginning with the field; None if nothing does.

    ``vocab_size``: number of tokens of the model, where it is known.
    """
    for name in ("group", "sample", "position"):
        if getattr(sample, name) < 0:
            return f"{name} must be a whole number from 0 on, and is {getattr(sample, name)}"
    for name in ("prompt_ids", "response_ids"):
        ids = getattr(sample, name)
        if not len(ids) or ids.min() < 0:
            return f"{name} must be a list of token ids, at least one, and is {ids.tolist()!r:.80}"
        if vocab_size is not None and ids.max() >= vocab_size:
            return f"{name} has token {ids.max()}, and the model has {vocab_size} (vocab_size in config.json)"
    log_probs, count = sample.rollout_log_probs, len(sample.response_ids)
    if len(log_probs) != count:
        return (
            f"rollout_log_probs has {len(log_probs)} entries and response_ids {count}; there must be one for each token"
        )
    if not log_probs_are_sound(log_probs):
        wrong = float(log_probs[~((log_probs >= -LARGEST_FLOAT32) & (log_probs <= LOG_PROB_TOLERANCE))][0])
        return f"rollout_log_probs must be finite numbers up to 0 (within {LOG_PROB_TOLERANCE:g}), and one is {wrong:g}"
    spans = [int(tokens) for _, tokens in sample.weight_versions]
    if not spans or min(spans) < 0:
        return f"weight_versions must be a list of [version, number of tokens], and is {sample.weight_versions!r:.80}"
    if sum(spans) > count:
        return f"weight_versions has {sum(spans)} tokens, and response_ids only {count}"
    if not abs(sample.reward) <= LARGEST_REWARD:
        return f"reward must be a number from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}, and is {sample.reward}"
    if not all(abs(value) <= LARGEST_REWARD for value in (sample.measures or {}).values()):
        return f"measures must be null, or finite numbers by name, and is {sample.measures!r:.80}"
    return mask_fault(sample.response_mask, log_probs)
