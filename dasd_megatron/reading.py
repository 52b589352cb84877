"""Reading the small files of run directories and checkpoints, any of which may be damaged, or another person's.

Each reader bounds what it takes into memory, opens nothing but regular files, and checks encoding, syntax and types.
Whatever is wrong becomes an :class:`UnreadableError` of one line, which names the file and says what to do. Shapes of
JSON values are described as :func:`check_shape` says.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dasd_megatron.files import RunDirectoryError

T = TypeVar("T")

SMALL_FILE_BYTES = 2**24
"""Most bytes of a file that is read as a whole."""
YAML_FILE_BYTES = 2**20
"""Most bytes of a YAML file, whose parser takes a second for a mebibyte."""
LINE_BYTES = 2**26
"""Most bytes of a line: a response of a million tokens, with its ids and log-probabilities, has about half of it."""
ROWS_FILE_BYTES = 2**33
"""Most bytes of a file that is read line by line, and whose rows are kept."""
_YAML_DEPTH = 64
_KINDS: dict[Any, str] = {
    None: "null",
    str: "a string of Unicode characters",
    bool: "true or false",
    int: "an integer of 64 bits",
    float: "a number",
    dict: "an object",
    list: "a list",
}

Row = dict[str, Any]


class MalformedError(ValueError):
    """Text that does not hold what it should. The message is a phrase that says what is wrong, and names no file."""


class UnreadableError(RunDirectoryError):
    """A file that is missing or damaged. The message names it and says what to do.

    Attributes:
        path: the file.
        reason: what is wrong with it, as the rest of a sentence that begins with the path.
    """

    def __init__(self, path: Path, reason: str, advice: str) -> None:
        super().__init__(f"{path} {reason}: {advice}")
        self.path, self.reason = path, reason


@dataclass(frozen=True, slots=True)
class JsonLine:
    """A line of a JSON Lines file.

    Attributes:
        number: its place in the file, counted from 1.
        text: the line without its end, empty where it is no UTF-8.
        row: its object, empty where there is a problem.
        problem: what is wrong with it, None where nothing is.
        is_whole: it ends in a newline, so that its writer was not killed in the middle of it.
    """

    number: int
    text: str
    row: Row
    problem: str | None
    is_whole: bool


def read_bytes(path: Path, *, advice: str, limit: int = SMALL_FILE_BYTES) -> bytes:
    """Return a file's content.

    Args:
        advice: what the user is to do where the file cannot be used; it ends the message.
        limit: most bytes.

    Raises:
        UnreadableError: the file is missing, no regular file, larger than ``limit``, or cannot be read.
    """
    try:
        with _open_regular(path, advice, limit) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise _cannot_read(path, error, advice) from error
    if len(content) > limit:
        raise _too_large(path, len(content), limit, advice)
    return content


def read_text(path: Path, *, advice: str, limit: int = SMALL_FILE_BYTES) -> str:
    """Return the text of a UTF-8 file. Raises UnreadableError, see :func:`read_bytes`."""
    try:
        return _decode(read_bytes(path, advice=advice, limit=limit))
    except MalformedError as error:
        raise UnreadableError(path, f"is damaged ({error})", advice) from error


def read_json(path: Path, shape: Any, *, advice: str, limit: int = SMALL_FILE_BYTES) -> Any:
    """Return the value in a JSON file, which has the ``shape`` that :func:`check_shape` describes.

    Raises:
        UnreadableError: the file cannot be read (see :func:`read_bytes`), is not JSON, or has another shape.
    """
    content = read_bytes(path, advice=advice, limit=limit)
    try:
        return parse_json(content, shape)
    except MalformedError as error:
        raise UnreadableError(path, f"is damaged ({error})", advice) from error


def read_yaml(path: Path, *, advice: str, limit: int = YAML_FILE_BYTES) -> Row:
    """Return the mapping in a YAML file, see :func:`parse_yaml`. Raises UnreadableError."""
    text = read_text(path, advice=advice, limit=limit)
    try:
        return parse_yaml(text)
    except MalformedError as error:
        raise UnreadableError(path, f"is damaged ({error})", advice) from error


def read_last_byte(path: Path, *, advice: str) -> bytes:
    """Return the last byte of a file of rows, which is empty where the file is. Raises UnreadableError, see
    :func:`read_bytes`."""
    try:
        with _open_regular(path, advice, ROWS_FILE_BYTES) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 1))
            return file.read(1)
    except OSError as error:
        raise _cannot_read(path, error, advice) from error


def iterate_json_lines(path: Path, *, advice: str) -> Iterator[JsonLine]:
    """Yield the lines of a JSON Lines file that are not blank, with what is wrong with each. Only the newline byte ends
    a line, and no more than one line is in memory.

    Raises:
        UnreadableError: the file cannot be read (see :func:`read_bytes`), or a line has more than ``LINE_BYTES``.
    """
    try:
        with _open_regular(path, advice, ROWS_FILE_BYTES) as file:
            number = 0
            while data := file.readline(LINE_BYTES + 1):
                number += 1
                if len(data) > LINE_BYTES:
                    raise UnreadableError(path, f"line {number} has more than {LINE_BYTES} bytes", advice)
                if data.strip():
                    yield _parse_line(number, data)
    except OSError as error:
        raise _cannot_read(path, error, advice) from error


def read_written(path: Path, shape: Any, make: Callable[[dict[str, Any]], T]) -> list[T]:
    """Return what ``make`` makes of each line of a JSON Lines file that this project has written for a run.

    Args:
        shape: of a line, for :func:`check_shape`.

    Raises:
        UnreadableError: the file is missing or damaged, or has a number that ``make`` finds too large (OverflowError).
    """
    advice = "restore it, or start a new run"
    made = []
    for line in iterate_json_lines(path, advice=advice):
        fault = line.problem
        try:
            check_shape(line.row, shape)
            made.append(make(line.row))
        except (MalformedError, OverflowError) as error:
            fault = fault or str(error)
        if fault is not None:
            raise UnreadableError(path, f"line {line.number} is damaged ({fault})", advice)
    return made


def read_json_lines(path: Path, *, advice: str) -> list[JsonLine]:
    """Return the lines of a JSON Lines file, of which each holds an object. A last line that a killed writer left half
    written is left out.

    Raises:
        UnreadableError: the file cannot be read, or another line is damaged; its number is named.
    """
    lines = []
    for line in iterate_json_lines(path, advice=advice):
        if line.problem is None:
            lines.append(line)
        elif line.is_whole:
            raise UnreadableError(path, f"line {line.number} is damaged ({line.problem})", advice)
    return lines


def parse_json(content: bytes | str, shape: Any) -> Any:
    """Return the value of a JSON text in UTF-8, which has the ``shape`` that :func:`check_shape` describes.

    Raises:
        MalformedError: it is no such text.
    """
    text = _decode(content) if isinstance(content, bytes) else content
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise MalformedError(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except ValueError as error:
        # Python converts no integer of more than 4,300 digits.
        raise MalformedError("a number has too many digits") from error
    except RecursionError as error:
        raise MalformedError("nested too deeply") from error
    check_shape(value, shape)
    return value


def parse_yaml(text: str) -> Row:
    """Return the mapping of a YAML text.

    Raises:
        MalformedError: it is no mapping, or :func:`check_yaml` refuses it.
    """
    import yaml

    check_yaml(text)
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        # A date that is none is a ValueError.
        raise MalformedError(f"not YAML: {_yaml_problem(error)}") from error
    check_shape(value, {str: object})
    return value


def check_yaml(text: str) -> None:
    """Refuse YAML that a program has not written for another: more than 64 levels, aliases, with which a few lines
    stand for gigabytes, and tags, which choose the type of a value.

    Raises:
        MalformedError: the text has one of these, or is no YAML.
    """
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _YAML_DEPTH:
                raise MalformedError("nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise MalformedError(f"{_line(event)} has an alias")
            if getattr(event, "tag", None) is not None:
                raise MalformedError(f"{_line(event)} has a tag")
            if not is_unicode(getattr(event, "value", None) or ""):
                raise MalformedError(f"{_line(event)} has half of a surrogate pair")
    except yaml.YAMLError as error:
        raise MalformedError(f"not YAML: {_yaml_problem(error)}") from error


def check_shape(value: Any, shape: Any, where: str = "it") -> None:
    """Refuse (MalformedError) a JSON value that has not the ``shape`` that a reader counts on.

    A shape is one of these:

    - ``object``: anything.
    - ``str``, ``bool``, ``int``, ``float``, ``dict``, ``list``, ``None``: a value of that type. Integers have at most
      64 bits, and are floats too; booleans are neither; strings have no halves of surrogate pairs.
    - ``(shape, ...)``: one of several.
    - ``[shape]``: a list of such values.
    - ``{str: shape}``: an object with any keys and such values.
    - ``{"name": shape, "name?": shape}``: an object with these keys, of which those with a question mark may be absent,
      and maybe others.

    Args:
        where: the place of the value, for the message.
    """
    if isinstance(shape, tuple):
        _check_alternatives(value, shape, where)
    elif isinstance(shape, list):
        _check_type(value, list, where)
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{index}]")
    elif isinstance(shape, dict):
        _check_type(value, dict, where)
        _check_object(value, shape, where)
    else:
        _check_type(value, shape, where)


def _check_alternatives(value: Any, shapes: tuple[Any, ...], where: str) -> None:
    problems = []
    for shape in shapes:
        try:
            return check_shape(value, shape, where)
        except MalformedError as error:
            problems.append(error)
    # The last alternative is the one that is usual; the others are what may stand in its place.
    raise problems[-1]


def _check_object(value: dict[str, Any], shape: dict[Any, Any], where: str) -> None:
    for key in value:
        _check_type(key, str, f"a name in {where}")
    if str in shape:
        for key, item in value.items():
            check_shape(item, shape[str], _place(where, key))
        return
    for name, inner in shape.items():
        key = name.removesuffix("?")
        if key in value:
            check_shape(value[key], inner, _place(where, key))
        elif not name.endswith("?"):
            raise MalformedError(f"{where} has no {key!r}")


def _check_type(value: Any, kind: Any, where: str) -> None:
    if kind is float and isinstance(value, int):
        kind = int
    if kind is None:
        fits = value is None
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    elif kind is str:
        fits = isinstance(value, str) and is_unicode(value)
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise MalformedError(f"{where} is not {_KINDS.get(kind, kind)}")


def is_unicode(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which JSON can spell and no file or terminal takes."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place(where: str, key: str) -> str:
    short = ascii(key)[1:-1][:60]
    return short if where == "it" else f"{where}.{short}"


def _parse_line(number: int, data: bytes) -> JsonLine:
    is_whole = data.endswith(b"\n")
    text = ""
    try:
        text = _decode(data.removesuffix(b"\n"))
        return JsonLine(number, text, parse_json(text, dict), None, is_whole)
    except MalformedError as error:
        return JsonLine(number, text, {}, str(error), is_whole)


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedError(f"not UTF-8 at byte {error.start}") from error


def _open_regular(path: Path, advice: str, limit: int) -> BinaryIO:
    """Open a file for reading bytes. Raises OSError, and UnreadableError for what is no file or too large."""
    try:
        # Opening a named pipe would wait for its writer.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 - returned
    except ValueError as error:
        raise UnreadableError(path, f"is no path ({error})", advice) from error
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        return file
    file.close()
    if stat.S_ISREG(status.st_mode):
        raise _too_large(path, status.st_size, limit, advice)
    raise UnreadableError(path, "is no regular file", advice)


def _cannot_read(path: Path, error: OSError, advice: str) -> UnreadableError:
    if isinstance(error, FileNotFoundError):
        return UnreadableError(path, "is missing", advice)
    return UnreadableError(path, f"cannot be read ({error.strerror or error})", advice)


def _too_large(path: Path, size: int, limit: int, advice: str) -> UnreadableError:
    return UnreadableError(path, f"is damaged ({size} bytes, more than the {limit} of any such file)", advice)


def _line(event: Any) -> str:
    return f"line {event.start_mark.line + 1}"


def _yaml_problem(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    return str(problem) if mark is None else f"{problem} at line {mark.line + 1} column {mark.column + 1}"
