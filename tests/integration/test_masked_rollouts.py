"""Saved rollouts with tokens that the policy did not sample train as if these were a part of the prompt, and count
nowhere."""

from __future__ import annotations

import copy
import json
import random
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from dasd_megatron.rollout_files import load_samples, rollouts_path, save_samples
from dasd_megatron.samples import Sample, ids_array, log_probs_array, mask_array
from tests.support.runs import NO_EVALUATION, finish, reproducible, rows, start, train

pytestmark = pytest.mark.integration

# Rounding must not grow: see test_layouts.py.
COMMON = [
    *NO_EVALUATION, "run.steps=2", "batch.minibatches=2", "loss.importance_sampling=token", "loss.kl_coef=0.1",
    "optimizer.lr=3e-4",
    "optimizer.adam_eps=1e-4",
    "loss.surrogate=gspo", "loss.clip_low=0.2", "loss.clip_high=0.2", "loss.aggregation=seq_mean_token_mean",
    "loss.rejection=token", "loss.rejection_veto=1e-4",
]  # fmt: skip
DASD = ["algorithm.objective=distributional", "algorithm.divergence_weight=0.3"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was warm-started a little and saved its rollouts; random rewards, so that the verifier counts."""
    made = tmp_path_factory.mktemp("recorded") / "made"
    train(*COMMON, "warm_start.steps=40", "warm_start.lr=3e-3", f"run.dir={made}")
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for step in (1, 2):
        samples = load_samples(made / "rollouts", step, groups=4, samples_per_group=4)
        for sample in samples:
            sample.reward = float(draw.random() < 0.5)
        save_samples(rollouts_path(made / "rollouts", step), samples)
    return made


def replay(recorded: Path, run: Path, change: Callable[[Sample], None] | None, *overrides: str) -> list[dict]:
    """Metrics of a run on a changed copy of the recorded rollouts."""
    source = recorded / "rollouts"
    if change is not None:
        source = run.with_name(run.name + "-rollouts")
        for step in (1, 2):
            samples = copy.deepcopy(load_samples(recorded / "rollouts", step, groups=4, samples_per_group=4))
            for sample in samples:
                change(sample)
            save_samples(rollouts_path(source, step), samples)
    model = ["model=hf", f"model.path={recorded / 'warm_start'}"]
    train(*COMMON, *DASD, *model, f"rollout.replay={source}", f"run.dir={run}", *overrides)
    found = reproducible(run / "metrics.jsonl")
    assert len(found) == 2 and found[0]["update/grad_norm"] > 1e-3
    return found


def append_answer(sample: Sample) -> None:
    """Append what a tool says behind the policy's last token."""
    count = 1 + sample.sample
    mask = [1] * len(sample.response_ids) + [0] * count
    ids, log_probs = [*sample.response_ids, *[7 + sample.group] * count], [*sample.rollout_log_probs, *[0.0] * count]
    _replace(sample, ids, log_probs, mask)


def insert_answer(sample: Sample) -> None:
    """Turns of the policy with a tool's answer between them."""
    middle, answer = len(sample.response_ids) // 2, [5, 6, 7]
    mask = [1] * middle + [0] * 3 + [1] * (len(sample.response_ids) - middle)
    ids, log_probs = sample.response_ids.tolist(), sample.rollout_log_probs.tolist()
    ids[middle:middle], log_probs[middle:middle] = answer, [0.0] * 3
    _replace(sample, ids, log_probs, mask)


def _replace(sample: Sample, ids: list[int], log_probs: list[float], mask: list[int]) -> None:
    sample.response_ids, sample.rollout_log_probs = ids_array(ids), log_probs_array(log_probs)
    sample.response_mask = mask_array(mask)


def assert_same(found: list[dict], expected: list[dict]) -> None:
    for row, other in zip(found, expected, strict=True):
        assert row.pop("weight_version") == other["weight_version"]
        assert row == pytest.approx(
            {name: value for name, value in other.items() if name != "weight_version"}, rel=1e-4, abs=1e-5
        )


def test_context_changes_no_metric(recorded: Path, tmp_path: Path) -> None:
    expected = replay(recorded, tmp_path / "plain", None)
    assert_same(replay(recorded, tmp_path / "masked", append_answer), expected)


def test_turns_with_answers_between_train_alike_on_replicas(recorded: Path, tmp_path: Path) -> None:
    found = replay(recorded, tmp_path / "single", insert_answer)
    assert_same(replay(recorded, tmp_path / "dp2", insert_answer, "parallel.data_parallel_size=2"), found)
    samples = load_samples(tmp_path / "single-rollouts", 1, groups=4, samples_per_group=4)
    assert found[0]["response/length_mean"] == sum(int(sample.response_mask.sum()) for sample in samples) / len(samples)
    # The tokens behind the answer are other than what was recorded for them.
    assert (
        found[0]["rollout/log_prob_diff_mean"] > 100 * rows(recorded / "metrics.jsonl")[0]["rollout/log_prob_diff_mean"]
    )
    inspected = json.loads((tmp_path / "single" / "inspect" / "step_000001.json").read_text())
    assert inspected
    for record, sample in zip(inspected, samples, strict=False):
        counts = {len(record[name]) for name in ("tokens", "entropy", "delta", "omega", "student_log_prob")}
        assert counts == {int(sample.response_mask.sum())}


def test_rollouts_that_cannot_be_trained_on_end_a_run_before_its_model_is_made(tmp_path: Path) -> None:
    sample = Sample(
        0, 0, 0, "p", "1+1", "2", "", [1, 2], [3, 10**6], [-0.1, -0.2], "2", "stop", [["v", 2]], 1.0, "2", False
    )  # fmt: skip
    path = rollouts_path(tmp_path / "rollouts", 1)
    save_samples(path, [sample])
    process = start(*NO_EVALUATION, f"rollout.replay={path.parent}", f"run.dir={tmp_path / 'run'}")
    status, output = finish(process)
    assert status != 0 and f"{path}: rollout 1: response_ids has token 1000000, and the model has" in output, output
    assert "Traceback" not in output and not (tmp_path / "run" / "metrics.jsonl").exists()
