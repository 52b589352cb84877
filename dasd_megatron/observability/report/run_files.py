"""Reading the files of a run directory leniently: what cannot be read becomes a note on the page, not an error.

All text of a run is untrusted. Large files are streamed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import yaml

from dasd_megatron.observability.metric_files import EVALUATION, METRICS, WARM_START, restore_non_finite
from dasd_megatron.observability.watch import WARNINGS

Row = dict[str, Any]
"""One line of a JSONL file."""

# These are control, zero-width and direction characters.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


class ReportError(RuntimeError):
    """No report can be made of this directory. The message says why and what to do."""


@dataclass
class Run:
    """The contents of a run directory that could be read. ``notes`` lists what could not be."""

    path: Path
    label: str = ""
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    warm_start: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    warnings: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def setting(self, name: str) -> Any:
        """Return the value of a dotted field of the configuration, None when it is not there."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def evaluation(self, label: str) -> Row | None:
        """Return the last line of evaluation.jsonl with this label."""
        return next((row for row in reversed(self.evaluations) if row.get("label") == label), None)

    def samples_path(self, row: Mapping[str, Any]) -> Path:
        """Return the file of the samples behind a line of evaluation.jsonl."""
        return self.path / "evaluations" / f"{row.get('label')}-step_{row['step']:06d}" / "samples.jsonl"


def read_run(path: Path) -> Run:
    """Read everything of a run directory but samples and token statistics. Raises :class:`ReportError` when it holds no
    run."""
    if not path.is_dir():
        raise ReportError(f"{path} is not a directory: give the directory of a run, like runs/<name>/<date-time>")
    if not any((path / name).exists() for name in ("config.yaml", METRICS, WARM_START, EVALUATION)):
        raise ReportError(
            f"{path} holds no run (neither config.yaml nor {METRICS}): give the directory of a run, like "
            "runs/<name>/<date-time>"
        )
    run = Run(path)
    run.config_text, run.config = _read_mapping(run, path / "config.yaml", yaml.safe_load)
    run.environment_text, run.environment = _read_mapping(run, path / "environment.json", json.loads)
    run.metrics = _read_rows(run, METRICS)
    run.warm_start = _read_rows(run, WARM_START)
    # Of several lines about one step and label, the last counts.
    evaluations = {(row.get("label"), row["step"]): row for row in _read_rows(run, EVALUATION)}
    run.evaluations = list(evaluations.values())
    run.warnings = _read_rows(run, WARNINGS)
    run.label = to_text(run.setting("run.name")) or show_hidden(path.resolve().name)
    return run


def read_objects(run: Run, path: Path) -> Iterator[Row]:
    """Yield the objects of a JSONL file one by one, so that large files are never in memory as a whole. Unreadable
    lines are counted in the notes."""
    bad = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                row = _parse_line(line)
                if isinstance(row, dict):
                    yield row
                else:
                    bad += 1
    except OSError as error:
        run.notes.append(f"{path.relative_to(run.path)} could not be read: {error}")
    if bad:
        run.notes.append(f"{path.relative_to(run.path)}: {bad} unreadable lines were left out")


def saved_steps(run: Run, folder: str, suffix: str) -> dict[int, Path]:
    """Return the files step_<n><suffix> of a folder of the run, by step."""
    found = (
        (re.fullmatch(rf"step_(\d+)\{suffix}", path.name), path) for path in (run.path / folder).glob(f"step_*{suffix}")
    )
    return dict(sorted((int(match.group(1)), path) for match, path in found if match))


def _parse_line(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        # orjson knows neither NaN nor lone surrogates, which json writes.
        try:
            return json.loads(line.decode("utf-8", errors="replace"))
        except ValueError:
            return None


def _read_mapping(run: Run, path: Path, parse: Callable[[str], Any]) -> tuple[str, dict[str, Any]]:
    """Return the text of a file and the mapping in it; both empty, with a note, where it cannot be read."""
    if not path.exists():
        run.notes.append(f"{path.name} is missing")
        return "", {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        value = parse(text)
        if not isinstance(value, dict):
            raise ValueError("it does not hold a mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.notes.append(f"{path.name} could not be read: {error}")
        return "", {}
    return text, value


def _read_rows(run: Run, name: str) -> list[Row]:
    path = run.path / name
    rows = [restore_non_finite(row) for row in read_objects(run, path)] if path.exists() else []
    sound = [row for row in rows if isinstance(row.get("step"), int)]
    if len(sound) != len(rows):
        run.notes.append(f"{name}: {len(rows) - len(sound)} lines without a step were left out")
    return sound


def show_hidden(text: object) -> str:
    """Write out the characters of ``text`` that would not show or would mislead, as ‹U+202E›."""
    return _HIDDEN.sub(
        lambda match: f"‹U+{ord(match.group()):04X}›", str(text).replace("\r\n", "\n").replace("\r", "‹U+000D›")
    )


def to_text(value: Any) -> str:
    """Return a value as text that hides nothing; None is empty."""
    return "" if value is None else show_hidden(value)


def shorten(text: str, limit: int) -> str:
    """Cut ``text`` to ``limit`` characters, and say how many are left out."""
    text = show_hidden(text)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters in the file)"


def to_number(value: Any) -> float | None:
    """Return a metric as a float, the names of NaN and infinities understood; None for what is no number."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    # JSON has integers that no float holds.
    return float(value) if isinstance(value, float) or abs(value) < 2**1023 else math.inf if value > 0 else -math.inf


def metric_values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    """Return one metric of every row."""
    return [to_number(row.get(name)) for row in rows]


def finite_values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return one metric of the rows where it is a finite number."""
    return [value for value in metric_values(rows, name) if value is not None and math.isfinite(value)]
