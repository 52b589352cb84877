r"""Units, degrees and percent signs at the end of an answer."""

from __future__ import annotations

import re
from typing import NamedTuple


class Quantity(NamedTuple):
    """A value and what stood behind it."""

    value: str
    unit: str
    """Empty where there is none."""


# Words that make another number of the digits before them are no units.
_NO_UNITS = frozenset(
    (
        "and", "or", "to", "of", "hundred", "hundreds", "thousand", "thousands", "million", "millions", "billion",
        "billions", "trillion", "trillions", "dozen", "dozens", "pi", "sqrt", "times", "plus", "minus", "over", "mod",
        "modulo", "squared", "cubed", "factorial", "half", "halves", "third", "thirds", "quarter", "quarters", "sin",
        "cos", "tan", "log", "ln", "exp", "base", "if", "for", "when", "where", "with", "is", "are", "not", "score",
        "pair", "pairs", "percent", "except", "but", "only", "than",
    )
)  # fmt: skip
_LONGEST = 120
_PERCENT = re.compile(r"(.*\S)\s*(?:%|\\text\{\s*(?:percent|per cent|%)\s*\}|\s(?:percent|per cent))", re.DOTALL)
_DEGREES = re.compile(r"(?<=[0-9)}.A-Za-z])\s*\\circ(?=\s*(?:\\text\{[^{}]*\}\s*)?\Z)")
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
# Quantities are like 18 dollars, 5 m/s, 12 cm^2 or 3 pints per day.
_PLAIN = re.compile(
    r"(.*[0-9.})])\s+((?:[^\W\d_]+/[^\W\d_]+|[^\W\d_]{2,}(?:\^\{?[23]\}?)?)(?:\s+[^\W\d_]+)*)", re.DOTALL
)
_OF_TEXT = re.compile(
    r"\s*(?:\\text\{([^{}]*)\}(?:\s*\^\s*(?:[23]|\{\s*-?[0-9]\s*\}))?|(?:/|\\cdot(?![A-Za-z])|\\times(?![A-Za-z]))(?=\s*\\text))"
)
_LETTER = re.compile(r"(.{0,60}[0-9]) [mgshlL]")
_SYNONYMS = {
    name: unit
    for unit, names in {
        "m": "meter meters metre metres",
        "cm": "centimeter centimeters centimetre centimetres",
        "mm": "millimeter millimeters millimetre millimetres",
        "km": "kilometer kilometers kilometre kilometres",
        "in": "inch inches",
        "ft": "foot feet",
        "yd": "yard yards",
        "mi": "mile miles",
        "kg": "kilogram kilograms",
        "g": "gram grams",
        "lb": "lbs pound pounds",
        "oz": "ounce ounces",
        "l": "liter liters litre litres",
        "s": "sec secs second seconds",
        "min": "mins minute minutes",
        "h": "hr hrs hour hours",
        "$": "dollar dollars usd",
        "deg": "degree degrees",
    }.items()
    for name in names.split()
}


def split_unit(text: str) -> Quantity:
    """Return the value of a quantity and its unit, of normalized text."""
    if len(text) > _LONGEST:
        return Quantity(text, "")
    percent = _PERCENT.fullmatch(text)
    if percent is not None:
        return Quantity(percent[1].strip(), "")
    if not TRIGONOMETRIC.search(text):
        text = _DEGREES.sub("", text)
    value, unit = _without_text(text)
    if not unit:
        plain = _PLAIN.fullmatch(text)
        if plain is not None and _are_units(plain[2]):
            value, unit = plain[1], plain[2]
    return Quantity(value, unit) if value else Quantity(text, "")


def _without_text(text: str) -> tuple[str, str]:
    r"""Return the text before the ``\text{...}`` that end it, and their words."""
    start: int | None = None
    words: list[str] = []
    end = 0
    for match in _OF_TEXT.finditer(text):
        if start is None or match.start() != end:
            start, words = match.start(), []
        words.append(match[0].strip())
        end = match.end()
    names = "".join(words)
    if start is None or end != len(text) or not _are_units(re.sub(r"\\text|[{}^/0-9-]|\\[a-z]+", " ", names)):
        return text, ""
    value = text[:start].strip()
    return (value, names) if re.search(r"[0-9)}A-Za-z]\Z", value) else (text, "")


def _are_units(words: str) -> bool:
    first, *others = words.lower().split() or [""]
    # 3 bolts of fiber are 3.
    return first not in _NO_UNITS and _NO_UNITS.isdisjoint(word for word in others if word != "of")


def without_letter(text: str) -> str:
    """Return ``540 m`` without the letter of its unit. Elsewhere than in place of a number it may be a factor."""
    match = _LETTER.fullmatch(text)
    return text if match is None else match[1]


def canonical_unit(unit: str) -> str:
    """Return one spelling of a unit: inches are in, and dollars are $."""
    plain = re.sub(r"\\text|[{}]", " ", unit).replace("\\cdot", " ").replace("\\times", " ")
    words = re.sub(r"\s*/\s*", " per ", plain.replace("^", " ^ ")).split()
    singular = [_SYNONYMS.get(word.lower(), word.lower().rstrip("s") if len(word) > 3 else word) for word in words]
    return " ".join(singular).replace("square", "^ 2").replace("cubic", "^ 3")
