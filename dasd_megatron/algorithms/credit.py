"""Direction-adaptive credit: per-rollout statistics of entropy and teacher gap, and from them each token's weight and
direction.

Source of the two formulas: arXiv:2605.22263. What the paper leaves open, and is our choice here: the side that ``rho``
counts from, the floor of the threshold, the scale of the gap and its floor, and the treatment of the edge cases that
:func:`direction_adaptive_credit` lists.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dasd_megatron.algorithms.methods import BETA, ENTROPY_FLOOR, QUANTILE_SIDES, SCALE_FLOOR, RolloutStatistics

# The gap of a token is bounded by this many nats, so that a token that the teacher rules out (log q = -inf) stays a
# finite outlier.
GAP_LIMIT = 20.0


class NonFiniteTokenError(ValueError):
    """An entropy or a gap that is not a number: the logits behind it were not finite. The message names the token and
    its rollout."""


class Credit(NamedTuple):
    """Credit of N packed tokens of B rollouts, without gradient; float32, float64 for float64 inputs."""

    omega: Tensor
    """``[N]`` direction times reliability, in [-1, 1]: above 0 the token is pulled toward the teacher, below 0 pushed
    away."""
    delta_bar: Tensor
    """``[N]`` gap divided by its scale in the rollout, sign kept."""
    tau: Tensor
    """``[B]`` entropy threshold, nats; 0 for an empty rollout."""
    sigma: Tensor
    """``[B]`` mean absolute deviation of the entropy, nats; 0 for an empty rollout."""
    advantage_term: Tensor
    """``[N]`` what the teacher adds to the verifier's advantage."""


def direction_adaptive_credit(
    entropy: Tensor,
    delta: Tensor,
    lengths: Tensor,
    *,
    rho: float = 0.2,
    quantile_side: str = "upper",
    beta: float = BETA,
    scale_floor: float = SCALE_FLOOR,
    entropy_floor: float = ENTROPY_FLOOR,
    eps: float = 1e-6,
    gate: bool = True,
    term_clip: float | None = None,
) -> Credit:
    """Route the direction of the teacher's signal by the student's entropy.

    In each rollout, with H the entropy and delta the gap log q(y) - log p(y):

        quantile  of H, linearly interpolated like ``torch.quantile``: at 1 - rho (``upper``: the most uncertain rho
                  lie beyond it and are pushed away) or at rho (``lower``: all but the most certain rho are pushed
                  away)
        tau       max(quantile, entropy_floor)
        sigma     mean |H - mean H|
        delta_bar delta / max(mean |delta|, scale_floor, eps)
        omega     tanh((tau - H) / max(sigma, eps)) * sigmoid(|delta_bar| - 1)
        term      beta * omega * delta_bar, cut to +-term_clip

    Args:
        entropy: ``[N]`` student's entropy at each response token, nats; packed, rollout after rollout.
        delta: ``[N]`` teacher's minus student's log-prob of the sampled token, nats.
        lengths: ``[B]`` integer tokens of each rollout, 0 allowed; their sum is N.
        rho: share of tokens beyond the threshold, 0 to 1.
        beta: weight of the term.
        scale_floor: least scale of the gap, nats. Where teacher and student agree all gaps are noise, and the floor
            keeps them small.
        entropy_floor: least threshold, nats. No token of at most this entropy is pushed away: a share of the tokens
            lies beyond the quantile also where the policy is certain of all of them.
        eps: guard of both divisions, nats.
        gate: False leaves the sigmoid out.
        term_clip: most that the teacher adds to or takes from an advantage; None: no bound but those of gap and scale.

    Returns:
        Credit. Nothing in it carries a gradient. Statistics are computed in float64.

    Edge cases: a rollout of one token, or with equal entropies throughout, has sigma 0. Above the floor its omega is 0,
    so that the teacher adds nothing. Below the floor all of it is pulled. With all gaps 0, delta_bar and the term are
    0. An infinite gap counts as +-20 nats (:data:`GAP_LIMIT`, which also bounds finite gaps). An empty rollout has
    tau = sigma = 0. N = 0 and B = 0 give empty tensors.

    Each rollout must be whole on this rank; :func:`context_parallel_credit` takes shards. No collectives, no loop over
    rollouts, one sort of N keys; the checks read the lengths and one flag back from the device.

    Raises:
        ValueError: shapes, dtypes, lengths or settings that do not fit.
        NonFiniteTokenError: an entropy that is NaN or infinite, or a gap that is NaN.
    """
    statistics = rollout_statistics(
        entropy,
        delta,
        lengths,
        rho=rho,
        quantile_side=quantile_side,
        scale_floor=scale_floor,
        entropy_floor=entropy_floor,
        eps=eps,
    )
    return make_credit(
        statistics,
        torch.tanh(statistics.routed),
        beta=beta,
        gate=gate,
        term_clip=term_clip,
        dtype=output_dtype(entropy),
    )


