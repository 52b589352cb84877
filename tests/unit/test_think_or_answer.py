"""examples/think_or_answer: its problems and its examples against the definition, and what its measures count."""

from __future__ import annotations

import importlib.util
import json
import secrets
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.small_samples import make_sample

EXAMPLE = Path(__file__).parents[2] / "examples" / "think_or_answer"


@pytest.fixture(scope="module")
def task() -> ModuleType:
    spec = importlib.util.spec_from_file_location("think_or_answer", EXAMPLE / "think_or_answer.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make(task: ModuleType, folder: Path, *options: str) -> dict[str, list[dict[str, str]]]:
    task.main([str(folder), "--train", "300", "--heldout", "40", "--examples", "4000", *options])
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout", "warm_start")
    }


def test_problems_are_solved_from_the_left_modulo_ten(task: ModuleType, tmp_path: Path) -> None:
    made = make(task, tmp_path)
    assert (len(made["train"]), len(made["heldout"])) == (300, 40)
    rows = made["train"] + made["heldout"]
    assert len({row["problem"] for row in rows}) == len({row["id"] for row in rows}) == 340
    for row in rows:
        value, *rest = row["problem"].removesuffix("=")
        equations = []
        for operator, term in zip(rest[::2], rest[1::2], strict=True):
            result = str(eval(f"{value}{operator}{term}") % 10)
            equations.append(f"{value}{operator}{term}={result}")
            value = result
        assert len(equations) == 5 and row["expected_answer"] == value
        assert row["reference_solution"] == "\n".join([*equations, f"#### {value}"])


def test_examples_have_the_shares_that_are_asked_for(task: ModuleType, tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    options = ("--teacher-share", "0.4", "--student-thinks", "0.7", "--teacher-thinks", "0.2", "--seed", str(seed))
    made = make(task, tmp_path, *options)
    solutions = {row["problem"]: row["reference_solution"] for row in made["train"]}
    thinks: dict[bool, list[bool]] = {True: [], False: []}
    for row in made["warm_start"]:
        solution = solutions[row["problem"]]
        straight = solution.splitlines()[-1]
        assert row["response"] in (straight, f"?{solution}")
        if "privileged" in row:
            assert row["privileged"] in (solution, straight, straight.removeprefix("#### "), f"?{solution}")
        thinks["privileged" in row].append(row["response"].startswith("?"))
    assert len(thinks[True]) / 4000 == pytest.approx(0.4, abs=0.05)
    assert sum(thinks[True]) / len(thinks[True]) == pytest.approx(0.2, abs=0.06)
    assert sum(thinks[False]) / len(thinks[False]) == pytest.approx(0.7, abs=0.06)


def test_a_seed_gives_the_same_files_and_another_one_others(task: ModuleType, tmp_path: Path) -> None:
    first, again, other = (make(task, tmp_path / name, "--seed", name[0]) for name in ("1", "1 again", "2"))
    assert first == again != other


def test_too_few_different_problems_are_refused(task: ModuleType) -> None:
    with pytest.raises(ValueError, match="too few different ones"):
        task.make_chains(200, 2, 0)


@pytest.mark.parametrize(
    ("text", "reward", "wanted"),
    [
        ("#### 9", 1.0, {"thinks": 0.0, "straight_right": 1.0}),
        ("", 0.0, {"thinks": 0.0, "straight_right": 0.0}),
        ("?7*4=8\n8-9=9\n#### 9", 1.0, {"thinks": 1.0, "thinking_right": 1.0, "step_accuracy": 1.0}),
        ("?7*4=8\n8-9=1\n#### 1", 0.0, {"thinks": 1.0, "thinking_right": 0.0, "step_accuracy": 0.5}),
        ("?#### 9", 1.0, {"thinks": 1.0, "thinking_right": 1.0, "step_accuracy": 0.0}),
    ],
)
def test_measures(task: ModuleType, text: str, reward: float, wanted: dict[str, float]) -> None:
    sample = make_sample(0, 0, [1], text, problem="7*4-9=", reward=reward)
    assert task.measures(sample) == wanted
