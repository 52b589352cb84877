"""The run's numbers on disk: metrics.jsonl, warm_start.jsonl, evaluation.jsonl and TensorBoard events; others follow
these files.

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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dasd_megatron.observability.trackers import Tracker

METRICS, WARM_START, EVALUATION = "metrics.jsonl", "warm_start.jsonl", "evaluation.jsonl"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunDirectoryError(RuntimeError):
    """A run directory that cannot be written or read. The message names the path and what to do."""


class MetricsLogger:
    """Appends the metrics of one run to its directory; one instance in the whole job (the first rank's).

    ``resume_step`` is the step that a resumed run continues from: TensorBoard then hides the events of later steps (its
    purge step), and :func:`truncate_after` with the same number must have been called before. ``trackers`` follow the
    files (:mod:`dasd_megatron.observability.trackers`); what they have to say goes to ``warn``. Raises
    :class:`RunDirectoryError` when the directory cannot be written, at construction, before any step has been spent.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool,
        resume_step: int | None = None,
        trackers: Sequence[Tracker] = (),
        warn: Callable[[str], None] = print,
    ) -> None:
        self.run_dir, self._trackers, self._warn = Path(run_dir), trackers, warn
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            probe = self.run_dir / f".write-probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise _cannot_write(self.run_dir, error) from error
        for name in (METRICS, WARM_START, EVALUATION):
            _mend_last_line(self.run_dir / name)
        rows = read_metrics(self.run_dir / METRICS)
        self._last_step = rows[-1]["step"] if rows else None
        self._events = _TensorBoard(self.run_dir / "tensorboard", resume_step) if tensorboard else None

    def log_step(self, metrics: Mapping[str, Any]) -> None:
        """Append one training step; ``metrics`` holds ``step`` (int), ``time`` (unix seconds; now, if absent) and
        scalars or strings."""
        step = _step_of(metrics, METRICS)
        if self._last_step is not None and step <= self._last_step:
            raise RunDirectoryError(
                f"{self.run_dir / METRICS} already holds step {self._last_step}, so step {step} would stand in it "
                "twice: call truncate_after on resume, or give the run another directory"
            )
        _append(self.run_dir / METRICS, {"step": step, "time": time.time(), **metrics})
        self._last_step = step
        if self._events:
            self._events.add("", step, metrics)
        for tracker in self._trackers:
            if trouble := tracker.trouble():
                self._warn(trouble)

    def log_warm_start(self, metrics: Mapping[str, Any]) -> None:
        """Append one step of the warm start: ``step``, ``loss`` (nats per token), ``lr``, ``grad_norm``."""
        step = _step_of(metrics, WARM_START)
        _append(self.run_dir / WARM_START, metrics)
        if self._events:
            self._events.add("warm_start", step, metrics)

    def log_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Append one evaluation: ``step``, ``label`` (before, step or after) and its results."""
        step = _step_of(metrics, EVALUATION)
        _append(self.run_dir / EVALUATION, metrics)
        if self._events:
            self._events.add("", step, {f"evaluation/{key}": value for key, value in metrics.items() if key != "step"})

    def restart_after(self, step: int) -> None:
        """Drop the lines after ``step`` and go on from there, as a run that is resumed."""
        truncate_after(self.run_dir, step)
        self._last_step = step or None
        if self._events:
            self._events.close()
            self._events = _TensorBoard(self.run_dir / "tensorboard", step)

    def close(self) -> None:
        if self._events:
            self._events.close()
        for tracker in self._trackers:
            if trouble := tracker.close():
                self._warn(trouble)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def truncate_after(run_dir: str | Path, step: int, warm_start_step: int | None = None) -> None:
    """Drop the lines of metrics.jsonl and evaluation.jsonl whose step lies after ``step``; for a resume from the
    checkpoint of ``step``.

    ``step=-1`` empties both (a fresh start in an old directory). ``warm_start_step``: do the same to warm_start.jsonl,
    whose steps count
    on their own; None leaves it. A half-written last line is dropped. Each file is replaced atomically (write, fsync,
    rename). Raises :class:`RunDirectoryError` for an unreadable line that is not the last, and for a directory that
    cannot be written.
    """
    limits = {METRICS: step, EVALUATION: step, WARM_START: warm_start_step}
    for name, limit in limits.items():
        path = Path(run_dir) / name
        if limit is None or not path.exists():
            continue
        kept = [line for line, row in _parsed_lines(path) if _step_of(row, path) <= limit]
        replace_file(path, "".join(line + "\n" for line in kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, NaN and infinities as floats again; [] when the file is absent; a half-written last
    line is left out."""
    path = Path(path)
    if not path.exists():
        return []
    return [restore_non_finite(row) for _, row in _parsed_lines(path)]


def restore_non_finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a metrics file with the strings "NaN", "Infinity" and "-Infinity" as floats again."""
    return {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) in place of ``path`` so that readers, and a crash, see the old file or the new one, never
    a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _step_of(row: Mapping[str, Any], where: object) -> int:
    step = row.get("step")
    if isinstance(step, bool) or not isinstance(step, numbers.Integral):
        raise RunDirectoryError(f"{where}: a line needs an integer 'step', this one has {step!r}")
    return int(step)


def _parsed_lines(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(line, object) of every whole line; what a crash left of the last line is skipped, damage before it raises."""
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


def _mend_last_line(path: Path) -> None:
    """Drop what a killed writer left of a last line, so that the next one does not continue it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = "".join(line + "\n" for line, _ in _parsed_lines(path))
    if whole != text:
        replace_file(path, whole)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    data = (json.dumps({key: _plain(key, value) for key, value in row.items()}, allow_nan=False) + "\n").encode()
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
        raise _cannot_write(path, error) from error


def _plain(key: str, value: Any) -> Any:
    """``value`` as JSON takes it: Python scalars, numpy and torch scalars by their ``item``, non-finite floats by
    name."""
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


def _cannot_write(path: Path, error: OSError) -> RunDirectoryError:
    reason = error.strerror or str(error)
    return RunDirectoryError(
        f"cannot write {path}: {reason}; free space there, make it writable, or set run.dir to a directory that is"
    )


class _TensorBoard:
    """Scalars through tensorboard's own event writer, which needs neither torch nor TensorFlow.

    The warm start goes to a folder of its own: its steps count from 1 too, and a purge step hides later events of every
    tag of a folder.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise RunDirectoryError(
                f"logging.tensorboard=true, but {error}: pip install tensorboard, or set logging.tensorboard=false"
            ) from error
        self._event, self._session_log, self._summary, self._writer = Event, SessionLog, Summary, EventFileWriter
        self._folder, self._resume_step = folder, resume_step
        self._writers: dict[str, Any] = {}

    def add(self, subfolder: str, step: int, values: Mapping[str, Any]) -> None:
        plain = {
            key: _plain(key, value)
            for key, value in values.items()
            if key not in ("step", "time") and not isinstance(value, str)
        }
        scalars = [
            self._summary.Value(tag=key, simple_value=float(value)) for key, value in plain.items() if value is not None
        ]
        try:
            writer = self._writers.get(subfolder) or self._open(subfolder)
            writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)))
            writer.flush()
        except OSError as error:
            raise _cannot_write(self._folder / subfolder, error) from error

    def _open(self, subfolder: str) -> Any:
        writer = self._writers[subfolder] = self._writer(str(self._folder / subfolder))
        if subfolder == "" and self._resume_step is not None:
            purge = self._session_log(status=self._session_log.START)
            writer.add_event(self._event(wall_time=time.time(), step=self._resume_step + 1, session_log=purge))
        return writer

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
