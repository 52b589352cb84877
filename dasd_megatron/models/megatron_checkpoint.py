"""Distributed checkpoints of Megatron-Core written and checked one tensor at a time, by a single process.

The format (``torch_dist``: PyTorch's distributed checkpoint with Megatron's keys) does not depend on the parallel
layout: a tensor of the model is one entry, repeated layers are one entry with the layer as its first axis, and each
entry is stored in rectangular chunks. Loading is Megatron's own ``dist_checkpointing.load``; only saving goes another
way here, because that saves from a model in memory.

Needs Megatron importable, so a backend selected.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dasd_megatron.errors import first_line
from dasd_megatron.files import file_sha256
from dasd_megatron.models.hf_weights import (
    MANIFEST_FILE,
    Journal,
    WeightsError,
    check_free_space,
    read_manifest,
    sha256,
)
from dasd_megatron.models.pickles import check_pickle, load_tensors

# A checkpoint may hold tensors under these names beside the model's, and no model has them.
_NOT_THE_MODEL = ("optimizer", "average.", "snapshot.", "chained_", "rng_state", "rerun_state")

# Megatron-Core and PyTorch use these names in a checkpoint's .metadata. All of them make plain records, so that
# reading it runs no foreign code.
_CHECKPOINT = "torch.distributed.checkpoint"
_METADATA_NAMES = {
    *((f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_CHECKPOINT}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    *((f"{_CHECKPOINT}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """Return what a distributed checkpoint holds and where, after a check that no pickle that loading it would read can
    run code.

    PyTorch's and Megatron's loaders trust ``.metadata`` and the objects in a checkpoint; whoever wrote it could make
    them do anything. Call this before they are given one.

    Raises:
        WeightsError: a file names code, is damaged or is missing.
    """
    file = path / ".metadata"
    try:
        with open(file, "rb") as stream:
            check_pickle(stream)
            stream.seek(0)
            metadata = _MetadataReader(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        # Megatron-Core 0.19 writes no common.pt beside weights alone; where an older one needs it, its loader says so.
        for file in sorted(path.glob("*.pt")):
            load_tensors(file.read_bytes())
        for index, place in metadata.storage_data.items():
            # Only objects are read here, to see that they are harmless. Tensors hold no code.
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                file = path / place.relative_path
                with open(file, "rb") as stream:
                    stream.seek(place.offset)
                    load_tensors(stream.read(place.length))
    # A damaged pickle fails in any way.
    except Exception as error:
        raise WeightsError(
            f"{file} is damaged, or would run code if it were loaded ({_reason(error)}); restore it"
        ) from error
    return metadata


def _reason(error: Exception) -> str:
    # torch explains at length how to load the file all the same; the name of what is in it stands below that.
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it names {found.group(1)}" if found else first_line(error)


class CheckpointWriter:
    """A checkpoint of model weights, filled tensor by tensor, that appears whole or not at all. Each chunk is a file of
    its own.

    Args:
        path: where it will appear; a directory that is there is replaced.
        job: what is written from what; chunks that a killed writer of the same job left behind are kept, after a look
            at their bytes.
        total_bytes: of all weights that will be added.

    Raises:
        WeightsError: the disk has no room for them.
    """

    def __init__(self, path: Path, job: dict[str, Any], total_bytes: int) -> None:
        self.path = path
        self._journal = Journal(path, job)
        self.folder = self._journal.folder
        self._entries: dict[str, TensorStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        for name in [name for name, record in self._journal.done.items() if not self._intact(record)]:
            del self._journal.done[name]
        check_free_space(
            path, self.folder, total_bytes - sum(record["bytes"] for record in self._journal.done.values())
        )

    def _intact(self, record: dict[str, Any]) -> bool:
        path = self.folder / str(record.get("file"))
        return (
            path.is_file() and path.stat().st_size == record.get("bytes") and file_sha256(path) == record.get("sha256")
        )

    def has(self, shard: ShardedTensor) -> bool:
        """Return True where this chunk is written; its ``data`` is not looked at."""
        return self._name(shard) in self._journal.done

    @staticmethod
    def _name(shard: ShardedTensor) -> str:
        return f"{shard.key}@{','.join(map(str, shard.global_offset))}"

    def add(self, shard: ShardedTensor, dtype: torch.dtype) -> None:
        """Write a chunk, or only enter it into the checkpoint where it is written already.

        Raises:
            OSError: the disk is full.
        """
        name = self._name(shard)
        shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        entry = self._entries.setdefault(
            shard.key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shard.global_shape), [])
        )
        file = f"__0_{len(self._storage)}.distcp"
        if not self.has(shard):
            buffer = io.BytesIO()
            # torch.save would keep all of the storage that a view looks into.
            torch.save(shard.data.detach().to(dtype).reshape(shape).clone(), buffer)
            with open(self.folder / file, "wb") as stream:
                stream.write(buffer.getbuffer())
            self._journal.add(
                name, {"file": file, "bytes": buffer.getbuffer().nbytes, "sha256": sha256(buffer.getbuffer())}
            )
        record = self._journal.done[name]
        entry.chunks.append(ChunkStorageMetadata(torch.Size(shard.global_offset), torch.Size(shape)))
        index = MetadataIndex(shard.key, shard.global_offset, len(entry.chunks) - 1)
        self._storage[index] = _StorageInfo(record["file"], 0, record["bytes"])

    def finish(self, record: dict[str, Any]) -> None:
        """Write the metadata and a manifest with ``record`` and every file's SHA-256, and let the checkpoint appear."""
        planner_data = {key: (key,) for key in self._entries}
        metadata = Metadata(
            state_dict_metadata={**self._entries}, planner_data=planner_data, storage_data=self._storage
        )
        with open(self.folder / ".metadata", "wb") as file:
            pickle.dump(metadata, file)
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, self.folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
        files = {
            done["file"]: {"bytes": done["bytes"], "sha256": done["sha256"]} for done in self._journal.done.values()
        }
        (self.folder / MANIFEST_FILE).write_text(json.dumps({"format": 1, **record, "files": files}, indent=2) + "\n")
        self._journal.commit(self.path)


