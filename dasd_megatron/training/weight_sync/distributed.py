"""Weights over a process group of the trainer's first process and all processes of the servers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import socket
import uuid
from collections.abc import Awaitable
from typing import TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from dasd_megatron import backend
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.rollout.weight_group import join_weight_group
from dasd_megatron.rollout.weight_payload import Entry
from dasd_megatron.training.weight_sync.send import LEAVE_SECONDS, BucketSender, BucketSync, Future

T = TypeVar("T")


class DistributedSender(BucketSender):
    """Sender over a process group, which is made when it is first needed, and again after a failure."""

    _group: dist.ProcessGroup | None = None
    _store: dist.TCPStore | None = None
    _name = ""
    _leaving: Future | None = None

    @property
    def joined(self) -> bool:
        """True while the process group stands."""
        return self._group is not None

    def drop(self) -> None:
        """Leave the group; the next sync makes another."""
        if self._group is not None:
            self._leaving = self.run(self._leave(self._name, self._group))
        self._group = self._store = None

    async def _leave(self, name: str, group: dist.ProcessGroup) -> None:
        async def dismiss(url: str) -> None:
            limits = dataclasses.replace(self.config, request_timeout_seconds=LEAVE_SECONDS)
            async with self.make_client(limits, [url]) as client:
                with contextlib.suppress(RolloutServerError):  # it is down, or has left already
                    await client.destroy_weights_update_group(name)

        # This runs in a thread, because a broadcast that still waits for a dead peer may hold it up, up to its own
        # limit.
        await asyncio.gather(asyncio.to_thread(dist.destroy_process_group, group), *map(dismiss, self.urls))

    async def _join(self) -> None:
        addresses = [_address_towards(url) for url in self.urls]
        limit = self.config.weight_sync_timeout_seconds
        world_size = 1 + sum(self.sizes)
        # The name is new each time, since a server may still know groups of a trainer that is gone.
        name = f"weights-{uuid.uuid4().hex}"
        store = dist.TCPStore(
            addresses[0],
            0,
            world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=limit),
        )
        offsets = [1 + sum(self.sizes[:index]) for index in range(len(self.sizes))]
        kind = backend.current().collective_backend()
        asked = self.client.init_weights_update_group(
            addresses, store.port, rank_offsets=offsets, world_size=world_size, name=name, backend=kind
        )
        joining = asyncio.to_thread(
            join_weight_group,
            addresses[0],
            store.port,
            rank=0,
            world_size=world_size,
            name=name,
            backend=kind,
            timeout_seconds=limit,
            store=store,
        )
        self._name = name
        self._group = await _await_both(asked, joining)
        self._store = store

    def begin(self) -> None:
        """Make the group if there is none, and open the update; raises as every sender's."""
        if self._group is None:
            self.finish(self.run(self._join()))
        super().begin()

    def send(self, flat: torch.Tensor, entries: list[Entry]) -> Future:
        """Announce a bucket to the servers and broadcast it."""
        names, dtypes, shapes = zip(*entries, strict=True)
        announced = self.client.update_weights_from_distributed(
            names, [str(dtype).removeprefix("torch.") for dtype in dtypes], shapes, name=self._name
        )
        return self.run(_await_both(announced, asyncio.to_thread(dist.broadcast, flat, 0, self._group)))

    def start_closing(self) -> list[Future]:
        """Begin to close, and include the leaving of the group in what is waited for."""
        return super().start_closing() + ([self._leaving] if self._leaving is not None else [])


class DistributedSync(BucketSync):
    """Weight sync over a process group, in which each version is broadcast."""

    sender_class = DistributedSender


async def _await_both(request: Awaitable[None], collective: Awaitable[T]) -> T:
    """Return the result of ``collective`` once ``request``, which asks the servers to take part in it, is answered too.

    A refused request is raised at once. The collective would wait for servers that never come until it times out, and
    is left to do so.
    """
    asked, joined = asyncio.ensure_future(request), asyncio.ensure_future(collective)
    tasks: list[asyncio.Future[None] | asyncio.Future[T]] = [asked, joined]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        failure = task.exception() if task in done else None
        if failure is not None:
            for other in tasks:
                other.cancel()
            raise failure
    return joined.result()


def _address_towards(url: str) -> str:
    """Return this machine's address on the network that leads to ``url``; connecting a UDP socket sends nothing."""
    parts = urlsplit(url)
    family, _, _, _, place = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)
        return probe.getsockname()[0]
