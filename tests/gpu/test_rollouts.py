"""The embedded server on a GPU: its engine against transformers, weights that are sent anew, and runs in which trainer
and server share one GPU.

`make test-gpu` runs these; without a GPU they skip and say so.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.support.engine_checks import check_generation, check_weight_update, make_models
from tests.support.runs import NO_EVALUATION, rows, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_and_log_probs_are_those_of_transformers(dtype: torch.dtype, models: tuple[str, str]) -> None:
    check_generation(models[0], torch.device("cuda", 0), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_weights_take_the_place_of_released_ones(dtype: torch.dtype, models: tuple[str, str]) -> None:
    check_weight_update(*models, torch.device("cuda", 0), dtype)


@pytest.mark.parametrize("release", ["false", "true"])
@pytest.mark.parametrize("trainer", ["cuda", "cpu"])
def test_a_run_samples_on_the_gpu(trainer: str, release: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(
        *NO_EVALUATION,
        f"backend.kind={trainer}",
        "rollout.device=cuda",
        f"rollout.release_memory={release}",
        "rollout.cache_gib=1",
        "rollout.verify_weights=4",
        "run.steps=3",
        f"run.dir={run}",
    )
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert max(row["rollout/log_prob_diff_max"] for row in metrics) < 1e-3
    assert re.search(r"cuda:\d had [\d.]+ GiB free", (run / "logs" / "rollout_server.log").read_text())
