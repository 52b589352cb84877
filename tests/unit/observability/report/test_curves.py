from __future__ import annotations

import json
import random

import pytest

from dasd_megatron.observability.metric_files import METRICS, WARM_START
from dasd_megatron.observability.report.curves import TRAINING_CHARTS, WARM_START_CHARTS, explain_curves, phase_table
from dasd_megatron.observability.report.run_files import read_run
from tests.support.report_runs import load_page, make_run, metrics, write_lines


def test_charts_of_some_runs_only(tmp_path):
    run = make_run(tmp_path / "run")
    rare = {"Divergence from the teacher", "Updates skipped", "Measure: thinks", "Measure: <b>"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for fields, shown in (
        ({"update/skipped": 0}, set()),
        ({"update/skipped": 1}, {"Updates skipped"}),
        ({"update/divergence": 0.1}, {"Divergence from the teacher"}),
        ({"measure/thinks": 0.5, "measure/<b>": 0.5}, {"Measure: thinks"}),
    ):
        write_lines(run / "metrics.jsonl", [*rows[:-1], {**rows[-1], **fields}])
        _, page, data = load_page(run)
        assert {attributes["aria-label"] for attributes in page.all("svg")} & rare == shown


def test_phases_have_their_share_and_their_tokens(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    row = {**metrics(1, random.Random(0)), "throughput/tokens_per_second": 100.0, "seconds/health": 0.1}
    write_lines(run / "metrics.jsonl", [row])
    rows = {row["phase"]: row for row in phase_table([read_run(run)])}
    # 300 tokens; 3 s of the step and 0.2 s of sync.
    assert rows["rollout"]["rate"] == "300" and rows["sync"]["rate"] == "1,500" and rows["all"]["seconds"] == "3.200"
    assert (
        rows["rollout"]["share"] == "31.2%"
        and rows["health"]["seconds"] == "0.100"
        and rows["other"]["seconds"] == "0.300"
        and "checkpoint" not in rows
    )


@pytest.mark.parametrize(
    ("chart", "file"),
    [*((chart, METRICS) for chart in TRAINING_CHARTS), *((chart, WARM_START) for chart in WARM_START_CHARTS)],
    ids=lambda value: getattr(value, "title", value),
)
def test_every_chart_is_explained(chart, file):
    text = explain_curves(chart.curves, file)
    assert text
    assert text.count("\n") + 1 >= len({curve.metric for curve in chart.curves}) - 1
