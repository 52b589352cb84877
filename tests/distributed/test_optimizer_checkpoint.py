"""What the distributed optimizer saves is what Megatron's own format gathers, and any other layout loads it to the bit."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import torch
from launch import torchrun
from test_model_parallel import MODELS, PP, SIZES, TP, VPP

from dasd_megatron.models.tiny import character_tokenizer

pytestmark = pytest.mark.distributed

REPLICAS = "parallel.data_parallel_size=2"


def test_optimizer_state_goes_from_one_layout_to_another(tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    MODELS["qwen3-tied"]().save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    common = {"folder": str(tmp_path), "path": str(tmp_path / "model"), "seed": seed, "rows": SIZES["vocab_size"]}
    saves = ["parallel=single", TP + "2", REPLICAS]
    torchrun("optimizer_checkpoint", 4, common | {"overrides": saves, "loads": False})
    # Buckets that end anywhere, with padding between them.
    buckets = ["parallel.overlap_grad_reduce=true", "parallel.bucket_size=30001"]
    loads = ["parallel=single", PP + "2", VPP + "2", REPLICAS, *buckets]
    torchrun("optimizer_checkpoint", 4, common | {"overrides": loads, "loads": True})
