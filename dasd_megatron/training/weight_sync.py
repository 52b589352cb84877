"""The policy's weights to the rollout servers over a process group of their own, bucket by bucket, without a file between."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import datetime
import socket
import threading
import uuid
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from dasd_megatron import backend
from dasd_megatron.config import RolloutConfig
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.rollout.client import RolloutError
from dasd_megatron.rollout.generation import make_client
from dasd_megatron.rollout.pool import ServerPool
from dasd_megatron.rollout.weight_group import join_weight_group

# A server that is gone, or hangs, is not waited for any longer when a group is left.
_LEAVE_SECONDS = 5.0


class WeightSyncError(RuntimeError):
    """The servers did not take the weights; what they serve now is unknown. ``url``: the server that it failed for, where that is known."""

    def __init__(self, what: str, url: str | None = None):
        super().__init__(f"weight sync: {what}")
        self.url = url


class DistributedSync:
    """Sends weights to servers; lives on global rank 0, but :func:`send_weights` is collective over all ranks.

    The group is made when it is first needed, and again after a failure. Every step has the limit ``rollout.weight_sync_timeout_seconds``.

    urls: addresses of the servers; sizes: processes of each that take part, its tensor-parallel size; pool: hears who serves the weights.
    """

    def __init__(self, config: RolloutConfig, urls: Sequence[str], sizes: Mapping[str, int], pool: ServerPool):
        self.config, self.urls = config, list(urls)
        self.sizes = [sizes[url] for url in self.urls]
        self._group: dist.ProcessGroup | None = None
        self._store: dist.TCPStore | None = None
        self._name = ""
        self._device = backend.current().device()
        # Two buffers: one fills while the other is on its way.
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=self._device) for _ in range(2)]
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="weight-sync", daemon=True).start()
        self._leaving: concurrent.futures.Future | None = None
        # All servers have to be asked at once: each waits for the others.
        in_flight = max(config.max_in_flight, len(self.urls))
        limits = dataclasses.replace(config, request_timeout_seconds=config.weight_sync_timeout_seconds, max_in_flight=in_flight)
        self._client = make_client(limits, self.urls, pool)

    @property
    def joined(self) -> bool:
        return self._group is not None

    def _run(self, work) -> concurrent.futures.Future:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _finish(self, future: concurrent.futures.Future) -> None:
        try:
            # Each request in it has its own limit, and so has each collective; this is for what neither bounds.
            future.result(2 * self.config.weight_sync_timeout_seconds + self.config.connect_timeout_seconds)
        except (RolloutError, RuntimeError, OSError) as error:  # a TimeoutError is an OSError
            self.drop_group()
            raise WeightSyncError(str(error) or type(error).__name__, error.url if isinstance(error, RolloutError) else None) from error

    def drop_group(self) -> None:
        """Leave the group without waiting for servers, some of which may be gone; the next sync makes another."""
        if self._group is not None:
            self._leaving = self._run(self._leave(self._name, self._group))
        self._group = self._store = None

    async def _leave(self, name: str, group: dist.ProcessGroup) -> None:
        async def tell(url: str) -> None:
            limits = dataclasses.replace(self.config, request_timeout_seconds=_LEAVE_SECONDS)
            async with make_client(limits, [url]) as client:
                with contextlib.suppress(RolloutError):  # it is down, or has left already
                    await client.destroy_weights_update_group(name)

        # In a thread: a broadcast that still waits for a dead peer may hold it up, up to its own limit.
        await asyncio.gather(asyncio.to_thread(dist.destroy_process_group, group), *map(tell, self.urls))

    async def _join(self) -> None:
        addresses = [_address_towards(url) for url in self.urls]
        limit = self.config.weight_sync_timeout_seconds
        world_size = 1 + sum(self.sizes)
        # A server may still know groups of a trainer that is gone.
        name = f"weights-{uuid.uuid4().hex}"
        store = dist.TCPStore(
            addresses[0], 0, world_size, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=limit)
        )
        offsets = [1 + sum(self.sizes[:index]) for index in range(len(self.sizes))]
        kind = "nccl" if self._device.type == "cuda" else "gloo"
        options = dict(rank=0, world_size=world_size, name=name, backend=kind, timeout_seconds=limit, store=store)
        asked = self._client.init_weights_update_group(
            addresses, store.port, rank_offsets=offsets, world_size=world_size, name=name, backend=kind
        )
        self._name = name
        self._group = await _both(asked, asyncio.to_thread(join_weight_group, addresses[0], store.port, **options))
        self._store = store

    def begin(self) -> None:
        """Make the group if there is none, and open the update on every server.

        Raises:
            WeightSyncError: a server refused, is gone or too slow.
        """
        if self._group is None:
            self._finish(self._run(self._join()))
        self._finish(self._run(self._client.begin_weight_update()))

    def buffer(self, index: int, size: int) -> torch.Tensor:
        """One of the two buffers, with room for ``size`` bytes at least."""
        if self._buffers[index].numel() < size:
            self._buffers[index] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffers[index]

    def send(self, flat: torch.Tensor, entries: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> concurrent.futures.Future:
        """Start to send a bucket; the future is done when every server has it."""
        names, dtypes, shapes = zip(*entries, strict=True)
        announced = self._client.update_weights_from_distributed(
            names, [str(dtype).removeprefix("torch.") for dtype in dtypes], shapes, name=self._name
        )
        return self._run(_both(announced, asyncio.to_thread(dist.broadcast, flat, 0, self._group)))

    def end(self, version: str) -> None:
        """Close the update on every server and check that it serves ``version``; raises as :meth:`begin`."""
        self._finish(self._run(self._client.end_weight_update(version)))

    def close(self) -> None:
        """Leave the group, tell the servers that can be told, and end what this object has started."""
        self.drop_group()
        waiting = [self._run(self._client.aclose())] + ([self._leaving] if self._leaving is not None else [])
        concurrent.futures.wait(waiting, timeout=2 * _LEAVE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _both(request, collective):
    """The result of ``collective``, once ``request``, which asks the servers to take part in it, is answered too.

    A refused request is raised at once: the collective would wait for servers that never come until it times out, and is left to.
    """
    tasks = [asyncio.ensure_future(request), asyncio.ensure_future(collective)]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        if task in done and task.exception() is not None:
            for other in tasks:
                other.cancel()
            raise task.exception()
    return tasks[1].result()


def _address_towards(url: str) -> str:
    """This machine's address on the network that leads to ``url``; a UDP socket that is connected sends nothing."""
    parts = urlsplit(url)
    family, _, _, _, place = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)
        return probe.getsockname()[0]


