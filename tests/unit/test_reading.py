"""Files of a run directory are read, or refused in one line that names them, whatever is in their place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_megatron import reading
from dasd_megatron.reading import (
    MalformedError,
    UnreadableError,
    check_shape,
    iterate_json_lines,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_json_lines,
    read_text,
    read_yaml,
)

ADVICE = "restore it"


def refusal(work: Callable[[], Any], path: Path) -> str:
    with pytest.raises(UnreadableError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path} ") and message.endswith(f": {ADVICE}")
    assert caught.value.path == path and caught.value.reason in message
    return caught.value.reason


def test_sound_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"step": 3, "name": "π\\u2028", "values": [1, 2.5]}\n', encoding="utf-8")
    shape = {"step": int, "name": str, "values": [float], "more?": str}
    expected = {"step": 3, "name": "π\u2028", "values": [1, 2.5]}
    assert read_json(path, shape, advice=ADVICE) == expected
    assert read_yaml(path, advice=ADVICE) == expected
    assert read_bytes(path, advice=ADVICE).decode() == read_text(path, advice=ADVICE) == path.read_text()
    (tmp_path / "link").symlink_to(path)
    assert read_json(tmp_path / "link", shape, advice=ADVICE) == expected


def put_directory(path: Path) -> None:
    path.mkdir()


def put_loop(path: Path) -> None:
    path.symlink_to(path)


def put_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


@pytest.mark.parametrize(
    ("put", "reason"),
    [
        (lambda path: None, "is missing"),
        (put_directory, "Is a directory"),
        (put_loop, "Too many levels of symbolic links"),
        (os.mkfifo, "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (put_huge, "more than the"),
    ],
)
@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_bytes(path, advice=ADVICE),
        lambda path: read_json(path, object, advice=ADVICE),
        lambda path: read_yaml(path, advice=ADVICE),
        lambda path: read_json_lines(path, advice=ADVICE),
    ],
)
def test_what_is_no_file_of_bounded_size_is_refused(
    put: Callable[[Path], None], reason: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    put(tmp_path / "file")
    began = time.process_time()
    assert reason in refusal(lambda: read(tmp_path / "file"), tmp_path / "file")
    assert time.process_time() - began < 1


def test_a_name_that_no_file_has_is_refused(tmp_path: Path) -> None:
    assert "is no path" in refusal(lambda: read_bytes(tmp_path / "a\0b", advice=ADVICE), tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b'{"step": 3', "not JSON"),
        (b'{"step": 3}\xff', "not UTF-8 at byte 11"),
        (b"\0" * 40, "not JSON"),
        (b"[" * 10**6, "nested too deeply"),
        (b'{"step": ' + b"1" * 5000 + b"}", "too many digits"),
        (b'{"step": 1' + b"0" * 30 + b"}", "step is not an integer of 64 bits"),
        (b'{"step": "3"}', "step is not an integer"),
        (b'{"step": true}', "step is not an integer"),
        (b'{"step": 3.0}', "step is not an integer"),
        (b"{}", "it has no 'step'"),
        (b"[]", "it is not an object"),
        (b'{"step": 3, "\\ud800": 1}', "a name in it is not a string"),
    ],
)
def test_damaged_json_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert reason in refusal(lambda: read_json(path, {"step": int}, advice=ADVICE), path)


def test_a_shape_says_where_a_value_is_wrong() -> None:
    shape = {"files": {str: {"bytes": int, "sha256": str}}, "names": [(None, str)], "any": object}
    sound = {"files": {"a": {"bytes": 1, "sha256": "f"}}, "names": [None, "x"], "any": [{}]}
    check_shape(sound, shape)
    for change, where in (
        ({"files": {"a": {"bytes": "1", "sha256": "f"}}}, "files.a.bytes is not an integer"),
        ({"files": {"a\n\x1b[2J": 1}}, "files.a\\n\\x1b[2J is not an object"),
        ({"names": [None, 1]}, r"names[1] is not a string"),
        ({"names": ["\ud800"]}, "names[0] is not a string of Unicode"),
    ):
        with pytest.raises(MalformedError) as caught:
            check_shape(sound | change, shape)
        assert where in str(caught.value)
    for value, kind in ((1, bool), (True, float), (None, str), (1.5, int), ([], dict)):
        with pytest.raises(MalformedError):
            check_shape(value, kind)
    check_shape(1, float)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", "not YAML"),
        ("- a\n- b\n", "not an object"),
        ("a: &x [1]\nb: *x\n", "line 2 has an alias"),
        ("a: !!python/object/apply:os.system [id]\n", "line 1 has a tag"),
        ("a: !!int ''\n", "line 1 has a tag"),
        ("[" * 10**5, "nested too deeply"),
        ("a:\n" + "".join(" " * depth + "a:\n" for depth in range(1, 200)), "nested too deeply"),
        ("a: 2020-99-99\n", "not YAML"),
        ("1: 2\n", "a name in it is not a string"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("a: \x07\n", "not YAML"),
    ],
)
def test_yaml_that_no_program_writes_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    began = time.process_time()
    assert reason in refusal(lambda: read_yaml(path, advice=ADVICE), path)
    assert time.process_time() - began < 1


def test_lines_end_at_the_newline_byte_alone_and_blank_ones_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"a": "x\u2028y\x85z"}\n\n  \n{"b": 1}\r\n', encoding="utf-8")
    assert [(line.number, line.row) for line in read_json_lines(path, advice=ADVICE)] == [
        (1, {"a": "x\u2028y\x85z"}),
        (4, {"b": 1}),
    ]


@pytest.mark.parametrize("rest", [b'{"a"', b"\0\0\0", b'{"a": 1', b"\xff", b"[]"])
def test_the_line_that_a_killed_writer_left_is_left_out_and_damage_is_named(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b'{"a": 1}\n' + rest)
    assert [line.row for line in read_json_lines(path, advice=ADVICE)] == [{"a": 1}]
    path.write_bytes(b'{"a": 1}\n' + rest + b"\n")
    assert "line 2 is damaged" in refusal(lambda: read_json_lines(path, advice=ADVICE), path)
    whole, torn = list(iterate_json_lines(path, advice=ADVICE))
    assert whole.problem is None and torn.problem is not None and torn.row == {}


def test_a_line_without_end_is_not_taken_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LINE_BYTES", 1000)
    path = tmp_path / "file"
    path.write_text(json.dumps({"a": 1}) + "\n" + "x" * 1001)
    assert "line 2 has more than 1000 bytes" in refusal(lambda: read_json_lines(path, advice=ADVICE), path)


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
)
def test_any_bytes_are_a_value_or_malformed(content: bytes) -> None:
    for parse in (lambda: parse_json(content, object), lambda: parse_yaml(content.decode("utf-8", "replace"))):
        try:
            parse()
        except MalformedError as error:
            assert "\n" not in str(error)
