"""The policy's weights to the rollout servers without a file between, bucket by bucket: over a process group, or on one
machine from memory that trainer and servers share. And whether what the servers hold is what the trainer has."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import datetime
import socket
import threading
import uuid
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dasd_megatron import backend
from dasd_megatron.config import RolloutConfig
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.rollout.client import RolloutServerError, make_client
from dasd_megatron.rollout.pool import ServerPool
from dasd_megatron.rollout.weight_checksum import cpu_checksum, gpu_checksum
from dasd_megatron.rollout.weight_group import join_weight_group
from dasd_megatron.rollout.weight_payload import Entry, PayloadError, SharedBuffer, pack

# SGLang's tensors that are several of Hugging Face's one below another.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# What it pads: part of the name, dimension, to a multiple of.
_PADDED = (("embed_tokens.", 0, 64), ("lm_head.", 0, 64), (".gate_up_proj.", 0, 32), (".down_proj.", 1, 32))
# A server that is gone, or hangs, is not waited for any longer when a group is left.
_LEAVE_SECONDS = 5.0


class WeightSyncError(RuntimeError):
    """The servers did not take the weights; what they serve now is unknown. ``url``: the server that it failed for,
    where that is known."""

    def __init__(self, what: str, url: str | None = None):
        super().__init__(f"weight sync: {what}")
        self.url = url


class WeightSync(ABC):
    """Sends weights to servers; lives on global rank 0, but :func:`send_weights` is collective over all ranks.

    Every step has the limit ``rollout.weight_sync_timeout_seconds``.

    urls: addresses of the servers; sizes: processes of each that take part, its tensor-parallel size; pool: hears who
    serves the weights.
    """

    def __init__(self, config: RolloutConfig, urls: Sequence[str], sizes: Mapping[str, int], pool: ServerPool):
        self.config, self.urls = config, list(urls)
        self.sizes = [sizes[url] for url in self.urls]
        self._device = backend.current().device()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="weight-sync", daemon=True).start()
        # All servers have to be asked at once: each may wait for the others.
        in_flight = max(config.max_in_flight, len(self.urls))
        limits = dataclasses.replace(
            config, request_timeout_seconds=config.weight_sync_timeout_seconds, max_in_flight=in_flight
        )
        self._client = make_client(limits, self.urls, pool)

    def _run(self, work) -> concurrent.futures.Future:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def finish(self, future: concurrent.futures.Future) -> None:
        """Wait for what :meth:`send` has started; raises as :meth:`begin`."""
        try:
            # Each request in it has its own limit, and so has each collective; this is for what neither bounds.
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
        self.finish(self._run(self._client.begin_weight_update()))

    @property
    @abstractmethod
    def joined(self) -> bool:
        """Whether the next sync needs no new connection."""

    @abstractmethod
    def buffer(self, index: int, size: int) -> torch.Tensor:
        """One of the two buffers, with room for ``size`` bytes at least: one fills while the other is on its way."""

    @abstractmethod
    def send(self, flat: torch.Tensor, entries: list[Entry]) -> concurrent.futures.Future:
        """Start to send a bucket, the head of a buffer; the future is done when every server has it."""

    def end(self, version: str) -> None:
        """Close the update on every server and check that it serves ``version``; raises as :meth:`begin`."""
        self.finish(self._run(self._client.end_weight_update(version)))

    @abstractmethod
    def drop(self) -> None:
        """Give up what a sync that failed has left, without waiting for servers, some of which may be gone."""

    def close(self) -> None:
        """End what this object has started."""
        self.drop()
        concurrent.futures.wait(self._last_words(), timeout=2 * _LEAVE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _last_words(self) -> list[concurrent.futures.Future]:
        return [self._run(self._client.aclose())]


def make_sync(config: RolloutConfig, urls: Sequence[str], sizes: Mapping[str, int], pool: ServerPool) -> WeightSync:
    """The sender of ``rollout.weight_sync``, distributed or tensor."""
    return {"distributed": DistributedSync, "tensor": TensorSync}[config.weight_sync](config, urls, sizes, pool)


class DistributedSync(WeightSync):
    """Over a process group of this process and all of the servers', made when it is first needed, and again after a
    failure."""

    def __init__(self, config: RolloutConfig, urls: Sequence[str], sizes: Mapping[str, int], pool: ServerPool):
        super().__init__(config, urls, sizes, pool)
        self._group: dist.ProcessGroup | None = None
        self._store: dist.TCPStore | None = None
        self._name = ""
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=self._device) for _ in range(2)]
        self._leaving: concurrent.futures.Future | None = None

    @property
    def joined(self) -> bool:
        return self._group is not None

    def drop(self) -> None:
        """Leave the group; the next sync makes another."""
        if self._group is not None:
            self._leaving = self._run(self._leave(self._name, self._group))
        self._group = self._store = None

    async def _leave(self, name: str, group: dist.ProcessGroup) -> None:
        async def tell(url: str) -> None:
            limits = dataclasses.replace(self.config, request_timeout_seconds=_LEAVE_SECONDS)
            async with make_client(limits, [url]) as client:
                with contextlib.suppress(RolloutServerError):  # it is down, or has left already
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
            addresses[0],
            0,
            world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=limit),
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
        """Make the group if there is none, and open the update; raises as any."""
        if self._group is None:
            self.finish(self._run(self._join()))
        super().begin()

    def buffer(self, index: int, size: int) -> torch.Tensor:
        if self._buffers[index].numel() < size:
            self._buffers[index] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffers[index]

    def send(self, flat: torch.Tensor, entries: list[Entry]) -> concurrent.futures.Future:
        names, dtypes, shapes = zip(*entries, strict=True)
        announced = self._client.update_weights_from_distributed(
            names, [str(dtype).removeprefix("torch.") for dtype in dtypes], shapes, name=self._name
        )
        return self._run(_both(announced, asyncio.to_thread(dist.broadcast, flat, 0, self._group)))

    def _last_words(self) -> list[concurrent.futures.Future]:
        return super()._last_words() + ([self._leaving] if self._leaving is not None else [])


class TensorSync(WeightSync):
    """Out of memory that the servers, on the same machine, open: files in /dev/shm on the CPU, CUDA IPC handles on a
    GPU.

    Both buffers are there from the first bucket of a sync to its end or failure.
    """

    joined = True

    def __init__(self, config: RolloutConfig, urls: Sequence[str], sizes: Mapping[str, int], pool: ServerPool):
        super().__init__(config, urls, sizes, pool)
        self._shared: dict[int, SharedBuffer] = {}
        self._on_device: dict[int, torch.Tensor] = {}

    def buffer(self, index: int, size: int) -> torch.Tensor:
        if self._device.type == "cuda":
            if index not in self._on_device or self._on_device[index].numel() < size:
                self._on_device[index] = torch.empty(size, dtype=torch.uint8, device=self._device)
            return self._on_device[index]
        if index not in self._shared or self._shared[index].bytes.numel() < size:
            if index in self._shared:
                self._shared.pop(index).close()
            self._shared[index] = SharedBuffer(size)
        return self._shared[index].bytes

    def send(self, flat: torch.Tensor, entries: list[Entry]) -> concurrent.futures.Future:
        # A server answers once it has copied the bucket; on a GPU, torch waits for that where it lets the memory go.
        return self._run(
            self._client.update_weights_from_tensor([[pack(flat, entries) for _ in range(size)] for size in self.sizes])
        )

    def end(self, version: str) -> None:
        self.drop()
        super().end(version)

    def drop(self) -> None:
        while self._shared:
            self._shared.popitem()[1].close()
        if self._on_device:
            self._on_device.clear()
            torch.cuda.ipc_collect()


async def _both(request, collective):
    """The result of ``collective``, once ``request``, which asks the servers to take part in it, is answered too.

    A refused request is raised at once: the collective would wait for servers that never come until it times out, and
    is left to.
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
def send_weights(
    model: ShardedModel, sync: WeightSync | None, version: str, *, bucket_size: int
) -> WeightSyncError | None:
    """Send the policy to the servers as ``version``, in the model's dtype and under Hugging Face's names.

    Collective over all ranks: per tensor an all-gather over tensor-parallel ranks and a broadcast over pipeline ranks.
    While a bucket travels, the next one is gathered; global rank 0 holds these two and one gathered tensor. A failure
    is kept until every tensor has gone by, so that no other rank waits for rank 0.

    Args:
        sync: on global rank 0; None elsewhere.
        bucket_size: bytes of one bucket; a larger tensor has one of its own.

    Returns:
        On rank 0 what failed, if anything did; None elsewhere.
    """
    failure: WeightSyncError | None = None
    sent: set[str] = set()
    entries: list[Entry] = []
    filled, which = 0, 0
    under_way: concurrent.futures.Future | None = None

    def flush() -> None:
        nonlocal filled, which, under_way
        if not entries:
            return
        if under_way is not None:
            previous, under_way = under_way, None
            sync.finish(previous)
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
            except PayloadError as error:
                failure = WeightSyncError(str(error))
            # Whatever it is, the other ranks are waiting in the next tensor's collectives.
            except Exception as error:
                failure = WeightSyncError(f"{type(error).__name__}: {error}")

    def finish() -> None:
        flush()
        if under_way is not None:
            sync.finish(under_way)
        sync.end(version)

    if sync is not None:
        guarded(sync.begin)
    for name, tensor in model.bridge.export_weights(model.chunks):
        if sync is not None:
            guarded(put, name, tensor)
    if sync is not None:
        guarded(finish)
        if failure is not None:
            sync.drop()
    return failure


