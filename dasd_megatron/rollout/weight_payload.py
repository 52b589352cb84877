"""Buckets of weights for a server on the same machine: the bytes stay where they are, and the payload says where.

The payload is what SGLang's ``/update_weights_from_tensor`` reads under ``load_format=flattened_bucket``: a pickle, in
base64, of the bucket's memory and of the tensors in it. It is written without SGLang, and names only globals that
SGLang's unpickler allows. On the CPU the memory is a file in /dev/shm, on a GPU a CUDA IPC handle.
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
from typing import Any, NamedTuple

import torch
from torch.multiprocessing import reductions

from dasd_megatron.models.pickles import check_pickle
from dasd_megatron.models.weight_formats import HfTensor

SHARED_MEMORY = Path("/dev/shm")


class PayloadError(ValueError):
    """A payload that is not a bucket of weights, or memory that cannot be had or opened. The message is one line."""


class SharedBuffer:
    """Memory of ``size`` bytes that unrelated processes can open: ``bytes`` [size] uint8. It is freed by :meth:`close`,
    or when this process ends.

    Raises:
        PayloadError: /dev/shm has no room.
    """

    def __init__(self, size: int) -> None:
        # Beyond the limit the kernel ends the process that writes, without any message.
        free = shutil.disk_usage(SHARED_MEMORY).free
        if size > free:
            raise PayloadError(
                f"a bucket takes {size} bytes of shared memory and {SHARED_MEMORY} has {free} free: lower "
                "rollout.weight_bucket_bytes, or mount a larger one (docker run --shm-size)"
            )
        # torch's helper process removes the file when this process ends, however it ends.
        storage = torch.UntypedStorage._new_using_filename_cpu(size)
        # Without this count a slow receiver that closes last would remove the file too, and fail.
        storage._shared_incref()
        self.path = SHARED_MEMORY / storage._share_filename_cpu_()[1].decode().lstrip("/")
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage)

    def close(self) -> None:
        """Free the memory. Receivers that have opened it keep what they have."""
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self.path.unlink(missing_ok=True)


class _Call:
    """An object that is pickled as the call ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def pack(flat: torch.Tensor, tensors: Sequence[HfTensor]) -> str:
    """Return the payload of a bucket for one receiving process, which may open it once.

    flat: [bytes] uint8, the head of a :class:`SharedBuffer`, or memory of a GPU; the tensors lie in it end to end.
    """
    metadata, start = [], 0
    for tensor in tensors:
        # SGLang's own class has these attributes, and asks for no more.
        metadata.append(
            SimpleNamespace(
                name=tensor.name,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                start_idx=start,
                end_idx=start + tensor.size,
                numel=tensor.size,
            )
        )
        start += tensor.size
    memory = _cuda_memory(flat) if flat.is_cuda else _shared_memory(flat)
    return base64.b64encode(pickle.dumps({"flattened_tensor": memory, "metadata": metadata})).decode()


def _shared_memory(flat: torch.Tensor) -> _Call:
    # This is what torch's reduce_tensor does under the sharing strategy file_system, which could only be set for the
    # whole process.
    storage = flat.untyped_storage()
    place = storage._share_filename_cpu_()
    # The receiver counts down once when it opens the file.
    storage._shared_incref()
    opened = _Call(reductions.rebuild_storage_filename, torch.UntypedStorage, *place)
    typed = _Call(reductions.rebuild_typed_storage, opened, torch.uint8)
    return _Call(reductions.rebuild_tensor, torch.Tensor, typed, (0, tuple(flat.shape), (1,), False))


def _cuda_memory(flat: torch.Tensor) -> _Call:
    function, arguments = reductions.reduce_tensor(flat)
    # The seventh argument is the device's number, and another process may count devices differently. SGLang takes the
    # device's identity too.
    uuid = str(torch.cuda.get_device_properties(flat.device).uuid)
    return _Call(function, *arguments[:6], uuid, *arguments[7:])


# The rest of this module reads payloads. They come from the network, so nothing that they name is ever called.


class _Record:
    """The arguments of a call that a payload asks for, in the place of the call."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


_REDUCTIONS = "torch.multiprocessing.reductions"
# A payload may use these names as plain data. Other names are refused.
_PLAIN = {
    ("torch", "Tensor"): "Tensor",
    ("torch.storage", "UntypedStorage"): "UntypedStorage",
    ("torch", "Size"): tuple,
    **{("torch", name): getattr(torch, name) for name in ("uint8", "float64", "float32", "float16", "bfloat16")},
}


class _Reader(pickle.Unpickler):
    """Unpickler that reads a payload into records, and refuses all other names."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        # These classes are made anew for each payload, since a pickle can change the attributes of classes it names.
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
    """Return the tensors of a payload with their names. They are views of the sender's memory, and have to be copied
    before the sender gets an answer.

    data: the pickle. Nothing that it names is called: it is read into records, and shared memory is opened only once
    these make a bucket.

    Raises:
        PayloadError: it is anything else, or its memory is gone.
    """
    try:
        check_pickle(data)
        reader = _Reader(data)
        content = reader.load()
    except PayloadError:
        raise
    except Exception as error:  # a pickle can break in any way
        raise PayloadError(f"not a pickle of a bucket: {type(error).__name__}: {error}") from error
    try:
        flat, metadata = content["flattened_tensor"], content["metadata"]
        _, typed, (offset, (size,), (stride,), _) = _require(flat, reader.tensor).arguments
        opened, dtype = _require(typed, reader.storage).arguments
        _, manager, handle, stored, *_ = _require(opened, reader.file).arguments
        places = [_read_tensor(vars(_require(entry, reader.metadata)), size) for entry in metadata]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise PayloadError(f"not a bucket of tensors: {error}") from error
    if (
        dtype is not torch.uint8
        or (offset, stride) != (0, 1)
        or not type(size) is type(stored) is int
        or not 0 < size <= stored
    ):
        raise PayloadError("not a bucket of tensors: its memory has to be bytes without gaps")
    memory = _open_shared_memory(manager, handle, stored)[:size]
    return [(place.name, memory[place.start : place.end].view(place.dtype).reshape(place.shape)) for place in places]


class _Place(NamedTuple):
    """A tensor of a bucket, and the bytes that it takes there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _require(value: Any, kind: type) -> Any:
    """Return ``value`` if it is of exactly this class; raises ValueError."""
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _read_tensor(fields: dict[str, Any], size: int) -> _Place:
    """Check a tensor's metadata against a bucket of ``size`` bytes; raises KeyError, TypeError, ValueError."""
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
    return _Place(name, dtype, shape, start, end)


def _open_shared_memory(manager: Any, handle: Any, size: int) -> torch.Tensor:
    """Open ``size`` bytes of torch's shared memory, [size] uint8; raises PayloadError."""
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