def rollout_statistics(
    entropy: Tensor,
    delta: Tensor,
    lengths: Tensor,
    *,
    rho: float,
    quantile_side: str,
    scale_floor: float,
    entropy_floor: float,
    eps: float,
    check_values: bool = True,
) -> RolloutStatistics:
    """Return the statistics that :func:`direction_adaptive_credit` describes, for every method alike; same arguments
    and errors. Without ``check_values`` neither lengths nor tokens are read back from the device: the caller knows the
    lengths, and looks at the tokens later."""
    _check_arguments(entropy, delta, lengths, rho, quantile_side, scale_floor, entropy_floor, eps)
    if check_values:
        _check_values(entropy, delta, lengths)
    entropy = entropy.detach().double()
    delta = delta.detach().double().clamp(-GAP_LIMIT, GAP_LIMIT)
    lengths = lengths.to(entropy.device, torch.int64)
    rollout = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=lengths.device), lengths, output_size=entropy.numel()
    )

    quantile = _quantile_per_rollout(entropy, rollout, lengths, 1.0 - rho if quantile_side == "upper" else rho)
    tau = torch.where(lengths > 0, quantile.clamp_min(entropy_floor), 0.0)
    mean_entropy = _mean_per_rollout(entropy, lengths)
    sigma = _mean_per_rollout((entropy - mean_entropy[rollout]).abs(), lengths)
    scale = _mean_per_rollout(delta.abs(), lengths).clamp_min(max(scale_floor, eps))
    routed = (tau[rollout] - entropy) / sigma.clamp_min(eps)[rollout]
    return RolloutStatistics(rollout, entropy, delta, delta / scale[rollout], tau, sigma, routed)


def make_credit(
    statistics: RolloutStatistics,
    direction: Tensor,
    *,
    beta: float,
    gate: bool,
    term_clip: float | None,
    dtype: torch.dtype,
    signal: Tensor | None = None,
) -> Credit:
    """Return the credit of a direction per token ``[N]``: the one place where gate, beta and clip come in, whichever
    method gives the direction.

    ``signal`` is ``[N]`` what beta and omega are multiplied with. None: the gap divided by its scale, and the gate is
    asked for; with a signal omega is the direction itself.
    """
    gated = gate and signal is None
    omega = direction * torch.sigmoid(statistics.delta_bar.abs() - 1.0) if gated else direction
    term = beta * omega * (statistics.delta_bar if signal is None else signal)
    if term_clip is not None and not term_clip > 0.0:
        raise ValueError(f"term_clip is {term_clip}; expected above 0, or None")
    if term_clip is not None:
        term = term.clamp(-term_clip, term_clip)
    return Credit(*(value.to(dtype) for value in (omega, statistics.delta_bar, statistics.tau, statistics.sigma, term)))


def output_dtype(entropy: Tensor) -> torch.dtype:
    """Return the dtype of results: float32, float64 for float64 inputs."""
    return torch.float64 if entropy.dtype == torch.float64 else torch.float32


