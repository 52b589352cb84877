"""The package's structure: imports point one way, each decision has one place, and modules and functions can be read at
a glance. The tests' own: they share helpers, and not each other."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import dasd_megatron
from dasd_megatron.algorithms.methods import METHODS
from dasd_megatron.models.families import FAMILIES

ROOT = Path(dasd_megatron.__file__).parent
TESTS = Path(__file__).parents[1]

# From the ground up: a package or module may import what stands before it, and nothing else of this project.
ORDER = (
    "files",
    "reading",
    "stopping",
    "machine",
    "errors",
    "arguments",
    "losses",
    "algorithms",
    "samples",
    "sample_columns",
    "rollout_json",
    "rollout_files",
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
# The tests that name sys.path. Programs that a test has as a string are not searched: they may set up their own.
MAY_NAME_SYS_PATH = {
    "support/preloaded.py": "gives a forked process the path that Python would have started with",
    "support/workers/describe_process.py": "prints the path, for the test that forked processes have the right one",
}


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


def compared_strings(tree: ast.AST) -> set[str]:
    """Return the strings that stand in a comparison: alone, or in a tuple, list or set."""
    return {
        part.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        for part in (side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else (side,))
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }


def test_comparisons_are_found():
    tree = ast.parse('a == "b"; "c" != a; a in ("d", "e"); f("g") == h["i"]')
    assert compared_strings(tree) == {"b", "c", "d", "e"}


@pytest.mark.parametrize(
    ("home", "names"), [("algorithms", METHODS), ("models", FAMILIES)], ids=["methods", "families"]
)
def test_names_are_compared_in_their_home_alone(home, names):
    found = {
        str(path.relative_to(ROOT)): compared & set(names)
        for module, path in MODULES.items()
        if module != "dasd_megatron"
        and part(module) != home
        and (compared := compared_strings(ast.parse(path.read_text(encoding="utf-8")))) & set(names)
    }
    assert found == {}


def test_tests_share_helpers_and_not_each_other():
    path_users, test_imports = set(), set()
    for file in TESTS.rglob("*.py"):
        name = file.relative_to(TESTS).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
                path_users.add(name)
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            test_imports |= {
                f"{name} imports {module}"
                for module in imported
                if module.startswith("tests.") and not module.startswith("tests.support")
            }
    assert path_users == set(MAY_NAME_SYS_PATH)
    assert test_imports == set()


def test_unit_tests_follow_the_folders_of_the_package():
    folders = {file.parent.relative_to(TESTS / "unit") for file in (TESTS / "unit").rglob("test_*.py")}
    assert [folder for folder in sorted(folders) if not (ROOT / folder).is_dir()] == []
