r"""Letters of multiple choice, with the text of the choice behind them."""

from __future__ import annotations

import re
from typing import NamedTuple

from dasd_megatron.verify.normalize import normalize


class Choice(NamedTuple):
    """A letter and the text behind it, which may be empty."""

    letter: str
    text: str


_LONGEST = 2000
# What stands behind the letter is the choice's text, and no formula that goes on.
_NO_FORMULA = r"(?!\s*(?:[-+*/^_,;=!<>&|]|(?:or|and)\b))"
_WRAPPED = re.compile(
    r"\s*\$?\s*\\(?:text|textbf|textrm|mathrm|mathbf|mbox|boldsymbol)\{\s*\(\s*([A-J])\s*\)\s*:?\s*\}"
    + _NO_FORMULA
    + "(.*)",
    re.DOTALL,
)
_LETTER = re.compile(
    rf"\(\s*([A-J])\s*\)(?::|\.(?![0-9]))?(?:\s+{_NO_FORMULA}(.*))?"
    rf"|([A-J])(?:\)|:|\.)(?:\s+{_NO_FORMULA}(.*))?|([A-J])",
    re.DOTALL,
)
# Who names two letters has not chosen.
_ANOTHER = re.compile(r"\(\s*[A-J]\s*\)|(?<![A-Za-z\\(])[A-J](?:\)|:|\.)(?:\s|\Z)")
_LEAD = re.compile(r"(?:\\text\{)?\s*(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s*:?\s+(?=\(?[A-J]\)?[\s.:)}]|\(?[A-J]\)?\Z)")


def choice(answer: str) -> Choice | None:
    r"""Return the letter of a multiple choice that an answer consists of, with the text behind it, as in ``C``,
    ``(C) 12``, ``C. 12`` or ``\text{C: more}``; None for other answers.

    A letter within a formula is none: ``\Delta C`` and ``C(x)`` are formulas.
    """
    if len(answer) > _LONGEST:
        return None
    wrapped = _WRAPPED.fullmatch(answer)
    if wrapped is not None:
        return _chosen(wrapped[1], wrapped[2].strip().strip("$").strip())
    text = normalize(answer).strip()
    if text.startswith("\\text{") and text.endswith("}") and text.count("{") == 1:
        text = text[len("\\text{") : -1].strip()
    text = _LEAD.sub("", text, count=1)
    match = _LETTER.fullmatch(text)
    if match is None:
        return None
    letter = match[1] or match[3] or match[5]
    return _chosen(letter, (match[2] or match[4] or "").strip())


def _chosen(letter: str, text: str) -> Choice | None:
    return None if _ANOTHER.search(text) else Choice(letter, text)
