"""The plan by which the policy's weights leave a sharded model: which Megatron parameters travel together, and which
Hugging Face tensors they become."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from dasd_megatron.models.weight_formats import PLAIN, HfTensor, WeightFormat


@dataclass(frozen=True)
class ExportEntry:
    """One Megatron parameter: where it is, the shape of its shard, and what it becomes."""

    stage: int
    """Pipeline stage."""
    chunk: int
    """Model chunk on that stage."""
    local_name: str
    """Name in the chunk."""
    name: str
    """Name in the whole model."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    partition_dim: int | None
    """Dimension that tensor-parallel ranks share; None where each has all of it."""
    tensors: tuple[HfTensor, ...]
    """Hugging Face tensors that the whole parameter is split into."""


@dataclass(frozen=True)
class ExportBucket:
    """Parameters of one pipeline stage whose Hugging Face tensors travel together, in the form ``form``.

    The tensors lie end to end. Those with the widest elements come first, so that each begins at a multiple of its
    element's size.
    """

    stage: int
    entries: tuple[ExportEntry, ...]
    tensors: tuple[HfTensor, ...]
    form: WeightFormat = PLAIN

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)


def plan_buckets(
    plan: Iterable[ExportEntry], most_bytes: int, only: Collection[str] | None = None, form: WeightFormat = PLAIN
) -> list[ExportBucket]:
    """Divide a plan into buckets of at most ``most_bytes``, stage by stage; a larger parameter has one of its own.

    Every Hugging Face tensor is in one bucket: a tied head, which the last stage has too, is left to the first.
    ``only``: names of the parameters to take; None: all. ``form``: what the tensors are turned into.
    """
    buckets: list[ExportBucket] = []
    planned: set[str] = set()
    filling: list[ExportEntry] = []
    filled = 0
    for entry in plan:
        names = {tensor.name for tensor in entry.tensors}
        if names <= planned or (only is not None and entry.name not in only):
            continue
        planned |= names
        size = sum(tensor.size for tensor in _formed(entry, form))
        if filling and (filled + size > most_bytes or filling[0].stage != entry.stage):
            buckets.append(_make_bucket(filling, form))
            filling, filled = [], 0
        filling.append(entry)
        filled += size
    if filling:
        buckets.append(_make_bucket(filling, form))
    return buckets


def _formed(entry: ExportEntry, form: WeightFormat) -> list[HfTensor]:
    return [formed for tensor in entry.tensors for formed in form.tensors(tensor)]


def _make_bucket(entries: Sequence[ExportEntry], form: WeightFormat) -> ExportBucket:
    tensors = [tensor for entry in entries for tensor in _formed(entry, form)]
    tensors.sort(key=lambda tensor: -tensor.dtype.itemsize)
    return ExportBucket(entries[0].stage, tuple(entries), tuple(tensors), form)


def split_bucket(
    flat: torch.Tensor, dtypes: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Return the tensors of a bucket, views into ``flat`` [bytes] uint8, where they lie end to end."""
    tensors, offset = [], 0
    for dtype, shape in zip(dtypes, shapes, strict=True):
        size = torch.Size(shape).numel() * dtype.itemsize
        tensors.append(flat[offset : offset + size].view(dtype).reshape(shape))
        offset += size
    return tensors


def bucket_bytes(dtypes: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]) -> int:
    """Return the size of a bucket with these tensors."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in zip(dtypes, shapes, strict=True))
