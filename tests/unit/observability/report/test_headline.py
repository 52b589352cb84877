from __future__ import annotations

import json

from dasd_megatron.observability.report.headline import setting_differences
from dasd_megatron.observability.report.run_files import read_run
from tests.support.report_runs import load_page, make_run, two_runs, write_lines


def test_only_what_differs_is_listed(tmp_path):
    runs = [read_run(path) for path in two_runs(tmp_path)]
    assert setting_differences(runs) == [
        ("algorithm.beta", ["0.1", "–"]),
        ("algorithm.name", ["dasd", "grpo"]),
        ("run.name", ["toy-run", "other"]),
        ("run.steps", ["12", "40"]),
    ]


def test_a_run_that_was_made_longer_is_not_finished(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    write_lines(run / "evaluation.jsonl", [row | {"step": min(row["step"], 3)} for row in rows])
    assert "not finished · step 5 of 12" in load_page(run)[1].text()
