"""The final answer of a response, and the comparisons that need no computer algebra."""

from __future__ import annotations

import re

_BOX = "\\boxed{"
_HASHES = "####"
_ANSWER_IS = re.compile(r"\banswer(?:\s+is\s*:?|\s*:)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_FULL_STOP = re.compile(r"(?<!\\right)\.\Z")
_LATEX_SPACING = re.compile(r"\\[!,;: ]|\\(?:left|right)(?![a-z])|\\?\$")
# Space between two digits stays: "1 2" is not 12.
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")
_NUMBER = re.compile(r"([+-]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+)(?:\.([0-9]*))?")
_UNEVALUATED = re.compile(r"(?=.*[0-9)][ ]*[-+*/])[-0-9+*/(). ,]+", re.DOTALL)
_OPERATORS = re.compile(r"\\(?:times|cdot|div)(?![a-z])|[\u00d7\u00f7\u22c5]")
_MINUS_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"})


def extract_answer(response: str) -> str | None:
    r"""The final answer that ``response`` marks as such, or None.

    Three marks count, the first that is present at all deciding: the last ``\boxed{...}`` with balanced braces; the rest of the line after
    the last ``####``; the sentence after the last ``answer is`` or ``answer:``, any case, up to its end or the line's. A mark without an
    answer behind it, such as a box that a length limit cut open, gives None rather than an earlier attempt. A response without a mark gives
    None even where it ends in ``= 12``: the format is part of the task, and guessing at the last number would reward intermediate steps.

    The time is linear in the length of the response.
    """
    start = response.rfind(_BOX)
    if start >= 0:
        return _balanced(response, start + len(_BOX))
    start = response.rfind(_HASHES)
    if start >= 0:
        return _clean(response[start + len(_HASHES) :].split("\n", 1)[0])
    end_of_mark = max((match.end() for match in _ANSWER_IS.finditer(response)), default=None)
    if end_of_mark is None:
        return None
    line = response[end_of_mark:].lstrip(" \t*\n").split("\n", 1)[0]
    return _clean(_SENTENCE_END.split(line, maxsplit=1)[0])


def compare_plain(predicted: str, expected: str) -> bool | None:
    """Whether two answers are equal, where text and numbers alone can tell; None where they cannot.

    Equal text is equal; dollar signs, LaTeX spacing and white space (but not between digits) aside. So are equal plain numbers: an optional
    sign (``+``, ``-`` or a typographic minus), digits with or without commas or spaces at the thousands, an optional decimal part; ``12.0``
    and ``012`` are 12. Where an integer is expected, another plain number is wrong, and so is arithmetic left undone, like ``3+9``:
    repeating the problem as its own answer must not pay. All else (fractions, LaTeX, text, decimals that may be rounded) is undecided.
    """
    predicted, expected = _compact(predicted), _compact(expected)
    if predicted == expected:
        return True
    expected_number = _plain_number(expected)
    if expected_number is None:
        return None
    predicted_number = _plain_number(predicted)
    if predicted_number == expected_number:
        return True
    integer_expected = "." not in expected_number
    if integer_expected and (predicted_number is not None or _UNEVALUATED.fullmatch(_OPERATORS.sub("*", predicted))):
        return False
    return None


def normalize_answer(answer: str) -> str:
    """One spelling for answers that text and numbers alone show to be equal: of a plain number without leading or trailing zeros, else the
    text without dollar signs, LaTeX spacing and white space, as :func:`compare_plain` compares them."""
    compact = _compact(answer)
    return _plain_number(compact) or compact


def _balanced(text: str, start: int) -> str | None:
    """``text[start:]`` up to the brace that closes one opened before ``start``; escaped braces do not count."""
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return _clean(text[start:position])
        position += 1
    return None


def _clean(answer: str) -> str | None:
    """Without surrounding space, Markdown emphasis and a full stop; None where nothing is left."""
    return _FULL_STOP.sub("", answer.strip().strip("*").strip()).rstrip() or None


def _compact(answer: str) -> str:
    return _SPACE.sub("", _LATEX_SPACING.sub("", answer.translate(_MINUS_SIGNS).replace("{,}", ","))).removesuffix(".")


def _plain_number(compact: str) -> str | None:
    """A number's one spelling without leading or trailing zeros; text, since Python refuses to make an int of thousands of digits."""
    match = _NUMBER.fullmatch(compact)
    if match is None:
        return None
    sign, whole, decimals = match.groups()
    whole = whole.replace(",", "").replace(" ", "").lstrip("0") or "0"
    decimals = (decimals or "").rstrip("0")
    magnitude = f"{whole}.{decimals}" if decimals else whole
    return f"-{magnitude}" if sign == "-" and magnitude != "0" else magnitude
