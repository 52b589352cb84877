"""Reading, cutting and appending the JSON Lines files of a run's numbers.

Every line is one JSON object, written by a single ``write`` and synced, so that a killed run loses at most the line
under way. Floats are written by ``repr`` and read back bit for bit. JSON has no NaN and no infinity: they stand as the
strings "NaN", "Infinity" and "-Infinity", which any reader sees, ``float()`` understands, and :func:`read_metrics`
turns back into floats.
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dasd_megatron.files import RunDirectoryError, cannot_write, replace_file

METRICS, WARM_START, EVALUATION = "metrics.jsonl", "warm_start.jsonl", "evaluation.jsonl"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def truncate_after(run_dir: str | Path, step: int, warm_start_step: int | None = None) -> None:
    """Drop the lines of metrics.jsonl and evaluation.jsonl whose step lies after ``step``; for a resume from the
    checkpoint of ``step``.

    ``step=-1`` empties both, for a fresh start in an old directory. ``warm_start_step`` does the same to
    warm_start.jsonl, whose steps count on their own; None leaves it. A half-written last line is dropped. Each file is
    replaced atomically (write, fsync, rename). Raises :class:`RunDirectoryError` for an unreadable line that is not the
    last, and for a directory that cannot be written.
    """
    limits = {METRICS: step, EVALUATION: step, WARM_START: warm_start_step}
    for name, limit in limits.items():
        path = Path(run_dir) / name
        if limit is None or not path.exists():
            continue
        kept = [line for line, row in _parsed_lines(path) if step_of_row(row, path) <= limit]
        replace_file(path, "".join(line + "\n" for line in kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file, NaN and infinities as floats again. Without the file there are none; a
    half-written last line is left out."""
    path = Path(path)
    if not path.exists():
        return []
    return [restore_non_finite(row) for _, row in _parsed_lines(path)]


def restore_non_finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of a metrics file with the strings "NaN", "Infinity" and "-Infinity" as floats again."""
    return {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}


def step_of_row(row: Mapping[str, Any], where: object) -> int:
    """Return the step of a line; ``where`` names the file in the :class:`RunDirectoryError` about a line without."""
    step = row.get("step")
    if isinstance(step, bool) or not isinstance(step, numbers.Integral):
        raise RunDirectoryError(f"{where}: a line needs an integer 'step', this one has {step!r}")
    return int(step)


def _parsed_lines(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield (line, object) of every whole line. The rest that a crash left of the last line is skipped; damage before
    it raises."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if number == len(lines):
                return
            raise RunDirectoryError(
                f"{path}, line {number}: {error}; repair or delete that line, then start again"
            ) from error
        yield line, row


def mend_last_line(path: Path) -> None:
    """Drop the half of a last line that a killed writer left, so that the next line does not continue it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = "".join(line + "\n" for line, _ in _parsed_lines(path))
    if whole != text:
        replace_file(path, whole)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line with a single write, and flush it to disk. A write that fails leaves the file as it was."""
    data = (json.dumps({key: plain_value(key, value) for key, value in row.items()}, allow_nan=False) + "\n").encode()
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            try:
                written = os.write(file, data)
                if written != len(data):
                    raise OSError(f"only {written} of {len(data)} bytes were written (is the disk full?)")
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
    except OSError as error:
        raise cannot_write(path, error) from error


def plain_value(key: str, value: Any) -> Any:
    """Return ``value`` as JSON takes it: Python scalars, numpy and torch scalars by their ``item``, non-finite floats
    by name."""
    if hasattr(value, "item") and callable(value.item):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if math.isfinite(number):
            return number
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    raise TypeError(f"metric {key!r} is a {type(value).__name__}: give a number or a string")
