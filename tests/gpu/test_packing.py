"""Packed sequences on one GPU equal padded ones: Transformer Engine's thd attention in bf16, local layers in fp32 and
bf16, both objectives, and with recomputation.

`make test-gpu` runs these; `pytest -m gpu tests/gpu/test_packing.py -s` also shows the differences and the times.
"""

from __future__ import annotations

import importlib.util
import secrets
from pathlib import Path

import pytest
import torch

from tests.support.small_models import save_qwen3
from tests.support.worker_scripts import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
TRANSFORMER_ENGINE = ["backend.transformer_impl=transformer_engine", "precision=bf16"]
CASES = {
    "local-fp32": ["backend.transformer_impl=local", "precision=fp32"],
    "local-bf16-distributional": [
        "backend.transformer_impl=local",
        "precision=bf16",
        "algorithm.objective=distributional",
    ],
    "te-bf16": TRANSFORMER_ENGINE,
    "te-bf16-distributional": [*TRANSFORMER_ENGINE, "algorithm.objective=distributional"],
    "te-bf16-recompute-full": [*TRANSFORMER_ENGINE, "precision.recompute=full"],
    "te-bf16-recompute-selective": [
        *TRANSFORMER_ENGINE,
        "precision.recompute=selective",
        "precision.recompute_modules=[core_attn,mlp]",
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_packed_equals_padded(case: str, tmp_path: Path) -> None:
    if case.startswith("te-") and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("transformer-engine is not installed")
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    save_qwen3(
        tmp_path / "model", vocab_size=1000, hidden_size=256, intermediate_size=512, num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    overrides = ["backend.kind=cuda", *CASES[case]]
    arguments = {"path": str(tmp_path / "model"), "seed": seed, "longest": 500, "overrides": overrides}
    print(torchrun("packing_matches_padded", 1, arguments))
