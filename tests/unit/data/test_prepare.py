"""The choice of problems: words, runs of words in common with evaluation sets, and names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dasd_megatron.data.prepare import Contamination, ngrams, words_of
from dasd_megatron.data.prompts import DataError


def test_words_are_counted_without_case_and_punctuation() -> None:
    assert words_of("It's 3,5 + x_1 = 8!") == words_of("it s 3 5 + X 1 = 8")
    assert words_of("2\u00d73 = \u5c0f\u660e") == ["2", "\u00d7", "3", "=", "\u5c0f", "\u660e"]


def test_runs_of_words() -> None:
    assert ngrams("a b c d", 3) == {("a", "b", "c"), ("b", "c", "d")}
    assert ngrams("a b", 3) == set()


def test_a_shared_run_of_words_is_contamination(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    texts = ["one two three four five", "short one"]
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    contamination = Contamination([path], "problem", 4)
    assert contamination.problems == 2
    assert "Zero, one two THREE four!" in contamination
    assert "one two three, six" not in contamination
    # Short problems are found by their whole text alone.
    assert "Short one." in contamination and "a short one" not in contamination


def test_an_evaluation_set_without_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"text": "1 + 1"}) + "\n")
    with pytest.raises(DataError, match=r"line 1: no problem \(fields: 'text'\).*give --problem-field"):
        Contamination([path], "problem", 4)
