from __future__ import annotations

import json

import pytest

from dasd_megatron.observability.report.page import write_report
from dasd_megatron.observability.report.run_files import ReportError
from tests.support.report_runs import inspected, load_page, make_run


def test_damage_is_listed_not_hidden(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("a: [1,\n")
    (run / "environment.json").write_text("[1, 2]")
    (run / "warm_start.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    bad = [
        inspected("x", ["x"], omega=[0.1, 0.2]),
        inspected("x", ["x"]) | {"tokens": None},
        {"tokens": ["x"]},
        inspected("fine", ["fine"]),
    ]
    (run / "inspect" / "step_000001.json").write_text(json.dumps(bad))
    _, page, data = load_page(run)
    words = page.text()
    for part in (
        "config.yaml could not be read",
        "environment.json could not be read",
        "warm_start.jsonl: 1 unreadable lines",
        "inspect/step_000001.json, rollout 1 was left out",
        "inspect/step_000001.json, rollout 3 was left out",
    ):
        assert part in words, part
    assert [record["place"] for record in data["rollouts"] if record["step"] == 1] == [4]


def test_a_run_that_was_killed(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    rows = (run / "evaluation.jsonl").read_text().splitlines()
    (run / "evaluation.jsonl").write_text(rows[0] + "\n" + rows[1][:20])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "reward/acc')
    (run / "inspect" / "step_000005.json").write_text('[{"problem_id": "p')
    with open(run / "rollouts" / "step_000005.jsonl", "a") as file:
        file.write('{"group": ')
    _, page, data = load_page(run)
    words = page.text()
    assert "not finished · step 5 of 12" in words and "no comparison yet" in words
    assert "inspect/step_000005.json could not be read" in words and "1 unreadable lines were left out" in words


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ReportError, match="is not a directory"):
        write_report([tmp_path / "absent"])
    with pytest.raises(ReportError, match="holds no run"):
        write_report([tmp_path])
