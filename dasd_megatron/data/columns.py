"""The problem, the answer and the solution in a row of a problem file, whatever its author has called them."""

from __future__ import annotations

import decimal
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dasd_megatron.config import DataSourceConfig
from dasd_megatron.data.prompts import DataError, NoAnswerError, Problem
from dasd_megatron.data.rows import MAX_ROW_BYTES, Number
from dasd_megatron.verify.answers import extract_answer

# The names of published problem sets, the most telling first. A point leads into a nested object.
PROBLEM_FIELDS = ("problem", "question", "extra_info.question", "prompt")
ANSWER_FIELDS = ("expected_answer", "answer", "final_answer", "ground_truth", "reward_model.ground_truth")
SOLUTION_FIELDS = ("reference_solution", "solution", "generated_solution", "extra_info.answer")
_IMAGE_FIELDS = ("image", "images", "image_1")

_CALCULATOR_TEXT = r"[-+*/.,()%$0-9 ]*"
_CALCULATOR_MARK = re.compile(rf"<<{_CALCULATOR_TEXT}={_CALCULATOR_TEXT}>>")
_HASHES = "####"
_ONE_FORMULA = re.compile(r"\$[^$]*\$")
_LIST_OF_TEXTS = re.compile(r"\[\s*[\"']")
_WORD = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf)\{([^{}]*)\}")
# Signs that show nothing.
_EMPTY = re.compile(r"(?:\\(?:boxed|fbox|text)\s?\{\s?\}|[$\s{}])*")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Remedies(NamedTuple):
    """What messages tell people to do, in the options of the command at hand."""

    problem: str
    """Of a row whose problem is not found, like ``set data.train.problem_field``."""
    answer: str
    solution: str


@dataclass(frozen=True)
class Columns:
    """The fields of a row to read, and the answers that are none.

    A field that is None is looked for by the names of published problem sets.
    """

    remedies: Remedies
    problem: str | None = None
    answer: str | None = None
    solution: str | None = None
    no_answer: frozenset[str] = field(default_factory=lambda: fold(DataSourceConfig().no_answer))
    """Case-folded words that stand in the place of an answer where there is none."""
    needs_solution: bool = True
    max_answer_chars: int | None = None
    """Longest answer that can be graded; None: any."""


class Taken(NamedTuple):
    """Where the parts of a problem were found, for people; empty where there is no such part."""

    problem: str
    answer: str
    solution: str


class _Found(NamedTuple):
    name: str
    value: Any


def fold(words: list[str]) -> frozenset[str]:
    """Return words in the spelling in which they are compared."""
    return frozenset(word.casefold().strip(" .") for word in words)


def columns_of(
    source: DataSourceConfig, remedies: Remedies, needs_solution: bool, max_answer_chars: int | None
) -> Columns:
    """Return the columns that a section of the configuration names."""
    return Columns(
        remedies,
        source.problem_field,
        source.answer_field,
        source.solution_field,
        fold(source.no_answer),
        needs_solution,
        max_answer_chars,
    )


def parse_record(record: dict[str, Any], where: str, default_id: str, columns: Columns) -> tuple[Problem, Taken]:
    """Return the problem in a row, and where its parts were found.

    Args:
        record: the row.
        where: its place, at the head of messages.
        default_id: id of a problem without one.
        columns: the fields to read.

    Raises:
        DataError: it is not a usable problem.
    """
    problem, problem_name = find_problem(record, where, columns)
    solution, solution_name = _find_solution(record, where, columns)
    answer, answer_name, worked = _find_answer(record, where, columns, solution, solution_name)
    if worked is not None and not solution:
        solution_name, solution = worked.name, worked.value
    if columns.solution is None and solution_name != SOLUTION_FIELDS[0] and _bare(solution) == _bare(answer):
        # Some sets call the answer a solution. A file of this project's own means what it says.
        solution, solution_name = "", ""
    if not answer:
        raise NoAnswerError(
            f"{where}: no answer (fields: {_names(record)}): {_sought(columns.answer, ANSWER_FIELDS)} is absent or "
            "empty, and no solution ends in '#### <answer>' or marks \\boxed{<answer>}; "
            f"{columns.remedies.answer} or fix the line"
        )
    _check_answer(answer, where, answer_name, columns)
    if columns.needs_solution and not solution:
        raise DataError(
            f"{where}: no reference solution (fields: {_names(record)}): "
            f"{_sought(columns.solution, SOLUTION_FIELDS)} is absent or empty; {columns.remedies.solution}"
        )
    id = _id_text(record["id"], where) if record.get("id") is not None else default_id
    return Problem(id, problem, answer, _CALCULATOR_MARK.sub("", solution)), Taken(
        problem_name, answer_name, solution_name if solution else ""
    )


