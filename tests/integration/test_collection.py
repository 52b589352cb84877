"""Whole runs that filter, over-sample and sample ahead: resumed like uninterrupted, the same for any number of
replicas, nothing lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dasd_megatron.rollout_files import read_samples
from tests.support.runs import NO_EVALUATION, kill, reproducible, rows, rows_so_far, saved_rollouts, start, train
from tests.support.servers import sglang_python

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

AHEAD = [
    *NO_EVALUATION,
    "run.steps=7",
    "checkpoint.every=3",
    "rollout.max_staleness=1",
    "loss.importance_sampling=token",
]
REWARDS = """
def even(sample):
    return float(sum(sample.response_ids) % 2 == 0)

def measures(sample):
    return {"right": sample.reward, "first": sample.response_ids[0] if sample.reward else None}
"""


def samples(run: Path) -> list[list[dict]]:
    """The rollouts of each step."""
    return list(saved_rollouts(run).values())


def positions(run: Path) -> list[list[int]]:
    return [sorted({sample["position"] for sample in step}) for step in samples(run)]


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A reward that differs within the groups of a model that cannot add, and the filter that wants it to."""
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ["verify.reward=own_rewards:even", "rollout.filter=dasd_megatron.rollout.filters:rewards_differ"]


def test_one_step_ahead_killed_and_resumed_is_like_uninterrupted(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(*AHEAD, f"run.dir={whole}")
    metrics = rows(whole / "metrics.jsonl")
    assert [row["rollout/staleness_max"] for row in metrics] == [0, 1, 1, 1, 1, 1, 1]
    assert [row["weight_version"] for row in metrics[:4]] == [
        "step_000000",
        "step_000000",
        "step_000001",
        "step_000002",
    ]
    # The importance weights are those of one update: not 1, as on-policy, and near it.
    assert metrics[0]["rollout/log_prob_diff_max"] < 1e-4 < metrics[3]["rollout/log_prob_diff_max"] < 0.5
    assert positions(whole) == [list(range(4 * step, 4 * step + 4)) for step in range(7)]
    process = start(*AHEAD, f"run.dir={run}")
    deadline = time.monotonic() + 120
    while len(rows_so_far(run)) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    kill(process)
    # What had been sampled for the fourth step is in the checkpoint after the third.
    assert len(read_samples(run / "checkpoints" / "step_000003" / "ready.safetensors")) == 16
    assert "at step 3" in train(*AHEAD, f"run.dir={run}", "resume=auto")
    assert reproducible(run / "metrics.jsonl") == reproducible(whole / "metrics.jsonl")


def test_which_groups_are_trained_on_does_not_depend_on_the_number_of_replicas(
    tmp_path: Path, rewards: list[str]
) -> None:
    options = [
        *NO_EVALUATION, "run.steps=3", "rollout.over_sampling=1.5", "verify.measures=own_rewards:measures", *rewards
    ]  # fmt: skip
    for replicas in (1, 2):
        train(*options, f"parallel.data_parallel_size={replicas}", f"run.dir={tmp_path / str(replicas)}")
    first, second = (rows(tmp_path / name / "metrics.jsonl") for name in ("1", "2"))
    assert positions(tmp_path / "1")[0] == positions(tmp_path / "2")[0]
    assert sum(row["rollout/groups_filtered"] for row in first) > 0
    assert max(row["reward/groups_all_correct"] + row["reward/groups_all_wrong"] for row in [*first, *second]) == 0.0
    assert first[0]["update/loss"] == pytest.approx(second[0]["update/loss"], rel=1e-4)
    for name in ("1", "2"):
        drawn = [position for step in positions(tmp_path / name) for position in step]
        assert len(drawn) == len(set(drawn)) == 12
    for name, metrics in (("1", first), ("2", second)):
        for row, step in zip(metrics, samples(tmp_path / name), strict=True):
            right = [sample["response_ids"][0] for sample in step if sample["reward"]]
            assert row["measure/right"] == row["reward/accuracy"] == len(right) / len(step)
            assert row["measure/first"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("engine", ["embedded", pytest.param("sglang", marks=pytest.mark.drill)])
def test_stragglers_are_retracted_and_go_on_under_new_weights(engine: str, tmp_path: Path, rewards: list[str]) -> None:
    options = [
        *NO_EVALUATION,
        "run.steps=10",
        "rollout.max_staleness=1",
        "rollout.unfinished=retract",
        "rollout.over_sampling=1.5",
        "rollout.groups_per_request=1",
        "rollout.max_new_tokens=48",
        "loss.importance_sampling=token",
        *rewards,
    ]
    if engine == "sglang":
        options += ["rollout=sglang_cpu", f"rollout.sglang.python={sglang_python()}"]
    train(*options, f"run.dir={tmp_path / 'run'}")
    metrics, steps = rows(tmp_path / "run" / "metrics.jsonl"), samples(tmp_path / "run")
    assert max(row["rollout/staleness_max"] for row in metrics) == 1
    assert sum(row["rollout/mixed_share"] for row in metrics) > 0
    drawn = [position for step in positions(tmp_path / "run") for position in step]
    assert len(drawn) == len(set(drawn)) == 40
    for number, step in enumerate(steps):
        for sample in step:
            assert sum(tokens for _, tokens in sample["weight_versions"]) == len(sample["response_ids"])
            assert {version for version, _ in sample["weight_versions"]} <= {
                f"step_{n:06d}" for n in (number, number - 1)
            }
