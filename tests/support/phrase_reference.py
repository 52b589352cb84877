"""A slow reference for the places of phrases in a text."""

from __future__ import annotations

import re


def slow_count(text: str, phrases: list[str]) -> int:
    """Count phrases word by word: the longest that fits, then on behind it."""
    words = re.sub(r"[^\w' ]", " ", text.lower().replace("\u2019", "'")).split()
    count = place = 0
    while place < len(words):
        fits = [
            len(phrase.split()) for phrase in phrases if words[place : place + len(phrase.split())] == phrase.split()
        ]
        count += bool(fits)
        place += max(fits, default=1)
    return count
