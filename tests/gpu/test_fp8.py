"""FP8 layers by Transformer Engine on one GPU: next to bf16 in score and update, exported as what they compute with,
and in a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.support.runs import NO_EVALUATION, rows, train
from tests.support.small_models import save_qwen3
from tests.support.worker_scripts import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
    ),
]

CUDA = ["parallel=single", "backend.kind=cuda", "precision=bf16"]
RECIPES = {
    "delayed": ["precision.fp8=delayed"],
    "tensorwise": ["precision.fp8=tensorwise"],
    "tensorwise-e4m3-ends": [
        "precision.fp8=tensorwise", "precision.fp8_format=e4m3", "precision.bf16_first_layers=1",
        "precision.bf16_last_layers=1"
    ],
    "blockwise": ["precision.fp8=blockwise"],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_qwen3(
        path, vocab_size=100, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_update_is_near_that_of_bf16(recipe: str, model: Path, tmp_path: Path) -> None:
    torchrun(
        "fp8_near_bf16",
        1,
        {"path": str(model), "export": str(tmp_path / "export"), "bf16": CUDA, "fp8": [*CUDA, *RECIPES[recipe]]},
    )


def test_a_run_compares_with_bf16(tmp_path: Path) -> None:
    run = [
        "backend.kind=cuda",
        "precision=bf16",
        "precision.fp8=tensorwise",
        "precision.fp8_check_every=2",
        "run.steps=4",
    ]
    train(*NO_EVALUATION, *run, "checkpoint.every=2", f"run.dir={tmp_path / 'run'}")
    gaps = [row.get("precision/fp8_log_prob_diff_mean") for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert [gap is not None for gap in gaps] == [True, True, False, True]
    assert all(0 < gap < 0.1 for gap in gaps if gap is not None)
    output = train(*NO_EVALUATION, *run, "run.steps=6", "resume=auto", f"run.dir={tmp_path / 'run'}")
    assert "resumed from" in output and len(rows(tmp_path / "run" / "metrics.jsonl")) == 6
