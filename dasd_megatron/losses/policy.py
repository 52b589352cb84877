"""The policy loss: clipped surrogates, divergence from a teacher and KL penalty per token, and their average over a
batch."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from dasd_megatron.losses.surrogates import AGGREGATIONS, SURROGATES, BatchCounts, Bounds

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
    surrogate: str = "ppo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    response_log_ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate of the policy gradient per token, as a loss to minimise.

    With r = exp(log_prob - old_log_prob), A the advantage and clip(r) = clip(r, 1 - clip_low, 1 + clip_high):

    - ``ppo``: ``-min(r A, clip(r) A)`` (arXiv:1707.06347; separate bounds as in DAPO, arXiv:2503.14476). With
      ``dual_clip`` c, tokens of negative advantage lose at most ``-c A`` (arXiv:1912.09729).
    - ``gspo``: ``-min(s A, clip(s) A)``, where s has the value of the geometric mean of the ratios over the whole
      response, and the gradient ``s d log_prob`` of the token's own log-prob (GSPO-token, arXiv:2507.18071).
    - ``cispo``: ``-sg(clip(r)) A log_prob`` with the weight as a constant (arXiv:2506.13585). No token loses its
      gradient.

    Args:
        log_prob: ``[N]`` log-prob under the policy being trained, nats; the only argument that receives a gradient.
        old_log_prob: ``[N]`` log-prob under the policy that the ratio is taken against.
        advantage: ``[N]`` any finite number.
        surrogate: name in :data:`~dasd_megatron.losses.surrogates.SURROGATES`.
        clip_low, clip_high: width of the trust region below and above a ratio of 1; 0 <= clip_low <= 1, clip_high >= 0;
            None: the surrogate's own.
        dual_clip: None, or a number above 1; ``ppo`` only.
        response_log_ratio: ``[N]`` mean of log_prob - old_log_prob over each token's whole response
            (:func:`response_means`); for surrogates that use it, and None for others.

    Returns:
        loss ``[N]``, float32 or wider, and clipped ``[N]`` bool: tokens whose gradient the clip, or the dual clip,
        removes; of ``cispo`` those whose weight it changes. The log-ratio is held within +-20, so that a mismatch
        between the policies gives a large finite loss and never an infinite one.

    Elementwise, so it works on any shard of the tokens; no collectives. Raises ValueError on shapes, bounds or
    arguments that do not fit.
    """
    kind = SURROGATES[surrogate]
    clip_low = kind.clip_low if clip_low is None else clip_low
    clip_high = kind.clip_high if clip_high is None else clip_high
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage)
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low is {clip_low}; expected 0 to 1, so that the ratio's lower bound is not negative")
    if not clip_high >= 0.0:
        raise ValueError(f"clip_high is {clip_high}; expected at least 0")
    if dual_clip is not None and not (kind.takes_dual_clip and dual_clip > 1.0):
        raise ValueError(f"dual_clip is {dual_clip}; expected None, or under ppo a number above 1")
    if (response_log_ratio is not None) != kind.uses_response_ratio:
        raise ValueError(f"response_log_ratio: {surrogate} needs {'one' if kind.uses_response_ratio else 'none'}")
    log_prob = at_least_float32(log_prob)
    advantage = advantage.detach().to(log_prob.dtype)
    log_ratio = log_prob - old_log_prob.detach()
    if response_log_ratio is not None:
        check_same_shape(log_prob=log_prob, response_log_ratio=response_log_ratio)
        # The difference is 0 and carries the gradient.
        log_ratio = response_log_ratio.detach().to(log_prob.dtype) + (log_prob - log_prob.detach())
    log_ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    loss, clipped = kind.loss(log_ratio, log_prob, advantage, Bounds(1.0 - clip_low, 1.0 + clip_high))
    if dual_clip is not None:
        limit = -advantage * dual_clip
        over = (advantage < 0) & (loss > limit)
        loss = torch.where(over, limit, loss)
        clipped = clipped | over
    return loss, clipped.detach()


def response_means(
    values: Tensor, rollout: Tensor, lengths: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return for each token the mean of ``values`` over its whole response.

    Args:
        values: ``[R]`` any of the tokens of some responses; each response is whole over the ranks of ``group``.
        rollout: ``[R]`` int64, the response of each token, an index of ``lengths``.
        lengths: ``[B]`` int64, tokens of every response, over all ranks of ``group``.
        group: ranks that have different tokens of the same responses (context parallelism); None: this rank has all.

    Returns:
        ``[R]`` in the values' dtype; no gradient flows.

    Collectives: one all-reduce of ``[B]`` float64 over ``group``, also from ranks without any token.
    """
    totals = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
    totals.index_add_(0, rollout, values.detach().double())
    if group is not None:
        dist.all_reduce(totals, group=group)
    means: Tensor = (totals / lengths)[rollout]
    return means.to(values.dtype)


def count_trained(lengths: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Count what a loss is averaged over.

    Args:
        lengths: ``[B]`` int64, tokens of every response, whose sum is N.
        kept: ``[N]`` bool, the packed tokens that rejection has left; None: all.

    Returns:
        trained ``[B]`` int64, tokens of every response without rejected ones, and counts ``[3]`` float64: all tokens,
        trained tokens, and responses with a trained token. The counts of several replicas add up. No collectives.
    """
    trained = lengths
    if kept is not None:
        trained = torch.zeros_like(lengths).index_add_(0, rollouts_of_tokens(lengths), kept.long())
    return trained, torch.stack([lengths.sum(), trained.sum(), (trained > 0).sum()]).double()


def aggregation_weights(
    lengths: Tensor,
    kept: Tensor | None,
    trained: Tensor,
    counts: Tensor,
    *,
    aggregation: str,
    max_tokens: int,
) -> Tensor:
    """Return the weights of the tokens' losses whose weighted mean over all tokens of the batch is its loss.

    Rejected tokens weigh 0 and count in no mean, nor do responses of which no token is left. That is how verl and slime
    average after rejection.

    Args:
        lengths, kept: see :func:`count_trained`.
        trained, counts: its results; the counts are those of the whole batch, summed over replicas.
        aggregation: name in :data:`~dasd_megatron.losses.surrogates.AGGREGATIONS`.
        max_tokens: the longest response that the configuration allows, tokens.

    Returns:
        ``[N]`` float32; all exactly 1 for ``token_mean`` without rejection, all 0 where everything is rejected. No
        collectives.
    """
    tokens, trained_tokens, responses = counts.tolist()
    batch = BatchCounts(trained_tokens, responses, max_tokens)
    divisor = AGGREGATIONS[aggregation].divisor(trained.double(), batch).expand(len(lengths))
    of_response: Tensor = (tokens / divisor).masked_fill(trained == 0, 0.0)
    weights = of_response.float().repeat_interleave(lengths)
    return weights if kept is None else weights * kept


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
    check_same_shape(divergence=divergence, omega=omega)
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
    check_same_shape(log_prob=log_prob, ref_log_prob=ref_log_prob)
    log_prob = at_least_float32(log_prob)
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


def rollouts_of_tokens(lengths: Tensor, tokens: int | None = None) -> Tensor:
    """Return the rollout of each packed token, ``[N]`` int64, from the rollouts' numbers of tokens ``[B]``. ``tokens``:
    N, for a caller that knows it; else it is read back from the device."""
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=tokens)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float64 if it is, else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_same_shape(**tensors: Tensor) -> None:
    """Refuse (ValueError) tensors of different shapes, which the message names."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}; expected one entry per token in each")
