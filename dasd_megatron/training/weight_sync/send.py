"""The policy's weights to the rollout servers without a file between them, bucket by bucket.

A :class:`BucketSender` knows how a bucket travels to a fixed set of servers, :func:`send_weights` gathers and packs,
and a :class:`BucketSync` chooses the servers and makes the senders.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from dasd_megatron import backend
from dasd_megatron.config import RolloutConfig
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.rollout.client import ClientFactory, make_client
from dasd_megatron.rollout.pool import ServerPool
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.rollout.weight_payload import Entry, PayloadError
from dasd_megatron.training.export import Policy
from dasd_megatron.training.parallel import broadcast_from_rank0, on_selected_rank
from dasd_megatron.training.weight_sync.base import WeightSync, WeightSyncError, raise_failure

# A server that is gone, or hangs, is not waited for any longer when a group is left.
LEAVE_SECONDS = 5.0

Future = concurrent.futures.Future[Any]


class BucketSender(ABC):
    """Sender of buckets of weights to a fixed set of servers. It lives on global rank 0, while :func:`send_weights` is
    collective over all ranks.

    Every step has the limit ``rollout.weight_sync_timeout_seconds``.

    sizes: the servers' addresses, with the processes of each that take part, its tensor-parallel size; pool: hears who
    serves the weights.
    """

    def __init__(
        self,
        config: RolloutConfig,
        sizes: Mapping[str, int],
        pool: ServerPool,
        make_client: ClientFactory = make_client,
    ) -> None:
        self.config, self.urls, self.sizes = config, list(sizes), list(sizes.values())
        self.make_client = make_client
        self.device = backend.current().device()
        self.buffers: dict[int, torch.Tensor] = {}
        """Memory of the device, by number of the buffer."""
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="weight-sync", daemon=True).start()
        # All servers have to be asked at once, since each may wait for the others.
        in_flight = max(config.max_in_flight, len(self.urls))
        limits = dataclasses.replace(
            config, request_timeout_seconds=config.weight_sync_timeout_seconds, max_in_flight=in_flight
        )
        self.client = make_client(limits, self.urls, pool)

    def run(self, work: Coroutine[Any, Any, Any]) -> Future:
        """Start ``work`` in this sender's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def finish(self, future: Future) -> None:
        """Wait for what :meth:`send` has started; raises as :meth:`begin`."""
        try:
            # Each request and each collective in it has its own limit; this one is for what neither bounds.
            future.result(2 * self.config.weight_sync_timeout_seconds + self.config.connect_timeout_seconds)
        except (RolloutServerError, RuntimeError, OSError) as error:  # a TimeoutError is an OSError
            self.drop()
            raise WeightSyncError(
                str(error) or type(error).__name__, error.url if isinstance(error, RolloutServerError) else None
            ) from error

    def begin(self) -> None:
        """Open the update on every server.

        Raises:
            WeightSyncError: a server refused, is gone or too slow.
        """
        self.finish(self.run(self.client.begin_weight_update()))

    @property
    @abstractmethod
    def joined(self) -> bool:
        """True where the next sync needs no new connection."""

    def buffer(self, index: int, size: int) -> torch.Tensor:
        """Return one of the two buffers, with room for ``size`` bytes at least: one fills while the other travels."""
        if index not in self.buffers or self.buffers[index].numel() < size:
            self.buffers[index] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.buffers[index]

    @abstractmethod
    def send(self, flat: torch.Tensor, entries: list[Entry]) -> Future:
        """Start to send a bucket, the head of a buffer; the future is done when every server has it."""

    def end(self, version: str) -> None:
        """Close the update on every server and check that it serves ``version``; raises as :meth:`begin`."""
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
        return [self.run(self.client.aclose())]


