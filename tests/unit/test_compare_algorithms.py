"""The harness of comparisons: its files, its statistics, and its page from runs that are there."""

from __future__ import annotations

import importlib.util
import json
import random
import secrets
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from dasd_megatron.config import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "compare_algorithms"
COMPARISONS = [*sorted(EXAMPLES.glob("*/comparison.yaml")), EXAMPLE / "long.yaml"]


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_algorithms", EXAMPLE / "compare.py")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their annotations up in it.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_run_is_a_configuration(compare: ModuleType, path: Path, tmp_path: Path) -> None:
    comparison = compare.read_comparison(path)
    started = []

    class Runner(compare.Runner):
        def train(self, folder: Path, task: str, *overrides: str) -> float:
            settings = [self._placed(text) for text in [*comparison.tasks[task].settings, *overrides]]
            started.append(load_config(settings, comparison.folder, needs_files=False))
            return 1.0

    runner = Runner(comparison, tmp_path, [])
    for task in comparison.tasks:
        runner.start(task)
    first = next(iter(comparison.tasks))
    for job in compare.jobs_of(comparison, [first], list(comparison.methods), [comparison.seeds[0]]):
        runner.run(job)
        assert started[-1].algorithm.name == job.method.replace(",", "").split()[0]
        assert started[-1].run.seed == job.seed


# Tables of Student's t at 5%, two-sided.
@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (20, 2.08596)]
)
def test_p_of_students_t(compare: ModuleType, freedom: int, t: float) -> None:
    assert compare.student_p(t, freedom) == compare.student_p(-t, freedom) == pytest.approx(0.05, abs=1e-5)
    assert compare.student_p(0.0, freedom) == pytest.approx(1.0)


def test_pairs_are_of_one_seed(compare: ModuleType) -> None:
    mean, deviation, p = compare.paired({1: 2.0, 2: 5.0, 3: 9.0, 4: None, 5: 1.0}, {5: None, 4: 1.0, 3: 8.0, 2: 3.0})
    assert (mean, deviation) == (1.5, pytest.approx(0.5**0.5)) and p == pytest.approx(compare.student_p(3.0, 1))
    assert compare.paired({1: 2.0, 2: 5.0}, {1: 0.0}) is None


