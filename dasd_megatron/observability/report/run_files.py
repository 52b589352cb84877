"""Reading the files of a run directory leniently: what cannot be read becomes a note on the page, not an error.

All text of a run is untrusted, and so are the sizes, the nesting and the kinds of its files.
:mod:`~dasd_megatron.reading` bounds what is read at once, and this module what is kept.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dasd_megatron.observability.metric_files import (
    EVALUATION,
    METRICS,
    WARM_START,
    WARNINGS,
    restore_non_finite,
    restore_number,
)
from dasd_megatron.reading import (
    YAML_FILE_BYTES,
    MalformedError,
    Row,
    UnreadableError,
    iterate_json_lines,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
)
from dasd_megatron.rollout_files import read_samples, whole_steps
from dasd_megatron.samples import ReplayError

MOST_ROWS = 20_000
ROW_CHARS = 64_000_000
"""Of files of numbers, at most so many lines and characters are kept, evenly spaced. Charts have some hundred
points."""
MOST_STEP = 2**53
"""Steps up to here are whole numbers for charts and the page's script as well."""
MOST_RESULTS = 200
MOST_NESTING = 50
MOST_NOTES = 40
NOTE_CHARS = 300
LABEL_CHARS = 120

# These are control, zero-width and direction characters.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)

_RESULT_OF_K = re.compile("(avg|pass|maj)@[0-9]{1,6}")
_RESULTS = ("response/length_mean", "nll_mean")


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
    metrics_every: int = 1
    """Each line of ``metrics`` stands for so many lines of the file."""
    _noted: int = 0

    def note(self, text: str) -> None:
        """Add a note for the page, unless there are enough; then the last one counts the others."""
        self._noted += 1
        if self._noted <= MOST_NOTES:
            self.notes.append(shorten(text, NOTE_CHARS))
        else:
            self.notes[MOST_NOTES:] = [f"{self._noted - MOST_NOTES:,} more notes are left out"]

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
    try:
        names = set(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ReportError(
            f"{path} is not a directory: give the directory of a run, like runs/<name>/<date-time>"
        ) from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}; give the directory of a run") from error
    if names.isdisjoint(("config.yaml", METRICS, WARM_START, EVALUATION)):
        raise ReportError(
            f"{path} holds no run (neither config.yaml nor {METRICS}): give the directory of a run, like "
            "runs/<name>/<date-time>"
        )
    run = Run(path)
    run.config_text, run.config = _read_mapping(run, path / "config.yaml", parse_yaml)
    run.environment_text, run.environment = _read_mapping(
        run, path / "environment.json", lambda text: parse_json(text, dict)
    )
    run.metrics, run.metrics_every = _read_steps(run, METRICS)
    run.warm_start, _ = _read_steps(run, WARM_START)
    # Of several lines about one step and label, the last counts.
    evaluations = {(to_text(row.get("label")), row["step"]): row for row in _read_rows(run, EVALUATION)[0]}
    run.evaluations = [_with_sound_results(row) for row in evaluations.values()]
    run.warnings, _ = _read_rows(run, WARNINGS)
    run.label = shorten(run.setting("run.name"), LABEL_CHARS) or show_hidden(resolve(path).name)
    return run


def resolve(path: Path) -> Path:
    """Return the path without links, as far as they lead anywhere."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links is a RuntimeError
        return path.absolute()


def file_size(path: Path) -> int:
    """Return the bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def read_objects(run: Run, path: Path, most_chars: float = math.inf) -> Iterator[Row]:
    """Yield the objects of a JSONL file one by one, so that large files are never in memory as a whole.

    Nothing is yielded where there is no file. Reading stops after about ``most_chars`` characters. What could not be
    read is counted in the notes.
    """
    for row, _ in _sized_objects(run, path, most_chars):
        yield row


