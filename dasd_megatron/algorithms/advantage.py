"""Advantages: the verifier's, relative to a group of rollouts, and the advantage of each token under a method.

The methods of :data:`~dasd_megatron.algorithms.methods.METHODS` share every statistic and differ in how they use it, so
that a comparison changes nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dasd_megatron.algorithms.credit import Credit, make_credit, output_dtype, rollout_statistics
from dasd_megatron.algorithms.methods import METHODS, OBJECTIVES, MethodSettings, RolloutFacts, RolloutStatistics


def group_relative_advantage(
    rewards: Tensor,
    *,
    samples_per_group: int | None = None,
    group_ids: Tensor | None = None,
    normalize_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Return GRPO's outcome advantage (arXiv:2402.03300): each reward minus its group's mean, divided by the group's
    standard deviation.

    The paper writes ``std`` and no more; this is the sample standard deviation (n - 1), which the public GRPO trainers
    use, plus ``eps``.

    Args:
        rewards: ``[B]`` one reward per rollout.
        samples_per_group: groups are consecutive runs of this many rollouts; give either this or ``group_ids``.
        group_ids: ``[B]`` integers, equal within a group; in any order.
        normalize_std: False leaves the division out (arXiv:2503.20783).
        eps: added to the standard deviation.

    Returns:
        ``[B]`` float32 (float64 for float64 rewards). Exactly 0 throughout a group whose rewards are all equal, a group
        of one included.

    A group must be whole on this rank; no collectives. Raises ValueError on shapes that do not fit and on rewards that
    are not finite.
    """
    if rewards.dim() != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected [rollouts]")
    if samples_per_group is not None and group_ids is None:
        if samples_per_group < 1 or rewards.numel() % samples_per_group:
            raise ValueError(
                f"{rewards.numel()} rewards do not split into groups of samples_per_group={samples_per_group}"
            )
        group = torch.arange(rewards.numel(), device=rewards.device) // samples_per_group
    elif group_ids is not None and samples_per_group is None:
        if group_ids.shape != rewards.shape or group_ids.is_floating_point():
            raise ValueError(
                f"group_ids is {group_ids.dtype} {tuple(group_ids.shape)}; expected integers {tuple(rewards.shape)}"
            )
        group = torch.unique(group_ids, return_inverse=True)[1]
    else:
        raise ValueError("give either samples_per_group or group_ids, and not both")
    if rewards.numel() == 0:
        return rewards.to(output_dtype(rewards))
    values = rewards.detach().double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"rewards[{int((~torch.isfinite(values)).nonzero()[0])}] is not finite")
    zeros = values.new_zeros(int(group.max()) + 1)
    counts = zeros.index_add(0, group, torch.ones_like(values))
    centred = values - (zeros.index_add(0, group, values) / counts)[group]
    # Equal rewards are recognised by their range. Their mean may differ from them in the last digit, which a tiny
    # standard deviation would blow up.
    highest = zeros.scatter_reduce(0, group, values, "amax", include_self=False)
    spread = highest > zeros.scatter_reduce(0, group, values, "amin", include_self=False)
    if normalize_std:
        variance = zeros.index_add(0, group, centred.square()) / (counts - 1).clamp_min(1)
        centred = centred / (variance.sqrt() + eps)[group]
    return torch.where(spread[group], centred, 0.0).to(output_dtype(rewards))


