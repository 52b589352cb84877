"""Rows of problem files: JSON lines, JSON arrays and Parquet, plain or gzipped, in one file or several.

Every reader of problems takes its rows from here, so that a file that one of them takes all take.
"""

from __future__ import annotations

import collections
import glob
import gzip
import importlib.util
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasd_megatron.data.prompts import DataError
from dasd_megatron.errors import first_line

MAX_ROW_BYTES = 2**24
"""A row, and a text in it, may have 16 MiB."""
MAX_ARRAY_BYTES = 2**30
"""JSON that is not one row a line is read as a whole, and may have 1 GiB."""
_MEBIBYTES = f"{MAX_ROW_BYTES // 2**20} MiB"
FORMS = "JSON lines, a JSON array or Parquet"
# Integers with more digits stay text. Python refuses to convert more than 4,300, and can be told to refuse more than
# 640.
_MAX_INTEGER_DIGITS = 600
_MOST_BLANK_LINES = 100_000
_SPACE = re.compile(r"[ \t\n\r]*")
_SPLIT = re.compile(r"(train|test|val|dev)")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_GZIP, _PARQUET, _BYTE_ORDER_MARK = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"


class _RepeatedNameError(Exception):
    """A JSON object that has a field twice."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number as its file spells it, where float or int would lose digits or refuse it."""

    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a problem file, or the error that says why there is none in its place."""

    where: str
    """The file and the line, for messages."""
    index: int
    """The place among the rows, from 0; of JSON lines the place among the lines."""
    value: dict[str, Any] | DataError


def files_of(path: Path, setting: str) -> list[Path]:
    """Return the files that a path names: a file itself, all of a folder, or all that fit a pattern like
    ``data/train-*.parquet``.

    Of a folder with files of several kinds, Parquet comes before JSON lines, and these before JSON. A folder that has
    files of a training and of a test split is refused.

    Raises:
        DataError: there is no such file.
    """
    if "\0" in str(path):
        raise DataError(f"{str(path)!r} is no path; set {setting} to {FORMS}")
    if not path.exists() and any(sign in str(path) for sign in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if not found:
            raise DataError(f"no file fits {path}; set {setting} to {FORMS}")
        return found
    if not path.is_dir():
        return [path]
    if (path / "state.json").exists():
        raise DataError(
            f"{path} was written by save_to_disk, which tools/prepare_data.py --dataset reads; set {setting} to {FORMS}"
        )
    for endings in ((".parquet",), (".jsonl", ".jsonl.gz"), (".json", ".json.gz")):
        found = sorted(file for file in path.rglob("*") if file.name.endswith(endings) and not _is_hidden(file, path))
        parts = {part for file in found for part in file.relative_to(path).parts}
        splits = {match[1] for part in parts if (match := _SPLIT.match(part))}
        if len(splits) > 1:
            raise DataError(
                f"{path} holds the splits {' and '.join(sorted(splits))}; set {setting} to one of them, like "
                f"{path}/train*"
            )
        if found:
            return found
    raise DataError(f"{path} is a folder without a .parquet, .jsonl or .json file; set {setting} to {FORMS}")


def read_rows(path: Path, setting: str) -> Iterator[Row]:
    """Yield the rows of the files that ``path`` names, in order, without holding more than one row of JSON lines or
    one batch of Parquet.

    The first bytes of a file say what it is: Parquet, a JSON array, or else JSON lines, which may be gzipped. A file
    may also be a row of JSON that spans several lines, or several such. Text is UTF-8; a byte-order mark and blank
    lines are tolerated. Of numbers that float or int would change, the text is kept (:class:`Number`).

    Args:
        path: as :func:`files_of` takes it.
        setting: the option that named the path, for messages.

    Raises:
        DataError: a file is missing, is no file of rows, or cannot be read to its end. The message names it. What is
            wrong with one row of JSON lines comes as that row, and the next follow.
    """
    try:
        files = files_of(path, setting)
        first = 0
        for file in files:
            last = first - 1
            for row in _file_rows(file, setting, first):
                last = row.index
                yield row
            first = last + 1
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist; set {setting} to {FORMS}") from error
    # gzip has errors of its own.
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{path} cannot be read ({reason}); set {setting} to a readable file") from error


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _file_rows(path: Path, setting: str, first: int) -> Iterator[Row]:
    # A pipe or a device may have no end, and gives its bytes only once.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{path} is no regular file; set {setting} to {FORMS}")
    with open(path, "rb") as file:
        head = file.peek(len(_LFS_POINTER))
        if head.startswith(_LFS_POINTER):
            raise DataError(f"{path} is a pointer of Git LFS and not the file itself; run git lfs pull where it is")
        if head.startswith(_PARQUET) or path.suffix == ".parquet":
            yield from _parquet_rows(path, setting, first)
        elif head.startswith(_GZIP):
            with gzip.GzipFile(fileobj=file) as unpacked, io.BufferedReader(unpacked) as content:
                yield from _json_rows(content, path, first)
        else:
            yield from _json_rows(file, path, first)


def _parquet_rows(path: Path, setting: str, first: int) -> Iterator[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(
            f"{path}: a Parquet file needs the pyarrow package: pip install 'dasd-megatron[data]', or give JSON lines"
        )
    import pyarrow
    import pyarrow.parquet

    index = first
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                yield Row(f"{path} row {index - first}", index, record)
                index += 1
    # Text that is not UTF-8 and times that Python cannot hold are no errors of pyarrow's own.
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({first_line(error)}); set {setting} to another file"
        ) from error


def _json_rows(file: io.BufferedReader[Any], path: Path, first: int) -> Iterator[Row]:
    head = file.peek(8192).removeprefix(_BYTE_ORDER_MARK).lstrip()
    if head.startswith(b"["):
        yield from _values(_whole_text(file, path), path, first, is_array=True)
        return
    if rows := _objects_over_lines(file, path, first, head):
        yield from rows
        return
    number = blank = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        # A few bytes that are packed can be blank lines without an end.
        blank = 0 if line.strip() else blank + 1
        if blank > _MOST_BLANK_LINES:
            raise DataError(f"{path} line {number + 1}: over {_MOST_BLANK_LINES:,} blank lines; remove them")
        where = f"{path} line {number + 1}"
        value: dict[str, Any] | DataError | None
        if len(line) > MAX_ROW_BYTES:
            value = DataError(f"{where}: longer than {_MEBIBYTES}; each line must be one JSON object")
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES)
        else:
            try:
                value = parse_line(line, where, number)
            except DataError as error:
                value = error
        if value is not None:
            yield Row(where, first + number, value)
        number += 1


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
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); each line must be one JSON object"
        ) from error
    except _RepeatedNameError as error:
        raise DataError(f"{where}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: not JSON (nested too deeply); each line must be one JSON object") from error
    return _as_object(value, where, "each line must be one JSON object")


def _as_object(value: Any, where: str, rule: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}, not an object; {rule}")
    return value


def _objects_over_lines(file: io.BufferedReader[Any], path: Path, first: int, head: bytes) -> list[Row]:
    """Return the objects of a file whose first one goes on behind the first line; none if it is not such a file.

    Args:
        file: at its beginning, where it is left if it is not such a file.
        head: its first bytes without leading space.
    """
    line, newline, _ = head.partition(b"\n")
    text = line.decode("utf-8", errors="replace").rstrip()
    try:
        _DECODER.decode(text)
    except json.JSONDecodeError as error:
        # An object that is cut at a line's end breaks there. Other errors are those of one line.
        if not (newline and text.startswith("{") and error.pos >= len(text)):
            return []
    except (RecursionError, _RepeatedNameError):
        return []
    else:
        return []
    try:
        return list(_values(_whole_text(file, path), path, first, is_array=False))
    except DataError:
        file.seek(0)
        return []


def _whole_text(file: io.BufferedReader[Any], path: Path) -> str:
    content = file.read(MAX_ARRAY_BYTES + 1)
    if len(content) > MAX_ARRAY_BYTES:
        raise DataError(f"{path}: JSON of more than {MAX_ARRAY_BYTES // 2**30} GiB; write one JSON object a line")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error


def _values(text: str, path: Path, first: int, *, is_array: bool) -> Iterator[Row]:
    """Yield the elements of a JSON array, or the objects that follow one another.

    Raises:
        DataError: the text is broken. What comes behind cannot be told apart, unlike in JSON lines.
    """
    position = _behind_space(text, 0)
    if is_array:
        position = _behind_space(text, position + 1)
    line, counted, index = 1, 0, 0
    while position < len(text) and not (is_array and text[position] == "]"):
        line += text.count("\n", counted, position)
        counted = position
        where = f"{path} line {line}" + (f" (element {index + 1})" if is_array else "")
        try:
            value, end = _DECODER.raw_decode(text, position)
        except _RepeatedNameError as error:
            raise DataError(f"{where}: {error}") from error
        except (json.JSONDecodeError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else f"{error.msg} at line {error.lineno}"
            raise DataError(f"{where}: not JSON ({reason}); the file must be an array of JSON objects") from error
        yield Row(where, first + index, _checked_element(value, where, end - position))
        index += 1
        position = _behind_space(text, end)
        if is_array and text[position : position + 1] == ",":
            position = _behind_space(text, position + 1)
        elif is_array and text[position : position + 1] != "]":
            raise DataError(f"{where}: a comma or the array's end must follow")
    if is_array and _behind_space(text, position + 1) < len(text):
        raise DataError(f"{path}: text follows the end of the array; write one array, or one JSON object a line")
    if is_array and position == len(text):
        raise DataError(f"{path}: the array has no end: the file is cut short")


def _checked_element(value: Any, where: str, size: int) -> dict[str, Any] | DataError:
    if size > MAX_ROW_BYTES:
        return DataError(f"{where}: longer than {_MEBIBYTES}")
    try:
        return _as_object(value, where, "each element must be a JSON object")
    except DataError as error:
        return error


def _behind_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _integer(digits: str) -> int | Number:
    return int(digits) if len(digits) <= _MAX_INTEGER_DIGITS else Number(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        name, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise _RepeatedNameError(f"the field {name[:80]!r} stands twice in an object; leave one of them")
    return record


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=Number, object_pairs_hook=_object)
