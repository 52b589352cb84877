"""The CUDA backend on one GPU: the sharded model against transformers, token statistics against float64, and a short
run.

`make test-gpu` runs these; without a GPU they skip and say so.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from dasd_megatron.losses import vocab_parallel_token_stats
from tests.support.runs import NO_EVALUATION, rows, train
from tests.support.small_models import save_qwen3
from tests.support.worker_scripts import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

IMPLEMENTATIONS = [
    "local",
    pytest.param(
        "transformer_engine",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
        ),
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_stats_match_float64(dtype: torch.dtype) -> None:
    logits = torch.randn(64, 5000, device="cuda").to(dtype).requires_grad_()
    targets = torch.randint(0, 4990, (64,), device="cuda")
    stats = vocab_parallel_token_stats(logits, targets, vocab_size=4990, temperature=0.8)
    (stats.log_prob.sum() + stats.entropy.sum()).backward()
    dense = logits.detach().double().requires_grad_()
    log_probs = (dense[:, :4990] / 0.8).log_softmax(-1)
    log_prob, entropy = log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)
    (log_prob.sum() + entropy.sum()).backward()
    torch.testing.assert_close(stats.log_prob.double(), log_prob.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        logits.grad.double(), dense.grad, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_model_matches_transformers(implementation: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_qwen3(
        tmp_path / "model", vocab_size=100, hidden_size=64, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
        max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    overrides = ["parallel=single", "backend.kind=cuda", f"backend.transformer_impl={implementation}"]
    path = str(tmp_path / "model")
    entry = {"path": path, "load": path, "export": str(tmp_path / "export"), "save": str(tmp_path / "save")}
    # Products of float32 by Transformer Engine may be TF32's.
    tolerance = 1e-2 if implementation == "transformer_engine" else 1e-4
    torchrun("model_matches_hf", 1, {"models": [entry], "seed": 1, "overrides": overrides, "tolerance": tolerance})


def test_short_run(tmp_path: Path) -> None:
    train(
        *NO_EVALUATION,
        "backend.kind=cuda",
        "precision=bf16",
        "run.steps=3",
        "warm_start.steps=3",
        f"run.dir={tmp_path / 'run'}",
    )
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
