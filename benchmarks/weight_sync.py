"""Seconds and GB/s to hand a model's weights to one rollout server, and the memory that the trainer needs for it.

The ways are from disk, over a process group, and out of shared memory, the last two with several bucket sizes. Beside
them stands a bare gloo broadcast of the same bytes between two processes. Memory is what the trainer needs beyond its
own, shared memory included.

    python benchmarks/weight_sync.py --model models/smollm2                      # the embedded server
    python benchmarks/weight_sync.py --model models/smollm2 --engine sglang      # real SGLang on the CPU

The model is whole in this process, in float32. Every figure is the median of ``--rounds`` syncs after one that is not
counted. Writes ``benchmarks/results/weight_sync_ENGINE.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from machine import describe, peak_bytes
from record import write_record

from dasd_megatron import backend
from dasd_megatron.config import Config, load_config

if TYPE_CHECKING:
    from dasd_megatron.models.gpt import ShardedModel

MEGABYTE = 2**20
_PEER = """
import sys, torch, torch.distributed as dist
from dasd_megatron.rollout.weight_group import join_weight_group
port, size, rounds = map(int, sys.argv[1:])
group = join_weight_group("127.0.0.1", port, rank=1, world_size=2, name="bare", backend="gloo", timeout_seconds=120.0)
flat = torch.empty(size, dtype=torch.uint8)
for _ in range(rounds):
    dist.broadcast(flat, 0, group)
    dist.all_reduce(torch.zeros(1), group=group)
"""


def _seconds(call: Callable[[], object], rounds: int) -> list[float]:
    found = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return found[1:]


def bare_broadcast(size: int, rounds: int) -> list[float]:
    """Return the seconds of gloo broadcasts of ``size`` bytes to another process that does nothing else."""
    import torch
    import torch.distributed as dist

    from dasd_megatron.rollout.weight_group import join_weight_group

    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))
    peer = subprocess.Popen([sys.executable, "-c", _PEER, str(store.port), str(size), str(rounds + 1)])
    group = join_weight_group(
        "127.0.0.1", store.port, rank=0, world_size=2, name="bare", backend="gloo", timeout_seconds=120.0, store=store
    )
    flat = torch.zeros(size, dtype=torch.uint8)

    def once() -> None:
        dist.broadcast(flat, 0, group)
        dist.all_reduce(torch.zeros(1), group=group)

    found = _seconds(once, rounds)
    peer.wait(60)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--engine", choices=("embedded", "sglang"), default="embedded")
    parser.add_argument("--buckets", type=int, nargs="+", default=[16, 64, 256, 1024], help="bucket sizes, MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    output = options.output or Path(__file__).parent / "results" / f"weight_sync_{options.engine}.json"
    engine = ["rollout=sglang_cpu"] if options.engine == "sglang" else []
    config = load_config(
        [
            "experiment=quickstart",
            "parallel=single",
            "backend.threads=1",
            f"model.path={options.model}",
            "rollout.threads=1",
            *engine,
        ]
    )
    os.environ.update(
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29677"}
    )
    backend.select(config.backend)
    with tempfile.TemporaryDirectory() as folder:
        rows, size = measure(config, options, Path(folder))
    print(f"{size / 1e9:.3f} GB of weights, median of {options.rounds}")
    print("| way | seconds | GB/s | of a bare broadcast's time | extra memory, MB |\n|---|---|---|---|---|")
    for row in rows:
        memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f}"
        print(
            f"| {row['way']} | {row['seconds']:.2f} | {size / row['seconds'] / 1e9:.2f} | {row['ratio']:.2f} | "
            f"{memory} |"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": describe(), "engine": options.engine, "bytes": size, "rounds": options.rounds, "rows": rows}
    write_record(output, record)


def measure(config: Config, options: argparse.Namespace, folder: Path) -> tuple[list[dict], int]:
    """Return a row for each way, and the bytes of the model's weights."""
    from dasd_megatron.models.gpt import build_model
    from dasd_megatron.rollout.local_server import LocalServer
    from dasd_megatron.training import parallel

    parallel.initialize(config)
    model = build_model(config, options.model)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    rows: list[dict] = []

    def report(way: str, found: list[float], extra: int | None) -> None:
        seconds = statistics.median(found)
        rows.append(
            {
                "way": way,
                "seconds": seconds,
                "spread": [min(found), max(found)],
                "ratio": seconds / (rows[0]["seconds"] if rows else seconds),
                "extra_bytes": extra,
            }
        )
        print(way, f"{seconds:.2f} s", file=sys.stderr, flush=True)

    report("bare gloo broadcast", bare_broadcast(size, options.rounds), None)

    def gather() -> None:
        for _ in model.bridge.export_weights(model.chunks):
            pass

    report("gathering alone", _seconds(gather, options.rounds), None)
    with LocalServer(options.model, "start", config.rollout, folder / "server.log") as server:
        by_disk = disk_sync(model, config, server.url, options.model, folder)
        report("disk", _seconds(by_disk, options.rounds), peak_bytes(by_disk))
        for way, kind in (("process group", "distributed"), ("shared memory", "tensor")):
            for bucket in options.buckets:
                with bucket_sync(model, config, server.url, kind, bucket * MEGABYTE) as send:
                    extra = peak_bytes(send)
                    report(f"{way}, {bucket} MiB buckets", _seconds(send, options.rounds), extra)
    return rows, size


def disk_sync(model: ShardedModel, config: Config, url: str, template_dir: Path, folder: Path) -> Callable[[], None]:
    """Return what hands the weights over in a directory, a new one each time."""
    from dasd_megatron.rollout.client import make_client
    from dasd_megatron.training.export import export_model

    numbers = itertools.count(1)

    def sync() -> None:
        number = next(numbers)
        path = folder / f"weights-{number}"
        export_model(model, path, template_dir=template_dir, manifest=False)

        async def update() -> None:
            async with make_client(config.rollout, [url]) as client:
                await client.update_weights_from_disk(str(path), f"disk-{number}")

        asyncio.run(update())

    return sync


@contextlib.contextmanager
def bucket_sync(
    model: ShardedModel, config: Config, url: str, kind: str, bucket_size: int
) -> Iterator[Callable[[], None]]:
    """Yield what hands the weights over in buckets, over one connection."""
    from dasd_megatron.rollout.pool import ServerPool
    from dasd_megatron.training.weight_sync import weight_sync_class
    from dasd_megatron.training.weight_sync.send import send_weights

    rollout = dataclasses.replace(config.rollout, weight_bucket_bytes=bucket_size)
    sender = weight_sync_class(kind).sender_class(rollout, {url: 1}, ServerPool([url]), stage=0)
    numbers = itertools.count(1)

    def sync() -> None:
        failure = send_weights(model, sender, f"{kind}-{bucket_size}-{next(numbers)}")
        if failure is not None:
            raise failure

    yield sync
    sender.close()


if __name__ == "__main__":
    main()
