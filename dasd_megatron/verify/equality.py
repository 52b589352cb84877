"""Equality of two expressions of sympy, decided by their values at a precision that follows from their size.

Two constants are equal if they agree to so many digits, relative to their size, that expressions of their length
cannot agree by chance: at least sixty, and several times as many as the integers within them have. Expressions in
variables are equal if they agree at several points. Nothing is simplified, so the time is that of the arithmetic, and
the worker that runs this has limits of time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

_LEAST_DIGITS = 60
_MOST_DIGITS = 6000
_POINTS = (
    sympy.Rational(137, 97),
    sympy.Rational(-211, 89),
    sympy.Rational(59, 241),
    sympy.Rational(-23, 167),
    sympy.Rational(1117, 31),
    sympy.Rational(7, 3),
    sympy.Integer(5),
    sympy.Integer(2),
    sympy.Integer(9),
    sympy.Integer(4),
)
_FRACTIONAL_POINTS = 6
_ENOUGH_POINTS = 2
_FLIPPED = {
    sympy.GreaterThan: sympy.LessThan,
    sympy.LessThan: sympy.GreaterThan,
    sympy.StrictGreaterThan: sympy.StrictLessThan,
    sympy.StrictLessThan: sympy.StrictGreaterThan,
}


def equal(predicted: Any, expected: Any) -> bool:
    """Return whether two expressions, relations, sets or matrices mean the same."""
    predicted, expected = _evaluated(predicted), _evaluated(expected)
    if isinstance(predicted, sympy.Expr) and isinstance(expected, sympy.Expr):
        return equal_expressions(predicted, expected)
    if isinstance(predicted, sympy.MatrixBase) and isinstance(expected, sympy.MatrixBase):
        return predicted.shape == expected.shape and all(
            equal_expressions(one, other) for one, other in zip(predicted.flat(), expected.flat(), strict=True)
        )
    if _is_relation(predicted) and _is_relation(expected):
        if _match(_conjuncts(predicted), _conjuncts(expected), _equal_relation):
            return True
        if predicted.free_symbols != expected.free_symbols:
            return False
    elif not isinstance(predicted, sympy.Set) and not isinstance(expected, sympy.Set):
        return False
    one, other = _as_set(predicted), _as_set(expected)
    return one is not None and other is not None and _equal_sets(one, other)


def _evaluated(expression: Any) -> Any:
    """Return the expression with the imaginary unit for its letter, and sums, integrals and limits carried out."""
    if not isinstance(expression, (sympy.Basic, sympy.MatrixBase)):
        return expression
    letters = [symbol for symbol in expression.free_symbols if symbol.name == "i"]
    if letters:
        expression = expression.subs({letter: sympy.I for letter in letters})
    if isinstance(expression, sympy.Expr) and expression.has(
        sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative
    ):
        return expression.doit()
    return expression


def equal_expressions(predicted: sympy.Expr, expected: sympy.Expr) -> bool:
    """Return whether two expressions have the same value, at every point where both have a real one."""
    if predicted == expected:
        return not predicted.has(sympy.zoo, sympy.nan)
    # Infinity alone has been found equal to itself. Arithmetic with it, or with what is undefined, says nothing.
    if any(expression.has(sympy.oo, sympy.zoo, sympy.nan) for expression in (predicted, expected)):
        return False
    predicted, expected = _without_functions(predicted, expected)
    symbols = sorted(predicted.free_symbols | expected.free_symbols, key=lambda symbol: str(symbol.name))
    digits = _digits(predicted, expected)
    if not symbols:
        one, other = _value(predicted, digits), _value(expected, digits)
        return one is not None and other is not None and _agree(one, other, digits)
    return _agree_at_points(symbols, [predicted, expected], digits, lambda values: _agree(values[0], values[1], digits))


def _without_functions(*expressions: sympy.Expr) -> list[sympy.Expr]:
    """Return the expressions with a variable in place of each value of an unknown function, like f(x)."""
    unknown = sorted(
        set().union(*(expression.atoms(AppliedUndef, sympy.Derivative) for expression in expressions)), key=str
    )
    replaced = {function: sympy.Symbol(f"value{index}", real=True) for index, function in enumerate(unknown)}
    return [expression.xreplace(replaced) for expression in expressions] if replaced else list(expressions)


def _agree_at_points(
    symbols: Sequence[sympy.Symbol],
    expressions: Sequence[sympy.Expr],
    digits: int,
    agree: Callable[[list[sympy.Expr]], bool],
) -> bool:
    """Return whether the values of ``expressions`` agree at every point where all are real, of which there are enough.

    Expressions of complex numbers are compared where they are complex too.
    """
    is_complex = any(expression.has(sympy.I) for expression in expressions)
    compared = 0
    for index in range(len(_POINTS)):
        if index >= _FRACTIONAL_POINTS and compared >= _ENOUGH_POINTS:
            break
        point = {
            symbol: _POINTS[(index + place) % _FRACTIONAL_POINTS]
            + (sympy.Rational(place, 7) if index < _FRACTIONAL_POINTS else 0)
            if index < _FRACTIONAL_POINTS
            else _POINTS[_FRACTIONAL_POINTS + (index + place) % (len(_POINTS) - _FRACTIONAL_POINTS)] + place
            for place, symbol in enumerate(symbols)
        }
        values = [_value(expression.xreplace(point), digits) for expression in expressions]
        if any(value is None or not (is_complex or value.is_real) for value in values):
            continue
        if not agree([value for value in values if value is not None]):
            return False
        compared += 1
    return compared >= _ENOUGH_POINTS


def _digits(*expressions: Any) -> int:
    """Return the digits at which expressions of this size do not agree by chance."""
    total = _LEAST_DIGITS
    for expression in expressions:
        for node in sympy.preorder_traversal(expression):
            if isinstance(node, sympy.Rational):
                total += 2 * int((node.p.bit_length() + node.q.bit_length()) * 0.302)
            elif isinstance(node, sympy.Pow) and node.exp.is_Integer and node.base.is_Rational:
                size = node.base.p.bit_length() + node.base.q.bit_length()
                total += int(min(abs(int(node.exp)), _MOST_DIGITS) * size * 0.302)
            if total > _MOST_DIGITS:
                return _MOST_DIGITS
    return total


def _value(expression: sympy.Expr, digits: int) -> sympy.Expr | None:
    """Return the number that a constant is, to so many digits; None where it has no finite value."""
    try:
        value = expression.evalf(digits, maxn=2 * digits + 100)
    # Numeric evaluation raises whatever its functions do. Such a value cannot be compared.
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    if (
        not value.is_number
        or value.has(sympy.oo, sympy.zoo, sympy.nan)
        or not all(part.is_Float or part.is_Rational for part in value.as_real_imag())
    ):
        return None
    return value


def _agree(one: sympy.Expr, other: sympy.Expr, digits: int) -> bool:
    """Return whether two numbers agree to nearly all of ``digits``, relative to the greater one."""
    scale = max(abs(one), abs(other))
    # evalf gives 0 for what it cannot tell from 0.
    if scale == 0:
        return True
    return bool(abs(one - other) <= scale * sympy.Float(10, digits) ** (8 - digits))


def _is_relation(expression: Any) -> bool:
    return isinstance(expression, Relational) or (
        isinstance(expression, sympy.And) and all(isinstance(part, Relational) for part in expression.args)
    )


def _conjuncts(expression: Any) -> list[Relational]:
    return list(expression.args) if isinstance(expression, sympy.And) else [expression]


def _equal_relation(predicted: Relational, expected: Relational) -> bool:
    """Return whether two equations or inequalities say the same, up to a factor that is a number."""
    if not all(isinstance(side, sympy.Expr) for side in (*predicted.args, *expected.args)):
        return bool(predicted == expected)
    one, other = _without_functions(predicted.lhs - predicted.rhs, expected.lhs - expected.rhs)
    symbols = sorted(one.free_symbols | other.free_symbols, key=lambda symbol: str(symbol.name))
    if not symbols:
        return bool(predicted == expected)
    digits = _digits(one, other)
    directed = type(expected) in _FLIPPED
    if not directed and type(predicted) is not type(expected):
        return False
    if directed and type(predicted) not in (type(expected), _FLIPPED[type(expected)]):
        return False
    sign = 1 if type(predicted) is type(expected) else -1
    if not directed:
        one, other = (sympy.fraction(sympy.together(side))[0] for side in (one, other))
    ratios: list[sympy.Expr] = []

    def constant_ratio(values: list[sympy.Expr]) -> bool:
        if values[0] == 0 or values[1] == 0:
            return bool(values[0] == values[1])
        ratio = values[0] / values[1]
        ratios.append(ratio)
        return (not directed or bool(ratio * sign > 0)) and _agree(ratios[0], ratio, digits)

    return _agree_at_points(symbols, [one, other], digits, constant_ratio) and len(ratios) >= _ENOUGH_POINTS


def _as_set(expression: Any) -> sympy.Set | None:
    """Return a set, or the real numbers that an inequality or a membership allows; None for other things."""
    if isinstance(expression, sympy.Set):
        return expression
    if isinstance(expression, sympy.Eq) and isinstance(expression.rhs, sympy.Set):
        members: sympy.Set = expression.rhs
        return members
    if not _is_relation(expression) or len(expression.free_symbols) != 1:
        return None
    try:
        result: sympy.Set = expression.as_set()
    # sympy solves what it can.
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    return result


def _equal_sets(one: sympy.Set, other: sympy.Set) -> bool:
    if one == other:
        return True
    if isinstance(one, sympy.Interval) and isinstance(other, sympy.Interval):
        return bool(
            one.left_open == other.left_open
            and one.right_open == other.right_open
            and equal_expressions(one.start, other.start)
            and equal_expressions(one.end, other.end)
        )
    if isinstance(one, sympy.FiniteSet) and isinstance(other, sympy.FiniteSet):
        return _match(one.args, other.args, equal)
    if isinstance(one, sympy.Union) and isinstance(other, sympy.Union):
        return _match(one.args, other.args, _equal_sets)
    return False


def _match(one: Sequence[Any], other: Sequence[Any], same: Callable[[Any, Any], bool]) -> bool:
    if len(one) != len(other):
        return False
    remaining = list(one)
    for right in other:
        found = next((index for index, left in enumerate(remaining) if same(left, right)), None)
        if found is None:
            return False
        del remaining[found]
    return True
