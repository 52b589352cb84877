"""The package's structure: imports point one way."""

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
