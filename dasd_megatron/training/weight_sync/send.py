"""The policy's weights to the rollout servers without a file between them, bucket by bucket.

A :class:`BucketSender` knows how a bucket travels to a fixed set of servers, :func:`send_weights` lets the ranks gather
and send in step, and a :class:`BucketSync` chooses the servers and makes the senders.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist

from dasd_megatron import backend
from dasd_megatron.config import RolloutConfig
from dasd_megatron.errors import first_line
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.models.weight_export import ExportBucket, plan_buckets
from dasd_megatron.models.weight_formats import WEIGHT_FORMATS
from dasd_megatron.rollout.client import ClientFactory, RolloutClient, make_client
from dasd_megatron.rollout.pool import ServerPool
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.rollout.weight_payload import PayloadError
from dasd_megatron.training.export import Policy
from dasd_megatron.training.parallel import broadcast_from_rank0, gather_world, on_selected_rank, true_on_any
from dasd_megatron.training.weight_sync.base import WeightSync, WeightSyncError, raise_failure

# A server that is gone, or hangs, is not waited for any longer when a group is left.
LEAVE_SECONDS = 5.0

Future = concurrent.futures.Future[Any]
T = TypeVar("T")


class BucketSender(ABC):
    """Sender of buckets of weights to a fixed set of servers. Every rank has one, and that of global rank 0 talks to
    the servers, for all.

    Every request has the limit ``rollout.weight_sync_timeout_seconds``, and what is under way at once twice that.

    sizes: the servers' addresses, with the processes of each that take part, its tensor-parallel size; pool: hears who
    serves the weights; stage: the pipeline stage whose weights this rank gathers, if it gathers any.
    """

    def __init__(
        self,
        config: RolloutConfig,
        sizes: Mapping[str, int],
        pool: ServerPool,
        *,
        stage: int | None,
        make_client: ClientFactory = make_client,
    ) -> None:
        self.config, self.urls, self.sizes = config, list(sizes), list(sizes.values())
        self.stage, self.make_client = stage, make_client
        self.device = backend.current().device()
        self.buffers: dict[int, torch.Tensor] = {}
        """Memory of the device, by number of the buffer."""
        self.answers: Future | None = None
        """Requests that the servers have still to answer, on global rank 0."""
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="weight-sync", daemon=True).start()
        self.client: RolloutClient | None = None
        if dist.get_rank() == 0:
            # All servers have to be asked at once, since each may wait for the others.
            in_flight = max(config.max_in_flight, len(self.urls))
            limits = dataclasses.replace(
                config, request_timeout_seconds=config.weight_sync_timeout_seconds, max_in_flight=in_flight
            )
            self.client = make_client(limits, self.urls, pool)

    @property
    def limit_seconds(self) -> float:
        """Limit of what is under way at once. Each request has its own, and those of several stages follow one
        another."""
        return 2 * self.config.weight_sync_timeout_seconds

    def run(self, work: Coroutine[Any, Any, Any]) -> Future:
        """Start ``work`` in this sender's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def finish(self, future: Future) -> None:
        """Wait for what this sender has started.

        Raises:
            WeightSyncError: a server refused, is gone or too slow.
        """
        try:
            future.result(self.limit_seconds + self.config.connect_timeout_seconds)
        except RolloutServerError as error:
            raise WeightSyncError(str(error), error.url) from error
        except TimeoutError as error:
            raise WeightSyncError(f"not done within {self.limit_seconds:g} s") from error
        except (RuntimeError, OSError) as error:
            raise WeightSyncError(first_line(error)) from error

    @property
    @abstractmethod
    def joined(self) -> bool:
        """True where the next sync needs no new connection."""

    def rounds(self, buckets: Sequence[ExportBucket]) -> list[list[ExportBucket]]:
        """Return the buckets that are gathered, and then under way, at the same time, round by round; at most one for
        each rank. By default they follow one another."""
        return [[bucket] for bucket in buckets]

    def sending_stage(self, bucket: ExportBucket) -> int:
        """Return the pipeline stage whose source sends a bucket. By default that is the first one's, global rank 0."""
        return 0

    def begin(self) -> None:
        """Start to open the update on every server. May be collective over all ranks."""
        if self.client is not None:
            self.answers = self.run(self.client.begin_weight_update())

    def buffer(self, index: int, size: int) -> torch.Tensor:
        """Return one of the two buffers, with room for ``size`` bytes at least: one fills while the other travels."""
        if index not in self.buffers or self.buffers[index].numel() < size:
            self.buffers[index] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.buffers[index]

    @abstractmethod
    def start(self, buckets: Sequence[ExportBucket], flat: torch.Tensor | None) -> None:
        """Start to send the buckets of a round.

        flat: [size] uint8, the one that this rank sends, the head of a buffer; None where it sends none.
        """

    def check(self) -> None:
        """Wait, on global rank 0, until every server has answered to what was started last; raises as :meth:`finish`.

        Elsewhere it waits for nothing, because a server that refuses never comes for what another rank sends.
        """
        if self.answers is not None:
            answers, self.answers = self.answers, None
            self.finish(answers)

    def end(self, version: str) -> None:
        """Close the update on every server and check that it serves ``version``; raises as :meth:`finish`."""
        if self.client is not None:
            self.finish(self.run(self.client.end_weight_update(version)))

    @abstractmethod
    def drop(self) -> None:
        """Give up what a failed sync has left, without waiting for servers, some of which may be gone."""

    def close(self) -> None:
        """End what this object has started."""
        self.drop()
        concurrent.futures.wait(self.start_closing(), timeout=2 * LEAVE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def start_closing(self) -> list[Future]:
        """Start the work that :meth:`close` waits for a little while."""
        return [] if self.client is None else [self.run(self.client.aclose())]


class BucketSync(WeightSync):
    """A way that sends every version anew, over a sender that is made for the servers of the moment."""

    sender_class: ClassVar[type[BucketSender]]
    _sender: BucketSender | None = None

    def send(self, policy: Policy) -> None:
        """Send the policy to all servers that can take it.

        A server for which it fails is left out of the next try, as long as others are left. Collective over all ranks:
        per try a gather and a broadcast of Python objects, :func:`send_weights`, and a broadcast of a bool.
        """
        rank0 = dist.get_rank() == 0
        while True:
            sender = self._connect(policy.model.bridge.export_stage)
            failure = send_weights(policy.model, sender, policy.version)
            again = rank0 and failure is not None and self.receivers.leave_out(sender.urls, failure)
            if not broadcast_from_rank0(again):
                break
        on_selected_rank(rank0, lambda: raise_failure(failure), (WeightSyncError,))

    def deliver(self) -> None:
        """Do nothing, since the servers have the weights."""

    async def catch_up(self, urls: Sequence[str]) -> None:
        """Do nothing, since rank 0 alone has not all weights."""

    def disconnect(self) -> None:
        """Close the sender."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _connect(self, stage: int | None) -> BucketSender:
        """Return a sender to the servers that can take weights, a new one unless there is one to exactly these."""
        rank0 = dist.get_rank() == 0
        sizes = broadcast_from_rank0(on_selected_rank(rank0, self._choose_servers, (RolloutServerError,)))
        if sizes is not None:
            self.disconnect()
            self._sender = self.sender_class(
                self.config, sizes, self.receivers.pool, stage=stage, make_client=self.make_client
            )
        assert self._sender is not None, "global rank 0 keeps a sender that this rank lacks"
        return self._sender

    def _choose_servers(self) -> dict[str, int] | None:
        """Return the servers that can take weights, with their sizes; None where the sender is connected to exactly
        these."""
        able = self.receivers.choose_receivers()
        if self._sender is not None and self._sender.joined and self._sender.urls == able:
            return None
        # A server that does not answer now would keep the others waiting when the sender connects.
        sizes = self.receivers.tensor_parallel_sizes(able)
        return {url: sizes[url] for url in able if url in sizes}


class _Attempts:
    """Work of a rank for a sync, up to the first failure: from then on nothing is done any more."""

    def __init__(self) -> None:
        self.failure: WeightSyncError | None = None

    def attempt(self, work: Callable[..., T], *arguments: Any) -> T | None:
        """Return what ``work`` does, unless something has failed. A failure is kept, whatever it is: the other ranks
        are waiting in the next collective."""
        if self.failure is not None:
            return None
        try:
            return work(*arguments)
        except WeightSyncError as error:
            self.failure = error
        except PayloadError as error:
            self.failure = WeightSyncError(str(error))
        except Exception as error:
            self.failure = WeightSyncError(f"{type(error).__name__}: {first_line(error)}")
        return None


@torch.no_grad()
def send_weights(model: ShardedModel, sender: BucketSender, version: str) -> WeightSyncError | None:
    """Send the policy to the servers as ``version``, in the form ``rollout.weight_format``, of tensors in the model's
    dtype, under Hugging Face's names, in buckets of ``rollout.weight_bucket_bytes``.

    While the buckets of a round travel, those of the next one are gathered: a sending rank holds two buckets, and what
    one is made of. Every rank learns of a failure before the next round, and nobody goes on.

    Collective over all ranks: per bucket those of ``bridge.collect_bucket``; per round an all-reduce of one number; at
    the end a gather of Python objects.

    Returns:
        The first failure, on every rank the same; None where all servers have the weights.
    """
    bridge, attempts = model.bridge, _Attempts()
    bucket_size, form = sender.config.weight_bucket_bytes, WEIGHT_FORMATS[sender.config.weight_format]
    planned = plan_buckets(bridge.export_plan(model.chunks), bucket_size, form=form)
    rounds = sender.rounds(planned)
    # Buffers that fit all but the few larger parameters need not be made anew for the next bucket.
    usual_size = max((bucket.size for bucket in planned if bucket.size <= bucket_size), default=0)
    attempts.attempt(sender.begin)
    # The round after the last one sends nothing, and waits for what the last one has sent.
    for index, buckets in enumerate([*rounds, []]):
        sent: torch.Tensor | None = None
        for bucket in buckets:
            stage = sender.sending_stage(bucket)
            room: torch.Tensor | None = None
            if bridge.export_stage == stage:
                room = attempts.attempt(sender.buffer, index % 2, max(bucket.size, usual_size))
                sent = room = None if room is None else room[: bucket.size]
            bridge.collect_bucket(model.chunks, bucket, room, to_stage=stage)
        attempts.attempt(sender.check)
        if true_on_any(attempts.failure is not None):
            break
        attempts.attempt(sender.start, buckets, sent)
    else:
        attempts.attempt(sender.end, version)
    own = attempts.failure
    failures = gather_world(None if own is None else (own.failure, own.url))
    first = next((failure for failure in failures if failure is not None), None)
    if first is None:
        return None
    sender.drop()
    return WeightSyncError(*first)
