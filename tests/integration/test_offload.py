"""A run whose trainer and server take turns on one device: its numbers are those of a run that keeps its memory, and it
goes on from what was saved while its memory was away."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.support.runs import finish, reproducible, rows, start, train

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RUN = [
    "run.steps=4",
    "evaluation.before=false",
    "evaluation.after=true",
    "checkpoint.every=0",
    "checkpoint.export_every=2",
    "rollout.release_memory=true",
    "rollout.backoff_seconds=0.05",
    "rollout.max_retries=1",
    "teacher.weights=ema",
    "teacher.ema_decay=0.5",
    "loss.kl_coef=0.1",
]
OFFLOAD = ["backend.offload=all", "rollout.weight_sync=tensor", "rollout.verify_weights=3"]


def test_taking_turns_changes_no_number_and_loses_no_step(tmp_path: Path) -> None:
    keeps, shares = tmp_path / "keeps", tmp_path / "shares"
    train(*RUN, f"run.dir={keeps}")
    # The server is gone in the third step, while the trainer's memory is away: the second is saved from the host.
    process = start(*RUN, *OFFLOAD, "rollout.max_restarts=0", f"run.dir={shares}")
    log, deadline = shares / "metrics.jsonl", time.monotonic() + 180
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "dasd_megatron.rollout.server" in child.cmdline():
            child.kill()
    status, output = finish(process)
    assert status not in (0, None) and "continue with resume=auto" in output, output[-4000:]
    saved = [
        path.name for path in (shares / "checkpoints").iterdir() if path.name.startswith("step_") and path.suffix == ""
    ]
    assert len(saved) == 1 and saved[0] in ("step_000002", "step_000003"), saved
    train(*RUN, *OFFLOAD, "resume=auto", f"run.dir={shares}")
    measured = ("memory/", "seconds/")
    found = [
        {name: value for name, value in row.items() if not name.startswith(measured)}
        for row in reproducible(shares / "metrics.jsonl")
    ]
    assert found == reproducible(keeps / "metrics.jsonl")
    assert rows(shares / "evaluation.jsonl")[-1]["avg@2"] == rows(keeps / "evaluation.jsonl")[-1]["avg@2"]
    for row in rows(shares / "metrics.jsonl"):
        assert row["memory/released"] > 0 and row["seconds/release"] > 0 and row["seconds/restore"] >= 0
    for name in ("model/model.safetensors", "checkpoints/step_000004.hf/model.safetensors"):
        assert (shares / name).read_bytes() == (keeps / name).read_bytes(), name
