"""The distributed optimizer saves what Megatron's own format gathers, and any other layout loads it to the
bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.small_models import PP, SIZES, TP, VPP, save_model
from tests.support.worker_scripts import torchrun

pytestmark = pytest.mark.distributed

REPLICAS = "parallel.data_parallel_size=2"


def test_optimizer_state_goes_from_one_layout_to_another(tmp_path: Path) -> None:
    seed = save_model("qwen3-tied", tmp_path / "model")
    common = {"folder": str(tmp_path), "path": str(tmp_path / "model"), "seed": seed, "rows": SIZES["vocab_size"]}
    saves = ["parallel=single", TP + "2", REPLICAS]
    torchrun("optimizer_checkpoint", 4, common | {"overrides": saves, "loads": False})
    # Buckets that end anywhere, with padding between them.
    buckets = ["parallel.overlap_grad_reduce=true", "parallel.bucket_size=30001"]
    loads = ["parallel=single", PP + "2", VPP + "2", REPLICAS, *buckets]
    torchrun("optimizer_checkpoint", 4, common | {"overrides": loads, "loads": True})
