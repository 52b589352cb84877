"""The package's structure: imports point one way, and modules and functions can be read at a glance."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import dasd_megatron

ROOT = Path(dasd_megatron.__file__).parent

# From the ground up: a package or module may import what stands before it, and nothing else of this project.
ORDER = (
    "files",
    "stopping",
    "errors",
    "losses",
    "algorithms",
    "samples",
    "weight_ways",
    "config",
    "plugins",
    "backend",
    "access",
    "verify",
    "models",
    "data",
    "observability",
    "planning",
    "rollout",
    "run",
    "evaluation",
    "training",
    "commands",
    "cli",
)
MOST_LINES_OF_A_MODULE, MOST_LINES_OF_A_FUNCTION, DEEPEST_NESTING = 600, 80, 4
# A table with a row for each metric.
TABLES = ("observability/metric_docs.py",)
# Resources and code for other processes, which nothing imports.
OUTSIDE = ("conf/", "rollout/sglang/stand_ins")


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    paths = [path for path in ROOT.rglob("*.py") if not str(path.relative_to(ROOT)).startswith(OUTSIDE)]
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in paths
    }


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {"", "dasd_megatron"}


MODULES = modules()
GRAPH = {name: imports(path, MODULES) - {name} for name, path in MODULES.items()}


def part(name: str) -> str:
    """Return the package or module of :data:`ORDER` that a module belongs to."""
    return name.split(".")[1]


def test_every_part_has_its_place():
    assert {part(name) for name in MODULES if name != "dasd_megatron"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_down(name):
    allowed = {*ORDER[: ORDER.index(name)], name}
    upward = [
        f"{module} imports {target}"
        for module, targets in GRAPH.items()
        if module != "dasd_megatron" and part(module) == name
        for target in sorted(targets)
        if part(target) not in allowed
    ]
    assert not upward


def test_there_is_no_circle():
    # graphlib's error has the modules of the circle.
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_the_arithmetic_knows_nothing_of_ours():
    for module, targets in GRAPH.items():
        if module != "dasd_megatron" and part(module) in ("losses", "algorithms"):
            assert {part(target) for target in targets} <= {"losses", "algorithms"}
            assert "megatron.core" not in MODULES[module].read_text(encoding="utf-8")


BLOCKS = (
    *(ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef),
    *(ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match),
)


def nesting(node: ast.AST) -> int:
    """Return how many blocks inside ``node`` contain one another at most; an ``elif`` is beside its ``if``."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def test_nesting_is_counted():
    source = "def f():\n for x in y:\n  if x:\n   with x: pass\n  elif y:\n   with y:\n    pass\n"
    assert nesting(ast.parse(source)) == 4
    assert nesting(ast.parse("if x: pass\nelif y: pass\nelif z: pass")) == 1


def test_modules_are_short():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()
    }
    assert {
        name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_MODULE and name not in TABLES
    } == {}


def test_functions_are_short_and_flat():
    found = {}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines, depth = node.end_lineno - node.lineno + 1, nesting(node)
                if lines > MOST_LINES_OF_A_FUNCTION or depth > DEEPEST_NESTING:
                    found[f"{path.relative_to(ROOT)}:{node.name}"] = (lines, depth)
    assert found == {}
