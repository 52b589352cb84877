"""Words and phrases of a list in texts, and results that a text corrects."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

_WORD = re.compile(r"\w+(?:'\w+)*")
_SPACES = {code: " " for code in range(128) if not (chr(code).isalnum() or chr(code) in "_'")}
_RESULT = re.compile(r"=\s?(-?[0-9][0-9,]*(?:\.[0-9]+)?)")
# It matches the reversed text, so that the search begins at the equals sign.
_LEFT_SIDE = re.compile(r" ?([\w.()\\{}]+(?: ?[-+*/^\u00d7\u00f7\u00b7] ?[\w.()\\{}]+)*)")
_LEFT_SIDE_CHARS = 64


class Phrases:
    """A list of words and phrases to find in lower-cased text.

    A word is a run of letters, digits and underscores, with apostrophes inside. A phrase is its words in a row,
    whatever punctuation or space is between them. Where several fit, the longest counts, and none overlap.
    """

    def __init__(self, phrases: Sequence[str]) -> None:
        self._by_first: dict[str, list[list[str]]] = {}
        for words in sorted((words_of(phrase) for phrase in phrases), key=len, reverse=True):
            self._by_first.setdefault(words[0], []).append(words)

    @property
    def first_words(self) -> set[str]:
        """The words with which a phrase begins."""
        return set(self._by_first)

    def find(self, words: Sequence[str], starts: Sequence[int]) -> list[int]:
        """Return the places in ``words`` at which a phrase begins, from ``starts``: :func:`possible_starts`."""
        found: list[int] = []
        end = 0
        for place in starts:
            if place < end:
                continue
            for phrase in self._by_first.get(words[place], ()):
                if words[place : place + len(phrase)] == phrase:
                    found.append(place)
                    end = place + len(phrase)
                    break
        return found


def possible_starts(words: Sequence[str], *lists: Phrases) -> list[int]:
    """Return the places of the words with which an entry of any of the lists begins: one pass for all of them."""
    first_words: set[str] = set().union(*(phrases.first_words for phrases in lists))
    return list(itertools.compress(range(len(words)), map(first_words.__contains__, words)))


def words_of(text: str) -> list[str]:
    """Return the words of a text for :class:`Phrases`, in lower case."""
    if not text.isascii():
        return _WORD.findall(_plain(text))
    # This finds the same words three times as fast.
    spaced = f" {text.lower().translate(_SPACES)} "
    if "'" in spaced:
        spaced = spaced.replace("''", " ").replace(" '", " ").replace("' ", " ")
    return spaced.split()


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")


class SelfCorrection(NamedTuple):
    """Finding on one text: does it say that it corrects itself, and does it."""

    has_phrase: bool
    """The text has a phrase of the list."""
    changes_result: bool
    """The text also changes a result: a lower bound."""


def find_self_correction(text: str, places: Sequence[int]) -> SelfCorrection:
    """Find out whether a text has a phrase of the list, and whether it really changes a result.

    A result is changed if the text states two equations with the same left side and different numbers to the right,
    with such a phrase somewhere between the first and the last equation of that left side: ``5+7=13. Wait, 5 + 7 =
    12``. A left side is the operands and operators in front of ``=``, of at most 64 characters, compared without
    spaces. A correction in words, or one that is written another way, is not seen.

    Args:
        places: the words of ``text`` at which a phrase begins.
    """
    if not places:
        return SelfCorrection(False, False)
    if text.count("=") < 2:
        return SelfCorrection(True, False)
    plain = _plain(text)
    reverse = plain[::-1]
    equations: dict[str, list[tuple[int, str]]] = {}
    for match in _RESULT.finditer(plain):
        place = len(plain) - match.start()
        left = _LEFT_SIDE.match(reverse, place, place + _LEFT_SIDE_CHARS)
        if left is not None:
            equations.setdefault(left[1].replace(" ", ""), []).append((match.start(), match[1].replace(",", "")))
    spans = [
        (stated[0][0], stated[-1][0]) for stated in equations.values() if len({number for _, number in stated}) > 1
    ]
    if not spans:
        return SelfCorrection(True, False)
    starts = [match.start() for match in _WORD.finditer(plain)]
    # In order, so that a span needs one search: a text may have thousands of phrases and of spans.
    phrases = sorted(starts[place] for place in places)
    changes_result = any(
        bisect.bisect_right(phrases, first) < bisect.bisect_left(phrases, last) for first, last in spans
    )
    return SelfCorrection(True, changes_result)