def _chosen(names: Sequence[str], count: int, version: str) -> list[str]:
    """``count`` of ``names``, evenly spread, from a start that moves with ``version``, so that in time every one has
    its turn."""
    count = min(count, len(names))
    start = zlib.crc32(version.encode())
    return [names[(start + index * len(names) // count) % len(names)] for index in range(count)]


@torch.no_grad()
def verify_weights(
    model: ShardedModel, config: RolloutConfig, urls: Sequence[str], pool: ServerPool, version: str
) -> WeightSyncError | None:
    """Compare ``rollout.verify_weights`` of the policy's parameters with what every server holds, by checksums of their
    bytes.

    Collective over all ranks, as :func:`send_weights`, for the chosen parameters alone: other ones each time, the same
    on all ranks. Servers have to hold them in ``rollout.dtype``, unquantised.

    Returns:
        On global rank 0 the first difference, or what kept a server from answering; None where all agree, and
        elsewhere.
    """
    plan = [entry.name for entry in model.bridge.export_plan(model.chunks)]
    chosen = _chosen(plan, config.verify_weights, version)
    parts: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in model.bridge.export_weights(model.chunks, only=chosen):
        members = parts.setdefault(_fused_name(name), [])
        # A tied head comes by twice.
        if dist.get_rank() == 0 and all(name != known for known, _ in members):
            members.append((name, tensor.to("cpu", getattr(torch, config.dtype))))
    if dist.get_rank() != 0:
        return None
    # Whatever the servers call it: they read no more than what is compared.
    others = {
        name
        for hf_name in model.bridge.hf_shapes
        for name in (hf_name, _fused_name(hf_name))
        if _fused_name(name) not in parts
    }

    if not urls:
        return WeightSyncError("no server serves the weights that are to be compared")

    async def ask() -> list[list[dict[str, str]]]:
        limits = dataclasses.replace(config, request_timeout_seconds=config.weight_sync_timeout_seconds)
        async with make_client(limits, urls, pool) as client:
            return await client.weight_checksums(sorted(others))

    try:
        answers = asyncio.run(ask())
    except RolloutServerError as error:
        return WeightSyncError(f"the servers' weights could not be compared: {error}", error.url)
    for url, ranks in zip(urls, answers, strict=True):
        if len(ranks) > 1:
            return WeightSyncError(
                f"{url} shares its weights among {len(ranks)} processes: write rollout.verify_weights=0", url
            )
        (served,) = ranks
        for name, wholes in _held(parts, served):
            if name not in served:
                return WeightSyncError(f"{url} has no tensor {name} to compare with the trainer's {version}", url)
            if all(served[name] != checksum(whole) for whole in wholes for checksum in (cpu_checksum, gpu_checksum)):
                return WeightSyncError(f"{url} serves other weights than the trainer's {version}: {name} differs", url)
    return None


def _fused_name(name: str) -> str:
    """The tensor of SGLang that holds Hugging Face's ``name``."""
    for fused, members in _FUSED.items():
        for member in members:
            if f".{member}." in name:
                return name.replace(f".{member}.", f".{fused}.")
    return name


def _held(
    parts: Mapping[str, list[tuple[str, torch.Tensor]]], served: Mapping[str, str]
) -> Iterator[tuple[str, list[list[torch.Tensor]]]]:
    """Names of what a server has to hold, and of which tensors it is made: each by itself where the server has that,
    and else fused.
    There are two ways where SGLang pads with zeros: the vocabulary, and on the CPU the intermediate size."""
    for fused, tensors in parts.items():
        if all(name in served for name, _ in tensors):
            made = [(name, [tensor]) for name, tensor in tensors]
        else:
            made = [(fused, [tensor for _, tensor in tensors])]
        for name, whole in made:
            pads = [pad for part, *pad in _PADDED if part in name]
            yield name, [whole, *([_padded(tensor, *pad) for tensor in whole] for pad in pads)]


def _padded(tensor: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """With zeros behind, along ``dim`` where it has that."""
    if dim >= tensor.dim():
        return tensor
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, -tensor.shape[dim] % multiple])