def _sized_objects(run: Run, path: Path, most_chars: float = math.inf) -> Iterator[tuple[Row, int]]:
    """Yield the objects of a JSONL file, each with the number of characters of its line."""
    if not os.path.lexists(path):
        return
    name = path.relative_to(run.path)
    bad = read = 0
    try:
        for line in iterate_json_lines(path, advice=""):
            read += len(line.text)
            if read > most_chars:
                run.note(f"{name}: the rest after {most_chars:,} characters was left out")
                break
            if line.problem is None:
                yield line.row, len(line.text)
            else:
                bad += 1
    except UnreadableError as error:
        run.note(f"{name} could not be read: {_reason(error)}")
    if bad:
        run.note(f"{name}: {bad} unreadable lines were left out")


def saved_rollouts(run: Run) -> dict[int, list[Path]]:
    """Return the files of each step whose rollouts are there in whole, by step."""
    steps = whole_steps(_names_in(run, "rollouts"))
    return {step: [run.path / "rollouts" / name for name in names] for step, names in steps.items()}


def read_rollouts(run: Run, paths: Sequence[Path], most_bytes: float = math.inf) -> Iterator[Row]:
    """Yield the rollouts of a step one by one, as JSON has them, but with arrays.

    Reading stops after about ``most_bytes``. What could not be read is in the notes.
    """
    for path in paths:
        if path.suffix == ".jsonl":
            yield from read_objects(run, path, most_bytes)
            continue
        name = path.relative_to(run.path)
        most_bytes -= file_size(path)
        if most_bytes < 0:
            run.note(f"{name} was left out: it is too large")
            return
        try:
            samples = read_samples(path)
        except ReplayError as error:
            run.note(f"{name} could not be read: {str(error).removeprefix(f'{path}').lstrip(': ')}")
            continue
        for sample in samples:
            yield {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}


def read_list(run: Run, path: Path, most_bytes: int) -> list[Row]:
    """Return the objects of a JSON file with a list of them; none, with a note, where it cannot be read."""
    try:
        entries: list[Row] = read_json(path, [dict], advice="", limit=most_bytes)
    except UnreadableError as error:
        run.note(f"{path.relative_to(run.path)} could not be read: {_reason(error)}")
        return []
    return entries


def _reason(error: UnreadableError) -> str:
    return error.reason if error.reason.startswith("line ") else f"it {error.reason}"