class BucketSync(WeightSync):
    """A way that sends every version anew, over a sender that is made for the servers of the moment."""

    sender_class: ClassVar[type[BucketSender]]
    _sender: BucketSender | None = None

    def send(self, policy: Policy) -> None:
        """Send the policy to all servers that can take it.

        A server for which it fails is left out of the next try, as long as others are left. Collective over all ranks:
        per try two gathers of a Python object, those of :func:`send_weights`, and a broadcast of a bool.
        """
        rank0 = dist.get_rank() == 0
        while True:
            on_selected_rank(rank0, self._connect, (RolloutServerError,))
            failure = send_weights(
                policy.model, self._sender, policy.version, bucket_size=self.config.weight_bucket_bytes
            )
            again = rank0 and failure is not None and self._leave_out(failure)
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

    def _connect(self) -> None:
        """Make a sender to the servers that can take weights, unless there is one to exactly these."""
        able = self.receivers.choose_receivers()
        if self._sender is not None and self._sender.joined and self._sender.urls == able:
            return
        # A server that does not answer now would keep the others waiting when the sender connects.
        sizes = self.receivers.tensor_parallel_sizes(able)
        if self._sender is not None:
            self._sender.close()
        answering = {url: sizes[url] for url in able if url in sizes}
        self._sender = self.sender_class(self.config, answering, self.receivers.pool, self.make_client)

    def _leave_out(self, failure: WeightSyncError) -> bool:
        return self._sender is not None and self.receivers.leave_out(self._sender.urls, failure)


class _Buckets:
    """Buckets that tensors are packed into: one fills while the one before it travels. On global rank 0.

    failure: the first failure. From then on nothing is done any more.
    """

    def __init__(self, sender: BucketSender, size: int) -> None:
        self.failure: WeightSyncError | None = None
        self._sender, self._size = sender, size
        self._names: set[str] = set()
        self._entries: list[Entry] = []
        self._filled = self._index = 0
        self._travelling: Future | None = None

    def attempt(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call ``work`` unless something has failed, and keep its failure: whatever it is, the other ranks are waiting
        in the next tensor's collectives."""
        if self.failure is not None:
            return
        try:
            work(*arguments)
        except WeightSyncError as error:
            self.failure = error
        except PayloadError as error:
            self.failure = WeightSyncError(str(error))
        except Exception as error:
            self.failure = WeightSyncError(f"{type(error).__name__}: {error}")

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor into the bucket that fills, and send that first where there is no room left."""
        # A tied head comes by again from the last pipeline stage.
        if name in self._names:
            return
        self._names.add(name)
        size = tensor.numel() * tensor.element_size()
        # A tensor has to begin at a multiple of its element size.
        if self._entries and (self._filled + size > self._size or self._filled % tensor.element_size()):
            self._flush()
        buffer = self._sender.buffer(self._index, max(size, self._size))
        buffer[self._filled : self._filled + size].copy_(tensor.contiguous().view(torch.uint8).flatten())
        self._entries.append((name, tensor.dtype, tuple(tensor.shape)))
        self._filled += size

    def finish(self, version: str) -> None:
        """Send what is left, and close the update."""
        self._flush()
        self._wait()
        self._sender.end(version)

    def _flush(self) -> None:
        if not self._entries:
            return
        self._wait()
        bucket = self._sender.buffer(self._index, self._filled)[: self._filled]
        self._travelling = self._sender.send(bucket, list(self._entries))
        self._entries.clear()
        self._filled, self._index = 0, 1 - self._index

    def _wait(self) -> None:
        if self._travelling is not None:
            previous, self._travelling = self._travelling, None
            self._sender.finish(previous)


@torch.no_grad()
def send_weights(
    model: ShardedModel, sender: BucketSender | None, version: str, *, bucket_size: int
) -> WeightSyncError | None:
    """Send the policy to the servers as ``version``, in the model's dtype and under Hugging Face's names.

    Collective over all ranks: per tensor an all-gather over tensor-parallel ranks and a broadcast over pipeline ranks.
    While a bucket travels, the next one is gathered; global rank 0 holds these two and one gathered tensor. A failure
    is kept until every tensor has gone by, so that no other rank waits for rank 0.

    Args:
        sender: on global rank 0; None elsewhere.
        bucket_size: bytes of one bucket; a larger tensor has one of its own.

    Returns:
        On rank 0 what failed, if anything did; None elsewhere.
    """
    buckets = None if sender is None else _Buckets(sender, bucket_size)
    if sender is not None and buckets is not None:
        buckets.attempt(sender.begin)
    for name, tensor in model.bridge.export_weights(model.chunks):
        if buckets is not None:
            buckets.attempt(buckets.put, name, tensor)
    if sender is None or buckets is None:
        return None
    buckets.attempt(buckets.finish, version)
    if buckets.failure is not None:
        sender.drop()
    return buckets.failure
