"""The checksums that SGLang 0.5.23 gives of its weights, computed from tensors on the host. SGLang has one kind on the
CPU and another on GPUs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from dasd_megatron.models.hf_weights import tensor_bytes

TILE_WORDS = 8192
CHUNK_WORDS = 1024 * TILE_WORDS  # bounds the temporaries, which are six times as large
_SEED = 0x243F6A88
# Each half of the checksum has a seed, a multiplier of the position and its rotation.
_HALVES = ((_SEED, 0x27D4EB2D, 15), (((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF, 0x165667B1, 13))


def cpu_checksum(tensors: Sequence[torch.Tensor]) -> str:
    """Return the checksum of these tensors, one below another, on a server without a GPU: the head of the SHA-256 of
    their bytes, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def gpu_checksum(tensors: Sequence[torch.Tensor]) -> str:
    """Return the same on a GPU: two hashes of 32 bits of every tile of words with their positions, summed over tiles,
    and mixed."""
    data = np.concatenate([np.frombuffer(tensor_bytes(tensor), dtype=np.uint8) for tensor in tensors])
    words = np.concatenate([data, np.zeros(-len(data) % 4, dtype=np.uint8)]).view(np.uint32)
    if not len(words):
        return f"{0:016x}"
    size = np.uint32(4 * len(words) & 0xFFFFFFFF)
    total = 0
    for start in range(0, len(words), CHUNK_WORDS):
        part = words[start : start + CHUNK_WORDS]
        position = (np.arange(len(part), dtype=np.uint64) + np.uint64(start)).astype(np.uint32)
        tiles = np.arange(0, len(part), TILE_WORDS)
        halves = []
        for seed, factor, by in _HALVES:
            hashed = _mix(part ^ (position * np.uint32(factor) + np.uint32(seed)) ^ _rotate(position, by))
            halves.append(_mix(np.add.reduceat(hashed, tiles, dtype=np.uint32) ^ size))
        high, low = halves
        total += (int(high.sum(dtype=np.uint64)) << 32) + int(low.sum(dtype=np.uint64))
    return f"{_mix64(total & (1 << 64) - 1):016x}"


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply MurmurHash3's finaliser of 32 bits."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _rotate(x: np.ndarray, by: int) -> np.ndarray:
    return (x << np.uint32(by)) | (x >> np.uint32(32 - by))


def _mix64(x: int) -> int:
    """Apply splitmix64's finaliser."""
    mask = (1 << 64) - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)
