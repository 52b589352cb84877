"""Memory of a GPU that the trainer gives to other processes and takes again: what becomes free, the values, a
checkpoint meanwhile, and a run whose trainer and server take turns on one GPU.

`make test-gpu` runs these; without a GPU they skip and say so.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.runs import NO_EVALUATION, rows, train
from tests.support.small_models import save_qwen3
from tests.support.worker_scripts import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_the_memory_of_the_gpu_is_free_for_others(distributed: str, tmp_path: Path) -> None:
    save_qwen3(
        tmp_path / "model", vocab_size=32000, hidden_size=1024, intermediate_size=3072, num_attention_heads=16,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    overrides = ["parallel=single", "backend.kind=cuda", "precision=bf16", f"optimizer.distributed={distributed}"]
    torchrun("offload_memory", 1, {"folder": str(tmp_path), "overrides": overrides})


@pytest.mark.parametrize("offload", ["state", "all"])
def test_trainer_and_server_take_turns_on_one_gpu(offload: str, tmp_path: Path) -> None:
    common = [
        *NO_EVALUATION,
        "backend.kind=cuda",
        "rollout.device=cuda",
        "rollout.release_memory=true",
        "rollout.cache_gib=1",
        "rollout.verify_weights=4",
        "run.steps=3",
        "checkpoint.every=2",
    ]
    train(*common, f"backend.offload={offload}", f"run.dir={tmp_path / 'run'}")
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert all(row["memory/released"] > 0 for row in metrics)
    assert max(row["rollout/log_prob_diff_max"] for row in metrics) < 1e-3
