"""The final answer of a response, and the comparisons that need no computer algebra."""

from __future__ import annotations

import re

_BOX = "\\boxed{"
_HASHES = "####"
_ANSWER_IS = re.compile(r"\banswer(?:\s+is\s*:?|\s*:)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_FULL_STOP = re.compile(r"(?<!\\right)\.\Z")
_LATEX_SPACING = re.compile(r"\\[!,;:]|\\(?:left|right)(?![a-z])|\\?\$")
# Space between two digits stays, because "1 2" is not 12.
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")
_NUMBER = re.compile(r"([+-]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+)(?:\.([0-9]*))?")
_UNEVALUATED = re.compile(r"(?=.*[0-9)][ ]*[-+*/])[-0-9+*/(). ,]+", re.DOTALL)
_OPERATORS = re.compile(r"\\(?:times|cdot|div)(?![a-z])|[\u00d7\u00f7\u22c5]")
_POWER_OF_TEN = re.compile(
    r"([+-]?)(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]|(?:\\times|\\cdot|[\u00d7\u22c5*])10\^)|10\^)"
    r"\{?([+-]?[0-9]{1,3})\}?"
)
_E_NOTATION = re.compile(r"(?<![\w.\\])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([+-]?[0-9]+)(?![\w.])")
# Quantities are like 18 dollars, 5 m/s, 12 cm^2 or 3 pints per day. Words that make another number of the digits are no
# units.
_QUANTITY = re.compile(r"(.*[0-9.])\s+((?:[^\W\d_]+/[^\W\d_]+|[^\W\d_]{2,}(?:\^\{?[23]\}?)?)(?:\s+[^\W\d_]+)*)")
_QUANTITY_CHARS = 100
_NO_UNITS = frozenset(
    (
        "and", "or", "to", "of", "hundred", "hundreds", "thousand", "thousands", "million", "millions", "billion",
        "billions", "trillion", "trillions", "dozen", "pi", "sqrt", "times", "plus", "minus", "over", "mod", "squared",
        "cubed", "factorial", "half", "halves", "third", "thirds", "quarter", "quarters", "sin", "cos", "tan", "log",
        "ln", "exp",
    )
)  # fmt: skip
_MINUS_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"})


def extract_answer(response: str) -> str | None:
    r"""Return the final answer that ``response`` marks as such, or None.

    Three marks count, and the first of them that is present at all decides:

    - the last ``\boxed{...}`` with balanced braces;
    - the rest of the line after the last ``####``;
    - the sentence after the last ``answer is`` or ``answer:``, any case, up to its end or the line's.

    A mark without an answer behind it gives None rather than an earlier attempt; a length limit can cut a box open. A
    response without a mark gives None even where it ends in ``= 12``: the format is part of the task, and to guess at
    the last number would reward intermediate steps.

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
    """Return whether two answers are equal, where text and numbers alone can tell; None where they cannot.

    Equal text is equal. Dollar signs, LaTeX spacing, a percent sign at the end and white space that is not between
    digits do not count.

    Equal plain numbers are equal. A plain number has an optional sign (``+``, ``-`` or a typographic minus), digits
    with or without commas or spaces at the thousands, and an optional decimal part, or is such a number times a power
    of ten. ``12.0``, ``012`` and ``1.2e1`` are 12. Where a number is expected, words behind the digits of the other
    answer are its unit.

    Where an integer or a power of ten is expected, another plain number is wrong. For an integer so is arithmetic left
    undone, like ``3+9``: to repeat the problem as its own answer must not pay.

    All else (fractions, LaTeX, text, decimals that may be rounded, lists) is undecided.
    """
    if _compact(predicted) == _compact(expected):
        return True
    expected_number = _plain_number(expected)
    if expected_number is None:
        return None
    predicted = _without_unit(predicted)
    predicted_number = _plain_number(predicted)
    if predicted_number == expected_number:
        return True
    if predicted_number is not None:
        exact = (
            "." not in expected_number
            or _POWER_OF_TEN.fullmatch(_compact(expected))
            or _POWER_OF_TEN.fullmatch(_compact(predicted))
        )
        return False if exact else None
    undone = "." not in expected_number and _UNEVALUATED.fullmatch(_OPERATORS.sub("*", _compact(predicted)))
    return False if undone else None


def for_algebra(answer: str) -> str:
    """Return ``answer`` as math-verify understands it.

    math-verify would read ``2e5`` as a product with Euler's number, and a percent sign as text.
    """
    return _E_NOTATION.sub(r"\1\\times 10^{\2}", _without_percent(answer))


def normalize_answer(answer: str) -> str:
    """Return the one spelling of all answers that text and numbers alone show to be equal, as :func:`compare_plain`
    compares them.

    A plain number has no leading or trailing zeros. Other text has no dollar signs, LaTeX spacing and white space.
    """
    return _plain_number(answer) or _compact(answer)


def _balanced(text: str, start: int) -> str | None:
    """Return ``text[start:]`` up to the brace that closes one opened before ``start``; escaped braces do not count."""
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
    """Remove surrounding space, Markdown emphasis and a full stop; return None where nothing is left."""
    return _FULL_STOP.sub("", answer.strip().strip("*").strip()).rstrip() or None


def _compact(answer: str) -> str:
    return _SPACE.sub("", _spelled(answer)).removesuffix(".")


def _spelled(answer: str) -> str:
    """Return the answer in one spelling, but with its white space."""
    text = answer.translate(_MINUS_SIGNS).replace("{,}", ",").replace("\\ ", " ")
    return _without_percent(_LATEX_SPACING.sub("", text))


def _without_percent(answer: str) -> str:
    """Remove a percent sign at the end: 50% is said for 50 where percents are asked for."""
    stripped = answer.rstrip()
    return stripped[:-1].removesuffix("\\").rstrip() if stripped.endswith("%") else answer


def _without_unit(answer: str) -> str:
    quantity = _QUANTITY.fullmatch(answer.strip()) if len(answer) <= _QUANTITY_CHARS else None
    if quantity is None or not _NO_UNITS.isdisjoint(quantity[2].lower().split()):
        return answer
    return quantity[1]


def _plain_number(answer: str) -> str | None:
    """Return a number's one spelling without leading or trailing zeros; None for other text.

    It is text, because Python refuses to make an int of thousands of digits.
    """
    spelled = _spelled(answer).strip()
    # A comma and white space separate two numbers.
    if re.search(r",\s", spelled):
        return None
    compact = _SPACE.sub("", spelled).removesuffix(".")
    power = _POWER_OF_TEN.fullmatch(compact)
    match = _NUMBER.fullmatch(compact if power is None else power[1] + _shifted(power[2] or "1", int(power[3])))
    if match is None:
        return None
    sign, whole, decimals = match.groups()
    whole = whole.replace(",", "").replace(" ", "").lstrip("0") or "0"
    decimals = (decimals or "").rstrip("0")
    magnitude = f"{whole}.{decimals}" if decimals else whole
    return f"-{magnitude}" if sign == "-" and magnitude != "0" else magnitude


def _shifted(mantissa: str, exponent: int) -> str:
    """Return the digits of mantissa x 10^exponent."""
    whole, _, decimals = mantissa.partition(".")
    digits, point = whole + decimals, len(whole) + exponent
    if point <= 0:
        return "0." + "0" * -point + digits
    return digits.ljust(point, "0")[:point] + "." + digits[point:]
