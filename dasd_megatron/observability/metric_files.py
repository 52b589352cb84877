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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dasd_megatron.files import RunDirectoryError, cannot_write, fsync_path, replace_file, write_whole
from dasd_megatron.reading import read_json_lines, read_last_byte

METRICS, WARM_START, EVALUATION = "metrics.jsonl", "warm_start.jsonl", "evaluation.jsonl"
WARNINGS = "watch.jsonl"
FILES = (METRICS, WARM_START, EVALUATION, WARNINGS)
_ADVICE = "repair it or move it away, then start again"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def truncate_after(run_dir: str | Path, step: int) -> None:
    """Drop the lines of metrics.jsonl, evaluation.jsonl and watch.jsonl whose step lies after ``step``; for a resume
    from the checkpoint of ``step``.

    A half-written last line is dropped. A file is replaced atomically (write, fsync, rename), and only where something
    is to be dropped. Raises :class:`~dasd_megatron.files.RunDirectoryError` for a damaged line, and for a directory
    that cannot be written.
    """
    for name in (METRICS, EVALUATION, WARNINGS):
        path = Path(run_dir) / name
        if not os.path.lexists(path):
            continue
        lines = read_json_lines(path, advice=_ADVICE)
        kept = [line for line in lines if step_of_row(line.row, f"{path} line {line.number}") <= step]
        if len(kept) < len(lines) or not ends_whole(path):
            replace_file(path, "".join(line.text + "\n" for line in kept))


def set_rows_aside(run_dir: Path, name: str) -> str | None:
    """Rename a file of rows that a run is to begin anew; return the new name, None where there are no rows.

    Raises:
        RunDirectoryError: it cannot be renamed.
    """
    path = run_dir / name
    if not os.path.lexists(path):
        return None
    try:
        if path.stat().st_size == 0:
            return None
        number = 1
        while os.path.lexists(aside := run_dir / f"{name}.{number}"):
            number += 1
        path.rename(aside)
        fsync_path(run_dir)
    except OSError as error:
        raise cannot_write(path, error) from error
    return aside.name


def missing_steps(run_dir: Path, step: int) -> int:
    """Return how many steps up to ``step`` metrics.jsonl lacks. A run that has gone on from another one's checkpoint
    has none before its first row; without any row all are lacking."""
    rows = read_metrics(run_dir / METRICS)
    found = {number for row in rows if 1 <= (number := step_of_row(row, run_dir / METRICS)) <= step}
    return step + 1 - min(found, default=1) - len(found)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file, NaN and infinities as floats again. Without the file there are none; a
    half-written last line is left out. Raises :class:`~dasd_megatron.reading.UnreadableError` for a damaged file."""
    path = Path(path)
    if not os.path.lexists(path):
        return []
    return [restore_non_finite(line.row) for line in read_json_lines(path, advice=_ADVICE)]


def restore_non_finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of a metrics file with the strings "NaN", "Infinity" and "-Infinity" as floats again, and integers
    that no float holds as infinities."""
    return {key: restore_number(value) if isinstance(value, (str, int)) else value for key, value in row.items()}


def restore_number(value: str | int) -> Any:
    """Return a value of a metrics file as :func:`restore_non_finite` does."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    return value if abs(value) < 2**1023 else math.inf if value > 0 else -math.inf


def step_of_row(row: Mapping[str, Any], where: object) -> int:
    """Return the step of a line; ``where`` names the file in the :class:`RunDirectoryError` about a line without."""
    step = row.get("step")
    if isinstance(step, bool) or not isinstance(step, numbers.Integral):
        raise RunDirectoryError(f"{where}: a line needs an integer 'step', this one has {step!r}")
    return int(step)


def mend_last_line(path: Path) -> None:
    """Drop the half of a last line that a killed writer left, so that the next line does not continue it."""
    if os.path.lexists(path) and not ends_whole(path):
        replace_file(path, "".join(line.text + "\n" for line in read_json_lines(path, advice=_ADVICE)))


def ends_whole(path: Path) -> bool:
    """Return whether a file is empty, or its last byte ends a line. Raises RunDirectoryError."""
    return read_last_byte(path, advice=_ADVICE) in (b"", b"\n")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line with a single write, and flush it to disk. A write that fails leaves the file as it was."""
    data = (json.dumps({key: plain_value(key, value) for key, value in row.items()}, allow_nan=False) + "\n").encode()
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            try:
                write_whole(file, data)
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
