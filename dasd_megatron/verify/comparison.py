r"""Comparison of two answers, as far as text and numbers can tell, and part by part where algebra has to.

Lists, tuples, sets, intervals and matrices are compared element by element, equations by their right sides, and
quantities without their units. What is left are single expressions, like ``\frac{\sqrt{2}}{2}``, which are handed to
``algebra`` where it is given.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from dasd_megatron.verify.choices import choice
from dasd_megatron.verify.normalize import normalize
from dasd_megatron.verify.plain_numbers import (
    BasedNumber,
    PlainNumber,
    based_number,
    equal_numbers,
    equals_fraction,
    may_round,
    plain_number,
)
from dasd_megatron.verify.units import canonical_unit, split_unit, without_letter

Algebra = Callable[[str, str], bool]
"""Function of a predicted and an expected expression that returns whether they are equal."""

_WHOLE = re.compile("-?[0-9]{1,18}")
_LONGEST = 4_000
_DEEPEST = 6
_MOST_UNORDERED = 40
_LONGEST_INTEGER = 1000
_OPENING = {"(": ")", "[": "]", "\\{": "\\}", "\\langle": "\\rangle"}
_TOKEN = re.compile(
    r"\\(?:begin|end)\{[a-zA-Z]+\*?\}|\\[A-Za-z]+|\\.|[\[\](){},;=<>!]| (?:or|and) |[^\\\[\](){},;=<>! ]+| ",
    re.DOTALL,
)
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_ROW_END = re.compile(r"\\\\(?:\[[^\]]{0,10}\])?")
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")
_UNDONE = re.compile(r"(?=.*[0-9)][ ]*[-+*/(])[-0-9+*/(). ,]+", re.DOTALL)
_OPERATORS = re.compile(r"\\(?:times|cdot|div)(?![a-z])")
_INTEGER_FRACTION = re.compile(r"([+-]?)\s?(?:\\frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\}|([0-9]+)\s?/\s?([0-9]+))")
_THOUSANDS_BEFORE = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3}){0,6}")
_WORDS = re.compile(r"\\text\{([^{}]*)\}|([A-Za-z][a-z]{2,}(?: [A-Za-z][a-z]+)*)")
_ANY_WORDS = re.compile(r"\\text\{([^{}]*)\}|([A-Za-z]+(?: [A-Za-z]+)*)")
_LEAD = re.compile(r"\A(?:the\s)?(?:final\s)?answer(?:\sis\s?:?|\s?:)\s?", re.IGNORECASE)
_LABEL = re.compile(r"[A-Za-z\\|]")
_ARITHMETIC = re.compile(r"\\(?:frac|cdot|times|div|sqrt|binom|circ|sin|cos|tan)(?![A-Za-z])")
_OPERATOR_IN_LABEL = re.compile(r"[-+*/^]|\\(?:frac|cdot|times|sqrt)")
_NAMED_VALUE = re.compile(r"([A-Za-z])\s?=[^=]+", re.DOTALL)
_SYMBOL = re.compile(r"\\?[A-Za-z]+(?:_(?:\{[^{}]*\}|[0-9A-Za-z]))?'*")
_RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|lt|gt|in|cup|cap|setminus|mathbb|emptyset)(?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class _Group:
    """Several answers in one: ``brackets`` is empty for a bare list, and ``matrix`` or ``row`` for a matrix."""

    brackets: str
    items: Sequence[str | _Group]

    @property
    def is_ordered(self) -> bool:
        return self.brackets not in ("", "\\{\\}")


def compare_answers(predicted: str, expected: str, algebra: Algebra | None = None) -> bool | None:
    """Return whether two answers, as they were written, are equal.

    Without ``algebra`` the result is None where text and numbers alone cannot tell. Of answers longer than any of a
    problem the text and the numbers alone count.
    """
    # Most answers are short whole numbers, and most references too.
    if _WHOLE.fullmatch(expected) and _WHOLE.fullmatch(predicted):
        return int(predicted) == int(expected)
    if len(predicted) > _LONGEST or len(expected) > _LONGEST:
        return _compare_long(predicted.strip(), expected.strip())
    letters = _compare_choices(predicted, expected, algebra)
    if letters is not None:
        return letters
    return _compare(normalize(predicted), normalize(expected), algebra, _DEEPEST)


def _compare_long(predicted: str, expected: str) -> bool:
    given, right = plain_number(predicted), plain_number(expected)
    return predicted == expected or (given is not None and right is not None and equal_numbers(given, right))


def _compare_choices(predicted: str, expected: str, algebra: Algebra | None) -> bool | None:
    """Return whether the letters of a multiple choice agree, or the text of the right one; None where none was
    expected."""
    right = choice(expected)
    given = choice(predicted)
    if right is not None:
        if given is not None:
            return given.letter == right.letter
        return compare_answers(predicted, right.text, algebra) if right.text and choice(right.text) is None else None
    if given is not None and given.text and choice(given.text) is None:
        return compare_answers(given.text, expected, algebra)
    return None


def compact(text: str) -> str:
    """Return normalized text without the white space and the full stop that say nothing."""
    return _SPACE.sub("", text).removesuffix(".")


def _compare(predicted: str, expected: str, algebra: Algebra | None, depth: int) -> bool | None:
    predicted, expected = _without_stop(predicted), _without_stop(expected)
    if compact(predicted) == compact(expected):
        return True
    if not predicted or not expected:
        return False
    # A number's thousands are no list.
    given_number, right_number = (plain_number(split_unit(text).value) for text in (predicted, expected))
    if depth == 0 or (given_number is not None and right_number is not None):
        return _compare_leaves(predicted, expected, algebra)
    given, right = _sides(predicted), _sides(expected)
    if len(given) > 1 or len(right) > 1:
        return _compare_equations(given, right, (predicted, expected), algebra, depth)
    return _compare_structures(
        predicted if given_number is not None else _structure(predicted, depth),
        expected if right_number is not None else _structure(expected, depth),
        (predicted, expected),
        algebra,
        depth,
    )


def _compare_equations(
    given: list[str], right: list[str], texts: tuple[str, str], algebra: Algebra | None, depth: int
) -> bool | None:
    """Return whether two answers are equal of which one is an equation at least, given by its sides."""
    predicted, expected = texts
    if len(given) > 1 and len(right) > 1:
        if compact(given[0]) == compact(right[0]):
            return _compare(given[-1], right[-1], algebra, depth - 1)
        return algebra(predicted, expected) if algebra is not None else None
    if len(given) > 1:
        return _compare_value_of_equation(given, expected, algebra, depth)
    if not _LABEL.search(right[0]) or _OPERATOR_IN_LABEL.search(right[0]):
        return False
    return _compare(predicted, right[-1], algebra, depth - 1)


def _compare_value_of_equation(parts: list[str], expected: str, algebra: Algebra | None, depth: int) -> bool | None:
    """Return whether an equation's value is what is expected. 69=70 is not 70: every part that is a number counts."""
    if not _is_label(parts[0]) and _SYMBOL.fullmatch(parts[-1].strip()) and len(parts) == 2:
        parts = parts[::-1]
    values = [part for part in parts[:-1] if not _is_label(part)]
    verdicts = [_compare(parts[-1], expected, algebra, depth - 1)]
    for part in values:
        if _is_undone(part):
            # Here arithmetic has been carried out: 2+3=5 is 5.
            verdicts.append(algebra(part, expected) if algebra is not None else None)
        else:
            verdicts.append(_compare(part, expected, algebra, depth - 1))
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _is_label(part: str) -> bool:
    r"""Return whether a side of an equation names its value, and is no arithmetic, like ``2\cdot 103``."""
    return _LABEL.search(_ARITHMETIC.sub("", part)) is not None


