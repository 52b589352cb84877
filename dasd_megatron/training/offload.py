"""The trainer's memory while rollout servers on the same devices sample: given back, and taken again to the bit.

``backend.offload`` says what is given. The order of events in a step, on every rank:

    restore(WEIGHTS, COPIES)     the servers have given their memory back: score
    restore(GRADIENTS)           forward and backward passes of the update
    restore(OPTIMIZER)           its first optimizer step, when the activations are gone
    release(STATE)               after the last one; the servers take back room for their weights
    ...                          the weights are sent, and may be written or verified
    release(WEIGHTS)             the servers take back room for keys and values, and sample

Memory is released below the tensors: a storage loses its bytes and gets them again, while every tensor and view stays
the object that Megatron's buffers, optimizers and hooks hold. A checkpoint that is saved meanwhile reads the values
where they are, on the host, and needs nothing of the device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dasd_megatron import backend, machine
from dasd_megatron.training.optimizer import OptimizerState
from dasd_megatron.training.parallel import PeerError, gather_world, on_selected_rank
from dasd_megatron.training.snapshots import WeightSnapshot

WEIGHTS, GRADIENTS, OPTIMIZER, COPIES = "weights", "gradients", "optimizer state", "copies of the weights"
STATE = (GRADIENTS, OPTIMIZER, COPIES)
"""All that the weights can be sent to the servers without."""
OFFLOADED: dict[str, tuple[str, ...]] = {"none": (), "state": STATE, "all": (*STATE, WEIGHTS)}
"""The parts that each ``backend.offload`` releases."""

_SETTLE_SECONDS = 10.0
"""Time that servers get, after they have answered that their memory is released, until the device shows it."""
_POLL_SECONDS = 0.1


class DeviceMemoryError(RuntimeError):
    """The device or its host lacks the memory that the trainer is to have; the message is one line and names a setting.
    Raised on every rank; nothing was changed, and a checkpoint can be saved."""

    on_all_ranks = True


class HoldsTensors(Protocol):
    """Owner of parameters: the model, as far as this module reads it."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters."""
        ...


@dataclass
class _Parked:
    """A storage without its memory, the size that it has otherwise, and its values on the host, uint8 [size]; None
    where the values are not needed again."""

    storage: torch.UntypedStorage
    size: int
    host: torch.Tensor | None


