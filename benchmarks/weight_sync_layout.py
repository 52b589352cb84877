"""Seconds to gather a sharded policy's weights, and to hand them to a rollout server, tensor by tensor and in buckets.

    python -m torch.distributed.run --nproc-per-node 4 benchmarks/weight_sync_layout.py

It is at TP 2 and PP 2, over gloo, to the embedded server.

``tensor by tensor`` is what this package did before, written anew here: a broadcast over the pipeline ranks and an
all-gather over the tensor-parallel ranks for every parameter, on all ranks, and global rank 0 alone sends. ``buckets``
is what it does now: one gather of shards for a bucket, and with ``distributed`` the source of every pipeline stage
sends. The two take turns, so that other work on the machine slows both. The model is made in code, in float32. Writes
``benchmarks/results/weight_sync_layout.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import describe
from record import write_record

from dasd_megatron import backend
from dasd_megatron.config import RolloutConfig, TinyModelConfig, load_config

if TYPE_CHECKING:
    import torch

    from dasd_megatron.models.gpt import ShardedModel
    from dasd_megatron.models.weight_export import HfTensor
    from dasd_megatron.training.weight_sync.send import BucketSender

MEGABYTE = 2**20
SIZES = TinyModelConfig(
    hidden_size=768, num_layers=16, num_attention_heads=12, num_key_value_heads=4, head_dim=64, intermediate_size=2304
)
TP2_PP2 = ["parallel=tp2", "parallel.pipeline_model_parallel_size=2"]


def tensor_by_tensor(model: ShardedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every Hugging Face tensor on every rank: two collectives for each parameter."""
    import torch
    import torch.distributed as dist
    from megatron.core.utils import unwrap_model

    bridge, mpu = model.bridge, model.bridge.mpu
    parameters = [dict(unwrap_model(chunk).named_parameters()) for chunk in model.chunks]
    for entry in bridge.export_plan(model.chunks):
        if entry.stage == mpu.pp_rank:
            shard: Any = parameters[entry.chunk][entry.local_name]
        else:
            shard = torch.empty(entry.shape, dtype=entry.dtype)
            if entry.partition_dim is not None:
                shard.tensor_model_parallel, shard.partition_dim = True, entry.partition_dim
        if mpu.pp_size > 1:
            dist.broadcast(shard.detach(), dist.get_global_rank(mpu.pp_group, entry.stage), group=mpu.pp_group)
        whole = shard.detach()
        if entry.partition_dim is not None and mpu.tp_size > 1:
            shards = [torch.empty_like(whole) for _ in range(mpu.tp_size)]
            dist.all_gather(shards, whole, group=mpu.tp_group)
            whole = bridge._weight_merge_across_tp(entry.name, shards, shard)
        yield from zip(*bridge._weight_to_hf_format(entry.name, whole), strict=True)