def token_advantages(
    name: str,
    settings: MethodSettings,
    *,
    rewards_advantage: Tensor,
    entropy: Tensor,
    delta: Tensor,
    lengths: Tensor,
    facts: RolloutFacts | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Credit]:
    """Return the advantage of each token under a method: ``verifier_weight * A + advantage_term``, with A the rollout's
    verifier advantage.

    ``dasd``, ``opsd``, ``reversed`` and ``grpo``: the term is ``beta * omega * delta_bar``, omega the direction (the
    entropy router, 1, -1, 0) times the gate; see :func:`~dasd_megatron.algorithms.credit.direction_adaptive_credit`.
    ``rlsd`` (arXiv:2604.03128, its token weight without the warm-up that blends it with plain advantages): the token's
    advantage is ``verifier_weight * A * clip(exp(sign(A) delta), 1 - rlsd_clip, 1 + rlsd_clip)``, so the verifier alone
    decides the sign; its omega is 0, and the term is what the weight changes.

    Under the ``distributional`` objective the teacher acts through a divergence that the loss weights with omega, so
    the token's advantage is the verifier's alone, and the term is 0.

    Args:
        name: a key of :data:`~dasd_megatron.algorithms.methods.METHODS`.
        settings: the settings of all methods.
        rewards_advantage: ``[B]`` verifier advantage of each rollout.
        entropy, delta: ``[N]`` packed response tokens, nats.
        lengths: ``[B]`` tokens of each rollout.
        facts: what else is known of the rollouts. None: the teacher has scored all of them. A rollout without a teacher
            has omega, delta_bar and term of exactly 0; its ``delta`` must be a number, and is not used.
        eps: guard of the divisions, nats.

    Returns:
        advantage ``[N]`` and Credit, both float32 (float64 for float64 entropies), without gradient.

    Whole rollouts on this rank, no collectives; under context parallelism gather the tokens first
    (:func:`~dasd_megatron.algorithms.credit.gather_packed_tokens`). Raises ValueError on an unknown name, shapes or
    settings, and NonFiniteTokenError on NaN.
    """
    _check(name, settings, rewards_advantage, lengths)
    dtype = output_dtype(entropy)
    method = METHODS[name]
    statistics = rollout_statistics(
        entropy,
        delta,
        lengths,
        rho=settings.rho,
        quantile_side=settings.quantile_side,
        scale_floor=settings.scale_floor,
        entropy_floor=settings.entropy_floor,
        eps=eps,
    )
    if facts is not None:
        statistics = _leave_out_teacherless(statistics, facts, lengths)
    if method.direction is not None:
        direction = method.direction(statistics, settings)
    else:
        direction = torch.zeros_like(statistics.routed)
    if facts is not None:
        direction = torch.where(facts.has_teacher.to(direction.device)[statistics.rollout], direction, 0.0)
    credit = make_credit(statistics, direction, beta=settings.beta, gate=settings.gate, dtype=dtype)
    verifier = (
        settings.verifier_weight * rewards_advantage.detach().to(entropy.device, torch.float64)[statistics.rollout]
    )
    if method.verifier_factor is not None:
        factor = method.verifier_factor(statistics, verifier, settings)
        credit = credit._replace(advantage_term=(verifier * (factor - 1.0)).to(dtype))
    if settings.is_distributional:
        credit = credit._replace(advantage_term=torch.zeros_like(credit.advantage_term))
    return verifier.to(dtype) + credit.advantage_term, credit


def _check(name: str, settings: MethodSettings, rewards_advantage: Tensor, lengths: Tensor) -> None:
    if name not in METHODS:
        raise ValueError(f"algorithm {name!r} is unknown; expected one of {', '.join(METHODS)}")
    if rewards_advantage.shape != lengths.shape:
        raise ValueError(
            f"rewards_advantage has shape {tuple(rewards_advantage.shape)} and lengths {tuple(lengths.shape)}; one "
            "entry per rollout"
        )
    if not 0.0 <= settings.rlsd_clip < 1.0:
        raise ValueError(
            f"rlsd_clip is {settings.rlsd_clip}; expected 0 up to, not including, 1, so that the verifier's sign stays"
        )
    if settings.objective not in OBJECTIVES:
        raise ValueError(f"objective is {settings.objective!r}; expected one of {', '.join(OBJECTIVES)}")


def _leave_out_teacherless(statistics: RolloutStatistics, facts: RolloutFacts, lengths: Tensor) -> RolloutStatistics:
    """Return the statistics with gaps of 0 for rollouts without a teacher; refuse facts of other rollouts or tokens."""
    for name in ("has_teacher", "is_right", "solve_rate"):
        shape = tuple(getattr(facts, name).shape)
        if shape != tuple(lengths.shape):
            raise ValueError(f"facts.{name} has shape {shape}; expected {tuple(lengths.shape)}")
    if facts.teacher_entropy is not None and facts.teacher_entropy.shape != statistics.gap.shape:
        raise ValueError(
            f"facts.teacher_entropy has shape {tuple(facts.teacher_entropy.shape)}; expected "
            f"{tuple(statistics.gap.shape)}"
        )
    taught = facts.has_teacher.to(statistics.gap.device)[statistics.rollout]
    return statistics._replace(
        gap=torch.where(taught, statistics.gap, 0.0), delta_bar=torch.where(taught, statistics.delta_bar, 0.0)
    )