def _compare_structures(
    predicted: str | _Group, expected: str | _Group, texts: tuple[str, str], algebra: Algebra | None, depth: int
) -> bool | None:
    if isinstance(predicted, str) and isinstance(expected, str):
        return _compare_leaves(predicted, expected, algebra)
    if isinstance(predicted, _Group) and isinstance(expected, _Group):
        return _compare_groups(predicted, expected, algebra, depth)
    # What looks like a number with thousands separators may be a list.
    if isinstance(predicted, str) and isinstance(expected, _Group):
        if "," in predicted and plain_number(predicted) is not None:
            return _compare_groups(_Group("", predicted.split(",")), expected, algebra, depth)
        if _is_of_one(expected):
            return _compare_structures(predicted, expected.items[0], texts, algebra, depth)
    if isinstance(expected, str) and isinstance(predicted, _Group):
        if "," in expected and plain_number(expected) is not None:
            return _compare_groups(predicted, _Group("", expected.split(",")), algebra, depth)
        if _is_of_one(predicted):
            return _compare_structures(predicted.items[0], expected, texts, algebra, depth)
    # An interval may be written as an inequality, and the real numbers as an interval.
    if any(_RELATION.search(text) for text in texts):
        return algebra(*texts) if algebra is not None else None
    return False


def _is_of_one(group: _Group) -> bool:
    r"""Return whether a set has one element, which may be written without its braces; ``\{\emptyset\}`` may not."""
    return group.brackets == "\\{\\}" and len(group.items) == 1 and group.items[0] != "\\emptyset"


