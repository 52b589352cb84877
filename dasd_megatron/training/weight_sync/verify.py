"""Comparison of the weights that the servers hold with the trainer's, by checksums, whichever way they came."""

from __future__ import annotations

import asyncio
import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dasd_megatron.config import RolloutConfig
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.models.weight_formats import WEIGHT_FORMATS, HfTensor
from dasd_megatron.rollout.client import ClientFactory, make_client
from dasd_megatron.rollout.pool import ServerPool
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.rollout.weight_checksum import cpu_checksum, gpu_checksum
from dasd_megatron.training.weight_sync.base import WeightSyncError

# SGLang stacks several of Hugging Face's tensors one below another in these.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# SGLang pads tensors whose names have this part: in this dimension, to a multiple of this size.
_PADDED = (("embed_tokens.", 0, 64), ("lm_head.", 0, 64), (".gate_up_proj.", 0, 32), (".down_proj.", 1, 32))

Parts = Mapping[str, list[tuple[str, torch.Tensor]]]
"""Hugging Face's tensors with their names, by the name of the tensor of SGLang that holds them."""


class _Expected(NamedTuple):
    """A tensor that a server has to hold, and the lists of tensors, one below another, that it may consist of."""

    name: str
    alternatives: list[list[torch.Tensor]]


@torch.no_grad()
def verify_weights(
    model: ShardedModel,
    config: RolloutConfig,
    urls: Sequence[str],
    pool: ServerPool,
    version: str,
    make_client: ClientFactory = make_client,
) -> WeightSyncError | None:
    """Compare ``rollout.verify_weights`` of the policy's parameters with what every server holds, by checksums of their
    bytes.

    Collective over all ranks, as ``bridge.export_weights``, for the chosen parameters alone: other ones each time, the
    same on all ranks. Servers have to hold them in ``rollout.dtype``, or quantised as ``rollout.weight_format`` sends
    them.

    Returns:
        On global rank 0 the first difference, or what kept a server from answering; None where all agree, and
        elsewhere.
    """
    plan = [entry.name for entry in model.bridge.export_plan(model.chunks)]
    chosen = _choose(plan, config.verify_weights, version)
    parts: dict[str, list[tuple[str, torch.Tensor]]] = {}
    form = WEIGHT_FORMATS[config.weight_format]
    for name, tensor in model.bridge.export_weights(model.chunks, only=chosen, form=form):
        kept = form.keeps(HfTensor(name, tensor.dtype, tuple(tensor.shape)))
        held = tensor.to("cpu", tensor.dtype if kept else getattr(torch, config.dtype))
        parts.setdefault(_fused_name(name), []).append((name, held))
    if dist.get_rank() != 0:
        return None
    # Both names of each tensor are skipped, whatever the servers call it, so that they read only what is compared.
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
        difference = _find_difference(url, ranks, parts, version)
        if difference is not None:
            return difference
    return None


def _choose(names: Sequence[str], count: int, version: str) -> list[str]:
    """Return ``count`` of ``names``, evenly spread, from a start that moves with ``version``, so that in time every
    name has its turn."""
    count = min(count, len(names))
    start = zlib.crc32(version.encode())
    return [names[(start + index * len(names) // count) % len(names)] for index in range(count)]


def _find_difference(url: str, ranks: list[dict[str, str]], parts: Parts, version: str) -> WeightSyncError | None:
    """Compare the checksums of a server, one dict for each of its processes, with the trainer's tensors."""
    if len(ranks) > 1:
        return WeightSyncError(
            f"{url} shares its weights among {len(ranks)} processes: write rollout.verify_weights=0", url
        )
    (served,) = ranks
    for name, alternatives in _expected_tensors(parts, served):
        if name not in served:
            return WeightSyncError(f"{url} has no tensor {name} to compare with the trainer's {version}", url)
        if all(served[name] != checksum(whole) for whole in alternatives for checksum in (cpu_checksum, gpu_checksum)):
            return WeightSyncError(f"{url} serves other weights than the trainer's {version}: {name} differs", url)
    return None


def _fused_name(name: str) -> str:
    """Return the name of the tensor of SGLang that holds Hugging Face's ``name``."""
    for fused, members in _FUSED.items():
        for member in members:
            if f".{member}." in name:
                return name.replace(f".{member}.", f".{fused}.")
    return name


def _expected_tensors(parts: Parts, served: Mapping[str, str]) -> Iterator[_Expected]:
    """Yield the tensors that a server has to hold: each by itself where the server has that, and else fused.

    There are two alternatives where SGLang pads with zeros: the vocabulary, and on the CPU the intermediate size.
    """
    for fused, tensors in parts.items():
        if all(name in served for name, _ in tensors):
            made = [(name, [tensor]) for name, tensor in tensors]
        else:
            made = [(fused, [tensor for _, tensor in tensors])]
        for name, whole in made:
            pads = [(dim, multiple) for part, dim, multiple in _PADDED if part in name]
            yield _Expected(name, [whole, *([_pad(tensor, *pad) for tensor in whole] for pad in pads)])


def _pad(tensor: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """Append zeros along ``dim``, where the tensor has that dimension, up to a multiple of ``multiple``."""
    if dim >= tensor.dim():
        return tensor
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, -tensor.shape[dim] % multiple])