class TrainerMemory:
    """Memory of this rank's device that the servers get while they sample.

    kind: ``backend.offload``; model, optimizer, copies: what holds the tensors. They are looked up at each release,
    since an optimizer may make its moments late.

    Attributes:
        release_seconds, restore_seconds: time spent, which :meth:`measures` sets back. released_bytes: most that was
            released at once since then.
    """

    def __init__(
        self,
        kind: str,
        model: HoldsTensors,
        optimizer: OptimizerState,
        copies: Sequence[WeightSnapshot | None] = (),
    ) -> None:
        self.kind, self.parts = kind, OFFLOADED[kind]
        self.release_seconds = self.restore_seconds = 0.0
        self.released_bytes = 0
        self._model, self._optimizer = model, optimizer
        self._copies = [copy for copy in copies if copy is not None]
        self._parked: dict[str, list[_Parked]] = {}
        self._host: dict[str, list[torch.Tensor]] = {}
        """Host memory of each part. It is kept between releases, since to make it takes longer than to copy."""

    def is_released(self, part: str) -> bool:
        """Return True while a part has no memory on the device."""
        return part in self._parked

    def release(self, *parts: str) -> None:
        """Give the memory of ``parts`` back, as far as ``backend.offload`` has them and they are not released.

        When it returns on one rank, all ranks have released them. Collective over all ranks: three gathers of objects,
        none where there is nothing to do.

        Raises:
            DeviceMemoryError: the host has no room for the values.
        """
        chosen = [part for part in parts if part in self.parts and part not in self._parked]
        if not chosen:
            return
        started = time.perf_counter()
        target = backend.current()
        storages = {part: self._storages(part) for part in chosen}
        kept = [part for part in chosen if part != GRADIENTS]
        _on_all_ranks(lambda: self._check_host([size for part in kept for size in self._missing(part, storages[part])]))
        _on_all_ranks(lambda: self._take_host({part: storages[part] for part in kept}))
        target.wait()
        for part in chosen:
            self._parked[part] = self._copy_out(part, storages[part])
        # The copies may still be under way.
        target.wait()
        self._free(chosen)
        released = sum(parked.size for parked in self._all_parked())
        self.released_bytes = max(self.released_bytes, released)
        # A server is asked to take the memory by rank 0, and may lie on the devices of other ranks.
        gather_world(None)
        self.release_seconds += time.perf_counter() - started

    def restore(self, *parts: str) -> None:
        """Take the memory of ``parts`` again, as far as they are released, with the values that they had; gradients are
        0.

        Collective over all ranks: two gathers of objects, none where there is nothing to do.

        Raises:
            DeviceMemoryError: the device of a rank has not as much free.
        """
        chosen = [part for part in parts if part in self._parked]
        if not chosen:
            return
        started = time.perf_counter()
        _on_all_ranks(lambda: self._check_device(chosen))
        try:
            _on_all_ranks(lambda: self._allocate(chosen))
        except DeviceMemoryError:
            # Ranks that had the memory give it back too, so that all of them have released the same parts.
            self._free(chosen)
            raise
        for part in chosen:
            for parked in self._parked.pop(part):
                values = _bytes_of(parked.storage)
                if parked.host is None:
                    values.zero_()
                else:
                    values.copy_(parked.host, non_blocking=True)
        # The host's memory may be written to again from here on.
        backend.current().wait()
        self.restore_seconds += time.perf_counter() - started

    def reader(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function that gives a tensor by which the values of another can be read: that one itself, or where
        its memory is released, a view of the host's, which a process forked from here on can read too."""
        readable = {
            parked.storage._cdata: backend.current().readable_when_forked(parked.host)
            for parked in self._all_parked()
            if parked.host is not None
        }

        def read(tensor: torch.Tensor) -> torch.Tensor:
            host = readable.get(tensor.untyped_storage()._cdata)
            if host is None:
                return tensor
            view = torch.empty(0, dtype=tensor.dtype)
            return view.set_(host.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())

        return read

    def measures(self) -> dict[str, float]:
        """Return the metrics of what was released and restored since the last call; none if nothing ever is."""
        if not self.parts:
            return {}
        found = {
            "seconds/release": self.release_seconds,
            "seconds/restore": self.restore_seconds,
            "memory/released": self.released_bytes / 1e9,
        }
        self.release_seconds = self.restore_seconds = 0.0
        self.released_bytes = sum(parked.size for parked in self._all_parked())
        return found

    def _all_parked(self) -> Iterator[_Parked]:
        for parked in self._parked.values():
            yield from parked

    def _storages(self, part: str) -> list[torch.UntypedStorage]:
        """Return the storages of a part, each once. Float32 weights that the optimizer shares with a float32 model are
        weights."""
        parameters: list[Any] = self._model.parameters()
        if part == GRADIENTS:
            return _distinct_storages(parameter.main_grad for parameter in parameters)
        if part == WEIGHTS:
            return _distinct_storages(parameters)
        if part == COPIES:
            return _distinct_storages(tensor for copy in self._copies for tensor in copy.tensors)
        weights = {storage._cdata for storage in _distinct_storages(parameters)}
        return [storage for storage in _distinct_storages(self._optimizer.tensors()) if storage._cdata not in weights]

    def _missing(self, part: str, storages: Sequence[torch.UntypedStorage]) -> list[int]:
        """Return the sizes of the host memory that a part needs and does not have yet."""
        sizes = [storage.nbytes() for storage in storages]
        return [] if [host.numel() for host in self._host.get(part, [])] == sizes else sizes

    def _check_host(self, sizes: Sequence[int]) -> None:
        """Refuse to fill the host's memory. All ranks of a machine do this before any takes its share."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed, free = sum(sizes) * ranks, machine.free_memory()
        if needed > free:
            raise DeviceMemoryError(
                f"backend.offload={self.kind} needs {needed / 1e9:.2f} GB of this machine's memory for {ranks} "
                f"processes, and {free / 1e9:.2f} GB are free: use more replicas with optimizer.distributed=true, or "
                "write backend.offload=none"
            )

    def _take_host(self, storages: Mapping[str, Sequence[torch.UntypedStorage]]) -> None:
        """Have memory of the host for each part; what does not fit any more is given back first."""
        for part, of_part in storages.items():
            missing = self._missing(part, of_part)
            if missing:
                self._host.pop(part, None)
                try:
                    self._host[part] = [backend.current().host_memory(size) for size in missing]
                except MemoryError as error:
                    raise DeviceMemoryError(
                        f"{error}: raise the machine's limit of locked memory (ulimit -l), or write "
                        "backend.offload=none"
                    ) from error

    def _copy_out(self, part: str, storages: Sequence[torch.UntypedStorage]) -> list[_Parked]:
        """Begin to copy a part's values to the host."""
        if part == GRADIENTS:
            return [_Parked(storage, storage.nbytes(), None) for storage in storages]
        hosts = self._host[part] if storages else []
        for storage, host in zip(storages, hosts, strict=True):
            host.copy_(_bytes_of(storage), non_blocking=True)
        return [_Parked(storage, host.numel(), host) for storage, host in zip(storages, hosts, strict=True)]

    def _check_device(self, parts: Sequence[str]) -> None:
        """Refuse to take more memory than is free, after a while in which servers may still give theirs back."""
        target = backend.current()
        needed = sum(parked.size for part in parts for parked in self._parked[part])
        deadline = time.monotonic() + _SETTLE_SECONDS
        while (free := target.free_memory(target.device())) < needed:
            target.release_cached_memory()
            if time.monotonic() > deadline:
                raise self._shortage(parts, needed, free)
            time.sleep(_POLL_SECONDS)

    def _allocate(self, parts: Sequence[str]) -> None:
        """Give the storages their sizes; refuse where the device turns out not to have them in one piece."""
        try:
            for part in parts:
                for parked in self._parked[part]:
                    parked.storage.resize_(parked.size)
        except RuntimeError as error:
            self._free(parts)
            target = backend.current()
            needed = sum(parked.size for part in parts for parked in self._parked[part])
            raise self._shortage(parts, needed, target.free_memory(target.device())) from error

    def _free(self, parts: Sequence[str]) -> None:
        """Take the memory from the storages of released parts, and give it to other processes."""
        for part in parts:
            for parked in self._parked[part]:
                parked.storage.resize_(0)
        backend.current().release_cached_memory()

    def _shortage(self, parts: Sequence[str], needed: int, free: int) -> DeviceMemoryError:
        return DeviceMemoryError(
            f"{free / 1e9:.2f} GB of the device are free, and the trainer needs {needed / 1e9:.2f} GB again for "
            f"{' and '.join(parts)}: let the servers take less (rollout.sglang.mem_fraction_static, rollout.cache_gib, "
            "--mem-fraction-static of external ones), see that they run with --enable-memory-saver, or lower "
            "batch.micro_batch_tokens"
        )


def _on_all_ranks(work: Callable[[], None]) -> None:
    """Do ``work`` on every rank; where it fails on one, raise its DeviceMemoryError on all."""
    try:
        on_selected_rank(True, work, (DeviceMemoryError,))
    except PeerError as error:
        # Every rank may have a figure of its own.
        first, *others = str(error).removeprefix("DeviceMemoryError: ").split("; DeviceMemoryError: ")
        raise DeviceMemoryError(first + (f" (and {len(others)} more ranks)" if others else "")) from error


def _distinct_storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Return the storages of tensors on this process's device, each once; without memory that torch does not own, and
    without single numbers, like the steps that Adam counts."""
    kind = backend.current().device().type
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == kind and tensor.numel() > 1 and storage.resizable():
            storages.setdefault(storage._cdata, storage)
    return list(storages.values())


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return all of a storage, uint8 [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
