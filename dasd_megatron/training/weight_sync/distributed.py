"""Weights over process groups of the trainer's pipeline stages and all processes of the servers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import itertools
import socket
import uuid
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from dasd_megatron import backend
from dasd_megatron.models.weight_export import ExportBucket
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.rollout.weight_group import join_weight_group
from dasd_megatron.training.parallel import gather_world
from dasd_megatron.training.weight_sync.base import raise_failure
from dasd_megatron.training.weight_sync.send import LEAVE_SECONDS, BucketSender, BucketSync, Future


class _Place(NamedTuple):
    """A process group as its rank 0 offers it: the pipeline stage that it is for, and where each server finds it."""

    stage: int
    name: str
    addresses: list[str]
    port: int


class DistributedSender(BucketSender):
    """Sender over process groups, one for each pipeline stage, whose rank 0 is the source of that stage's weights. They
    are made when they are first needed, and again after a failure.

    Global rank 0 tells the servers when to take part in which broadcast. A server takes one bucket at a time, and two
    servers that took those of two stages in different orders would wait for each other for ever. So all of them are
    told of one stage's bucket after the other's, while the next buckets of all stages are gathered.
    """

    _connected = False
    _place: _Place | None = None
    _group: dist.ProcessGroup | None = None
    _moving: Future | None = None
    """Work that this rank alone has under way: its joining, or its broadcast."""
    _leaving: Future | None = None

    @property
    def joined(self) -> bool:
        """True while the process groups stand."""
        return self._connected

    def rounds(self, buckets: Sequence[ExportBucket]) -> list[list[ExportBucket]]:
        """Return the next bucket of every stage that has one left, round by round."""
        stages: dict[int, list[ExportBucket]] = {}
        for bucket in buckets:
            stages.setdefault(bucket.stage, []).append(bucket)
        together = itertools.zip_longest(*(stages[stage] for stage in sorted(stages)))
        return [[bucket for bucket in members if bucket is not None] for members in together]

    def sending_stage(self, bucket: ExportBucket) -> int:
        """Return the bucket's own stage."""
        return bucket.stage

    def drop(self) -> None:
        """Leave the groups; the next sync makes others."""
        if self._connected:
            self._connected, self._moving = False, None
            self._leaving = self.run(self._leave(self._names))

    async def _leave(self, names: Sequence[str]) -> None:
        group, self._group, self._place = self._group, None, None

        async def dismiss(url: str, name: str) -> None:
            limits = dataclasses.replace(self.config, request_timeout_seconds=LEAVE_SECONDS)
            async with self.make_client(limits, [url]) as client:
                with contextlib.suppress(RolloutServerError):  # it is down, or has left already
                    await client.destroy_weights_update_group(name)

        requests = [dismiss(url, name) for url in self.urls for name in names if self.client is not None]
        if group is not None:
            # This runs in a thread, because a broadcast that still waits for a dead peer may hold it up, up to its own
            # limit.
            requests.append(asyncio.to_thread(dist.destroy_process_group, group))
        await asyncio.gather(*requests)

    def begin(self) -> None:
        """Start to open the update. Where there are no groups, make them first: collective over all ranks then, one
        gather of Python objects."""
        if self._connected:
            super().begin()
            return
        self._connected = True
        place: _Place | None = None
        failure: Exception | None = None
        try:
            place, store = self._listen()
        except (OSError, RuntimeError) as error:
            failure = error
        places = sorted(found for found in gather_world(place) if found is not None)
        self._names = [found.name for found in places]
        raise_failure(failure)
        if place is not None:
            self._moving = self.run(self._join(place, store))
        if self.client is not None:
            self.answers = self.run(self._invite(self.client, places))

    def _listen(self) -> tuple[_Place | None, dist.TCPStore | None]:
        """Open what the servers join a group by, where this rank is the source of a stage's weights."""
        if self.stage is None:
            return None, None
        addresses = [_address_towards(url) for url in self.urls]
        store = dist.TCPStore(
            addresses[0],
            0,
            1 + sum(self.sizes),
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=self.limit_seconds),
        )
        # The name is new each time, since a server may still know groups of a trainer that is gone.
        return _Place(self.stage, f"weights-{uuid.uuid4().hex}", addresses, store.port), store

    async def _join(self, place: _Place, store: dist.TCPStore | None) -> None:
        self._place = place
        group = await asyncio.to_thread(
            join_weight_group,
            place.addresses[0],
            place.port,
            rank=0,
            world_size=1 + sum(self.sizes),
            name=place.name,
            backend=backend.current().collective_backend(),
            timeout_seconds=self.limit_seconds,
            store=store,
        )
        if self._place is place:
            self._group, self._store = group, store
        else:  # the sync has failed meanwhile
            await asyncio.to_thread(dist.destroy_process_group, group)

    async def _invite(self, client: RolloutClient, places: Sequence[_Place]) -> None:
        """Let the servers join the groups, and open the update. A server joins one at a time, and waits there for the
        others, so that all have to be asked in the same order."""
        offsets = [1 + sum(self.sizes[:index]) for index in range(len(self.sizes))]
        for place in places:
            await client.init_weights_update_group(
                place.addresses,
                place.port,
                rank_offsets=offsets,
                world_size=1 + sum(self.sizes),
                name=place.name,
                backend=backend.current().collective_backend(),
            )
        await client.begin_weight_update()

    def start(self, buckets: Sequence[ExportBucket], flat: torch.Tensor | None) -> None:
        """Broadcast this rank's bucket, and let the servers take those of all ranks."""
        if self._moving is not None:
            # The servers have answered, so that it is done, or will be at once.
            moving, self._moving = self._moving, None
            self.finish(moving)
        if flat is not None:
            self._moving = self.run(asyncio.to_thread(self._broadcast, flat))
        if self.client is not None and buckets:
            self.answers = self.run(self._announce(self.client, buckets))

    def _broadcast(self, flat: torch.Tensor) -> None:
        with backend.current().beside(flat):
            dist.broadcast(flat, 0, self._group)

    async def _announce(self, client: RolloutClient, buckets: Sequence[ExportBucket]) -> None:
        for bucket in buckets:
            names, dtypes, shapes = zip(*bucket.tensors, strict=True)
            await client.update_weights_from_distributed(
                names,
                [str(dtype).removeprefix("torch.") for dtype in dtypes],
                shapes,
                name=self._names[bucket.stage],
            )

    def check(self) -> None:
        """Wait as every sender does. A broadcast of this rank that has failed by now is raised too."""
        super().check()
        if self._moving is not None and self._moving.done():
            self.finish(self._moving)

    def start_closing(self) -> list[Future]:
        """Begin to close, and include the leaving of the groups in what is waited for."""
        return super().start_closing() + ([self._leaving] if self._leaving is not None else [])


class DistributedSync(BucketSync):
    """Weight sync over process groups, in which each version is broadcast."""

    sender_class = DistributedSender


def _address_towards(url: str) -> str:
    """Return this machine's address on the network that leads to ``url``; connecting a UDP socket sends nothing."""
    parts = urlsplit(url)
    family, _, _, _, place = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)
        return probe.getsockname()[0]