def send_from_rank0(model: ShardedModel, sender: BucketSender, version: str, bucket_size: int) -> None:
    """Send every tensor from global rank 0, which packs one bucket while the one before it travels."""
    import torch

    from dasd_megatron.models.weight_export import ExportBucket, HfTensor

    sender.begin()
    sends = sender.stage is not None
    names: set[str] = set()
    filling: list[HfTensor] = []
    filled = index = 0

    def flush() -> None:
        nonlocal filled, index
        sender.check()
        sender.start([ExportBucket(0, (), tuple(filling))], sender.buffer(index, filled)[:filled])
        filling.clear()
        filled, index = 0, 1 - index

    for name, tensor in tensor_by_tensor(model):
        if not sends or name in names:
            continue
        names.add(name)
        known = HfTensor(name, tensor.dtype, tuple(tensor.shape))
        if filling and filled + known.size > bucket_size:
            flush()
        room = sender.buffer(index, max(known.size, bucket_size))[filled : filled + known.size]
        room.copy_(tensor.contiguous().view(torch.uint8).flatten())
        filling.append(known)
        filled += known.size
    if sends:
        flush()
        sender.check()
        sender.start([], None)
    sender.end(version)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", type=int, default=32, help="bucket size, MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "weight_sync_layout.json")
    options = parser.parse_args()
    config = load_config(["experiment=quickstart", "backend.threads=1", "rollout.threads=1", *TP2_PP2])
    backend.select(config.backend)

    import torch.distributed as dist

    from dasd_megatron.models.gpt import build_model
    from dasd_megatron.models.tiny import make_tiny_model
    from dasd_megatron.rollout.local_server import LocalServer
    from dasd_megatron.training import parallel

    parallel.initialize(config)
    rank0 = dist.get_rank() == 0
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if rank0 else None
        path = parallel.broadcast_from_rank0(
            str(make_tiny_model(Path(folder) / "model", SIZES, 0)) if folder is not None else None
        )
        model = build_model(config, path)
        server = None
        if folder is not None:
            server = stack.enter_context(LocalServer(path, "start", config.rollout, Path(folder) / "log"))
        url = parallel.broadcast_from_rank0(None if server is None else server.url)
        rows = measure(model, config.rollout, url, options)
    if rank0:
        size = sum(tensor.size for entry in model.bridge.export_plan(model.chunks) for tensor in entry.tensors)
        print("| what | tensor by tensor, s | buckets, s | ratio |\n|---|---|---|---|")
        for row in rows:
            old, new = (statistics.median(row[way]) for way in ("tensor by tensor", "buckets"))
            print(f"| {row['what']} | {old:.2f} | {new:.2f} | {old / new:.2f} |")
        record = {"machine": describe(), "layout": TP2_PP2, "bytes": size, "bucket_bytes": options.bucket * MEGABYTE}
        write_record(options.output, record | {"rows": rows})
    dist.destroy_process_group()


def measure(model: ShardedModel, rollout: RolloutConfig, url: str, options: argparse.Namespace) -> list[dict]:
    """Return the seconds of every round, of both ways in turn, after one that is not counted."""
    from dasd_megatron.rollout.pool import ServerPool
    from dasd_megatron.training.weight_sync import weight_sync_class
    from dasd_megatron.training.weight_sync.send import send_weights

    stage, bucket_size, pool = model.bridge.export_stage, options.bucket * MEGABYTE, ServerPool([url])
    rollout = dataclasses.replace(rollout, weight_bucket_bytes=bucket_size)
    versions = (f"step_{number}" for number in itertools.count())

    def next_version() -> str:
        version = next(versions)
        pool.expect(version)
        return version

    def iterate(generator: Iterator[object]) -> None:
        for _ in generator:
            pass

    def send(sender: BucketSender) -> None:
        failure = send_weights(model, sender, next_version())
        if failure is not None:
            raise failure

    rows = [
        _compare(
            "gathering alone",
            lambda: iterate(tensor_by_tensor(model)),
            lambda: iterate(model.bridge.export_weights(model.chunks)),
            options.rounds,
        )
    ]
    for kind in ("distributed", "tensor"):
        make = weight_sync_class(kind).sender_class
        first = 0 if stage == 0 else None
        old, new = (make(rollout, {url: 1}, pool, stage=own) for own in (first, stage))
        rows.append(
            _compare(
                f"weight_sync={kind}",
                lambda old=old: send_from_rank0(model, old, next_version(), bucket_size),
                lambda new=new: send(new),
                options.rounds,
            )
        )
        old.close()
        new.close()
    return rows


def _compare(what: str, old: Callable[[], None], new: Callable[[], None], rounds: int) -> dict:
    import torch.distributed as dist

    seconds: dict[str, list[float]] = {"tensor by tensor": [], "buckets": []}
    for number in range(rounds + 1):
        for way, call in zip(seconds, (old, new), strict=True):
            dist.barrier()
            started = time.perf_counter()
            call()
            dist.barrier()
            if number:
                seconds[way].append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        print(what, {way: round(statistics.median(times), 3) for way, times in seconds.items()}, file=sys.stderr)
    return {"what": what, **seconds}


if __name__ == "__main__":
    main()