def _compare_groups(predicted: _Group, expected: _Group, algebra: Algebra | None, depth: int) -> bool | None:
    given, right = _as_tuple(_in_order(predicted, expected)), _as_tuple(expected)
    if "matrix" in (predicted.brackets, expected.brackets) and predicted.brackets == expected.brackets:
        given, right = predicted, expected
    if len(given.items) != len(right.items):
        return False
    if given.brackets != right.brackets and not (
        given.brackets == ""
        and right.brackets in ("()", "\\{\\}")
        or right.brackets == ""
        and given.brackets in ("()", "\\{\\}")
    ):
        return False

    def pair(one: str | _Group, other: str | _Group) -> bool | None:
        if isinstance(one, str) and isinstance(other, str):
            return _compare(one, other, algebra, depth - 1)
        return _compare_structures(one, other, ("", ""), algebra, depth - 1)

    if given.is_ordered or right.is_ordered or len(given.items) > _MOST_UNORDERED:
        undecided = False
        for one, other in zip(given.items, right.items, strict=True):
            verdict = pair(one, other)
            if verdict is False:
                return False
            undecided |= verdict is None
        return None if undecided else True
    return _compare_unordered(given.items, right.items, pair)


def _compare_unordered(
    predicted: Sequence[str | _Group],
    expected: Sequence[str | _Group],
    pair: Callable[[str | _Group, str | _Group], bool | None],
) -> bool | None:
    remaining = list(predicted)
    undecided = False
    for other in expected:
        verdicts = []
        for index, one in enumerate(remaining):
            verdicts.append(pair(one, other))
            if verdicts[-1] is True:
                del remaining[index]
                break
        else:
            if None not in verdicts:
                return False
            undecided = True
    return None if undecided else True


def _in_order(given: _Group, right: _Group) -> _Group:
    """Return the values ``y=4, x=8`` in the order of their letters, where a tuple is expected."""
    if given.brackets or right.brackets != "()" or len(given.items) != len(right.items):
        return given
    named = [_NAMED_VALUE.fullmatch(item) if isinstance(item, str) else None for item in given.items]
    names = sorted(match[1] for match in named if match is not None)
    # Of letters that do not follow one another nobody knows the order.
    if len(names) < len(named) or any(ord(after) - ord(name) != 1 for name, after in itertools.pairwise(names)):
        return given
    return _Group("", [match[0] for match in sorted(filter(None, named), key=lambda match: match[1])])


def _as_tuple(group: _Group) -> _Group:
    """Return a vector, written in angle brackets or as a matrix of one row or column, as a tuple."""
    if group.brackets == "\\langle\\rangle":
        return _Group("()", group.items)
    if group.brackets != "matrix":
        return group
    rows = [row.items if isinstance(row, _Group) else [row] for row in group.items]
    if len(rows) == 1:
        return _Group("()", rows[0])
    if all(len(row) == 1 for row in rows):
        return _Group("()", [row[0] for row in rows])
    return group


def _compare_leaves(predicted: str, expected: str, algebra: Algebra | None) -> bool | None:
    """Return whether two single expressions are equal."""
    given, right = split_unit(predicted), split_unit(expected)
    if given.unit and right.unit and canonical_unit(given.unit) != canonical_unit(right.unit):
        return False
    value = given.value if plain_number(right.value) is None else without_letter(given.value)
    return _compare_values(value, right.value, algebra)


