"""Problems, and the JSONL files that they are read from and written to."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dasd_megatron.config import DataSourceConfig
from dasd_megatron.files import atomic_file

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_GSM8K_ANSWER = re.compile(r"####[ \t]*([^\n]*?)\s*\Z")


class DataError(ValueError):
    """A problem set that cannot be used. The message names the file, the line, the field and the fix."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with its answer; ``reference_solution`` is empty where the source has none."""

    id: str
    problem: str
    expected_answer: str
    reference_solution: str


def load_problems(
    source: DataSourceConfig,
    name: str,
    *,
    needs_solution: bool = True,
    prepare: Callable[[dict[str, Any], str], dict[str, Any]] | None = None,
) -> list[Problem]:
    """Read problems from the JSONL file ``source.path``, in file order.

    Lines are UTF-8; a byte-order mark and blank lines are tolerated. A problem's id is its ``id`` field, else ``<file
    stem>-<index of the line, from 0>``. An answer that is a JSON number becomes its text. With ``source.size`` the file
    is read up to that many problems and no further.

    Files in the style of GSM8K: where ``answer_field`` is absent, a ``#### 72`` at the end of the solution gives the
    answer. An answer that itself ends that way is taken as a solution. Calculator marks (``<<48/2=24>>``) are removed
    from solutions. The ``####`` line stays, because the warm start imitates the solution, and a response must end in an
    answer that the verifier finds.

    Args:
        source: the file, its fields, and the number of problems.
        name: the place of ``source`` in the configuration, ``train`` or ``heldout``; used in messages.
        needs_solution: refuse problems without a reference solution.
        prepare: turns the record of a line, and the place of that line for messages, into a record with the fields
            that ``source`` names. None: the records have them already.

    Raises:
        DataError: the file is missing, unreadable, empty or too short, or a line is not a usable problem.
    """
    if source.path is None:
        raise DataError(f"data.{name}.path is not set; give the path of a JSONL file with one problem a line")
    if source.size is not None and source.size < 1:
        raise DataError(f"data.{name}.size is {source.size}; it must be at least 1, or null for the whole file")
    path = Path(source.path)
    problems: list[Problem] = []
    line_of_id: dict[str, int] = {}
    for index, line in enumerate(_read_lines(path, name)):
        where = f"{path} line {index + 1}"
        record = parse_line(line, where, index)
        if record is None:
            continue
        if prepare is not None:
            record = prepare(record, where)
        problem = parse_record(record, where, f"{path.stem}-{index}", source, f"data.{name}.", needs_solution)
        if problem.id in line_of_id:
            raise DataError(
                f"{where}: id {problem.id!r} already stands on line {line_of_id[problem.id]}; give each problem an id "
                "of its own"
            )
        line_of_id[problem.id] = index + 1
        problems.append(problem)
        if len(problems) == source.size:
            return problems
    if not problems:
        raise DataError(f"{path} holds no problems; data.{name}.path needs a JSONL file with one problem a line")
    if source.size is not None:
        raise DataError(
            f"{path} holds {len(problems)} problems, but data.{name}.size asks for {source.size}; lower it, or set it "
            "to null for all"
        )
    return problems


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems as JSONL that :func:`load_problems` reads back under its default field names.

    The file appears whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems)


