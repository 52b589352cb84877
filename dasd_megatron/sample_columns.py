"""Samples as columns of numbers, which files hold and ranks send to one another.

What there is for each token stands in flat arrays, one response behind the other. All texts stand in one table of UTF-8
bytes, each once, and samples have their numbers in it. So a prompt, a problem or a reference solution that the samples
of a group share is there once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dasd_megatron.samples import Ids, Sample

Columns = dict[str, NDArray[Any]]
"""One-dimensional arrays by name."""

_NUMBERS = {"group": np.int64, "sample": np.int64, "position": np.int64, "reward": np.float64, "timed_out": np.bool_}
_TEXTS = (
    "problem_id", "problem", "expected_answer", "reference_solution", "text", "finish_reason", "predicted_answer",
    "feedback", "privileged_source", "privileged",
)  # fmt: skip
_MAY_BE_NONE = ("predicted_answer", "feedback", "privileged_source")
# Columns with an entry for each of the N samples. Prompts and texts have numbers, -1 for none.
_OF_SAMPLES: dict[str, Any] = {
    **_NUMBERS,
    **{f"{name}_number": np.int32 for name in _TEXTS},
    "prompt_number": np.int32,
    "response_lengths": np.int64,
    "is_masked": np.bool_,
    "version_counts": np.int64,
    "measure_counts": np.int64,
}
# Columns of other lengths, each with the column of lengths whose sum is its own.
_OF_PARTS: dict[str, tuple[Any, str]] = {
    "prompt_ids": (np.int32, "prompt_lengths"),
    "response_ids": (np.int32, "response_lengths"),
    "rollout_log_probs": (np.float32, "response_lengths"),
    "texts": (np.uint8, "text_lengths"),
    "version_numbers": (np.int32, "version_counts"),
    "version_tokens": (np.int64, "version_counts"),
    "measure_numbers": (np.int32, "measure_counts"),
    "measure_values": (np.float64, "measure_counts"),
}
_LENGTHS = {"prompt_lengths": np.int64, "text_lengths": np.int64}
_TEACHER = ("teacher_number", "teacher_ids", "teacher_lengths")


class _Table:
    """Numbers of different values, in the order in which they come."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def number(self, value: Any) -> int:
        """Return the number of a value, -1 for None."""
        return -1 if value is None else self.numbers.setdefault(value, len(self.numbers))

    def lengths(self) -> NDArray[np.int64]:
        """Return the length of each value."""
        return np.array([len(value) for value in self.numbers], dtype=np.int64)


def to_columns(samples: Sequence[Sample], *, with_teacher: bool) -> Columns:
    """Return N samples, at least one, as columns.

    ``with_teacher``: the teacher's prompts too, which are in no file.
    """
    texts, prompts = _Table(), _Table()
    masks = [sample.response_mask for sample in samples if sample.response_mask is not None]
    spans = [span for sample in samples for span in sample.weight_versions]
    measures = [item for sample in samples for item in (sample.measures or {}).items()]
    columns: Columns = {
        **{name: np.array([getattr(sample, name) for sample in samples], kind) for name, kind in _NUMBERS.items()},
        **{
            f"{name}_number": np.array([texts.number(getattr(sample, name)) for sample in samples], np.int32)
            for name in _TEXTS
        },
        "prompt_number": np.array([prompts.number(sample.prompt_ids.tobytes()) for sample in samples], np.int32),
        "response_ids": np.concatenate([sample.response_ids for sample in samples]),
        "rollout_log_probs": np.concatenate([sample.rollout_log_probs for sample in samples]),
        "response_lengths": np.array([len(sample.response_ids) for sample in samples], np.int64),
        "response_mask": np.concatenate([np.zeros(0, np.bool_), *masks]),
        "is_masked": np.array([sample.response_mask is not None for sample in samples]),
        "version_counts": np.array([len(sample.weight_versions) for sample in samples], np.int64),
        "version_numbers": np.array([texts.number(str(name)) for name, _ in spans], np.int32),
        "version_tokens": np.array([tokens for _, tokens in spans], np.int64),
        "measure_counts": np.array([-1 if sample.measures is None else len(sample.measures) for sample in samples]),
        "measure_numbers": np.array([texts.number(name) for name, _ in measures], np.int32),
        "measure_values": np.array([value for _, value in measures], np.float64),
    }
    columns["prompt_ids"], columns["prompt_lengths"] = _ids_of(prompts)
    encoded = [text.encode("utf-8", "replace") for text in texts.numbers]
    columns["texts"] = _writable(encoded, np.uint8)
    columns["text_lengths"] = np.array([len(text) for text in encoded], np.int64)
    if with_teacher:
        shown = _Table()
        prompts_shown = [sample.teacher_prompt_ids for sample in samples]
        columns["teacher_number"] = np.array(
            [shown.number(None if ids is None else ids.tobytes()) for ids in prompts_shown], np.int32
        )
        columns["teacher_ids"], columns["teacher_lengths"] = _ids_of(shown)
    return columns


def without_teacher(columns: Columns) -> Columns:
    """Return the columns without the teacher's prompts."""
    return {name: column for name, column in columns.items() if name not in _TEACHER}