def _compare_values(predicted: str, expected: str, algebra: Algebra | None) -> bool | None:
    if compact(predicted) == compact(expected):
        return True
    based = _compare_bases(based_number(predicted), based_number(expected), predicted, expected)
    if based is not None:
        return based
    given, right = plain_number(predicted), plain_number(expected)
    if given is not None and right is not None:
        return equal_numbers(given, right)
    if right is not None and not right.has_point and _is_undone(predicted):
        return False
    fraction, expected_fraction = _fraction(predicted), _fraction(expected)
    if right is not None and fraction is not None:
        return equals_fraction(right, fraction)
    if expected_fraction is not None and (fraction is not None or given is not None):
        return _equals_exact(fraction, given, expected_fraction)
    words = _compare_words(predicted, expected)
    if words is not None:
        return words
    return algebra(predicted, expected) if algebra is not None else None


def _equals_exact(fraction: Fraction | None, number: PlainNumber | None, expected: Fraction) -> bool:
    if fraction is not None:
        return fraction == expected
    assert number is not None
    value = Fraction(number.value)
    return value == expected or (may_round(number) and abs(value - expected) * 2 <= Fraction(number.unit))


def _compare_bases(given: BasedNumber | None, right: BasedNumber | None, predicted: str, expected: str) -> bool | None:
    """Return whether numbers agree of which one has its base with it. The digits alone are right where a base is
    expected, because then the problem names it."""
    if right is not None:
        if given is not None:
            return given == right
        digits = compact(predicted).replace(" ", "").replace(",", "").removeprefix("+")
        return (digits.lstrip("0") or "0") == right.digits if re.fullmatch(r"-?[0-9A-Z.]+", digits) else False
    if given is not None and any(character.isdigit() for character in given.digits):
        return given.base == 10 and plain_number(given.digits) == plain_number(expected)
    return None


def _is_undone(text: str) -> bool:
    """Return whether the text is arithmetic left undone, like 3+9. To repeat the problem as its answer must not pay."""
    return _UNDONE.fullmatch(_OPERATORS.sub("*", compact(text))) is not None


def _fraction(text: str) -> Fraction | None:
    """Return the value of a fraction of two integers; None for other text."""
    if len(text) > _LONGEST_INTEGER:
        return None
    match = _INTEGER_FRACTION.fullmatch(text.strip())
    if match is None:
        return None
    numerator, denominator = int(match[2] or match[4]), int(match[3] or match[5])
    if denominator == 0:
        return None
    return Fraction(-numerator if match[1] == "-" else numerator, denominator)


def _compare_words(predicted: str, expected: str) -> bool | None:
    """Return whether words are equal, large letters or small; None where no words are expected."""
    right = _WORDS.fullmatch(expected)
    if right is None:
        return None
    given = (_WORDS if right[1] is None else _ANY_WORDS).fullmatch(predicted)
    if given is not None:
        one, other = ((match[1] or match[2]).strip(" .") for match in (given, right))
        if one == other or (len(other) > 2 and one.casefold() == other.casefold()):
            return True
    if right[1] is None:
        # Letters without a mark of text may be a product.
        return None
    return predicted.replace(" ", "") == right[1].replace(" ", "")


def _without_stop(text: str) -> str:
    """Return the text without the words and the stop of its sentence, and of two sides of an approximation the exact
    one."""
    text = _LEAD.sub("", text.strip(), count=1).removesuffix(".").rstrip()
    left, sign, right = text.partition("\\approx")
    if sign:
        return (right if _SYMBOL.fullmatch(left.strip()) else left).strip()
    return text


