"""Rows of every kind of file, where they stand, and files that are damaged or none."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dasd_megatron.data import rows
from dasd_megatron.data.prompts import DataError
from dasd_megatron.data.rows import Number, read_rows

RECORDS = [{"problem": f"What is {number}+1?", "answer": str(number + 1)} for number in range(4)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
# With one object a line, as pandas and jq write it.
ARRAY_OF_LINES = "[\n" + ",\n".join(json.dumps(record) for record in RECORDS) + "\n]\n"


def values(path: Path) -> list[Any]:
    return [row.value for row in read_rows(path, "--input")]


def put(folder: Path, content: str | bytes, name: str = "set.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


FORMS = {
    "lines": LINES,
    "lines without an end": LINES.rstrip(),
    "lines with carriage returns": LINES.replace("\n", "\r\n"),
    "lines between blank ones": "\n \t\n" + LINES.replace("\n", "\n\n"),
    "array of lines": ARRAY_OF_LINES,
    "array of lines with carriage returns": ARRAY_OF_LINES.replace("\n", "\r\n"),
    "array, minified": json.dumps(RECORDS, separators=(",", ":")),
    "array, pretty": json.dumps(RECORDS, indent=4),
    "array behind space": " \n\n" + json.dumps(RECORDS),
    "pretty objects": "".join(json.dumps(record, indent=2) + "\n" for record in RECORDS),
    "pretty objects behind space": "\n\n" + "\n".join(json.dumps(record, indent="\t") for record in RECORDS),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte-order mark"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_json(form: str, mark: str, packed: bool, tmp_path: Path) -> None:
    content = (mark + FORMS[form]).encode()
    # The name says nothing.
    assert values(put(tmp_path, gzip.compress(content) if packed else content)) == RECORDS


def test_places_of_rows(tmp_path: Path) -> None:
    path = put(tmp_path, "\n" + LINES)
    assert [(row.where, row.index) for row in read_rows(path, "--input")][:2] == [
        (f"{path} line 2", 1),
        (f"{path} line 3", 2),
    ]
    path = put(tmp_path, ARRAY_OF_LINES)
    assert [(row.where, row.index) for row in read_rows(path, "--input")][2:] == [
        (f"{path} line 4 (element 3)", 2),
        (f"{path} line 5 (element 4)", 3),
    ]


def test_a_broken_line_is_one_row(tmp_path: Path) -> None:
    lines = LINES.split("\n")
    broken = ["{", "[1]", "7", "\ud800", '{"a": 1}}', "{'a': 1}", '{"a": 1, "b": 2, "a": 1}', '{"a": {"b": 1, "b": 2}}']
    content = "\n".join([lines[0], *broken, lines[1]]).encode(errors="surrogatepass")
    found = values(put(tmp_path, content))
    assert [found[0], found[-1]] == RECORDS[:2]
    assert all(isinstance(value, DataError) for value in found[1:-1]) and len(found) == 10
    # Also the first, whatever it looks like.
    for line in broken:
        if not line.startswith("["):
            found = values(put(tmp_path, (line + "\n" + LINES).encode(errors="surrogatepass")))
            assert isinstance(found[0], DataError) and found[1:] == RECORDS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ARRAY_OF_LINES.rstrip()[:-1], "the array has no end|must follow"),
        (ARRAY_OF_LINES.replace("},\n", "}\n", 1), r"line 2 \(element 1\): a comma or the array's end must follow"),
        (ARRAY_OF_LINES + LINES, "text follows the end of the array"),
        (ARRAY_OF_LINES[:80], r"line 3 \(element 2\): not JSON \(.* at line 3\)"),
        ("[" * 100_000, "nested too deeply"),
        ("[", "the array has no end"),
        (b"[\xff]", "not UTF-8 at byte 1"),
        ('[{"a": 1, "a": 2}]', r"line 1 \(element 1\): the field 'a' stands twice in an object"),
        # Without the time, so that every worker has the same name for the test.
        (gzip.compress(LINES.encode(), mtime=0)[:-9], "cannot be read"),
        (b"\x1f\x8b" + LINES.encode(), "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "pointer of Git LFS"),
        (b"PAR1" + bytes(100), "cannot be read as Parquet"),
    ],
)
def test_files_that_cannot_be_read_to_their_end_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        values(put(tmp_path, content))
    assert "set.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_any_character_that_json_allows_may_stand_in_a_string(tmp_path: Path) -> None:
    text = "".join(chr(code) for code in (*range(32, 127), 0x7F, 0x85, 0xA0, 0x2028, 0x2029, 0xFEFF, 0xFFFD, 0x1F600))
    record = {"problem": text, "answer": "1"}
    line = json.dumps(record, ensure_ascii=False)
    assert values(put(tmp_path, line + "\n" + line)) == [record, record]
    assert values(put(tmp_path, f"[{line},\n{line}]")) == [record, record]


def test_numbers_keep_their_digits(tmp_path: Path) -> None:
    long = "7" * 5000
    (record,) = values(put(tmp_path, f'{{"a": {long}, "b": 1e400, "c": 0.10, "d": 12, "e": -{long}, "f": 27.0}}'))
    assert record == {
        "a": Number(long),
        "b": Number("1e400"),
        "c": Number("0.10"),
        "d": 12,
        "e": Number(f"-{long}"),
        "f": Number("27.0"),
    }


def test_rows_and_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 100)
    long = json.dumps({"problem": "x" * 1000})
    found = values(put(tmp_path, long + "\n" + LINES + long))
    assert [isinstance(value, DataError) for value in found] == [True, *[False] * 4, True]
    assert "line 1: longer than" in str(found[0])
    found = values(put(tmp_path, f"[{long},{LINES.splitlines()[0]}]"))
    assert "element 1): longer than" in str(found[0]) and found[1] == RECORDS[0]
    monkeypatch.setattr(rows, "MAX_ARRAY_BYTES", 50)
    with pytest.raises(DataError, match="JSON of more than .* GiB; write one JSON object a line"):
        values(put(tmp_path, ARRAY_OF_LINES))


def test_blank_lines_without_an_end_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path, gzip.compress(LINES.encode() + b"\n" * 2_000_000))
    with pytest.raises(DataError, match=r"set\.jsonl line 10\d{4}: over 100,000 blank lines; remove them"):
        values(path)


def test_a_long_file_of_lines_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = put(tmp_path, gzip.compress(LINES.encode() * 10_000))
    assert sum(1 for _ in read_rows(path, "--input")) == 40_000
    assert next(iter(read_rows(path, "--input"))).value == RECORDS[0]


def test_folders_and_patterns(tmp_path: Path) -> None:
    for number, record in enumerate(RECORDS):
        put(tmp_path, json.dumps(record, indent=1), f"set/train/{number % 2}/{number}.json")
    put(tmp_path, LINES, "set/train/.cache/old.json")
    found = list(read_rows(tmp_path / "set", "--input"))
    assert [row.value for row in found] == [RECORDS[index] for index in (0, 2, 1, 3)]
    assert [row.index for row in found] == [0, 1, 2, 3]
    assert values(tmp_path / "set" / "train" / "*" / "[01].json") == RECORDS[:2]
    put(tmp_path, LINES, "set/test/0.json")
    with pytest.raises(DataError, match="holds the splits test and train; set --input to one of them"):
        values(tmp_path / "set")
    with pytest.raises(DataError, match="no file fits .*x-*"):
        values(tmp_path / "x-*.jsonl")
    # A file whose name looks like a pattern is a file.
    assert values(put(tmp_path, LINES, "a[0].jsonl")) == RECORDS
    put(tmp_path, "{}", "saved/state.json")
    with pytest.raises(DataError, match="save_to_disk"):
        values(tmp_path / "saved")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match="is no regular file"):
            values(path)
    with pytest.raises(DataError, match="does not exist; set --input to JSON lines"):
        values(tmp_path / "absent")
    with pytest.raises(DataError, match="cannot be read|is no path"):
        values(Path("a\0b"))
    with pytest.raises(DataError, match="cannot be read"):
        values(Path("x" * 5000))


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "set.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    content = path.read_bytes()
    assert values(path) == RECORDS
    # By its content, whatever its name.
    assert values(put(tmp_path, content, "set.bin")) == RECORDS
    for damaged in (content[:-20], content[: len(content) // 2], b"", content[:4]):
        with pytest.raises(DataError, match="cannot be read as Parquet") as caught:
            values(put(tmp_path, damaged, "set.parquet"))
        assert "\n" not in str(caught.value)
