"""Progress of a run for people: live bars on a terminal, tidy lines in a log file, a table at the end."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dasd_megatron.errors import printable


def _is_terminal(stream: TextIO) -> bool:
    """Return whether the stream is a terminal that can move the cursor.

    Only the stream decides: FORCE_COLOR, which rich would heed, must not put control characters into a log file.
    """
    return stream.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown")


def format_duration(seconds: float) -> str:
    """Write seconds as people do: 3.4s, 2m05s, 1h07m."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def format_step(metrics: Mapping[str, Any], total_steps: int, eta_seconds: float | None = None) -> str:
    """Write the headline of one training step on one line; metrics that a step does not have are left out.

    ``acc`` share of correct rollouts, ``H`` mean student entropy (nats), ``len`` mean response length (tokens),
    ``push`` share of tokens pushed away from the teacher, ``|g|`` gradient norm before clipping.
    """
    width = len(str(total_steps))
    parts = [f"step {metrics['step']:>{width}}/{total_steps}"]
    for label, key, form in (
        ("acc", "reward/accuracy", lambda v: f"{v:6.1%}"),
        ("H", "entropy/mean", lambda v: f"{v:.3f}"),
        ("len", "response/length_mean", lambda v: f"{v:6.1f}"),
        ("push", "credit/pushed_share", lambda v: f"{v:5.1%}"),
        ("|g|", "update/grad_norm", lambda v: f"{v:.3g}".ljust(7)),
        ("", "throughput/tokens_per_second", lambda v: f"{v:7,.0f} tok/s"),
        ("", "seconds/total", lambda v: f"{format_duration(v):>6}"),
    ):
        if metrics.get(key) is not None:
            parts.append(f"{label} {form(metrics[key])}".strip() if label else form(metrics[key]))
    if eta_seconds is not None:
        parts.append(f"eta {format_duration(eta_seconds)}")
    return "  ".join(parts)


class ProgressDisplay:
    """Progress of one run, shown by its first rank.

    On a terminal there is one line per training step above a live bar with the time left. Elsewhere (a log file, a
    pipe, TERM=dumb) there is one plain line per training step and about ``lines_per_phase`` per counted phase, without
    control characters, flushed, each with the time of day. ``start_step`` is the step that a resumed run continues
    from. Use it as a context manager, so that an exception leaves a sound terminal.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        lines_per_phase: int = 10,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._console = Console(file=self._stream, highlight=False)
        self.live = _is_terminal(self._stream)
        self._total_steps, self._start_step = total_steps, start_step
        self._lines_per_phase, self._clock = lines_per_phase, clock
        self._recent_seconds: deque[float] = deque(maxlen=10)
        self._bars: Progress | None = None
        self._train_bar: TaskID | None = None

    def __enter__(self) -> ProgressDisplay:
        if self.live:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
            )
            self._bars = Progress(*columns, console=self._console, transient=True)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        """Show a named stretch of work (data, warm start, evaluate before, ...), with ``total`` countable units or
        None."""
        phase = Phase(self, name, total)
        try:
            yield phase
        except BaseException:
            phase.close(failed=True)
            raise
        phase.close(failed=False)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show one finished training step; ``metrics`` as logged, with ``step`` and, for the time left,
        ``seconds/total``."""
        if metrics.get("seconds/total") is not None:
            self._recent_seconds.append(metrics["seconds/total"])
        eta = None
        if self._recent_seconds:
            eta = sum(self._recent_seconds) / len(self._recent_seconds) * max(0, self._total_steps - metrics["step"])
        if self._bars is not None:
            if self._train_bar is None:
                self._train_bar = self._bars.add_task(
                    "train", total=self._total_steps, completed=self._start_step, note=""
                )
            note = f"eta {format_duration(eta)}" if eta is not None else ""
            self._bars.update(self._train_bar, completed=metrics["step"], note=note)
            self.message(format_step(metrics, self._total_steps))
        else:
            self.message(format_step(metrics, self._total_steps, eta))

    def message(self, text: str, style: str = "") -> None:
        """Show one line of information."""
        moment = time.strftime("%H:%M:%S", time.localtime(self._clock()))
        if self.live:
            self._console.print(Text.assemble((moment, "dim"), " ", (printable(text), style)), soft_wrap=True)
        else:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            line = f"{moment} {printable(text)}\n".encode(encoding, errors="replace").decode(encoding)
            self._stream.write(line)
            self._stream.flush()

    def warning(self, text: str) -> None:
        """Show one line that stands out."""
        self.message(f"WARNING: {text}", style="bold yellow")


class _Bar:
    """The live bar of one phase."""

    def __init__(self, bars: Progress, name: str, total: int | None) -> None:
        self._bars, self._task = bars, bars.add_task(printable(name), total=total, note="")

    def update(self, done: int, note: str) -> None:
        self._bars.update(self._task, completed=done, note=printable(note))

    def remove(self) -> None:
        self._bars.remove_task(self._task)


