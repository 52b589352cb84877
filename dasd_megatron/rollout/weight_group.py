"""The process groups that carry weights from the trainer to rollout servers, one for each pipeline stage.

They are apart from the trainer's own groups. Rank 0 of each is a process of the trainer, which gathers the weights of
its stage. The others are the servers' processes, which join when ``/init_weights_update_group`` asks them to; SGLang
joins in the same way.
"""

from __future__ import annotations

import datetime
from typing import Any, cast

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