def normalize_text(text: str) -> str:
    """Return the text by which two problems count as the same: Unicode NFKC, case folded, runs of white space as one
    space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_disjoint(train: Sequence[Problem], heldout: Sequence[Problem]) -> None:
    """Refuse held-out problems that also stand in the training set, compared by :func:`normalize_text`.

    Raises:
        DataError: names the first held-out problem that is also trained on, and how many there are.
    """
    trained = {normalize_text(problem.problem): problem.id for problem in train}
    shared = [problem for problem in heldout if normalize_text(problem.problem) in trained]
    if shared:
        first = shared[0]
        raise DataError(
            f"held-out problem {first.id!r} also stands in the training set, as "
            f"{trained[normalize_text(first.problem)]!r}: {_shorten(first.problem)} ({len(shared)} such in all); "
            "remove them from data.train or data.heldout"
        )


def _read_lines(path: Path, name: str) -> list[bytes]:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist; set data.{name}.path to a JSONL file with one problem a line"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); set data.{name}.path to a readable JSONL file"
        ) from error
    # Only the newline byte ends a line. str.splitlines would also break at characters such as U+2028, which JSON allows
    # inside a string.
    return content.split(b"\n")


def parse_line(line: bytes, where: str, index: int) -> dict[str, Any] | None:
    """Return the JSON object of line ``index`` (from 0) of a file, or None for a blank line.

    Raises:
        DataError: the line holds something else; the message begins with ``where``.
    """
    try:
        text = line.decode("utf-8-sig" if index == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    if not text.strip():
        return None
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        detail = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        )
        raise DataError(f"{where}: not JSON ({detail}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}, not an object; each line must be one JSON object")
    return record


def parse_record(
    record: dict[str, Any], where: str, default_id: str, source: DataSourceConfig, prefix: str, needs_solution: bool
) -> Problem:
    """Return the problem in a record, as :func:`load_problems` describes it.

    Args:
        record: the JSON object of a line.
        where: place of that line, at the head of messages.
        default_id: id of a problem without one.
        source: names of the fields.
        prefix: prefix of the settings' names in messages, like ``data.train.``.
        needs_solution: refuse a problem without a reference solution.

    Raises:
        DataError: it is not a usable problem.
    """
    problem = _text_field(record, source.problem_field, where, f"{prefix}problem_field")
    solution = ""
    if _present(record, source.solution_field):
        solution = _text_field(record, source.solution_field, where, f"{prefix}solution_field")
    answer = ""
    if _present(record, source.answer_field):
        answer = _answer_text(record[source.answer_field], where, source.answer_field)
        derived = _GSM8K_ANSWER.search(answer)
        if derived:
            solution = solution or answer
            answer = derived.group(1)
    elif solution:
        derived = _GSM8K_ANSWER.search(solution)
        answer = derived.group(1) if derived else ""
    if not answer:
        raise DataError(
            f"{where}: no answer: field {source.answer_field!r} is absent or empty and {source.solution_field!r} does "
            f"not end in '#### <answer>' (fields: {', '.join(map(repr, record))}); set {prefix}answer_field or fix "
            "the line"
        )
    if needs_solution and not solution:
        raise DataError(
            f"{where}: no reference solution: field {source.solution_field!r} is absent or empty (fields: "
            f"{', '.join(map(repr, record))}); set {prefix}solution_field, or teacher.privileged=answer, which needs "
            "none"
        )
    return Problem(
        id=_id_text(record["id"], where) if record.get("id") is not None else default_id,
        problem=problem,
        expected_answer=answer,
        reference_solution=_CALCULATOR_MARK.sub("", solution),
    )


def _present(record: dict[str, Any], field: str) -> bool:
    value = record.get(field)
    return value is not None and value != ""


def _text_field(record: dict[str, Any], field: str, where: str, setting: str) -> str:
    if field not in record:
        raise DataError(
            f"{where}: no field {field!r} (fields: {', '.join(map(repr, record)) or 'none'}); set {setting} or fix "
            "the line"
        )
    value = record[field]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field {field!r} is {_shorten(json.dumps(value))}, not a string; set {setting} or fix the line"
        )
    if not value.strip():
        raise DataError(f"{where}: field {field!r} is empty; fix or remove the line")
    return _valid_unicode(value.strip(), where, field)


def _answer_text(value: Any, where: str, field: str) -> str:
    if isinstance(value, str):
        return _valid_unicode(value.strip(), where, field)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise DataError(
        f"{where}: field {field!r} is {_shorten(json.dumps(value))}; an answer must be a string or a finite number"
    )


def _id_text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(
            f"{where}: field 'id' is {_shorten(json.dumps(value))}; an id must be a non-empty string or an integer"
        )
    return _valid_unicode(str(value), where, "id")


def _valid_unicode(text: str, where: str, field: str) -> str:
    # JSON can spell half of a surrogate pair ("\ud800"), which no tokenizer or UTF-8 file accepts.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} holds half of a surrogate pair at character {error.start}; fix the line"
        ) from error
    return text


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
