"""Words, phrases and corrections against slow references that follow their definitions, on fresh random inputs."""

from __future__ import annotations

import random
import re
import secrets
import time

import pytest

from dasd_megatron.evaluation.phrases import (
    Phrases,
    SelfCorrection,
    find_self_correction,
    possible_starts,
    words_of,
)
from tests.support.phrase_reference import slow_count


@pytest.fixture
def draw() -> random.Random:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return random.Random(seed)


WORDS = [
    "wait",
    "Wait",
    "waiting",
    "await",
    "let",
    "me",
    "check",
    "CHECK",
    "that's",
    "that",
    "s",
    "hmm",
    "5",
    "x",
    "wait_",
    "Let\u2019s",
]
PHRASES = ["wait", "let me check", "let me", "hmm", "that's", "me check that's"]


def places_of(phrases: list[str], text: str) -> list[int]:
    finder, words = Phrases(phrases), words_of(text)
    return finder.find(words, possible_starts(words, finder))


def correction(text: str, phrases: list[str]) -> SelfCorrection:
    return find_self_correction(text, places_of(phrases, text))


def test_phrases(draw):
    texts = [
        "".join(draw.choice(WORDS) + draw.choice([" ", ", ", "\n", "... ", " **", "\u2014"]) for _ in range(100))
        for _ in range(60)
    ]
    found = [len(places_of(PHRASES, text)) for text in texts]
    assert found == [slow_count(text, PHRASES) for text in texts] and sum(found) > 0
    assert len(places_of(PHRASES, "Wait, waiting: 'wait' and LET ME\n check!")) == 3
    assert places_of(PHRASES, "") == [] == places_of([], "wait")


def test_words_of_ascii_and_of_other_texts_are_the_same(draw):
    for _ in range(500):
        text = "".join(draw.choice("ab5_'' \n.,*-") for _ in range(draw.randint(0, 40)))
        words = re.findall(r"\w+(?:'\w+)*", text)
        assert words_of(text) == words and words_of(f"{text} \u00e9")[:-1] == words, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5+7=13. Wait, 5 + 7 = 12", (True, True)),
        ("5+7=12. Wait, 5 + 7 = 12", (True, False)),
        ("5+7=13. So 5 + 7 = 12. Wait.", (True, False)),
        ("Wait. 5+7=13. Then 5 + 7 = 12.", (True, False)),
        ("5+7=13. Then 5 + 7 = 12.", (False, False)),
        ("5+7=13. Wait, 5 + 8 = 12", (True, False)),
        ("x = 3, y = 4. Actually, let me see: x = 1,000 and y = 4", (True, True)),
        ("x = 1000. Actually, x = 1,000", (True, False)),
        ("3\n-4\n#### -4", (False, False)),
    ],
)
def test_self_correction(text, expected):
    assert correction(text, ["wait", "actually"]) == expected
    assert correction("", ["wait", "actually"]) == (False, False)


def test_self_correction_against_all_pairs(draw):
    for _ in range(300):
        parts, places = [], []
        for _ in range(draw.randint(1, 8)):
            if draw.random() < 0.4:
                places.append(None)
                parts.append("wait")
            else:
                equation = (draw.choice("ab"), draw.choice("12"))
                places.append(equation)
                parts.append(f"{equation[0]} = {equation[1]}.")
        changed = any(
            places[first]
            and places[last]
            and places[first][0] == places[last][0]
            and places[first][1] != places[last][1]
            for middle, place in enumerate(places)
            if place is None
            for first in range(middle)
            for last in range(middle + 1, len(places))
        )
        assert correction(" ; ".join(parts), ["wait"]) == (None in places, changed), parts


def test_adversarial_texts_take_no_time():
    texts = [
        "=" * 200_000,
        "wait " + "1" * 200_000 + "=1 a=2",
        "wait " + "a+" * 100_000 + "=1 b=2",
        "wait = " * 30_000,
        "'" * 200_000,
    ]
    started = time.perf_counter()
    for text in texts:
        correction(text, ["wait"])
        places_of(["wait", "let me check"], text)
    assert time.perf_counter() - started < 3
