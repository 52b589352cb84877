"""Buckets of weights for a server on the same machine: the bytes stay where they are, and what is sent says where that
is.

The text is what SGLang's ``/update_weights_from_tensor`` reads under ``load_format=flattened_bucket``: a pickle, in
base64, of the bucket's memory and of the tensors in it. It is written without SGLang, of globals that its own unpickler
allows. On the CPU the memory is a file in /dev/shm, on a GPU a CUDA IPC handle.
"""

from __future__ import annotations

import base64
import contextlib
import io
import pickle
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing import reductions

Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of one tensor of a bucket, where they lie one behind another without gaps."""

SHARED_MEMORY = Path("/dev/shm")


class PayloadError(ValueError):
    """A payload that is not a bucket of weights, or memory that cannot be had or opened. The message is one line."""


class SharedBuffer:
    """Memory of ``size`` bytes that unrelated processes can open: ``bytes`` [size] uint8. It is given back by
    :meth:`close`, or when this process ends.

    Raises:
        PayloadError: /dev/shm has no room.
    """

    def __init__(self, size: int) -> None:
        # Beyond the limit the kernel ends the process that writes, without a word.
        free = shutil.disk_usage(SHARED_MEMORY).free
        if size > free:
            raise PayloadError(
                f"a bucket takes {size} bytes of shared memory and {SHARED_MEMORY} has {free} free: lower "
                "rollout.weight_bucket_bytes, or mount a larger one (docker run --shm-size)"
            )
        # torch's helper process removes the file when this process ends, however it does.
        storage = torch.UntypedStorage._new_using_filename_cpu(size)
        # The file is removed here alone: a receiver that was slow and comes last would remove it again, and fail.
        storage._shared_incref()
        self.path = SHARED_MEMORY / storage._share_filename_cpu_()[1].decode().lstrip("/")
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage)

    def close(self) -> None:
        """Receivers that have opened it keep what they hold."""
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self.path.unlink(missing_ok=True)


class _Call:
    """Pickled as the call ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def pack(flat: torch.Tensor, entries: Sequence[Entry]) -> str:
    """The payload of one bucket for one receiving process, which may open it once.

    flat: [bytes] uint8, the head of a :class:`SharedBuffer`, or memory of a GPU.
    """
    metadata, start = [], 0
    for name, dtype, shape in entries:
        size = torch.Size(shape).numel() * dtype.itemsize
        # SGLang's own class has these attributes, and asks for no more.
        metadata.append(
            SimpleNamespace(
                name=name, shape=tuple(shape), dtype=dtype, start_idx=start, end_idx=start + size, numel=size
            )
        )
        start += size
    memory = _cuda_memory(flat) if flat.is_cuda else _shared_memory(flat)
    return base64.b64encode(pickle.dumps({"flattened_tensor": memory, "metadata": metadata})).decode()


def _shared_memory(flat: torch.Tensor) -> _Call:
    # By hand what reduce_tensor does under the sharing strategy file_system, which would have to be set for the whole
    # process.
    storage = flat.untyped_storage()
    place = storage._share_filename_cpu_()
    # The receiver counts down once when it opens the file.
    storage._shared_incref()
    opened = _Call(reductions.rebuild_storage_filename, torch.UntypedStorage, *place)
    typed = _Call(reductions.rebuild_typed_storage, opened, torch.uint8)
    return _Call(reductions.rebuild_tensor, torch.Tensor, typed, (0, tuple(flat.shape), (1,), False))


def _cuda_memory(flat: torch.Tensor) -> _Call:
    function, arguments = reductions.reduce_tensor(flat)
    # The seventh names the device by its number, which another process may count differently; SGLang takes the identity
    # too.
    uuid = str(torch.cuda.get_device_properties(flat.device).uuid)
    return _Call(function, *arguments[:6], uuid, *arguments[7:])


# ---- Reading, from the network: nothing of a payload is ever called
# -----------------------------------------------------------


