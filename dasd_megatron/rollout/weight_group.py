"""The process group that carries weights from the trainer to rollout servers, and the flat buckets that travel over it.

It is apart from the trainer's own groups. Its rank 0 is the trainer's first process. The others are the servers'
processes, which join when ``/init_weights_update_group`` asks them to; SGLang joins it in the same way.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def join_weight_group(
    address: str,
    port: int,
    *,
    rank: int,
    world_size: int,
    name: str,
    backend: str,
    timeout_seconds: float,
    store: dist.TCPStore | None = None,
) -> dist.ProcessGroup:
    """Become ``rank`` of the group ``name``, and return it when all ranks have come. Needs no default process group.

    ``store``: rank 0's, which listens at ``address:port``; the others connect to it. Collectives fail after
    ``timeout_seconds`` too.

    Raises:
        RuntimeError, ValueError: not all came in time, or nobody listens there.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if store is None:
        store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    # torch.distributed.new_group would make it a part of the default group. The two names used here instead are private
    # to torch, and have kept their form since 2.6.
    group, _ = distributed_c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        distributed_c10d.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=cast(Any, name),  # newer releases of torch have a type of their own for it
        timeout=timeout,
    )
    distributed_c10d._world.pg_group_ranks[group] = {index: index for index in range(world_size)}
    return group


def split_bucket(
    flat: torch.Tensor, dtypes: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Return the tensors of a bucket, views into ``flat`` [bytes] uint8, where they lie end to end."""
    tensors, offset = [], 0
    for dtype, shape in zip(dtypes, shapes, strict=True):
        size = torch.Size(shape).numel() * dtype.itemsize
        tensors.append(flat[offset : offset + size].view(dtype).reshape(shape))
        offset += size
    return tensors


def bucket_bytes(dtypes: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]) -> int:
    """Return the size of a bucket with these tensors."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in zip(dtypes, shapes, strict=True))
