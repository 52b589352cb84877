from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dasd_megatron.observability.report.page import write_report
from dasd_megatron.observability.report.run_files import ReportError, Run, read_run, shorten, to_number
from tests.support.report_runs import inspected, load_page, make_run, write_lines


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


def test_the_last_line_about_an_evaluation_counts(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    write_lines(run / "evaluation.jsonl", [rows[0], rows[0] | {"avg@2": 0.125}, rows[1]])
    found = read_run(run)
    assert [row["label"] for row in found.evaluations] == ["before", "after"]
    assert found.evaluation("before")["avg@2"] == 0.125 and found.evaluation("step") is None


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (0.5, 0.5), ("Infinity", math.inf), (10**400, math.inf), (-(10**400), -math.inf)]
    + [(True, None), ("1", None), (None, None), ([1], None)],
)
def test_numbers_are_read_leniently(value, number):
    assert to_number(value) == number


def test_settings_are_found_by_dotted_names():
    run = Run(Path("."), config={"a": {"b": {"c": 1}}, "d": 2})
    assert (run.setting("a.b.c"), run.setting("d"), run.setting("d.e"), run.setting("a.x")) == (1, 2, None, None)


def test_long_text_says_what_is_cut():
    assert shorten("abc", 3) == "abc"
    assert shorten("a\u202eb" + "c" * 2000, 3) == "a‹U … (2,007 more characters in the file)"