def _check_answer(answer: str, where: str, name: str, columns: Columns) -> None:
    """Refuse (DataError) an answer that no response can have."""
    word = _WORD.fullmatch(answer)
    if (answer if word is None else word[1]).casefold().strip(" .") in columns.no_answer:
        raise NoAnswerError(
            f"{where}: no answer: {name} is {_shorten(answer)!r}, which stands for a missing one; remove the line, or "
            "let tools/prepare_data.py drop all such lines"
        )
    if _EMPTY.fullmatch(answer):
        raise NoAnswerError(
            f"{where}: no answer: {name} is {_shorten(answer)!r}, which says nothing; {columns.remedies.answer} or "
            "remove the line"
        )
    if columns.max_answer_chars is not None and len(answer) > columns.max_answer_chars:
        raise DataError(
            f"{where}: {name} is an answer of {len(answer)} characters, and responses with more than "
            f"verify.max_answer_chars={columns.max_answer_chars} are never right; remove the line"
        )


def find_problem(record: dict[str, Any], where: str, columns: Columns) -> tuple[str, str]:
    """Return the text of the problem in a row, and the name of its field.

    Raises:
        DataError: there is none.
    """
    found = _find(record, columns.problem, PROBLEM_FIELDS)
    if found is None:
        raise DataError(
            f"{where}: no problem (fields: {_names(record)}): {_sought(columns.problem, PROBLEM_FIELDS)} is absent or "
            f"empty; {columns.remedies.problem} or fix the line"
        )
    name, value = found
    # A problem may itself show such messages, as text.
    messages = None if isinstance(value, str) and name == PROBLEM_FIELDS[0] else _as_messages(value)
    if messages is not None:
        text = _user_text(messages, where, name)
        name = f"{name} (its user message)"
    elif isinstance(value, str):
        text = value
    else:
        raise DataError(
            f"{where}: field {name!r} is {_shown(value)}, not a string or a list of chat messages; "
            f"{columns.remedies.problem} or fix the line"
        )
    if not text.strip():
        raise DataError(f"{where}: field {name!r} is empty; fix or remove the line")
    if columns.problem is None:
        image = next((image for image in _IMAGE_FIELDS if record.get(image) not in (None, "", [])), None)
        if image is not None:
            raise DataError(f"{where}: field {image!r} holds an image, which the text of a problem cannot show")
        context = record.get("context")
        if name == "question" and isinstance(context, str) and context.strip():
            text, name = f"{context.strip()}\n{text}", "context and question"
    return _valid_text(text.strip(), where, name), name


def _find_solution(record: dict[str, Any], where: str, columns: Columns) -> tuple[str, str]:
    found = _find(record, columns.solution, SOLUTION_FIELDS)
    if found is None:
        return "", ""
    name, value = found
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise DataError(
            f"{where}: field {name!r} is {_shown(value)}, not a string; fix the line, or name another field"
        )
    return _valid_text("\n".join(parts).strip(), where, name), name


def _find_answer(
    record: dict[str, Any], where: str, columns: Columns, solution: str, solution_name: str
) -> tuple[str, str, _Found | None]:
    """Return the answer, where it was found, and the worked solution around it where the answer's field has one."""
    found = _find(record, columns.answer, ANSWER_FIELDS)
    if found is None:
        marked = extract_answer(solution) if solution else None
        found = _Found(f"the marked answer of {solution_name}", marked or [])
    name, value = found
    if isinstance(value, str) and _LIST_OF_TEXTS.match(value.strip()):
        value = _listed(value, where, name)
    # Of several answers, each may have a mark.
    parts = [_one_answer(part, where, name) for part in (value if isinstance(value, list) else [value])]
    answers = [_marked_answer(part) for part in parts]
    # They are joined as a response would list them.
    answer = _valid_text(", ".join(filter(None, answers)), where, name)
    if answers == parts:
        return answer, name, None
    is_worked = len(parts) == 1 and _bare(parts[0]) not in (answer, f"\\boxed{{{answer}}}")
    worked = _Found(name, _valid_text(parts[0], where, name)) if is_worked else None
    return answer, f"the marked answer of {name}", worked


def _marked_answer(text: str) -> str:
    """Return the answer that an answer's field marks within more text, by a box or by ``####`` in its last line, or the
    text itself if it marks none."""
    # A mark may stand within another.
    for _ in range(3):
        marked: str | None = None
        if _HASHES in text.rsplit("\n", 1)[-1]:
            marked = text.rpartition(_HASHES)[2].strip()
        elif "\\boxed" in text:
            marked = extract_answer(text)
        if marked is None:
            break
        text = _without_dollars(marked)
    return text