def _names_in(run: Run, folder: str) -> list[str]:
    """Return the names in a folder of the run, none with a note where it cannot be read."""
    try:
        return os.listdir(run.path / folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        run.note(f"{folder} could not be read: {error}")
        return []


def saved_steps(run: Run, folder: str, suffix: str) -> dict[int, Path]:
    """Return the files step_<n><suffix> of a folder of the run, by step."""
    names = _names_in(run, folder)
    found = ((re.fullmatch(rf"step_([0-9]{{1,15}})\{suffix}", name), name) for name in names)
    return dict(sorted((int(match.group(1)), run.path / folder / name) for match, name in found if match))


def _check_plain(value: Any, depth: int = 0) -> None:
    """Refuse (MalformedError) what cannot be written out."""
    if depth > MOST_NESTING:
        raise MalformedError("nested too deeply")
    # Python writes out no integer of more than 4,300 digits, and YAML has some in base 16.
    if isinstance(value, int) and value.bit_length() > 4096:
        raise MalformedError(f"an integer has {value.bit_length()} bits")
    if isinstance(value, dict):
        if not all(isinstance(key, (str, int, float)) or key is None for key in value):
            raise MalformedError("a key is neither text nor a number")
        for part in (*value, *value.values()):
            _check_plain(part, depth + 1)
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            _check_plain(part, depth + 1)


def _read_mapping(run: Run, path: Path, parse: Callable[[str], Row]) -> tuple[str, Row]:
    """Return the text of a file and the mapping in it; both empty, with a note, where it cannot be read."""
    if not os.path.lexists(path):
        run.note(f"{path.name} is missing")
        return "", {}
    try:
        text = read_text(path, advice="", limit=YAML_FILE_BYTES)
        value = parse(text)
        _check_plain(value)
    except UnreadableError as error:
        run.note(f"{path.name} could not be read: {_reason(error)}")
    except MalformedError as error:
        run.note(f"{path.name} could not be read: {error}")
    else:
        return text, value
    return "", {}


def _read_rows(run: Run, name: str) -> tuple[list[Row], int]:
    """Return lines of a file of numbers, and for how many lines of the file each of them stands.

    At most :data:`MOST_ROWS` lines and :data:`ROW_CHARS` characters are kept: each n-th line and the last one.
    """
    kept: list[tuple[Row, int]] = []
    size = count = without_step = 0
    every = 1
    last: tuple[Row, int] | None = None
    for row, length in _sized_objects(run, run.path / name):
        step = row.get("step")
        if type(step) is not int or abs(step) >= MOST_STEP:
            without_step += 1
            continue
        last = (row, length)
        if count % every == 0:
            kept.append(last)
            size += length
        count += 1
        while len(kept) > 1 and (len(kept) > MOST_ROWS or size > ROW_CHARS):
            del kept[1::2]
            size, every = sum(length for _, length in kept), 2 * every
    if last is not None and kept[-1] is not last:
        kept.append(last)
    if without_step:
        run.note(f"{name}: {without_step} lines without a step were left out")
    if every > 1:
        run.note(f"{name}: of {count:,} lines, each {every:,}th is read, and the last")
    return [restore_non_finite(row) for row, _ in kept], every


def _read_steps(run: Run, name: str) -> tuple[list[Row], int]:
    """Return lines of a file with one line for each step, as :func:`_read_rows` does, in the order of the steps."""
    rows, every = _read_rows(run, name)
    by_step = {row["step"]: row for row in rows}
    ordered = [by_step[step] for step in sorted(by_step)]
    if len(ordered) != len(rows):
        run.note(f"{name}: {len(rows) - len(ordered)} lines repeat a step: the last line of a step counts")
    elif any(found is not row for found, row in zip(ordered, rows, strict=True)):
        run.note(f"{name}: its lines are not in the order of the steps")
    return ordered, every


def _with_sound_results(row: Row) -> Row:
    """Return a line of evaluation.jsonl without results that are no numbers or have odd names. Of very many k, the
    smallest and the largest are kept."""
    results = {
        name: number
        for name, value in row.items()
        if (_RESULT_OF_K.fullmatch(name) or name in _RESULTS) and (number := to_number(value)) is not None
    }
    of_k = sorted((name for name in results if name not in _RESULTS), key=lambda name: int(name.split("@")[1]))
    for name in of_k[MOST_RESULTS - 1 : -1]:
        del results[name]
    return {name: value for name, value in row.items() if "@" not in name and name not in _RESULTS} | results


_OUTLINE = reprlib.Repr()
_OUTLINE.maxlevel, _OUTLINE.maxlist, _OUTLINE.maxdict, _OUTLINE.maxstring = 4, 20, 20, 200


def show_hidden(value: object) -> str:
    """Write out a value, and characters in it that would not show or would mislead, as ‹U+202E›. Lists and mappings are
    outlined, since they may be nested without end."""
    text = _OUTLINE.repr(value) if isinstance(value, (list, tuple, dict, set)) else str(value)
    return _HIDDEN.sub(
        lambda match: f"‹U+{ord(match.group()):04X}›", text.replace("\r\n", "\n").replace("\r", "‹U+000D›")
    )


def to_text(value: Any) -> str:
    """Return a value as text that hides nothing; None is empty."""
    return "" if value is None else show_hidden(value)


def shorten(value: object, limit: int) -> str:
    """Return a value as :func:`to_text` does, cut to ``limit`` characters; it says how many are left out."""
    text = to_text(value)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters in the file)"


def to_number(value: Any) -> float | None:
    """Return a metric as a float, the names of NaN and infinities understood; None for what is no number."""
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        value = restore_number(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def metric_values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    """Return one metric of every row."""
    return [to_number(row.get(name)) for row in rows]


def finite_values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return one metric of the rows where it is a finite number."""
    return [value for value in metric_values(rows, name) if value is not None and math.isfinite(value)]
