"""The time that a row takes grows with its text, whatever the text is."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable

import pytest

from dasd_megatron.data.columns import Columns, Remedies, parse_record
from dasd_megatron.data.prepare import ngrams, words_of
from dasd_megatron.data.prompts import DataError, normalize_text
from dasd_megatron.data.rows import parse_line
from dasd_megatron.evaluation.phrases import Phrases, find_self_correction, possible_starts
from dasd_megatron.evaluation.phrases import words_of as phrase_words

COLUMNS = Columns(Remedies("", "", ""), needs_solution=False, max_answer_chars=512)
PHRASES = Phrases(["wait", "on second thought"])
UNITS = [
    *" \t\n\x0b\x85\u2028a1.,-+*/^=(){}[]'\"\\#$<>|%:;@&~_!?",
    *("####", "#### ", "\\boxed{", "\\boxed{}", "}{", "<<1=1>>", "<<", "<<1", "answer is ", "$ ", "['", '["', '{"a":'),
    *("wait a=1 a=2 ", "a=1 ", "1 000", "x'", "\n#### ", "\\text{", "\\\\", "\u00b2", "\u4e2d"),
]


def parse(text: str, field: str) -> None:
    record = {"problem": "p", "answer": "1", field: text} if field != "solution" else {"problem": "p", field: text}
    with contextlib.suppress(DataError):
        parse_record(record, "where", "id", COLUMNS)


def read_line(text: str) -> None:
    for line in (text.encode(), json.dumps({"problem": text}).encode()):
        with contextlib.suppress(DataError):
            parse_line(line, "where", 0)


def correct(text: str) -> None:
    words = phrase_words(text)
    find_self_correction(text, PHRASES.find(words, possible_starts(words, PHRASES)))


READERS: dict[str, Callable[[str], object]] = {
    "line": read_line,
    "problem": lambda text: parse(text, "problem"),
    "prompt": lambda text: parse(text, "prompt"),
    "answer": lambda text: parse(text, "answer"),
    "solution": lambda text: parse(text, "solution"),
    "id": lambda text: parse(text, "id"),
    "name of a field": lambda text: parse_record({"problem": "p", "answer": "1", text: "1"}, "where", "id", COLUMNS),
    "text of a problem": normalize_text,
    "words": words_of,
    "runs of words": lambda text: ngrams(text, 13),
    "corrections": correct,
}


def seconds(reader: Callable[[str], object], text: str) -> float:
    begun = time.process_time()
    reader(text)
    return time.process_time() - begun


def is_slow(reader: Callable[[str], object], text_of: Callable[[int], str]) -> bool:
    """Return whether twice the text takes more than thrice the time, in the best of three tries."""
    for _ in range(3):
        single, double = seconds(reader, text_of(6_000)), seconds(reader, text_of(12_000))
        if double < max(0.05, 3 * single):
            return False
    return True


@pytest.mark.parametrize("name", READERS)
def test_any_text_is_read_in_a_time_that_grows_with_it(name: str) -> None:
    def text_of(beginning: str, unit: str, length: int) -> str:
        return beginning + unit * (length // len(unit)) + "\n!"

    slow = [
        (beginning, unit)
        for beginning in ("", "#### ", "\\boxed{")
        for unit in UNITS
        if is_slow(READERS[name], functools.partial(text_of, beginning, unit))
    ]
    assert slow == []


def test_corrections_are_found_in_a_time_that_grows_with_the_text() -> None:
    def text_of(length: int) -> str:
        parts = length // 4
        return "wait " * parts + "".join(f"v{part}=1 v{part}=2 " for part in range(parts))

    assert not is_slow(correct, text_of)
