"""Whole runs: the same rollouts give the same metrics and the same model in a parallel layout as in one process.

``tests/distributed/test_parity.py`` has every layout, by the trainer's own step; here the launcher, the replicas'
shares, packing and the export are in it too.
"""

from __future__ import annotations

import random
import secrets
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dasd_megatron.rollout_files import load_samples, rollouts_path, save_samples
from tests.support.runs import NO_EVALUATION, rows, train

pytestmark = pytest.mark.integration

PACKING = ["batch.packing=true", "batch.micro_batch_size=8", "batch.micro_batch_tokens=200"]
LAYOUTS = {
    "tp2-pp2": [
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2",
        "algorithm.objective=distributional",
    ],
    "dp2-overlap-packing": [
        "parallel.data_parallel_size=2",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
        "parallel.bucket_size=3000",
        "algorithm.objective=distributional",
        *PACKING,
    ],
}
# Two minibatches of two epochs, so that the optimizer's state, the clip and the order of the data all count; every
# weight of the loss on.
COMMON = [
    *NO_EVALUATION,
    "run.steps=2",
    "batch.minibatches=2",
    "batch.epochs=2",
    "loss.kl_coef=0.1",
    "loss.dual_clip=3.0",
    "teacher.weights=ema",
    # Rounding must not grow into a difference: at SMALL's rate it grows a hundredfold in these eight updates, and with
    # a tiny epsilon Adam's first step is the sign of each gradient, which rounding decides where a gradient is nearly
    # zero.
    "optimizer.lr=3e-4",
    "optimizer.adam_eps=1e-4",
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Rollouts saved by one process, with random rewards so that the verifier counts, and the run of one process that
    replays them."""
    folder = tmp_path_factory.mktemp("recorded")
    # A random model is equally uncertain everywhere, and routing by its entropy would magnify rounding; a little
    # training spreads it.
    train(*COMMON, "warm_start.steps=40", "warm_start.lr=3e-3", f"run.dir={folder / 'made'}")
    model = ["model=hf", f"model.path={folder / 'made' / 'warm_start'}"]
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for step in (1, 2):
        samples = load_samples(folder / "made" / "rollouts", step, groups=4, samples_per_group=4)
        for sample in samples:
            sample.reward = float(draw.random() < 0.5)
        save_samples(rollouts_path(folder / "replay", step), samples)
    overrides = [*COMMON, *model, f"rollout.replay={folder / 'replay'}"]
    train(*overrides, "algorithm.objective=distributional", f"run.dir={folder / 'single'}")
    return overrides, folder / "single"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_equals_that_of_one_process(layout: str, recorded: tuple[list[str], Path], tmp_path: Path) -> None:
    overrides, single = recorded
    train(*overrides, *LAYOUTS[layout], f"run.dir={tmp_path / 'run'}")
    found, expected = rows(tmp_path / "run" / "metrics.jsonl"), rows(single / "metrics.jsonl")
    assert len(found) == len(expected) == 2
    assert (
        expected[0]["update/grad_norm"] > 0.01
        and expected[0]["reward/std"] > 0
        and expected[0]["update/divergence"] > 1e-3
    )
    for row, other in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "kl_to_start", "divergence", "capped_share"):
            assert row[f"update/{name}"] == pytest.approx(other[f"update/{name}"], rel=1e-5, abs=1e-5), (
                row["step"],
                name,
            )
        for name in ("entropy/mean", "credit/delta_mean", "credit/omega_mean"):
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (row["step"], name)
        for name in (
            "reward/mean",
            "reward/std",
            "reward/groups_all_wrong",
            "response/length_mean",
            "credit/pushed_share",
            "update/lr",
        ):
            assert row[name] == pytest.approx(other[name], rel=1e-9), (row["step"], name)
    weights, expected_weights, before = (
        load_file(path / "model.safetensors")
        for path in (tmp_path / "run" / "model", single / "model", single.parent / "made" / "warm_start")
    )
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-5)
    assert max(float((tensor - before[name]).abs().max()) for name, tensor in expected_weights.items()) > 1e-3