def _ids_of(prompts: _Table) -> tuple[Ids, NDArray[np.int64]]:
    return _writable(prompts.numbers, np.int32), prompts.lengths() // 4


def _writable(parts: Iterable[bytes], kind: Any) -> NDArray[Any]:
    # Of bytes an array cannot be written, and torch warns of such.
    return np.frombuffer(bytearray(b"".join(parts)), kind)


def from_columns(columns: Columns) -> list[Sample]:
    """Return the samples of columns that have no :func:`columns_fault`. Their arrays are parts of the columns."""
    bounds = np.cumsum([0, *columns["text_lengths"].tolist()]).tolist()
    content = columns["texts"].tobytes()
    texts = [content[begin:end].decode() for begin, end in zip(bounds, bounds[1:], strict=False)]
    text_of = dict(enumerate(texts)) | {-1: None}
    prompts = _split(columns["prompt_ids"], columns["prompt_lengths"])
    lengths = columns["response_lengths"]
    masks = iter(_split(columns["response_mask"], lengths[columns["is_masked"]]))
    versions = zip(columns["version_numbers"].tolist(), columns["version_tokens"].tolist(), strict=True)
    measures = zip(columns["measure_numbers"].tolist(), columns["measure_values"].tolist(), strict=True)
    teacher: list[Any] = [None] * len(lengths)
    if "teacher_number" in columns:
        shown = [*_split(columns["teacher_ids"], columns["teacher_lengths"]), None]
        teacher = [shown[number] for number in columns["teacher_number"].tolist()]
    own = {name: columns[name].tolist() for name in _NUMBERS}
    own |= {name: [text_of[number] for number in columns[f"{name}_number"].tolist()] for name in _TEXTS}
    own |= {
        "prompt_ids": [prompts[number] for number in columns["prompt_number"].tolist()],
        "response_ids": _split(columns["response_ids"], lengths),
        "rollout_log_probs": _split(columns["rollout_log_probs"], lengths),
        "response_mask": [next(masks) if masked else None for masked in columns["is_masked"].tolist()],
        "weight_versions": [
            [[texts[number], tokens] for number, tokens in (next(versions) for _ in range(count))]
            for count in columns["version_counts"].tolist()
        ],
        "measures": [
            None if count < 0 else {texts[number]: value for number, value in (next(measures) for _ in range(count))}
            for count in columns["measure_counts"].tolist()
        ],
        "teacher_prompt_ids": teacher,
    }
    return [Sample(**dict(zip(own, values, strict=True))) for values in zip(*own.values(), strict=True)]


def _split(values: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    bounds = np.cumsum([0, *lengths.tolist()]).tolist()
    return [values[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]


def columns_fault(columns: Columns) -> str | None:
    """Return what keeps columns of a file from being read as samples, for an error message; None if nothing does.

    Samples that can be read may still have values that cannot be trained on.
    """
    kinds = {**_OF_SAMPLES, **_LENGTHS, **{name: kind for name, (kind, _) in _OF_PARTS.items()}}
    for name, kind in {**kinds, "response_mask": np.bool_}.items():
        if name not in columns:
            return f"{name} is missing"
        if columns[name].dtype != kind or columns[name].ndim != 1:
            found = f"{columns[name].dtype} {list(columns[name].shape)}"
            return f"{name} must be a row of {np.dtype(kind).name}, and is {found}"
    count = len(columns["group"])
    for name in _OF_SAMPLES:
        if not 0 < count == len(columns[name]):
            return f"{name} has {len(columns[name])} entries for {count} samples"
    for name, (_, lengths) in _OF_PARTS.items():
        if (fault := _lengths_fault(lengths, columns[lengths], name, len(columns[name]))) is not None:
            return fault
    masked = columns["response_lengths"][columns["is_masked"]]
    return _lengths_fault("response_lengths", masked, "response_mask", len(columns["response_mask"])) or _numbers_fault(
        columns
    )


def _lengths_fault(name: str, lengths: NDArray[np.int64], parts: str, total: int) -> str | None:
    lowest = -1 if name == "measure_counts" else 0
    # Python's integers have no bound, and a sum of int64 may come round to the right one.
    if lengths.min(initial=0) < lowest or sum(max(length, 0) for length in lengths.tolist()) != total:
        return f"{name} do not add up to the {total} entries of {parts}"
    return None


def _numbers_fault(columns: Columns) -> str | None:
    """Return which number of a prompt or a text there is not, or which text is no UTF-8; None if all are sound."""
    texts = columns["text_lengths"]
    tables = {f"{name}_number": (-1 if name in _MAY_BE_NONE else 0, len(texts)) for name in _TEXTS}
    tables |= {name: (0, len(texts)) for name in ("version_numbers", "measure_numbers")}
    tables["prompt_number"] = (0, len(columns["prompt_lengths"]))
    for name, (lowest, size) in tables.items():
        numbers = columns[name]
        if numbers.min(initial=0) < lowest or numbers.max(initial=lowest) >= size:
            return f"{name} has the number of an entry that is not there"
    content, begin = columns["texts"].tobytes(), 0
    for length in texts.tolist():
        try:
            content[begin : begin + length].decode()
        except UnicodeDecodeError:
            return f"the text at byte {begin} of texts is no UTF-8"
        begin += length
    return None
