"""The clipped policy surrogate of PPO and the KL penalty to a reference policy, per token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp(20) is 5e8: far outside every clip range, and far from overflow.
_MAX_LOG_RATIO = 20.0
# Up to this gap a power series stands for the k3 estimator, whose terms cancel there.
_K3_SERIES_UNTIL = 0.1
# Beyond this gap the k3 estimator goes on as a straight line.
_K3_LINEAR_FROM = 10.0


def policy_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return PPO's clipped surrogate per token, as a loss to minimise.

    With r = exp(log_prob - old_log_prob) and A the advantage, the loss is ``-min(r A, clip(r, 1 - clip_low, 1 +
    clip_high) A)`` (arXiv:1707.06347; separate bounds as in DAPO, arXiv:2503.14476). With ``dual_clip`` c, tokens of
    negative advantage lose at most ``-c A`` (arXiv:1912.09729).

    Args:
        log_prob: ``[N]`` log-prob under the policy being trained, nats; the only argument that receives a gradient.
        old_log_prob: ``[N]`` log-prob under the policy that the ratio is taken against.
        advantage: ``[N]`` any finite number.
        clip_low, clip_high: width of the trust region below and above a ratio of 1; 0 <= clip_low <= 1, clip_high >= 0.
        dual_clip: None, or a number above 1.

    Returns:
        loss ``[N]``, float32 or wider, and clipped ``[N]`` bool: tokens whose gradient the clip, or the dual clip,
        removes. The log-ratio is held within +-20, so that a mismatch between the policies gives a large finite loss
        and never an infinite one.

    Elementwise, so it works on any shard of the tokens; no collectives. Raises ValueError on shapes or bounds that do
    not fit.
    """
    _same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage)
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low is {clip_low}; expected 0 to 1, so that the ratio's lower bound is not negative")
    if not clip_high >= 0.0:
        raise ValueError(f"clip_high is {clip_high}; expected at least 0")
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip is {dual_clip}; expected a number above 1, or None for no dual clip")
    log_prob = _at_least_float32(log_prob)
    advantage = advantage.detach().to(log_prob.dtype)
    ratio = (log_prob - old_log_prob.detach()).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    unclipped = -advantage * ratio
    bounded = -advantage * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    clipped = bounded > unclipped
    loss = torch.where(clipped, bounded, unclipped)
    if dual_clip is not None:
        limit = -advantage * dual_clip
        over = (advantage < 0) & (loss > limit)
        loss = torch.where(over, limit, loss)
        clipped = clipped | over
    return loss, clipped.detach()


def routed_divergence(
    divergence: Tensor, omega: Tensor, *, cap: float, pull_cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the distributional objective's teacher term per token, ``omega * D``, with bounds on how far a token is
    pushed away and on how strongly one is pulled.

    Minimising it raises D where omega is below 0, but there only while D is under ``cap``: an unbounded repulsion could
    run away, since a divergence has no maximum. It lowers D where omega is above 0, with ``pull_cap`` only while D is
    under that: the few tokens where teacher and student differ most would otherwise decide the gradient. Both caps are
    our choice.

    Args:
        divergence: ``[N]`` D(student, teacher), nats, infinities allowed; receives the gradient ``omega``, 0 beyond a
            cap.
        omega: ``[N]`` direction times reliability, in [-1, 1]; no gradient.
        cap: nats, at least 0.
        pull_cap: nats, above 0; None: no cap where omega is above 0.

    Returns:
        term ``[N]`` and capped ``[N]`` bool: pushed and pulled tokens at or beyond their cap. Without ``pull_cap`` a
        pulled token whose divergence is infinite, which has no gradient to follow, contributes 0.

    Elementwise; no collectives. Raises ValueError on shapes or caps that do not fit.
    """
    _same_shape(divergence=divergence, omega=omega)
    if not cap >= 0.0:
        raise ValueError(f"cap is {cap}; expected at least 0 nats")
    if pull_cap is not None and not pull_cap > 0.0:
        raise ValueError(f"pull_cap is {pull_cap}; expected more than 0 nats, or None for no cap")
    omega = omega.detach().to(divergence.dtype)
    pushed_out = (omega < 0) & (divergence >= cap)
    bounded = torch.where(pushed_out, cap, torch.where(divergence == math.inf, 0.0, divergence))
    if pull_cap is None:
        return omega * bounded, pushed_out.detach()
    pulled_out = (omega > 0) & (divergence >= pull_cap)
    return omega * torch.where(pulled_out, pull_cap, bounded), (pushed_out | pulled_out).detach()


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
    _same_shape(log_prob=log_prob, rollout_log_prob=rollout_log_prob)
    if level not in ("token", "sequence"):
        raise ValueError(f"level is {level!r}; expected token or sequence")
    if not cap > 0.0:
        raise ValueError(f"cap is {cap}; expected a number above 0")
    if int(lengths.sum()) != log_prob.numel():
        raise ValueError(f"lengths sum to {int(lengths.sum())}, but there are {log_prob.numel()} tokens")
    log_ratio = _at_least_float32(log_prob.detach()) - rollout_log_prob.detach()
    if level == "sequence":
        rollout = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        # Float32 would lose the fourth digit of the ratio over some ten thousand tokens.
        totals = torch.zeros(len(lengths), dtype=torch.float64, device=log_ratio.device).index_add_(
            0, rollout, log_ratio.double()
        )
        log_ratio = totals.to(log_ratio.dtype)[rollout]
    limit = math.log(cap)
    return log_ratio.clamp(max=limit).exp(), log_ratio > limit


def kl_k3(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """Return Schulman's k3 estimate of KL(policy || reference) at each sampled token: ``exp(x) - 1 - x`` with
    ``x = ref_log_prob - log_prob``.

    Source: http://joschu.net/blog/kl-approx.html; the penalty of GRPO (arXiv:2402.03300). Never negative, and 0 only at
    x = 0.

    Args:
        log_prob: ``[N]`` log-prob under the policy being trained, nats; receives the gradient ``1 - exp(x)``.
        ref_log_prob: ``[N]`` log-prob under the reference; no gradient.

    Returns:
        ``[N]`` nats, float32 or wider. Near x = 0 a power series replaces the difference of nearly equal numbers; above
        x = 10 the curve goes on as its tangent, so that value and gradient stay finite however far the policy has
        moved.

    Elementwise; no collectives. Raises ValueError on different shapes.
    """
    _same_shape(log_prob=log_prob, ref_log_prob=ref_log_prob)
    log_prob = _at_least_float32(log_prob)
    gap = ref_log_prob.detach().to(log_prob.dtype) - log_prob
    # Every branch sees only its own gaps. A branch that another one corrects afterwards would leave the small gradient
    # as the difference of two large ones, which float32 has no digits for.
    near, far = gap.abs() < _K3_SERIES_UNTIL, gap > _K3_LINEAR_FROM
    small = torch.where(near, gap, 0.0)
    series = (
        small.square()
        / 2
        * (1 + small / 3 * (1 + small / 4 * (1 + small / 5 * (1 + small / 6 * (1 + small / 7 * (1 + small / 8))))))
    )
    middle = torch.where(near | far, 0.0, gap)
    curve = torch.expm1(middle) - middle
    slope = math.expm1(_K3_LINEAR_FROM)
    tangent = slope - _K3_LINEAR_FROM + (gap - _K3_LINEAR_FROM) * slope
    return torch.where(near, series, torch.where(far, tangent, curve))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}; expected one entry per token in each")