class CheckpointFiles:
    """The tensors that a distributed checkpoint says it holds, checked against its files.

    Raises:
        WeightsError: no checkpoint there, a file is missing or too short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "metadata.json").is_file() or not (path / ".metadata").is_file():
            raise WeightsError(
                f"{path} is not a distributed checkpoint of Megatron-Core: it has no metadata.json and .metadata"
            )
        self._metadata = read_metadata(path)
        self.entries: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_NOT_THE_MODEL)
        }
        self._places: dict[str, list[_StorageInfo]] = {}
        for index, place in self._metadata.storage_data.items():
            if index.fqn in self.entries:
                self._places.setdefault(index.fqn, []).append(place)
        manifest = path / MANIFEST_FILE
        self._unverified = read_manifest(manifest, "files") if manifest.is_file() else {}
        self._check_files()

    def _check_files(self) -> None:
        for key, entry in self.entries.items():
            for place in self._places.get(key, []):
                file = self.path / place.relative_path
                if not file.is_file():
                    raise WeightsError(f"{file} is missing; it holds part of {key}: restore it")
                if file.stat().st_size < place.offset + place.length:
                    raise WeightsError(
                        f"{file} is truncated: it has {file.stat().st_size} bytes, {key} ends at "
                        f"{place.offset + place.length}"
                    )
            stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if stored != math.prod(entry.size) or len(self._places.get(key, [])) != len(entry.chunks):
                raise WeightsError(
                    f"{self.path}: {key} has {stored} of its {math.prod(entry.size)} elements; the checkpoint is "
                    "incomplete"
                )

    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights.

        Raises:
            WeightsError: they have several.
        """
        found = {key: entry.properties.dtype for key, entry in self.entries.items()}
        if len(set(found.values())) != 1:
            raise WeightsError(
                f"{self.path}: expected weights of one dtype, found {sorted(map(str, set(found.values())))}"
            )
        return next(iter(found.values()))

    def check_coverage(self, shards: list[ShardedTensor], vocab_size: int) -> None:
        """Compare keys and shapes with those of the whole model, in any sharding.

        Raises:
            WeightsError: tensors are missing, have no place, or another shape; the first ones are named.
        """
        expected = {shard.key: shard for shard in shards}
        missing, unused = sorted(set(expected) - set(self.entries)), sorted(set(self.entries) - set(expected))
        if missing:
            raise WeightsError(
                f"{self.path}: {len(missing)} tensors that the model has are missing: {', '.join(missing[:3])}"
            )
        if unused:
            raise WeightsError(
                f"{self.path}: {len(unused)} tensors have no place in the model: {', '.join(unused[:3])}"
            )
        for key, shard in expected.items():
            stored, wanted = tuple(self.entries[key].size), tuple(shard.global_shape)
            if shard.allow_shape_mismatch:
                # Rows of the vocabulary were padded for the layout that saved them.
                stored, wanted = (min(stored[0], vocab_size), *stored[1:]), (vocab_size, *wanted[1:])
            if stored != wanted:
                raise WeightsError(f"{self.path}: {key} has shape {stored}, and the model's config calls for {wanted}")

    def read(self, shard: ShardedTensor) -> torch.Tensor:
        """Return the part of a stored tensor that ``shard`` describes, whatever the chunks; rows past the stored ones
        are 0.

        Files that the manifest lists are compared with it the first time that something is read from them.

        Raises:
            WeightsError: a file is not the one that was written, or cannot be read.
        """
        entry = self.entries[shard.key]
        shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        result = torch.zeros(shape, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            low = [max(a, b) for a, b in zip(chunk.offsets, shard.global_offset, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(chunk.offsets, chunk.sizes, shard.global_offset, shape, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            stored = self._chunk(shard.key, chunk)
            if tuple(chunk.offsets) == tuple(shard.global_offset) and tuple(chunk.sizes) == shape:
                return stored.reshape(shard.local_shape)
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, shard.global_offset, strict=True))
            result[target] = stored[source]
        return result.reshape(shard.local_shape)

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        path = self.path / place.relative_path
        try:
            if (
                place.relative_path in self._unverified
                and file_sha256(path) != self._unverified.pop(place.relative_path)["sha256"]
            ):
                raise WeightsError(f"{path} is not what {MANIFEST_FILE} lists; it holds part of {key}: restore it")
            with open(path, "rb") as file:
                file.seek(place.offset)
                tensor = load_tensors(file.read(place.length))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(
                f"{path} cannot be read ({first_line(error)}); it holds part of {key}: restore it"
            ) from error
        if tuple(tensor.shape) != tuple(chunk.sizes):
            raise WeightsError(
                f"{path}: part of {key} has shape {tuple(tensor.shape)} and not {tuple(chunk.sizes)}: restore it"
            )
        return tensor
