"""The logits that the fused loss works on at once and keeps, by the device. Imports no torch, so that a plan for a
GPU can be made anywhere."""

from __future__ import annotations

_CPU_TOKENS = 1024
"""On a CPU a block is cut further to fit its caches, and larger blocks gain nothing."""
_SHARE = 1 / 256
_KEPT_SHARE = 1 / 64
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


def kept_logits_bytes(kind: str, memory: float) -> int:
    """Return how many bytes of logits the forward pass may leave to the backward pass, on a device of ``memory`` bytes:
    on a GPU 1/64 of it, in bf16 some 7,000 tokens by 152,000 columns of 141 GB. On a CPU none: its memory is the
    machine's, and other processes want it."""
    return 0 if kind == "cpu" else int(memory * _KEPT_SHARE)
