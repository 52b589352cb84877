"""Every regular expression of the package takes a time that grows no faster than the text, whatever the text is."""

from __future__ import annotations

import ast
import re
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import dasd_megatron

ROOT = Path(dasd_megatron.__file__).parent
METHODS = ("match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer")
CHARACTERS = 8_000
# An expression whose time grows with the square of the length needs 32 million steps.
MOST_SECONDS = 0.03
# The comparison of answers sees verify.max_answer_chars of them at most. These modules see whole responses.
ANSWER_CHARACTERS = 512
OF_RESPONSES = ("verify/answers.py", "verify/steps.py", "verify/countdown.py")
UNITS = [
    *" \t\n\x0b\x85aAx019_.,-+*/^=(){}[]'\"\\#$<>|%:;@&~!?",
    *("\u00e9", "\u4e2d", "\u00b2", "\u00bd", "\u2028"),
    *(
        "a ",
        "1 ",
        "1,",
        "1.",
        "a.",
        "a,",
        "1a",
        " \n",
        "()",
        "{}",
        "[]",
        "{{",
        "\\\\",
        "**",
        "''",
        "a'",
        "<<",
        "://",
        "a=1",
    ),
    *("\\a", "\\a{", "{a}", "10", "1 000", "####", "answer is ", "\\boxed{", "\\text{"),
]


class Expression(NamedTuple):
    """A regular expression and the methods that the package calls on it."""

    module: str
    name: str
    compiled: re.Pattern
    methods: frozenset[str]


def evaluate(node: ast.expr, names: dict[str, object]) -> object:
    """Return the value of an expression over module-level constants, or None."""
    try:
        return eval(compile(ast.Expression(node), "constant", "eval"), {"re": re, **names})
    # Whatever else a module computes is no regular expression.
    except Exception:
        return None


def calls_of(tree: ast.AST) -> list[tuple[str, str, ast.Call]]:
    """Return (owner, method, call) of every call like ``owner.method(...)``."""
    return [
        (node.func.value.id, node.func.attr, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.attr in METHODS)
    ]


def find_expressions() -> tuple[list[Expression], list[str]]:
    """Return the regular expressions of the package, and the calls whose pattern is not a constant."""
    trees = {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
        for path in ROOT.rglob("*.py")
        if not str(path.relative_to(ROOT)).startswith("conf/")
    }
    used: dict[str, set[str]] = {}
    for tree in trees.values():
        for owner, method, _ in calls_of(tree):
            used.setdefault(owner, set()).add(method)
    found, unknown = [], []
    for module, tree in trees.items():
        names: dict[str, object] = {}
        for node in tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value is not None:
                names[target.id] = evaluate(node.value, names)
        found += [
            Expression(module, name, value, frozenset(used.get(name, METHODS)))
            for name, value in names.items()
            if isinstance(value, re.Pattern)
        ]
        for owner, method, call in calls_of(tree):
            if owner != "re":
                continue
            pattern = evaluate(call.args[0], names)
            flags = next((evaluate(keyword.value, names) for keyword in call.keywords if keyword.arg == "flags"), 0)
            if isinstance(pattern, str | bytes):
                compiled = re.compile(pattern, flags)
                found.append(Expression(module, f"line {call.lineno}", compiled, frozenset({method})))
            else:
                unknown.append(f"{module}: {ast.unparse(call.args[0])}")
    return found, unknown


EXPRESSIONS, UNKNOWN = find_expressions()


def seconds(expression: Expression, text: str) -> float:
    """Return the processor time of all matches in a text, the least of three where it is long."""
    data = text.encode() if isinstance(expression.compiled.pattern, bytes) else text
    least = float("inf")
    for _ in range(3):
        begun = time.process_time()
        for method in expression.methods & {"match", "fullmatch"}:
            getattr(expression.compiled, method)(data)
        if expression.methods - {"match", "fullmatch"}:
            for _ in expression.compiled.finditer(data):
                pass
        least = min(least, time.process_time() - begun)
        if least < MOST_SECONDS:
            break
    return least


def slow_texts(expression: Expression) -> list[tuple[str, str, float]]:
    """Return (beginning, unit, seconds) of texts that take too long."""
    is_short = expression.module.startswith("verify/") and expression.module not in OF_RESPONSES
    length = ANSWER_CHARACTERS if is_short else CHARACTERS
    slow = []
    for beginning in ("", "1", "#### ", "\\boxed{"):
        for unit in UNITS:
            taken = seconds(expression, beginning + unit * (length // len(unit)) + "\n!")
            if taken >= MOST_SECONDS:
                slow.append((beginning, unit, taken))
    return slow


def test_expressions_are_found() -> None:
    assert len(EXPRESSIONS) > 40
    assert {f"{expression.module} {expression.name}" for expression in EXPRESSIONS} >= {
        "data/prepare.py _WORD",
        "data/columns.py _CALCULATOR_MARK",
        "access.py line 36",
    }
    # Names of metrics and of a run's files.
    assert {line.partition(":")[0] for line in UNKNOWN} == {
        "observability/metric_pages.py",
        "observability/report/run_files.py",
    }


def test_slow_expressions_are_noticed() -> None:
    cubic = Expression("", "", re.compile(r"####[ \t]*([^\n]*?)\s*\Z"), frozenset({"search"}))
    assert seconds(cubic, "#### " + " " * 400 + "\nx") > MOST_SECONDS
    square = Expression("", "", re.compile(r"a*b"), frozenset({"sub"}))
    assert seconds(square, "a" * CHARACTERS) > MOST_SECONDS


@pytest.mark.parametrize("module", sorted({expression.module for expression in EXPRESSIONS}))
def test_time_grows_with_the_text(module: str) -> None:
    slow = {
        expression.name: texts
        for expression in EXPRESSIONS
        if expression.module == module and (texts := slow_texts(expression))
    }
    assert slow == {}