def gather_packed_tokens(values: Tensor, positions: Tensor, num_tokens: int, group: dist.ProcessGroup | None) -> Tensor:
    """Bring packed tokens that are spread over a group together, in packed order, whatever the split.

    Args:
        values: ``[K, n_local]`` K quantities of this rank's tokens, any floating dtype, infinities allowed.
        positions: ``[n_local]`` int64 place of each of them in the packed order; together the ranks hold each of 0..N-1
            once.
        num_tokens: N.
        group: usually the context-parallel group; None: this process holds all tokens.

    Returns:
        ``[K, N]`` on every rank, bit-equal for any split, in the dtype of ``values``.

    Collectives: one all-reduce of (K + 1) x N numbers. Every place is filled by one rank and 0 on the others, so the
    sum is exact.

    Raises:
        ValueError: shapes that do not fit, positions outside 0..N-1, or places held by no rank or by several.
    """
    if values.dim() != 2 or positions.shape != values.shape[1:] or positions.dtype != torch.int64:
        raise ValueError(
            f"values {tuple(values.shape)} and positions {tuple(positions.shape)} {positions.dtype}; expected [K, n] "
            "and [n] int64"
        )
    placed = values.new_zeros(values.shape[0] + 1, num_tokens)
    inside = (positions >= 0) & (positions < num_tokens)
    kept = positions[inside]
    placed[:-1, kept] = values.detach()[:, inside]
    # Places are counted by addition, so that a place that is filled twice on one rank shows as well.
    placed[-1] = torch.bincount(kept, minlength=num_tokens).to(placed.dtype)
    misplaced = (~inside).sum().to(placed.dtype)
    if group is not None and dist.get_world_size(group) > 1:
        # The number of misplaced tokens travels with the counts: if one rank alone refused, the others would wait.
        packed = torch.cat([placed.flatten(), misplaced[None]])
        dist.all_reduce(packed, group=group)
        placed, misplaced = packed[:-1].view_as(placed), packed[-1]
    if bool((placed[-1] != 1).any() | (misplaced != 0)):
        wrong = (placed[-1] != 1).nonzero()
        where = (
            f"place {int(wrong[0])} is held {int(placed[-1, wrong[0]])} times"
            if len(wrong)
            else "some lie outside the packed order"
        )
        raise ValueError(f"positions do not cover 0 to {num_tokens - 1} once over the group: {where}")
    return placed[:-1]


def context_parallel_credit(
    entropy: Tensor,
    delta: Tensor,
    lengths: Tensor,
    positions: Tensor,
    *,
    group: dist.ProcessGroup | None,
    rho: float = 0.2,
    quantile_side: str = "upper",
    beta: float = BETA,
    scale_floor: float = SCALE_FLOOR,
    entropy_floor: float = ENTROPY_FLOOR,
    eps: float = 1e-6,
    gate: bool = True,
    term_clip: float | None = None,
) -> Credit:
    """:func:`direction_adaptive_credit` for tokens spread over a context-parallel group; the identical result for any
    split.

    ``entropy`` and ``delta`` are ``[n_local]``, this rank's tokens, at ``positions`` ``[n_local]`` of the packed order;
    ``lengths`` ``[B]`` are of whole rollouts. The token-wise results are of this rank's tokens, tau and sigma of all
    rollouts. One all-reduce of 3 N numbers. Settings and errors are those of :func:`direction_adaptive_credit` and
    :func:`gather_packed_tokens`.
    """
    whole = gather_packed_tokens(torch.stack([entropy, delta]), positions, int(lengths.sum()), group)
    credit = direction_adaptive_credit(
        whole[0],
        whole[1],
        lengths,
        rho=rho,
        quantile_side=quantile_side,
        beta=beta,
        scale_floor=scale_floor,
        entropy_floor=entropy_floor,
        eps=eps,
        gate=gate,
        term_clip=term_clip,
    )
    return credit._replace(
        omega=credit.omega[positions],
        delta_bar=credit.delta_bar[positions],
        advantage_term=credit.advantage_term[positions],
    )