@torch.no_grad()
def send_weights(model: ShardedModel, sync: DistributedSync | None, version: str, *, bucket_size: int) -> WeightSyncError | None:
    """Send the policy to the servers as ``version``, in the model's dtype and under Hugging Face's names.

    Collective over all ranks: per tensor an all-gather over tensor-parallel ranks and a broadcast over pipeline ranks. While a bucket
    travels, the next one is gathered; global rank 0 holds these two and one gathered tensor. A failure is kept until every tensor has gone
    by, so that no other rank waits for rank 0.

    Args:
        sync: on global rank 0; None elsewhere.
        bucket_size: bytes of one bucket; a larger tensor has one of its own.

    Returns:
        On rank 0 what failed, if anything did; None elsewhere.
    """
    failure: WeightSyncError | None = None
    sent: set[str] = set()
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    filled, which = 0, 0
    under_way: concurrent.futures.Future | None = None

    def flush() -> None:
        nonlocal filled, which, under_way
        if not entries:
            return
        if under_way is not None:
            previous, under_way = under_way, None
            sync._finish(previous)
        under_way = sync.send(sync.buffer(which, filled)[:filled], list(entries))
        entries.clear()
        filled, which = 0, 1 - which

    def put(name: str, tensor: torch.Tensor) -> None:
        nonlocal filled
        # A tied head comes by again from the last pipeline stage.
        if name in sent:
            return
        sent.add(name)
        size = tensor.numel() * tensor.element_size()
        # A tensor has to begin at a multiple of its element size.
        if entries and (filled + size > bucket_size or filled % tensor.element_size()):
            flush()
        buffer = sync.buffer(which, max(size, bucket_size))
        buffer[filled : filled + size].copy_(tensor.contiguous().view(torch.uint8).flatten())
        entries.append((name, tensor.dtype, tuple(tensor.shape)))
        filled += size

    def guarded(work, *arguments) -> None:
        nonlocal failure
        if failure is None:
            try:
                work(*arguments)
            except WeightSyncError as error:
                failure = error
            # Whatever it is, the other ranks are waiting in the next tensor's collectives.
            except Exception as error:
                failure = WeightSyncError(f"{type(error).__name__}: {error}")

    def finish() -> None:
        flush()
        if under_way is not None:
            sync._finish(under_way)
        sync.end(version)

    if sync is not None:
        guarded(sync.begin)
    for name, tensor in model.bridge.export_weights(model.chunks):
        if sync is not None:
            guarded(put, name, tensor)
    if sync is not None:
        guarded(finish)
    return failure