def write_run(folder: Path, draw: random.Random) -> dict[str, float]:
    folder.mkdir(parents=True)
    after = {"avg@16": draw.random(), "pass@16": draw.random()}
    health = {"health/distinct_correct_paths": 3.0, "health/step_accuracy": 0.5}
    (folder / "evaluation.jsonl").write_text(json.dumps({"label": "after", **after, **health}) + "\n")
    steps = [
        {"reward/accuracy": draw.random(), "entropy/mean": draw.random(), "response/length_mean": 9.0} for _ in range(8)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (folder / "seconds").write_text("12.5")
    return after


def test_the_page_has_means_and_deviations(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    runs = tmp_path / "runs"
    (runs / "countdown" / "warm_start").mkdir(parents=True)
    (runs / "countdown" / "warm_start" / "evaluation.jsonl").write_text(
        '{"label": "before", "avg@16": 0.4, "pass@16": 0.9}\n'
    )
    made = {
        method: [write_run(runs / "countdown" / compare.slug(method) / f"seed{number}", draw) for number in (1, 2, 10)]
        for method in ("grpo", "opsd, beta 0.1", "dasd, beta 0.1")
    }
    # Not complete, and not compared.
    (runs / "countdown" / "rlsd" / "seed1").mkdir(parents=True)
    # Nor one that is not asked for.
    write_run(runs / "countdown" / "grpo" / "seed3", draw)
    chosen = ["--seeds", "10", "1", "2", "--only-results", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["compare.py", str(EXAMPLE / "comparison.yaml"), "--runs", str(runs), *chosen])
    compare.main()
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "rlsd" not in text and "## chain_sum" not in text and "Avg@16 40.00%, Pass@16 90.00%" in text
    for other in ("grpo", "opsd, beta 0.1"):
        differences = [
            100 * (first["pass@16"] - second["pass@16"])
            for first, second in zip(made["dasd, beta 0.1"], made[other], strict=True)
        ]
        mean, deviation = statistics.mean(differences), statistics.stdev(differences)
        assert f"| dasd, beta 0.1 − {other} | " in text and f"| {mean:+.2f} ± {deviation:.2f} (" in text
    for method, results in made.items():
        values = [100 * result["avg@16"] for result in results]
        assert f"| {method} | 3 | {statistics.mean(values):.2f}% ± {statistics.stdev(values):.2f} |" in text
    assert sorted(json.loads((tmp_path / "out" / "results.json").read_text())["countdown"]["grpo"]) == ["1", "10", "2"]
    ElementTree.fromstring((tmp_path / "out" / "countdown.svg").read_text())


def test_a_comparison_is_made_in_parts(compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(runs: Path, seed: int, before: float, *options: str) -> dict[str, dict[str, float]]:
        start = runs / "countdown" / "warm_start"
        start.mkdir(parents=True)
        (start / "evaluation.jsonl").write_text(json.dumps({"label": "before", "avg@16": before}) + "\n")
        write_run(runs / "countdown" / "grpo" / f"seed{seed}", random.Random(seed))
        arguments = ["--runs", str(runs), "--only-results", "--output", str(tmp_path / "out"), *options]
        monkeypatch.setattr(sys, "argv", ["compare.py", str(EXAMPLE / "comparison.yaml"), *arguments])
        compare.main()
        results: dict[str, dict[str, float]] = json.loads((tmp_path / "out" / "results.json").read_text())["countdown"][
            "grpo"
        ]
        return results

    first = make(tmp_path / "first", 1, 0.4)
    second = make(tmp_path / "second", 2, 0.4, "--add")
    assert sorted(second) == ["1", "2"] and second["1"] == first["1"]
    with pytest.raises(SystemExit, match="different policies"):
        make(tmp_path / "third", 3, 0.5, "--add")
    # A run that is there is not made again, whatever the folder holds.
    assert make(tmp_path / "fourth", 1, 0.4, "--add") == second
    assert sorted(make(tmp_path / "fifth", 3, 0.5)) == ["3"]


def test_a_run_that_fails_lets_no_other_begin(compare: ModuleType, tmp_path: Path) -> None:
    begun = []
    comparison = compare.read_comparison(EXAMPLE / "comparison.yaml")

    class Runner(compare.Runner):
        def train(self, folder: Path, task: str, *overrides: str) -> float:
            if folder.name.startswith("seed"):
                begun.append(folder)
                time.sleep(0.05)
                if len(begun) == 3:
                    raise SystemExit("no more memory")
            return 1.0

    jobs = list(compare.jobs_of(comparison, ["countdown"], list(comparison.methods), [1, 2, 3]))
    with pytest.raises(SystemExit, match="no more memory"):
        compare.run_all(Runner(comparison, tmp_path, []), jobs, 1)
    assert len(jobs) == 36 and len(begun) <= 4


def test_unknown_names_are_refused(compare: ModuleType, tmp_path: Path) -> None:
    text = (EXAMPLE / "long.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("baseline: grpo", "baseline: other"))
    with pytest.raises(SystemExit, match="no methods other among grpo, opsd, dasd"):
        compare.read_comparison(tmp_path / "own.yaml")


def published() -> list[Path]:
    return [path for path in COMPARISONS if (path.parent / "RESULTS.md").exists() and path.stem == "comparison"]


@pytest.mark.parametrize("path", published(), ids=lambda path: path.parent.name)
def test_the_published_page_is_made_of_the_published_numbers(compare: ModuleType, path: Path) -> None:
    comparison = compare.read_comparison(path)
    found = json.loads((path.parent / "results.json").read_text())
    assert (path.parent / "RESULTS.md").read_text() == compare.page(comparison, found) + "\n"
    assert found.keys() <= comparison.tasks.keys()
    for task, methods in found.items():
        assert (path.parent / f"{task}.svg").read_text() == compare.picture(comparison, methods)
        assert methods.keys() <= comparison.methods.keys()
