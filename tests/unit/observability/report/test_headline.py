from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dasd_megatron.observability.report.headline import (
    Status,
    accuracy_interval,
    evaluation_size,
    facts_of_runs,
    result_cards,
    results_of_runs,
    run_facts,
    run_status,
    setting_differences,
)
from dasd_megatron.observability.report.run_files import Run, read_run
from tests.support.report_runs import load_page, make_run, two_runs, write_lines


def run_of(path: Path = Path("."), **values: object) -> Run:
    return Run(path, **values)


def evaluation(label: str, step: int, **results: float) -> dict:
    return {"label": label, "step": step, **results}


@pytest.mark.parametrize(
    ("steps", "done", "after", "status"),
    [
        (12, 12, None, Status("done", "finished · 12 steps")),
        (12, 5, None, Status("open", "not finished · step 5 of 12")),
        (12, 5, 5, Status("done", "finished · 5 steps")),
        (12, 5, 3, Status("open", "not finished · step 5 of 12")),
        (None, 5, None, Status("open", "not finished · step 5")),
        ("12", 12, None, Status("open", "not finished · step 12 of 12")),
        (0, 0, None, Status("open", "not finished · step 0 of 0")),
        (0, 0, 0, Status("done", "finished · 0 steps")),
    ],
)
def test_the_status_follows_from_steps_and_evaluations(steps, done, after, status):
    run = run_of(
        config={"run": {"steps": steps}},
        metrics=[{"step": step} for step in range(1, done + 1)],
        evaluations=[] if after is None else [evaluation("after", after)],
    )
    assert run_status(run) == status


def test_a_run_that_was_made_longer_is_not_finished(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    write_lines(run / "evaluation.jsonl", [row | {"step": min(row["step"], 3)} for row in rows])
    assert "not finished · step 5 of 12" in load_page(run)[1].text()


def test_cards_show_the_largest_k_and_which_way_it_went():
    before = evaluation("before", 0, **{"avg@4": 0.5, "pass@2": 0.5, "pass@4": 0.75, "response/length_mean": 20.0})
    after = evaluation("after", 9, **{"avg@4": 0.25, "pass@2": 0.5, "pass@4": 0.75, "response/length_mean": 30.0})
    cards = {card["label"]: card for card in result_cards(run_of(evaluations=[before, after]))}
    assert set(cards) == {"Avg@4", "Pass@4", "Mean length, tokens"}
    assert (cards["Avg@4"]["class"], cards["Avg@4"]["change"]) == ("down", "-25.0 points")
    assert cards["Pass@4"]["class"] == "" and cards["Mean length, tokens"]["class"] == ""
    assert (cards["Mean length, tokens"]["before"], cards["Mean length, tokens"]["after"]) == ("20.0", "30.0")
    (alone, *_) = result_cards(run_of(evaluations=[before]))
    assert (alone["after"], alone["change"], alone["class"]) == ("–", "", "")


def test_results_of_runs_stand_side_by_side():
    first = run_of(evaluations=[evaluation("before", 0, **{"avg@4": 0.5}), evaluation("after", 9, **{"avg@4": 0.75})])
    second = run_of(evaluations=[evaluation("before", 0, **{"avg@8": 0.25, "pass@8": 0.5})])
    assert results_of_runs([first, second]) == [
        ("Avg@4", [("75.0%", "+25.0 points"), ("–", "")]),
        ("Avg@8", [("–", ""), ("25.0% before", "")]),
        ("Pass@8", [("–", ""), ("50.0% before", "")]),
    ]


def test_the_interval_is_of_paired_differences(tmp_path):
    # Differences 0, 0.5, 0.5 and 1; a fifth problem is in one evaluation alone.
    outcomes = {"before": ["00", "10", "00", "00", "11"], "after": ["00", "11", "01", "11"]}
    run = run_of(tmp_path, evaluations=[evaluation("before", 0), evaluation("after", 3)])
    for label, problems in outcomes.items():
        write_lines(
            run.samples_path(run.evaluation(label)),
            [
                {"problem_id": f"p{place}", "symbolic_correct": mark == "1"}
                for place, marks in enumerate(problems)
                for mark in marks
            ],
        )
    half = 1.96 * math.sqrt((0.25 + 0.25) / 3 / 4)
    assert accuracy_interval(run).startswith(
        f"Difference of average accuracy, paired over 4 problems: +50.0 points, 95% interval "
        f"{100 * (0.5 - half):+.1f} to {100 * (0.5 + half):+.1f}."
    )
    assert accuracy_interval(run_of(tmp_path, evaluations=run.evaluations[:1])) == ""


def test_the_size_of_an_evaluation():
    assert evaluation_size(None) == ""
    assert evaluation_size({"num_problems": 1200, "num_samples": 4}) == "1,200 held-out problems · 4 samples of each"
    assert evaluation_size({"num_problems": "many", "num_samples": 4}) == "4 samples of each"


def test_facts_that_are_absent_are_left_out(tmp_path):
    rows = [
        {"step": 1, "seconds/total": 2.0, "throughput/tokens_per_second": 100.0, "verify/timeouts": 1},
        {"step": 2, "seconds/total": math.nan, "throughput/tokens_per_second": 300.0, "verify/timeouts": None},
    ]
    config = {
        "algorithm": {"name": "dasd", "scale_floor": 1.0},
        "parallel": {"tensor_model_parallel_size": 2, "data_parallel_size": 4},
        "model": {"path": None, "tiny": {"num_layers": 2, "hidden_size": 64}},
        "batch": {"groups": 8},
    }
    facts = run_facts(run_of(tmp_path, config=config, metrics=rows))
    assert facts == {
        "Algorithm": "dasd",
        "Gap scale floor": "1.0 nats",
        "Model": "tiny Qwen3 made in code: 2 layers of width 64",
        "Parallel": "TP 2 × DP 4",
        "Training": "2 steps in 2.0s",
        "Speed": "200 tokens/s, mean over steps",
        "Verifier timeouts": "1",
        "Directory": str(tmp_path.resolve()),
    }
    table = facts_of_runs([run_of(tmp_path, config={"run": {"seed": 3}}), run_of(tmp_path)])
    assert table == [("Seed", ["3", "–"]), ("Directory", [str(tmp_path.resolve())] * 2)]


def test_only_what_differs_is_listed(tmp_path):
    runs = [read_run(path) for path in two_runs(tmp_path)]
    assert setting_differences(runs) == [
        ("algorithm.beta", ["0.1", "–"]),
        ("algorithm.name", ["dasd", "grpo"]),
        ("run.name", ["toy-run", "other"]),
        ("run.steps", ["12", "40"]),
    ]