def _sides(text: str) -> list[str]:
    """Return the parts of an equation, or of a statement that something lies in a set, between its outer signs."""
    if "=" not in text and "\\in" not in text:
        return [text]
    parts, start, depth = [], 0, 0
    previous = ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        depth += _depth_change(token)
        if depth == 0 and (token == "=" or token == "\\in"):
            following = text[match.end() : match.end() + 1]
            if previous in ("<", ">", "!", "=", ":") or following == "=":
                return [text]
            parts.append(text[start : match.start()])
            start = match.end()
        elif depth == 0 and token in (",", ";", " or ", " and ", "<", ">", "\\le", "\\ge", "\\ne"):
            # A list of equations is split at its commas first, and a chain of inequalities is one statement.
            return [text]
        previous = token[-1]
    parts.append(text[start:])
    return [part.strip() for part in parts] if all(part.strip() for part in parts) else [text]


def _depth_change(token: str) -> int:
    if token in ("(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil") or token.startswith("\\begin"):
        return 1
    if token in (")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil") or token.startswith("\\end"):
        return -1
    return 0


def _structure(text: str, depth: int) -> str | _Group:
    """Return the parts of a list, tuple, set, interval or matrix, or the text itself."""
    text = text.strip()
    # Plain text has no other braces for a set.
    if text.startswith("{") and _closes_at_end(text):
        text = f"\\{{{text[1:-1]}\\}}"
    matrix = _MATRIX.fullmatch(text)
    if matrix is not None and "\\begin" not in matrix[2]:
        rows = [row.split("&") for row in _ROW_END.split(matrix[2].strip().removesuffix("\\\\"))]
        return _Group("matrix", [_Group("row", [cell.strip() for cell in row]) for row in rows])
    items, brackets = _split(text), ""
    if len(items) == 1:
        opening = next((bracket for bracket in _OPENING if text.startswith(bracket)), None)
        if opening is None or not _closes_at_end(text):
            return _with_both_signs(text)
        closing = next((bracket for bracket in _OPENING.values() if text.endswith(bracket)), "")
        inner = text[len(opening) : len(text) - len(closing)].strip()
        items, brackets = _split(inner), opening + closing
        if len(items) == 1 and _MATRIX.fullmatch(inner) is not None:
            return _structure(inner, depth)
        if len(items) == 1 and brackets == "()":
            return _structure(inner, depth - 1) if depth > 0 else text
        if len(items) == 1 and brackets != "\\{\\}":
            return text
    if not all(items):
        return text
    signed = [_with_both_signs(item) if brackets in ("", "\\{\\}") else item for item in items]
    flat: list[str | _Group] = []
    for item in signed:
        flat.extend(item.items if isinstance(item, _Group) else [item])
    return _Group(brackets, flat)


def _with_both_signs(text: str) -> str | _Group:
    r"""Return ``1 \pm x`` as the list of ``1 + x`` and ``1 - x``."""
    if "\\pm" not in text and "\\mp" not in text:
        return text
    upper = re.sub(r"\\pm(?![A-Za-z])", "+", re.sub(r"\\mp(?![A-Za-z])", "-", text))
    lower = re.sub(r"\\pm(?![A-Za-z])", "-", re.sub(r"\\mp(?![A-Za-z])", "+", text))
    return _Group("", [upper.strip().removeprefix("+").strip(), lower]) if upper != text else text


def _split(text: str) -> list[str]:
    """Return the parts between the outer commas, semicolons, ands and ors."""
    parts, start, depth = [], 0, 0
    spaced = ", " in text
    for match in _TOKEN.finditer(text):
        token = match[0]
        depth += _depth_change(token)
        if depth == 0 and token in (",", ";", " or ", " and "):
            part = text[start : match.start()].strip()
            # In 1,234, 5 the first comma stands between thousands.
            if token == "," and spaced and _THOUSANDS_BEFORE.fullmatch(part[-32:]) and _is_thousand(text, match.end()):
                continue
            # A comma may stand before the and.
            if part or token not in (" or ", " and "):
                parts.append(part)
            start = match.end()
    parts.append(text[start:].strip())
    return parts


def _is_thousand(text: str, start: int) -> bool:
    return re.fullmatch(r"[0-9]{3}(?![0-9]).?", text[start : start + 4]) is not None


def _closes_at_end(text: str) -> bool:
    """Return whether the bracket that opens the text is closed by its last one."""
    depth = 0
    for match in _TOKEN.finditer(text):
        depth += _depth_change(match[0])
        if depth <= 0:
            return match.end() == len(text) and depth == 0
    return False
