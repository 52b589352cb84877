"""Rollout servers, the policy sent to it as ``rollout.weight_sync`` says, and what they hold compared with the
policy."""

import contextlib
import json
import os
import sys
from pathlib import Path

from dasd_megatron import backend
from dasd_megatron.config import load_config

arguments = json.loads(sys.argv[1])
config = load_config(
    ["experiment=quickstart", f"model.path={arguments['path']}", "rollout.threads=1", *arguments["overrides"]]
)
backend.select(config.backend)

import httpx  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from dasd_megatron.models.gpt import build_model  # noqa: E402
from dasd_megatron.rollout.local_server import LocalServer  # noqa: E402
from dasd_megatron.rollout.pool import ServerPool  # noqa: E402
from dasd_megatron.rollout.weight_payload import PayloadError  # noqa: E402
from dasd_megatron.training import parallel  # noqa: E402
from dasd_megatron.training.weight_sync import weight_sync_class  # noqa: E402
from dasd_megatron.training.weight_sync.send import send_weights  # noqa: E402
from dasd_megatron.training.weight_sync.verify import verify_weights  # noqa: E402

parallel.initialize(config)
model = build_model(config, arguments["path"])
rank = dist.get_rank()
parameters = dict(model.named_parameters())


def change(name: str, amount: float) -> None:
    """Every rank's shard of a parameter, all values or with a sign the first alone."""
    if name in parameters:
        with torch.no_grad():
            parameters[name].view(-1)[: 1 if amount < 0 else None].add_(abs(amount))


def shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(f"torch_{os.getpid()}_")}


def refuse(*_: object) -> torch.Tensor:
    raise PayloadError("no room")


last_stage = config.parallel.pipeline_model_parallel_size - 1

with contextlib.ExitStack() as stack:
    servers = []
    if rank == 0:
        servers = [
            stack.enter_context(
                LocalServer(arguments["path"], "start", config.rollout, Path(f"{arguments['log']}{index}"))
            )
            for index in range(arguments["servers"])
        ]
    urls = parallel.broadcast_from_rank0([server.url for server in servers])
    pool = ServerPool(urls)
    sender = weight_sync_class(config.rollout.weight_sync).sender_class(
        config.rollout, dict.fromkeys(urls, 1), pool, stage=model.bridge.export_stage
    )
    stack.callback(sender.close)

    def send(version: str) -> str:
        error = send_weights(model, sender, version)
        assert not shared_files()
        # Every rank knows what rank 0 knows.
        assert parallel.broadcast_from_rank0(str(error or "")) == str(error or "")
        return str(error or "")

    def difference(version: str) -> str:
        return str(verify_weights(model, config.rollout, urls, pool, version) or "")

    # From its directory it has the same ones.
    assert (different := difference("start")) == "", different
    for name in parameters:
        change(name, 0.01)
    # Nobody chooses more than there are: all of them are other ones now.
    moved = difference("moved")
    assert rank != 0 or "other weights" in moved, moved
    for version in ("step_1", "step_2"):
        assert (failure := send(version)) == "", failure
        assert (different := difference(version)) == "", different
        for name in parameters:
            change(name, 0.01)
    assert send("step_3") == ""
    # One value of one tensor on one side.
    for name, served in (
        ("decoder.layers.0.self_attention.linear_proj.weight", "o_proj"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "gate_"),
        ("embedding.word_embeddings.weight", "embed_tokens"),
    ):
        kept = parameters[name].detach().clone() if name in parameters else None
        change(name, -0.001)
        different = difference("step_3")
        assert rank != 0 or served in different, (name, different)
        if kept is not None:
            parameters[name].data.copy_(kept)
        assert (different := difference("step_3")) == "", different
    # A rank that has no room for a bucket: an error on all of them, and the next sync is a good one.
    with pytest.MonkeyPatch.context() as patch:
        if model.bridge.export_stage == (0 if config.rollout.weight_sync == "tensor" else last_stage):
            patch.setattr(sender, "buffer", refuse)
        assert "no room" in send("unsent")
    assert (failure := send("step_4")) == "", failure
    assert (different := difference("step_4")) == "", different
    # A server that dies: an error, in time, no file left, and none of the other ranks hangs.
    if rank == 0:
        for url in urls:
            assert httpx.get(f"{url}/model_info").json()["weight_version"] == "step_4"
        servers[-1].stop()
    failed, compared = send("lost"), difference("lost")
    assert failed and (rank != 0 or "could not be compared" in compared), (failed, compared)
