"""Corrections for a rollout engine whose probabilities are others than the trainer's: truncated importance weights, and
rejection of tokens and responses that differ too much."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dasd_megatron.losses.policy import at_least_float32, check_same_shape, rollouts_of_tokens
from dasd_megatron.losses.surrogates import REJECTIONS


def importance_weights(
    log_prob: Tensor, rollout_log_prob: Tensor, lengths: Tensor, *, level: str, cap: float
) -> tuple[Tensor, Tensor]:
    """Return truncated importance weights between the trainer and the rollout engine, which differ even where their
    weights are equal.

    ``token``: ``min(p(y_t) / m(y_t), cap)`` with p the trainer's and m the engine's probability; ``sequence``: the
    ratio of the whole response, ``min(prod_t p(y_t) / m(y_t), cap)``, for each of its tokens. Multiplied onto the
    advantages, they make the expectation over the engine's samples one over the trainer's policy, but for what the cap
    cuts off.

    Args:
        log_prob, rollout_log_prob: ``[N]`` packed response tokens of B rollouts, nats; no gradient flows.
        lengths: ``[B]`` int64, sum N, every one at least 1.
        cap: above 0.

    Returns:
        weights ``[N]``, float32 or wider, and cut ``[N]`` bool: tokens whose weight the cap has lowered. No
        collectives: a rollout has to be whole here for ``sequence``. Raises ValueError on another level, a cap of 0 or
        below, or shapes that do not fit.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}; expected token or sequence")
    if not cap > 0.0:
        raise ValueError(f"cap is {cap}; expected a number above 0")
    log_ratio = _log_ratio(log_prob, rollout_log_prob, lengths)
    if level == "sequence":
        log_ratio = _totals(log_ratio, lengths).to(log_ratio.dtype).repeat_interleave(lengths)
    limit = math.log(cap)
    return log_ratio.clamp(max=limit).exp(), log_ratio > limit


class Rejected(NamedTuple):
    """Packed tokens that are trained on, ``kept`` ``[N]`` bool, and responses that the veto has left out, ``vetoed``
    ``[B]`` bool."""

    kept: Tensor
    vetoed: Tensor


def reject(
    log_prob: Tensor,
    rollout_log_prob: Tensor,
    lengths: Tensor,
    *,
    level: str,
    low: float | None = None,
    high: float | None = None,
    veto: float | None = None,
) -> Rejected:
    """Leave out tokens or whole responses whose probabilities differ too much between trainer and rollout engine.

    With p the trainer's probability of a token and m the engine's, kept is what has its ratio within the bounds, both
    included: at ``token`` p / m of the token (IcePop, arXiv:2510.18855), at ``sequence`` its product over the response,
    and at ``geometric`` its geometric mean over the response. With ``veto`` every response is left out of which any
    token has a ratio below it.

    Args:
        log_prob, rollout_log_prob: ``[N]`` packed response tokens of B rollouts, nats; no gradient flows.
        lengths: ``[B]`` int64, sum N, every one at least 1.
        level: name in :data:`~dasd_megatron.losses.surrogates.REJECTIONS`, or none for the veto alone.
        low, high: least and largest ratio that is kept, at least 0; None: the level's own.
        veto: a ratio in (0, 1); None: no veto.

    No collectives: every rollout is whole here. A ratio that is not a number is out of all bounds. Raises ValueError
    on shapes that do not fit.
    """
    log_ratio = _log_ratio(log_prob, rollout_log_prob, lengths).double()
    kept = torch.ones_like(log_ratio, dtype=torch.bool)
    if level != "none":
        rejection = REJECTIONS[level]
        low = rejection.bounds.low if low is None else low
        high = rejection.bounds.high if high is None else high
        totals, sizes = (values.repeat_interleave(lengths) for values in (_totals(log_ratio, lengths), lengths))
        compared = rejection.log_ratio(log_ratio, totals, sizes)
        kept = (compared >= (math.log(low) if low > 0 else -math.inf)) & (compared <= math.log(high))
    vetoed = torch.zeros_like(lengths, dtype=torch.bool)
    if veto is not None:
        vetoed = _totals(~(log_ratio >= math.log(veto)), lengths) > 0
        kept &= ~vetoed.repeat_interleave(lengths)
    return Rejected(kept, vetoed)


def _log_ratio(log_prob: Tensor, rollout_log_prob: Tensor, lengths: Tensor) -> Tensor:
    check_same_shape(log_prob=log_prob, rollout_log_prob=rollout_log_prob)
    if int(lengths.sum()) != log_prob.numel():
        raise ValueError(f"lengths sum to {int(lengths.sum())}, but there are {log_prob.numel()} tokens")
    return at_least_float32(log_prob.detach()) - rollout_log_prob.detach()


def _totals(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum ``values`` ``[N]`` over their rollouts; ``[B]`` float64, since float32 would lose the fourth digit of a ratio
    over some ten thousand tokens."""
    totals = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
    return totals.index_add_(0, rollouts_of_tokens(lengths), values.double())
