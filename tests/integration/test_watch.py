"""A run that the watch pauses, lets end for want of an answer, and stops."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.runs import NO_EVALUATION, finish, rows, start

pytestmark = pytest.mark.integration

# Groups without a right answer are certain for random weights: warnings at steps 2, 4 and 6.
OVERRIDES = [
    *NO_EVALUATION, "run.steps=7", "parallel.data_parallel_size=2", "checkpoint.every=0",
    "watch.act_on=[rewards_all_wrong]",
    "watch.saturated_share=0.1", "watch.patience=2", "watch.cooldown=1",
]  # fmt: skip


def test_pause_continue_time_out_and_stop(tmp_path: Path) -> None:
    run = tmp_path / "run"
    latest = run / "checkpoints" / "latest"
    process = start(*OVERRIDES, "watch.action=pause", "watch.pause_timeout_seconds=10", f"run.dir={run}")
    deadline = time.monotonic() + 120
    while not latest.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-6000:]
        time.sleep(0.05)
    assert latest.read_text().strip() == "step_000002"
    (run / "watch.continue").touch()
    status, output = finish(process)
    assert status == 76, output[-6000:]
    assert (
        f"paused after step 2, which is saved (rewards_all_wrong). To go on: touch {run / 'watch.continue'}" in output
    )
    assert "on with step 3" in output and "WARNING: step 2, rewards_all_wrong: " in output
    assert (
        "stopped after step 4, which is saved; continue with resume=auto. watch.action=pause: rewards_all_wrong"
        in output
    )
    assert (
        "Traceback" not in output
        and latest.read_text().strip() == "step_000004"
        and not (run / "watch.continue").exists()
    )

    status, output = finish(start(*OVERRIDES, "watch.action=stop", f"run.dir={run}", "resume=auto"))
    assert status == 76, output[-6000:]
    assert (
        "stopped after step 6, which is saved; continue with resume=auto. watch.action=stop: rewards_all_wrong"
        in output
    )
    assert "Traceback" not in output and latest.read_text().strip() == "step_000006"
    metrics, warnings = (
        rows(run / "metrics.jsonl"),
        [row for row in rows(run / "watch.jsonl") if row["condition"] == "rewards_all_wrong"],
    )
    assert [(row["step"], row["action"]) for row in warnings] == [(2, "pause"), (4, "pause"), (6, "stop")]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert [row["watch/warnings"] > 0 for row in metrics] == [False, True, False, True, False, True]
