"""The size of the blocks of logits that the fused loss works in, by the device. Imports no torch, so that a plan for a
GPU can be made anywhere."""

from __future__ import annotations

_CPU_TOKENS = 1024
"""On a CPU a block is cut further to fit its caches, and larger blocks gain nothing."""
_SHARE = 1 / 256
_LEAST_TOKENS, _MOST_TOKENS = 128, 16384


def loss_block_tokens(kind: str, memory: float, columns: int) -> int:
    """Return the tokens of one block of logits, a power of two, on a device of ``memory`` bytes.

    On a GPU a block takes at most 1/256 of the memory in float32, and 16,384 tokens at most, which is what it takes of
    141 GB with 8,192 columns. What a small block costs there is its launches, which do not depend on its size.

    The whole memory decides, and not what is free at some moment: that differs between ranks and between a run and its
    continuation, and sums over other blocks are rounded otherwise. ``dasd plan`` can know it, too.

    Args:
        kind: of the backend.
        memory: bytes of the whole device.
        columns: of one block, ``loss.block_columns``.
    """
    if kind == "cpu":
        return _CPU_TOKENS
    tokens = int(min(max(memory * _SHARE / (4 * columns), _LEAST_TOKENS), _MOST_TOKENS))
    return 1 << (tokens.bit_length() - 1)