def _find(record: dict[str, Any], chosen: str | None, usual: tuple[str, ...]) -> _Found | None:
    """Return the first of the fields that has a value."""
    for name in usual if chosen is None else (chosen,):
        value = value_at(record, name)
        if value is not None and value != "" and value != []:
            return _Found(name, value)
    return None


def value_at(record: dict[str, Any], name: str) -> Any:
    """Return the value of a field, or of a path like ``reward_model.ground_truth`` or ``prompt.0.content``; None where
    there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and len(part) < 10 and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _as_messages(value: Any) -> list[dict[str, Any]] | None:
    """Return chat messages, which may be spelled as JSON in a string; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("[") and '"role"' in value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return value
    return None


def _user_text(messages: list[dict[str, Any]], where: str, name: str) -> str:
    """Return the text of the only user message. A system message is left out: templates write the instructions."""
    asked = [turn.get("content") for turn in messages if turn["role"] == "user"]
    others = {str(turn["role"]) for turn in messages} - {"user", "system"}
    if len(asked) != 1 or others:
        roles = ", ".join(_shorten(str(turn["role"]), 20) for turn in messages[:5])
        raise DataError(
            f"{where}: field {name!r} has the messages {roles!r}; a problem is one user message, behind a system "
            "message or none"
        )
    parts = asked[0] if isinstance(asked[0], list) else [{"type": "text", "text": asked[0]}]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: the user message of field {name!r} is {_shown(asked[0])}, not text")
    return "\n".join(text for text in texts if text is not None)


def _listed(text: str, where: str, name: str) -> list[Any]:
    """Return the list that a string spells as JSON, like Skywork-OR1's."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: field {name!r} is {_shown(text)}, a list of answers that is not JSON; write a JSON list"
        ) from error
    if not isinstance(value, list):
        raise DataError(f"{where}: field {name!r} is {_shown(text)}; write one answer or a JSON list")
    return value


def _one_answer(value: Any, where: str, name: str) -> str:
    if isinstance(value, str):
        # A form feed is white space to strip().
        control = _CONTROL.search(value)
        if control:
            raise DataError(
                f"{where}: field {name!r} has the control character {control[0]!r}; most likely a backslash of LaTeX "
                "was lost"
            )
        text = _without_dollars(value.strip())
        if not _LIST_OF_TEXTS.match(text):
            return text
    if isinstance(value, Number):
        return _plain_decimal(value.text)
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return _plain_decimal(str(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return _plain_decimal(repr(value))
    raise DataError(f"{where}: field {name!r} is {_shown(value)}; an answer must be a string or a finite number")


def _plain_decimal(text: str) -> str:
    """Return a number without zeros behind its last decimal: 27.0 is 27."""
    if "." not in text or "e" in text.lower():
        return text
    return text.rstrip("0").removesuffix(".")


def _without_dollars(text: str) -> str:
    return text[1:-1].strip() if _ONE_FORMULA.fullmatch(text) else text


def _bare(text: str) -> str:
    """Return a text without the dollar signs and the space around it, to tell an answer from a worked solution."""
    return text.strip("$ \n\t.")


def _id_text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{where}: field 'id' is {_shown(value)}; an id must be a non-empty string or an integer")
    return _valid_text(str(value), where, "id")


def _valid_text(text: str, where: str, name: str) -> str:
    if len(text) > MAX_ROW_BYTES:
        raise DataError(f"{where}: field {name!r} is longer than {MAX_ROW_BYTES} characters")
    # JSON can spell half of a surrogate pair ("\ud800"), which no tokenizer or UTF-8 file accepts.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {name!r} holds half of a surrogate pair at character {error.start}; fix the line"
        ) from error
    return text


def _sought(chosen: str | None, usual: tuple[str, ...]) -> str:
    return f"each of {', '.join(usual)}" if chosen is None else f"field {chosen!r}"


def _names(record: dict[str, Any]) -> str:
    return _shorten(", ".join(map(repr, record)), 300) or "none"


def _shown(value: Any) -> str:
    try:
        return _shorten(json.dumps(value, default=_spelling))
    except (RecursionError, TypeError):
        return f"a {type(value).__name__}"


def _spelling(value: Any) -> str:
    return value.text if isinstance(value, Number) else f"a {type(value).__name__}"


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def summaries(taken: dict[Taken, int]) -> Iterator[str]:
    """Yield a line for each way in which the problems of a file were found."""
    for found, count in taken.items():
        solution = f", solution from {found.solution}" if found.solution else ", no solution"
        rows = "1 row" if count == 1 else f"{count} rows"
        yield f"{rows}: problem from {found.problem}, answer from {found.answer}{solution}"
