"""Stand-in for SGLang's compiled kernels: the two that its plain CPU path calls are here in Python. The others raise
when they are called.

``torch.ops.sgl_kernel.convert_weight_packed`` must stay undefined: SGLang takes its presence for an AMX build.
"""

import numpy as np
import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, max_context_len
):
    """Enter the cache slots of new tokens, packed in ``out_cache_loc``, into columns start to end of each request's
    row."""
    first = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[first : first + end - start].to(req_to_token.dtype)
        first += end - start


def _rotate(value, bits):
    return (value << np.uint32(bits)) | (value >> np.uint32(32 - bits))


def _mix(state, block):
    block = _rotate(block * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    return _rotate(state ^ block, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def murmur_hash32_cpu(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (32 bits) of (seed, position, column) for every row and column: uint32 [rows, columns].

    The four blocks of 32 bits are the seed's low and high half, the position and the column. It makes the noise of a
    draw with ``sampling_seed``; NumPy's uint32 wraps around, which the hash wants and torch's does not offer.
    """
    seeds = seed.view(torch.int64).numpy().view(np.uint64)
    columns = col_indices.numpy().astype(np.uint32)
    result = np.empty((len(seeds), len(columns)), dtype=np.uint32)
    with np.errstate(over="ignore"):
        blocks = ((seeds & np.uint64(0xFFFFFFFF)).astype(np.uint32), (seeds >> np.uint64(32)).astype(np.uint32))
        states = np.zeros(len(seeds), dtype=np.uint32)
        for block in (*blocks, positions.numpy().astype(np.uint32)):
            states = _mix(states, block)
        for row, state in enumerate(states):
            value = _mix(state, columns) ^ np.uint32(16)
            value = (value ^ (value >> np.uint32(16))) * np.uint32(0x85EBCA6B)
            value = (value ^ (value >> np.uint32(13))) * np.uint32(0xC2B2AE35)
            result[row] = value ^ (value >> np.uint32(16))
    return torch.from_numpy(result)


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32_cpu, "CPU")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args, **_kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} has no CPU version here: leave out the option of SGLang that needs it"
        )

    return missing