class Phase:
    """The handle that :meth:`ProgressDisplay.phase` yields."""

    def __init__(self, display: ProgressDisplay, name: str, total: int | None) -> None:
        self._display, self.name, self.total = display, name, total
        self._done, self._lines, self._values = 0, 0, ""
        self._started = display._clock()
        self._bar = None if display._bars is None else _Bar(display._bars, name, total)
        if self._bar is None:
            display.message(f"{name} ..." if total is None else f"{name}: 0/{total}")

    def advance(self, units: int = 1, **values: float | str) -> None:
        """Count ``units`` more as done; ``values`` (loss=..., lr=...) are shown beside the count."""
        self._done += units
        self._values = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        if self._bar is not None:
            self._bar.update(self._done, self._values)
        elif (
            self.total
            and self._done < self.total
            and self._done * self._display._lines_per_phase >= (self._lines + 1) * self.total
        ):
            self._lines = self._done * self._display._lines_per_phase // self.total
            elapsed = self._display._clock() - self._started
            left = elapsed / self._done * (self.total - self._done)
            count = f"{self.name}: {self._done}/{self.total}"
            self._display.message("  ".join(filter(None, (count, self._values, f"eta {format_duration(left)}"))))

    def close(self, failed: bool) -> None:
        """Show the end of the phase and its duration."""
        elapsed = format_duration(self._display._clock() - self._started)
        if self._bar is not None:
            self._bar.remove()
        count = f" {self._done}/{self.total}" if self.total else ""
        end = "stopped by an error after" if failed else "done in"
        self._display.message("  ".join(filter(None, (f"{self.name}:{count} {end} {elapsed}", self._values))))


def evaluation_rows(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> list[tuple[str, float | None, float | None, str]]:
    """Return (name, before, after, unit) of every result that an evaluation has, in reading order; unit is share,
    tokens or nats.

    ``before`` and ``after`` are lines of evaluation.jsonl: ``avg@n``, ``pass@k`` ..., ``maj@n`` (shares),
    ``response/length_mean`` (tokens), ``nll_mean`` (nats per token); None where that evaluation was not made.
    """
    before, after = before or {}, after or {}
    found = {key for key in (*before, *after) if re.fullmatch(r"(avg|pass|maj)@\d+", key)}
    order = {"avg": 0, "pass": 1, "maj": 2}
    keys = [
        (key, key.capitalize(), "share")
        for key in sorted(found, key=lambda key: (order[key.split("@")[0]], int(key.split("@")[1])))
    ]
    keys += [("response/length_mean", "Mean length", "tokens"), ("nll_mean", "Mean -log p of a token", "nats")]
    return [
        (label, before.get(key), after.get(key), unit) for key, label, unit in keys if key in before or key in after
    ]


def format_result(value: float | None, unit: str) -> str:
    """Write a result with its unit; "-" where there is none."""
    if value is None:
        return "-"
    return {"share": f"{value:.1%}", "tokens": f"{value:.1f} tokens", "nats": f"{value:.3f} nats"}[unit]


def format_difference(before: float | None, after: float | None, unit: str) -> str:
    """Write the change of a result with its sign and unit; "-" where one side is missing."""
    if before is None or after is None:
        return "-"
    difference = after - before
    return {
        "share": f"{100 * difference:+.1f} points",
        "tokens": f"{difference:+.1f} tokens",
        "nats": f"{difference:+.3f} nats",
    }[unit]


def summary_table(
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    stream: TextIO | None = None,
) -> None:
    """Print the closing table (held-out results before, after, difference) and under it each of ``facts`` on a line of
    its own.

    ``before`` and ``after`` are lines of evaluation.jsonl, or None where that evaluation was not made. ``facts`` maps
    names to values. They are never wrapped, so that the path of the report can be clicked or copied. ``stream`` is
    standard output if not given.
    """
    stream = stream if stream is not None else sys.stdout
    terminal = _is_terminal(stream)
    console = Console(file=stream, highlight=False, force_terminal=terminal, width=None if terminal else 100)
    table = Table(box=box.SIMPLE_HEAVY)
    table.add_column("held-out problems")
    for heading in ("before", "after", "difference"):
        table.add_column(heading, justify="right")
    for label, old, new, unit in evaluation_rows(before, after):
        table.add_row(label, format_result(old, unit), format_result(new, unit), format_difference(old, new, unit))
    if not table.rows:
        table.add_row("not evaluated", "-", "-", "-")
    console.print(table)
    width = max((len(printable(str(name))) for name in facts), default=0)
    for name, value in facts.items():
        console.print(Text(f"  {printable(str(name)):<{width}}  {printable(str(value))}"), soft_wrap=True)
