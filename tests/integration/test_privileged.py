"""Whole runs whose teacher is shown what arises in them: right responses of the group, and feedback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dasd_megatron.rollout_files import read_samples
from tests.support.runs import NO_EVALUATION, finish, reproducible, rows, saved_rollouts, start, train

pytestmark = pytest.mark.integration

# A model of random weights is never right, so that the tokens' sum decides here.
REWARDS = """
def told(sample):
    odd = sum(sample.response_ids) % 2
    return float(not odd), "odd" if odd and sample.sample % 2 else None
def bare(sample):
    return float(sum(sample.response_ids) % 2 == 0)
"""
STEPS = 5


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Problems in the form of DAPO-Math-17k, which have no solutions, and a reward that differs within groups."""
    for name, first, count in (("train", 0, 40), ("heldout", 40, 6)):
        lines = [
            {
                "prompt": [{"role": "user", "content": f"What is {place} + 1?"}],
                "reward_model": {"ground_truth": str(place + 1), "style": "rule-lighteval/MATH_v2"},
            }
            for place in range(first, first + count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "told_rewards.py").write_text(REWARDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    files = [f"data.{name}.path={tmp_path / name}.jsonl" for name in ("train", "heldout")]
    return [
        *NO_EVALUATION,
        "data=jsonl",
        "data.train.size=null",
        "data.heldout.size=null",
        *files,
        "verify.reward=told_rewards:told",
        "rollout.max_staleness=1",
        "loss.importance_sampling=token",
        "checkpoint.every=3",
        f"run.steps={STEPS}",
    ]


def without_warnings(run: Path) -> list[dict]:
    """The metrics of a run, without what its watch says, which knows the steps of its own directory alone."""
    return [{**row, "watch/warnings": None} for row in reproducible(run / "metrics.jsonl")]


def test_peers_and_feedback_train_and_go_on_from_a_checkpoint_as_uninterrupted(
    options: list[str], tmp_path: Path
) -> None:
    options += ["teacher.privileged=[feedback,peer]", "teacher.peer=random", "teacher.max_privileged_tokens=60"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(*options, f"run.dir={whole}")
    metrics = rows(whole / "metrics.jsonl")
    for row in metrics:
        shares = [row[f"teacher/{name}_share"] for name in ("feedback", "peer", "absent")]
        assert sum(shares) == pytest.approx(1) and shares[0] > 0 and shares[1] > 0
        assert row["update/grad_norm"] > 0 and row["credit/delta_abs_mean"] > 0
    for step in range(1, STEPS + 1):
        samples = saved_rollouts(whole)[step]
        sources = [sample["privileged_source"] for sample in samples]
        assert sources.count(None) / len(sources) == metrics[step - 1]["teacher/absent_share"]
        for sample in samples:
            if sample["privileged_source"] == "feedback":
                assert sample["feedback"] == "odd" and sample["reward"] == 0
                assert sample["privileged"].endswith("Feedback:\nodd") and sample["text"] in sample["privileged"]
            elif sample["privileged_source"] == "peer":
                peers = [other for other in samples if other["group"] == sample["group"] and other["reward"] == 1]
                assert sample["privileged"] in {
                    other["text"].strip() for other in peers if other["sample"] != sample["sample"]
                }
    # What had been collected ahead is in the checkpoint, and gets its prompts again.
    checkpoint = whole / "checkpoints" / "step_000003"
    assert len(read_samples(checkpoint / "ready.safetensors")) == 16
    train(*options, f"run.dir={run}", f"resume={checkpoint}")
    assert without_warnings(run) == without_warnings(whole)[3:]


def test_a_reward_function_without_a_text_ends_the_run_in_one_line(options: list[str], tmp_path: Path) -> None:
    process = start(
        *options, "verify.reward=told_rewards:bare", "teacher.privileged=[peer,feedback]",
        "teacher.max_privileged_tokens=60", f"run.dir={tmp_path / 'run'}", "parallel.data_parallel_size=2",
    )  # fmt: skip
    status, output = finish(process)
    assert status != 0 and "Traceback" not in output, output
    assert "told_rewards:bare on problem" in output and "return (number, text)" in " ".join(output.split()), output
