"""The work of a grading process: algebra on a pair of answers.

Every worker imports this module, so it must stay light and not import torch.
"""

from __future__ import annotations

import functools
import math
import re
import resource
import signal
from typing import Any

from dasd_megatron.verify.comparison import compare_answers
from dasd_megatron.verify.plain_numbers import PlainNumber, based_number, may_be_rounded, may_round, plain_number
from dasd_megatron.verify.units import TRIGONOMETRIC

MEMORY_LIMIT_BYTES = 1 << 30
_ORPHAN_GRACE_SECONDS = 5
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.])")
_E_NOTATION = re.compile(r"(?<![\w.\\])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([+-]?[0-9]+)(?![\w.])")
# latex2sympy adds what stands next to a number, as in the mixed number 3\frac{1}{2}.
_BESIDE_NUMBER = re.compile(r"(?<![0-9_^.])([0-9]+)\s*(?=\(|\\frac|\{)")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_BASED = re.compile(r"(?<![0-9A-Za-z_^\\}])([0-9]+)_(?:\{([0-9]{1,2})\}|([0-9]))")
_DEGREES = re.compile(r"([0-9.]+)\s*\\circ(?![A-Za-z])")
_GAMMA = re.compile(r"\\gamma(?![A-Za-z])")
# The parser reads x' as x and A^T as A, and passes over what it does not know.
_PRIMES = re.compile(r"([A-Za-z])('{1,4})")
_TO_THE_T = re.compile(r"\^\s*(?:\{\s*T\s*\}|T(?![A-Za-z]))")
_MISREAD = re.compile(r"'|[0-9]_|\\(?:phantom|hphantom|vphantom|cancel)(?![A-Za-z])")


def prepare_worker() -> None:
    """Load the parser and sympy, and bound what an answer can do to the machine."""
    # The pool stops a worker by SIGTERM. A handler in Python would wait for the end of, say, a giant integer power. The
    # default action does not.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _parse("1")
    # "9^{9^{9^{9}}}" asks for more memory than any machine has. The MemoryError makes the answer wrong.
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_LIMIT_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def symbolically_equal(predicted: str, expected: str, timeout_seconds: float) -> bool:
    """Return whether two answers are equal, by text, numbers and algebra. The caller kills the worker at
    ``timeout_seconds``."""
    # If the caller itself is killed while an answer hangs, only the kernel is left to stop this process.
    signal.alarm(math.ceil(timeout_seconds) + _ORPHAN_GRACE_SECONDS)
    try:
        return compare_answers(predicted, expected, equal_by_algebra) is True
    except (MemoryError, RecursionError):
        return False
    finally:
        signal.alarm(0)


def equal_by_algebra(predicted: str, expected: str) -> bool:
    """Return whether two normalized expressions are equal, or one is a right rounding of the other."""
    from dasd_megatron.verify.equality import equal

    right = _parse(expected)
    given = _parse(predicted) if right is not None else None
    if given is None or right is None:
        return False
    number, expected_number = plain_number(predicted), plain_number(expected)
    if expected_number is not None and expected_number.has_point:
        return _rounds_to(given, expected_number)
    if number is not None and may_round(number):
        return _rounds_to(right, number)
    return equal(given, right)


def _rounds_to(exact: Any, rounded: PlainNumber) -> bool:
    """Return whether an exact value is that of a decimal, or rounds to it."""
    import sympy

    from dasd_megatron.verify.equality import equal

    decimal = sympy.Rational(str(rounded.value))
    if equal(exact, decimal):
        return True
    if not isinstance(exact, sympy.Expr) or exact.free_symbols:
        return False
    value = exact.evalf(rounded.digits + 30)
    if not value.is_Float and not value.is_Rational:
        return False
    if not may_be_rounded(rounded, None):
        return False
    return bool(abs(value - decimal) * 2 <= sympy.Rational(str(rounded.unit)))


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> Any:
    """Return what sympy understands by normalized text; None where it is no expression."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    text = for_parser(text)
    if _MISREAD.search(text):
        return None
    try:
        return latex2sympy(
            text,
            is_real=True,
            normalization_config=None,
            conversion_config=ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False),
        )
    except MemoryError:
        raise
    # The parser raises bare Exceptions for text that is no formula, and whatever sympy's constructors raise.
    except Exception:
        return None


def for_parser(text: str) -> str:
    """Return normalized text as latex2sympy reads it rightly: decimals are exact fractions, a number beside something
    is a factor, and a number with its base is its value."""
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = _E_NOTATION.sub(r"\1\\cdot 10^{\2}", text)
    if TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"(\\frac{\1 \\pi}{180})", text)
    text = text.replace("\\circ", " ")
    # latex2sympy takes a small gamma for the function.
    text = _GAMMA.sub(r"\\text{gamma}", text)
    text = _BASED.sub(_value_of_based, text)
    text = _PRIMES.sub(lambda match: f"{match[1]}_{{p{len(match[2])}}}", text)
    text = _TO_THE_T.sub("^{(T)}", text)
    text = _DECIMAL.sub(_exact_fraction, text)
    return _BESIDE_NUMBER.sub(r"\1\\cdot ", text)


def _value_of_based(match: re.Match[str]) -> str:
    number = based_number(match[0])
    return match[0] if number is None else str(int(number.digits, number.base))


def _exact_fraction(match: re.Match[str]) -> str:
    return f"{{\\frac{{{int(match[1] + match[2])}}}{{1{'0' * len(match[2])}}}}}"