def _check_arguments(
    entropy: Tensor,
    delta: Tensor,
    lengths: Tensor,
    rho: float,
    quantile_side: str,
    scale_floor: float,
    entropy_floor: float,
    eps: float,
) -> None:
    if entropy.dim() != 1 or delta.shape != entropy.shape:
        raise ValueError(
            f"entropy has shape {tuple(entropy.shape)} and delta {tuple(delta.shape)}; expected [tokens] for both"
        )
    if not (entropy.is_floating_point() and delta.is_floating_point()):
        raise ValueError(f"entropy is {entropy.dtype} and delta {delta.dtype}; expected floating point")
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)} and dtype {lengths.dtype}; expected [rollouts] of integers"
        )
    if not 0.0 <= rho <= 1.0:
        raise ValueError(f"rho is {rho}; expected 0 to 1")
    if quantile_side not in QUANTILE_SIDES:
        raise ValueError(f"quantile_side is {quantile_side!r}; expected one of {', '.join(QUANTILE_SIDES)}")
    if not scale_floor >= 0.0:
        raise ValueError(f"scale_floor is {scale_floor}; expected at least 0 nats")
    if not 0.0 <= entropy_floor < math.inf:
        raise ValueError(f"entropy_floor is {entropy_floor}; expected a number of nats, at least 0")
    if not eps > 0.0:
        raise ValueError(f"eps is {eps}; expected above 0")


def _check_values(entropy: Tensor, delta: Tensor, lengths: Tensor) -> None:
    sizes = lengths.tolist()
    if min(sizes, default=0) < 0 or sum(sizes) != entropy.numel():
        raise ValueError(
            f"lengths sum to {sum(sizes)}, the least is {min(sizes, default=0)}; expected counts that sum to "
            f"{entropy.numel()} tokens"
        )
    broken = ~torch.isfinite(entropy) | torch.isnan(delta)
    if bool(broken.any()):
        token = int(broken.nonzero()[0])
        rollout = int((torch.tensor(sizes).cumsum(0) <= token).sum())
        raise NonFiniteTokenError(
            f"token {token} of the pack (rollout {rollout}) has entropy {float(entropy[token])} and gap "
            f"{float(delta[token])}, one of {int(broken.sum())} such tokens; the logits behind it are not finite"
        )


def _mean_per_rollout(values: Tensor, lengths: Tensor) -> Tensor:
    """Return ``[B]`` means, 0 where a rollout is empty; in a fixed order of summation, so that repeated runs agree bit
    for bit.

    ``unsafe`` leaves out a check of the lengths that :func:`_check_values` makes, and that fails on an empty batch.
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0.0) / lengths.clamp_min(1)


def _quantile_per_rollout(values: Tensor, rollout: Tensor, lengths: Tensor, level: float) -> Tensor:
    """Return ``[B]`` linearly interpolated quantiles of float64 ``values``, 0 where a rollout is empty.

    One sort orders the tokens by rollout and then by value: the key holds the rollout in its upper 32 bits and below it
    the bits of the value as float32, rearranged so that they order like the numbers. Values that float32 cannot tell
    apart may change places, which moves the quantile by less than float32's precision.
    """
    if values.numel() == 0:
        return values.new_zeros(lengths.numel())
    bits = values.float().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() + 2**31
    by_rollout = values[torch.argsort((rollout << 32) + ordered)]
    position = level * (lengths - 1).clamp_min(0).double()
    below = position.floor()
    start = lengths.cumsum(0) - lengths
    low = (start + below.long()).clamp_max(values.numel() - 1)
    high = (start + position.ceil().long()).clamp_max(values.numel() - 1)
    return torch.where(lengths > 0, torch.lerp(by_rollout[low], by_rollout[high], position - below), 0.0)
