"""Sampling of the embedded server: a pure function of logits, parameters, seed and position.

A counter-based hash gives one uniform per token. The token is the inverse of the cumulative distribution at it, in
float64.
"""

from __future__ import annotations

import numpy as np
import torch

TOP_K_ALL = 1 << 30


def _mix64(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits by a bijection: xor-shift-multiply with splitmix64's constants.

    uint64 in, uint64 out; the arithmetic is modulo 2**64.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def counter_uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return one uniform per row, from a hash of (seed, position).

    seeds: [B] int64; positions: [B] int64, the sequence position of the token to draw. Returns [B] float64 strictly
    inside (0, 1). The values are multiples of 2**-49, so that ``u * total < total`` holds in float64: inverting a
    cumulative sum never runs past its last positive entry.
    """
    key = _mix64(seeds.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    bits = _mix64(
        key ^ _mix64(positions.astype(np.int64).view(np.uint64) * np.uint64(0xD1B54A32D192ED03) + np.uint64(1))
    )
    return ((bits >> np.uint64(16)).astype(np.float64) + 0.5) * 2.0**-48


def keep_top(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero what top-k and top-p cut off; the rest is not normalised.

    probs: [B, V] float64; top_k: [B] int64 >= 1; top_p: [B] float64 in (0, 1]. A token stays when its rank is under
    top_k and the mass of the tokens ranked before it is at most top_p. This is SGLang's rule: both cuts look at the
    unfiltered distribution. Ties rank by id.
    """
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(probs.shape[-1], device=probs.device)
    drop = (rank >= top_k[:, None]) | (before > top_p[:, None])
    return torch.zeros_like(probs).scatter_(-1, ids, ordered.masked_fill(drop, 0.0))


def sample_tokens(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution at ``uniforms``.

    ``top_k == 1`` takes the largest logit.

    logits: [B, V] any float dtype; temperature: [B] float64 > 0; top_k: [B] int64 >= 1; top_p: [B] float64 in (0, 1];
    uniforms: [B] float64 in (0, 1). Returns tokens [B] int64, and log-probs [B, V] float64 of the whole vocabulary
    after temperature and before top-k and top-p.
    """
    log_probs = torch.log_softmax(logits.double() / temperature[:, None], dim=-1)
    greedy = top_k == 1
    if bool(greedy.all()):
        return log_probs.argmax(-1), log_probs
    probs = log_probs.exp()
    cut = ((top_k < probs.shape[-1]) | (top_p < 1.0)) & ~greedy
    if bool(cut.any()):
        rows = cut.nonzero()[:, 0]
        probs[rows] = keep_top(probs[rows], top_k[rows], top_p[rows])
    cumulative = probs.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)
    return torch.where(greedy, log_probs.argmax(-1), tokens), log_probs
