"""After a weight sync servers hold the policy's weights, tensor for tensor, in every layout and for both ways without a
file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from tests.support.servers import sglang_python
from tests.support.worker_scripts import torchrun

pytestmark = pytest.mark.distributed

TINY = TinyModelConfig(
    hidden_size=32, num_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48
)
# Far smaller than the model, and no multiple of anything: tensors of all sizes end and begin buckets, and some have one
# of their own.
SMALL_BUCKETS = [
    "rollout.weight_bucket_bytes=5001",
    "rollout.weight_sync_timeout_seconds=30",
    "rollout.verify_weights=99",
]
TP2_PP2 = ["parallel=tp2", "parallel.pipeline_model_parallel_size=2"]


@pytest.mark.parametrize("way", ["tensor", "distributed"])
@pytest.mark.parametrize(
    ("engine", "layout", "processes", "servers"),
    [
        # The short form of the drill that follows. It stays in `make test`, with two embedded servers, which must get
        # the stages' buckets in the same order.
        ("embedded", TP2_PP2, 4, 2),
        pytest.param("sglang", TP2_PP2, 4, 1, marks=pytest.mark.drill),
    ],
)
def test_the_servers_hold_what_the_policy_is(
    way: str, engine: str, layout: list[str], processes: int, servers: int, tmp_path: Path
) -> None:
    overrides = [*SMALL_BUCKETS, *layout]
    if engine == "sglang":
        overrides += ["rollout=sglang_cpu", f"rollout.sglang.python={sglang_python()}"]
    overrides += [f"rollout.weight_sync={way}", "rollout.max_retries=0"]
    path = make_tiny_model(tmp_path / "model", TINY, 0)
    arguments = {"path": str(path), "log": str(tmp_path / "server.log"), "servers": servers, "overrides": overrides}
    torchrun("weight_sync_to_server", processes, arguments, timeout=400)
