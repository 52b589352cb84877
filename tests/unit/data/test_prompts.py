"""Problems in this project's own form, and the comparison of two sets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_megatron.data.prompts import (
    DataError,
    Problem,
    check_disjoint,
    normalize_text,
    read_written_problems,
    write_problems,
)
from dasd_megatron.reading import UnreadableError

TEXT = st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=20).map(str.strip).filter(bool)


@settings(max_examples=50)
@given(st.lists(st.tuples(TEXT, TEXT, st.just("") | TEXT), min_size=1, max_size=5))
def test_written_problems_read_back_the_same(tmp_path_factory, rows):
    problems = [Problem(f"p{i}", problem, answer, solution) for i, (problem, answer, solution) in enumerate(rows)]
    path = tmp_path_factory.mktemp("problems") / "new" / "set.jsonl"
    write_problems(path, problems)
    assert read_written_problems(path) == problems
    assert [file.name for file in path.parent.iterdir()] == ["set.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "set.jsonl"
    old = [Problem("a", "1", "2", "")]
    write_problems(path, old)
    with pytest.raises(UnicodeEncodeError):
        write_problems(path, [Problem("b", "\ud800", "2", "")])
    assert read_written_problems(path) == old
    assert [file.name for file in tmp_path.iterdir()] == ["set.jsonl"]


def test_check_disjoint_compares_normalized_text():
    train = [Problem("t0", "How  many\nARE there? \ufb01ve", "5", "")]
    check_disjoint(train, [Problem("h0", "How many are there? six", "6", "")])
    check_disjoint([], train)
    same = Problem("h2", "how many are there? five", "5", "")
    with pytest.raises(DataError, match=r"'h2' also stands in the training set, as 't0'.*\(2 such in all\)"):
        check_disjoint(train, [Problem("h1", "other", "1", ""), same, same])


def test_raised_digits_make_another_problem():
    assert normalize_text("Compute 3\u00b2.") != normalize_text("Compute 32.")
    assert normalize_text("x\u2081") != normalize_text("x1")
    assert normalize_text("Compute 3\u00b2.") == normalize_text("compute  3^2.")


@pytest.mark.parametrize("line", [b"\xff", b"{", b"[]", b"[" * 100_000, b'{"id": "a"}', b'{"id": 1}', b"7" * 5000])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_damaged_problems_of_a_run_are_named(line, end, tmp_path):
    path = tmp_path / "train.jsonl"
    write_problems(path, [Problem("a", "1", "2", "")])
    path.write_bytes(path.read_bytes() + line + end)
    with pytest.raises(UnreadableError, match=r"train.jsonl line 2 is damaged .*: restore it, or") as caught:
        read_written_problems(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UnreadableError, match="absent"):
        read_written_problems(tmp_path / "absent")
