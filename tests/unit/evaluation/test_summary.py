"""``metrics.json`` and the table of an evaluation of two benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dasd_megatron.config import Config
from dasd_megatron.evaluation.summary import MACRO_AVERAGE, OURS, print_table, write_metrics
from tests.support.evaluation_samples import Engine, draw


def test_metrics_of_several_benchmarks(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = draw(config, tmp_path / "one", Engine())
    right = [[{**record, "symbolic_correct": True, "predicted_answer": "1"} for record in row] for row in records]
    for name in ("gsm8k", "mine"):
        (tmp_path / name).mkdir()
    metrics = write_metrics(
        config.evaluation, config.health, tmp_path, {"gsm8k": records, "mine": right}, seed=config.run.seed
    )
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    ours = metrics["gsm8k"][OURS]
    flat = [record for row in records for record in row]
    assert ours["avg@3"] == pytest.approx(sum(record["symbolic_correct"] for record in flat) / 21)
    assert (
        ours["no_answer_share"]
        == ours["truncated_share"]
        == sum(record["predicted_answer"] is None for record in flat) / 21
    )
    assert metrics["gsm8k"]["pass@1[avg-of-3]"]["symbolic_correct"] == pytest.approx(100 * ours["avg@3"])
    assert set(metrics["gsm8k"]) == {"pass@1", *(f"{kind}@{k}" for kind in ("pass", "majority") for k in (2, 3)), *(f"pass@1[avg-of-{k}]" for k in (2, 3)), OURS}  # fmt: skip # noqa: E501
    # Through the files' JSON, as what was measured on the samples themselves.
    assert ours["health/length_p50"] == sorted(record["num_generated_tokens"] for record in flat)[10]
    assert ours["health/distinct_paths"] == pytest.approx(
        sum(len({record["generation"] for record in row}) for row in records) / 7
    )
    # The steps of sums are checked, and none of these responses has one.
    assert ours["health/step_accuracy"] == 0.0
    table = json.loads((tmp_path / "gsm8k" / "health.json").read_text())["calibration"]
    assert sum(entry["responses"] for entry in table) == 21
    low, high = ours["confidence_intervals"]["avg@3"]
    assert 0 <= low < ours["avg@3"] < high <= 1
    average = metrics[MACRO_AVERAGE][OURS]
    assert average["avg@3"] == pytest.approx((ours["avg@3"] + 1) / 2)
    # Half of one benchmark's uncertainty, and of the other's, which is none.
    width = average["confidence_intervals"]["avg@3"][1] - average["confidence_intervals"]["avg@3"][0]
    assert width == pytest.approx((high - low) / 2)
    print_table(metrics, 0.95)
    table = capsys.readouterr().out
    assert "GSM8K" in table and "mine" in table and "mean" in table and "Avg@3 [95%]" in table and "100.0%" in table