class _Record:
    """What a payload would have called, with what."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


_REDUCTIONS = "torch.multiprocessing.reductions"
# Stand for themselves, as data.
_PLAIN = {
    ("torch", "Tensor"): "Tensor",
    ("torch.storage", "UntypedStorage"): "UntypedStorage",
    ("torch", "Size"): tuple,
    **{("torch", name): getattr(torch, name) for name in ("uint8", "float64", "float32", "float16", "bfloat16")},
}


class _Reader(pickle.Unpickler):
    """Reads a payload into records; what it names beyond those is refused."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        # Of this payload alone: a pickle can change the attributes of classes that it names.
        self.tensor, self.storage, self.file, self.metadata = (
            type(name, (_Record,), {}) for name in ("tensor", "storage", "file", "metadata")
        )
        self._named = _PLAIN | {
            (_REDUCTIONS, "rebuild_tensor"): self.tensor,
            (_REDUCTIONS, "rebuild_typed_storage"): self.storage,
            (_REDUCTIONS, "rebuild_storage_filename"): self.file,
            ("types", "SimpleNamespace"): self.metadata,
            ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"): self.metadata,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._named:
            raise PayloadError(f"Blocked unsafe global ({module}.{name}) during pickle deserialization")
        return self._named[module, name]


def unpack(data: bytes) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a payload, by name, views of the sender's memory: to be copied before it is told that they are.

    data: the pickle. It is read without calling anything that it names: what it may name becomes records, and shared
    memory is opened
    only once these make a bucket.

    Raises:
        PayloadError: it is anything else, or its memory is gone.
    """
    try:
        reader = _Reader(data)
        content = reader.load()
    except PayloadError:
        raise
    except Exception as error:  # a pickle can break in any way
        raise PayloadError(f"not a pickle of a bucket: {type(error).__name__}: {error}") from error
    try:
        flat, metadata = content["flattened_tensor"], content["metadata"]
        _, typed, (offset, (size,), (stride,), _) = _checked(flat, reader.tensor).arguments
        opened, dtype = _checked(typed, reader.storage).arguments
        _, manager, handle, stored, *_ = _checked(opened, reader.file).arguments
        tensors = [_tensor(vars(_checked(entry, reader.metadata)), size) for entry in metadata]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise PayloadError(f"not a bucket of tensors: {error}") from error
    if (
        dtype is not torch.uint8
        or (offset, stride) != (0, 1)
        or not type(size) is type(stored) is int
        or not 0 < size <= stored
    ):
        raise PayloadError("not a bucket of tensors: its memory has to be bytes without gaps")
    memory = _open(manager, handle, stored)[:size]
    return [(name, memory[start:end].view(dtype).reshape(shape)) for name, dtype, shape, start, end in tensors]


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _tensor(fields: dict[str, Any], size: int) -> tuple[str, torch.dtype, tuple[int, ...], int, int]:
    name, dtype, start, end = (fields[key] for key in ("name", "dtype", "start_idx", "end_idx"))
    shape = tuple(fields["shape"])
    whole = (
        isinstance(name, str)
        and isinstance(dtype, torch.dtype)
        and all(type(number) is int for number in (*shape, start, end))
    )
    if not whole or min(shape, default=1) < 0 or not 0 <= start <= end <= size:
        raise ValueError(f"tensor {name!r} is not within the bucket")
    if end - start != torch.Size(shape).numel() * dtype.itemsize or start % dtype.itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} does not fill bytes {start} to {end}")
    return name, dtype, shape, start, end


def _open(manager: Any, handle: Any, size: int) -> torch.Tensor:
    if (
        not isinstance(manager, bytes)
        or not isinstance(handle, bytes)
        or not re.fullmatch(rb"/torch_[0-9A-Za-z_]+", handle)
    ):
        raise PayloadError("not a bucket of tensors: it names no shared memory of torch")
    path = SHARED_MEMORY / handle.decode().lstrip("/")
    with contextlib.suppress(OSError, ValueError):
        if stat.S_ISSOCK(Path(manager.decode()).stat().st_mode) and path.stat().st_size >= size:
            try:
                storage = reductions.rebuild_storage_filename(torch.UntypedStorage, manager, handle, size)
            except RuntimeError as error:
                raise PayloadError(f"{path} cannot be opened: {error}") from error
            return torch.empty(0, dtype=torch.uint8).set_(storage)
    raise PayloadError(f"{path} is gone, too short, or not on this machine")
