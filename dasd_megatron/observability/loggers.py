"""The run's numbers on disk as they come: metrics.jsonl, warm_start.jsonl, evaluation.jsonl and TensorBoard events.

Trackers follow these files; :mod:`~dasd_megatron.observability.metric_files` has their format.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dasd_megatron.files import RunDirectoryError, cannot_write
from dasd_megatron.observability.metric_files import (
    EVALUATION,
    FILES,
    METRICS,
    WARM_START,
    append_row,
    mend_last_line,
    plain_value,
    read_metrics,
    step_of_row,
    truncate_after,
)
from dasd_megatron.observability.trackers import Tracker


class MetricsLogger:
    """Logger that appends the metrics of one run to its directory; one instance in the whole job (the first rank's).

    ``resume_step`` is the step that a resumed run continues from. TensorBoard then hides the events of later steps (its
    purge step), and :meth:`restart_after` has to be called with the same number. ``trackers`` follow the files
    (:mod:`dasd_megatron.observability.trackers`), and their warnings go to ``warn``. Raises
    :class:`RunDirectoryError` when the directory cannot be written: at construction, before any step has been spent.
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
            raise cannot_write(self.run_dir, error) from error
        for name in FILES:
            mend_last_line(self.run_dir / name)
        self._last_step = self._read_last_step()
        self._events = _TensorBoard(self.run_dir / "tensorboard", resume_step) if tensorboard else None

    def log_step(self, metrics: Mapping[str, Any]) -> None:
        """Append one training step; ``metrics`` holds ``step`` (int), ``time`` (unix seconds; now, if absent) and
        scalars or strings."""
        step = step_of_row(metrics, METRICS)
        if self._last_step is not None and step <= self._last_step:
            raise RunDirectoryError(
                f"{self.run_dir / METRICS} already holds step {self._last_step}, so step {step} would stand in it "
                "twice: call truncate_after on resume, or give the run another directory"
            )
        append_row(self.run_dir / METRICS, {"step": step, "time": time.time(), **metrics})
        self._last_step = step
        if self._events:
            self._events.add("", step, metrics)
        for tracker in self._trackers:
            if trouble := tracker.trouble():
                self._warn(trouble)

    def log_warm_start(self, metrics: Mapping[str, Any]) -> None:
        """Append one step of the warm start: ``step``, ``loss`` (nats per token), ``lr``, ``grad_norm``."""
        step = step_of_row(metrics, WARM_START)
        append_row(self.run_dir / WARM_START, metrics)
        if self._events:
            self._events.add("warm_start", step, metrics)

    def log_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Append one evaluation: ``step``, ``label`` (before, step or after) and its results."""
        step = step_of_row(metrics, EVALUATION)
        append_row(self.run_dir / EVALUATION, metrics)
        if self._events:
            self._events.add("", step, {f"evaluation/{key}": value for key, value in metrics.items() if key != "step"})

    def restart_after(self, step: int) -> None:
        """Drop the lines after ``step`` and go on from there, as a run that is resumed."""
        truncate_after(self.run_dir, step)
        self._last_step = self._read_last_step()
        if self._events:
            self._events.close()
            self._events = _TensorBoard(self.run_dir / "tensorboard", step)

    def _read_last_step(self) -> int | None:
        rows = read_metrics(self.run_dir / METRICS)
        return step_of_row(rows[-1], self.run_dir / METRICS) if rows else None

    def close(self) -> None:
        """Close the files, and let the trackers send the rest."""
        if self._events:
            self._events.close()
        for tracker in self._trackers:
            if trouble := tracker.close():
                self._warn(trouble)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TensorBoard:
    """Scalars for TensorBoard, through its own event writer, which needs neither torch nor TensorFlow.

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
            key: plain_value(key, value)
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
            raise cannot_write(self._folder / subfolder, error) from error

    def _open(self, subfolder: str) -> Any:
        writer = self._writers[subfolder] = self._writer(str(self._folder / subfolder))
        if subfolder == "" and self._resume_step is not None:
            purge = self._session_log(status=self._session_log.START)
            writer.add_event(self._event(wall_time=time.time(), step=self._resume_step + 1, session_log=purge))
        return writer

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
