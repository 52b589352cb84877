"""Plain numbers: their exact values, how many digits they give, and which rounding of a number is right.

A plain number is written with digits alone: a sign, thousands separators, a decimal point, a power of ten. Values are
exact at any length and size; nothing is compared with a tolerance.
"""

from __future__ import annotations

import decimal
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

_NUMBER = re.compile(r"([+-]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|)(?:\.([0-9]*))?")
_POWER_OF_TEN = re.compile(
    r"([+-]?)(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s?(?:[eE]|(?:\\times|\\cdot|\*|x)\s?10\s?\^\s?)|10\s?\^\s?)"
    r"\{?\s?([+-]?[0-9]{1,3})\s?\}?"
)
_BASED = re.compile(
    r"([+-]?)\(?([0-9A-Z]+(?:\.[0-9A-Z]+)?)\)?_\s?(?:\{\s?\(?(.{1,24}?)\)?\s?\}|\\text\{\s?([a-z]{2,12})\s?\}|([0-9]))"
)
_IN_BASE = re.compile(r"([+-]?)([0-9A-Z]+(?:\.[0-9A-Z]+)?)\s?\(?\s?(?:in\s)?[bB]ase[\s-]([a-z0-9]{1,12})\s?\)?")
_BASE_NAMES = {
    name: base
    for base, name in enumerate(
        (
            "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
            "fourteen", "fifteen", "sixteen",
        ),
        2,
    )
} | {"binary": 2, "octal": 8, "decimal": 10, "hexadecimal": 16, "hex": 16}  # fmt: skip
_HIGHEST_BASE = 36
# Digits from which on a decimal is taken for a rounded value and not for an exact one: 0.5 is a half, 3.14 is pi.
_DIGITS_OF_A_ROUNDING = 3
_DIGITS_OF_A_MEASUREMENT = 2
_DIGITS_OF_AN_ENDLESS_DECIMAL = 2
_DIGITS_FOR_AN_EXACT_VALUE = 6

# Every operation is exact: nothing has more digits than this, and so no result is rounded.
_EXACT = decimal.Context(prec=decimal.MAX_PREC, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)


@dataclass(frozen=True, slots=True)
class PlainNumber:
    """A number as it was written."""

    value: Decimal
    """Exact."""
    unit: Decimal
    """The value of one in the last digit, like 0.01 for 3.14."""
    digits: int
    """Significant digits, trailing zeros behind a decimal point included."""
    has_point: bool
    has_exponent: bool

    @property
    def is_whole(self) -> bool:
        """Whether the value is a whole number, however it is written: 12.00 is 12."""
        return self.value == self.value.to_integral_value()

    @property
    def is_exact(self) -> bool:
        """Whether the number stands for its value alone, and not for all that it may be a rounding of."""
        enough = _DIGITS_OF_A_MEASUREMENT if self.has_exponent else _DIGITS_OF_A_ROUNDING
        return not self.has_point or self.digits < enough or (self.is_whole and not self.has_exponent)


def plain_number(text: str) -> PlainNumber | None:
    """Return the number that normalized ``text`` writes; None where it is something else."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return _number("", text, None, 0, False)
    # A comma and white space separate two numbers.
    if not text or ", " in text:
        return None
    compact = text.replace("- ", "-", 1).replace("+ ", "+", 1)
    power = _POWER_OF_TEN.fullmatch(compact)
    if power is not None:
        whole, _, decimals = (power[2] or "1").partition(".")
        return _number(power[1], whole, decimals if "." in (power[2] or "") else None, int(power[3]), True)
    match = _NUMBER.fullmatch(compact)
    if match is None or not (match[2] or match[3]):
        return None
    return _number(match[1], match[2].replace(",", "").replace(" ", ""), match[3], 0, False)


def _number(sign: str, whole: str, decimals: str | None, exponent: int, has_exponent: bool) -> PlainNumber:
    places = len(decimals or "")
    value = Decimal(f"{sign}{whole or '0'}{decimals or ''}E{exponent - places}")
    return PlainNumber(
        value,
        Decimal((0, (1,), exponent - places)),
        len((whole + (decimals or "")).lstrip("0")),
        decimals is not None,
        has_exponent,
    )


def equal_numbers(predicted: PlainNumber, expected: PlainNumber) -> bool:
    """Return whether ``predicted`` is right where ``expected`` is.

    Equal values are equal. A number with more digits than the expected one is right if it rounds to it, where the
    expected one may be a rounding (:attr:`PlainNumber.is_exact`).
    """
    if predicted.value == expected.value:
        return True
    if expected.is_exact or predicted.unit >= expected.unit:
        return False
    return _rounds_to(predicted.value, expected)


def _rounds_to(value: Decimal, expected: PlainNumber) -> bool:
    distance = _EXACT.subtract(value, expected.value).copy_abs()
    return _EXACT.multiply(distance, Decimal(2)) <= expected.unit


def equals_fraction(expected: PlainNumber, value: Fraction) -> bool:
    """Return whether a fraction is right where the plain number ``expected`` is."""
    exact = Fraction(expected.value)
    return value == exact or (may_be_rounded(expected, value) and abs(value - exact) * 2 <= Fraction(expected.unit))


def may_be_rounded(expected: PlainNumber, value: Fraction | None) -> bool:
    """Return whether ``expected`` may be the rounding of an exact value.

    It is easier to believe where the value has no finite decimal expansion. None stands for an irrational value.
    """
    if value is not None:
        odd = value.denominator
        for prime in (2, 5):
            while odd % prime == 0:
                odd //= prime
        if odd == 1:
            return not expected.is_exact
    return expected.has_point and not expected.is_whole and expected.digits >= _DIGITS_OF_AN_ENDLESS_DECIMAL


def may_round(predicted: PlainNumber) -> bool:
    """Return whether ``predicted`` has digits enough to stand for an expected value that is exact."""
    return predicted.has_point and not predicted.is_whole and predicted.digits >= _DIGITS_FOR_AN_EXACT_VALUE


@dataclass(frozen=True, slots=True)
class BasedNumber:
    """A number whose base is written with it, like 1101_2."""

    digits: str
    base: int


def based_number(text: str) -> BasedNumber | None:
    r"""Return the number and its base that normalized ``text`` writes, like ``1101_2``, ``2A_{16}``,
    ``1101_{\text{two}}`` or ``1101 (base 2)``; None where it is something else."""
    match = _BASED.fullmatch(text) or _IN_BASE.fullmatch(text)
    if match is None:
        return None
    name = (match[3] or match[4] or match[5]).replace("\\text", "").strip("{}() ").removeprefix("base").strip().lower()
    base = _BASE_NAMES.get(name) or (int(name) if name.isascii() and name.isdigit() and len(name) <= 2 else 0)
    digits = match[2]
    if not 2 <= base <= _HIGHEST_BASE or not all(int(digit, 36) < base for digit in digits.replace(".", "")):
        return None
    # A_12 is a symbol with an index, unless a digit says that it is a number.
    if not any(digit.isdigit() for digit in digits) and base <= 10:
        return None
    return BasedNumber(match[1].replace("+", "") + (digits.lstrip("0") or "0"), base)
