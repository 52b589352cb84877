"""Rollouts as JSON, one object a line: as earlier versions saved them, as others may write them, and as people read
them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dasd_megatron.reading import JsonLine, UnreadableError, is_unicode, iterate_json_lines
from dasd_megatron.samples import (
    LARGEST_FLOAT32,
    LARGEST_REWARD,
    LOG_PROB_TOLERANCE,
    ReplayError,
    Sample,
    mask_fault,
)

_LARGEST_INTEGER = 2**63 - 1
ADVICE = "give rollouts that a run has saved"
"""Remedy for the user where a file cannot be read."""


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
"""Requirement on each field of a saved rollout, in words and as a test."""


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


def as_json(sample: Sample) -> dict[str, Any]:
    """Return a sample as JSON has it, without the teacher's prompt: arrays are lists, and a mask has 1 and 0."""
    record = {name: getattr(sample, name) for name in _FIELDS}
    record = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in record.items()}
    if sample.response_mask is not None:
        record["response_mask"] = sample.response_mask.astype(int).tolist()
    return record


def read_json_samples(path: Path, vocab_size: int | None) -> list[Sample]:
    """Read a file with one rollout a line.

    ``vocab_size``: number of tokens of the model that is to be trained on them, where it is known.

    Raises:
        ReplayError: names a broken line, or one that cannot be trained on, with the field and its value.
    """
    samples = []
    try:
        for line in iterate_json_lines(path, advice=ADVICE):
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
