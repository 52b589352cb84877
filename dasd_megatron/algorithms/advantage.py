"""Advantages: the verifier's, relative to a group of rollouts, and the advantage of each token under a method.

The methods of :data:`~dasd_megatron.algorithms.methods.METHODS` share every statistic and differ in how they use it, so
that a comparison changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dasd_megatron.algorithms.credit import Credit, make_credit, output_dtype, rollout_statistics
from dasd_megatron.algorithms.gates import PUSH_GATES
from dasd_megatron.algorithms.methods import (
    METHODS,
    NO_GATE,
    OBJECTIVES,
    Method,
    MethodSettings,
    RolloutFacts,
    RolloutStatistics,
    TokenFacts,
)


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
    sum_over_replicas: Callable[[Tensor], Tensor] | None = None,
    eps: float = 1e-6,
    check_values: bool = True,
) -> tuple[Tensor, Credit]:
    """Return the advantage of each token under a method: ``factor * verifier_weight * A + beta * omega * signal``, with
    A the rollout's verifier advantage.

    ``dasd``, ``opsd``, ``reversed`` and ``grpo``: factor 1, omega the direction (the entropy router, 1, -1, 0) times
    the gate, signal delta_bar; see :func:`~dasd_megatron.algorithms.credit.direction_adaptive_credit`. The other
    methods' factors, directions and signals stand beside them in :mod:`~dasd_megatron.algorithms.methods`; a token that
    a method does not teach has factor 1 and omega 0, so the verifier's advantage alone.

    Under the ``distributional`` objective the teacher acts through a divergence that the loss weights with omega, so
    the token's advantage is the verifier's alone, times the factor.

    Args:
        name: a key of :data:`~dasd_megatron.algorithms.methods.METHODS`.
        settings: the settings of all methods.
        rewards_advantage: ``[B]`` verifier advantage of each rollout.
        entropy, delta: ``[N]`` packed response tokens, nats.
        lengths: ``[B]`` tokens of each rollout.
        facts: what else is known of the rollouts. None: the teacher has scored all of them, and methods that ask for
            verdicts or for the teacher's entropy are refused. A rollout without a teacher has omega, delta_bar and term
            of exactly 0; its ``delta`` must be a number, and is not used.
        sum_over_replicas: sums a float64 ``[2]`` tensor over data-parallel replicas, for a method whose omega has a
            mean of 1 over the whole batch, and is called by that one alone. None: this process has the whole batch.
        eps, check_values: see :func:`~dasd_megatron.algorithms.credit.rollout_statistics`.

    Returns:
        advantage ``[N]`` and Credit, both float32 (float64 for float64 entropies), without gradient. Its term is what
        is added to ``verifier_weight * A``, a factor included.

    Whole rollouts on this rank, no collectives but ``sum_over_replicas``; under context parallelism gather the tokens
    first (:func:`~dasd_megatron.algorithms.credit.gather_packed_tokens`). Raises ValueError on an unknown name, shapes
    or settings, and NonFiniteTokenError on NaN.
    """
    _check(name, settings, rewards_advantage, lengths, facts)
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
        check_values=check_values,
    )
    verifier = settings.verifier_weight * rewards_advantage.detach().to(entropy.device, torch.float64)
    statistics, tokens = _read_facts(method, statistics, verifier, lengths, facts)
    direction = _find_direction(method, statistics, tokens, settings, facts, sum_over_replicas)
    signal = None if method.signal is None else method.signal(statistics)
    credit = make_credit(
        statistics,
        direction,
        beta=settings.beta,
        gate=settings.gate,
        term_clip=settings.term_clip,
        dtype=dtype,
        signal=signal,
    )
    if settings.is_distributional:
        credit = credit._replace(advantage_term=torch.zeros_like(credit.advantage_term))
    verifier = tokens.verifier
    if method.verifier_factor is None:
        return verifier.to(dtype) + credit.advantage_term, credit
    scaled = torch.where(tokens.taught, verifier * method.verifier_factor(statistics, tokens, settings), verifier)
    advantage = scaled.to(dtype) + credit.advantage_term
    return advantage, credit._replace(advantage_term=credit.advantage_term + (scaled - verifier).to(dtype))


def _check(
    name: str, settings: MethodSettings, rewards_advantage: Tensor, lengths: Tensor, facts: RolloutFacts | None
) -> None:
    if name not in METHODS:
        raise ValueError(f"algorithm {name!r} is unknown; expected one of {', '.join(METHODS)}")
    if rewards_advantage.shape != lengths.shape:
        raise ValueError(
            f"rewards_advantage has shape {tuple(rewards_advantage.shape)} and lengths {tuple(lengths.shape)}; one "
            "entry per rollout"
        )
    for setting in ("rlsd_clip", "rlsd_lambda", "position_w_min"):
        if not 0.0 <= getattr(settings, setting) <= 1.0:
            raise ValueError(f"{setting} is {getattr(settings, setting)}; expected 0 to 1")
    if not settings.srpo_beta >= 0.0:
        raise ValueError(f"srpo_beta is {settings.srpo_beta}; expected at least 0")
    if not settings.position_s > 0.0:
        raise ValueError(f"position_s is {settings.position_s}; expected above 0")
    if settings.objective not in OBJECTIVES:
        raise ValueError(f"objective is {settings.objective!r}; expected one of {', '.join(OBJECTIVES)}")
    method = METHODS[name]
    if method.teaches != "all" and facts is None:
        raise ValueError(f"algorithm {name!r} acts on {method.teaches} rollouts alone; give facts")
    if method.needs_teacher_entropy and (
        facts is None or (facts.teacher_entropy is None and bool(facts.has_teacher.any()))
    ):
        raise ValueError(f"algorithm {name!r} reads the teacher's entropy; give facts.teacher_entropy")


def _read_facts(
    method: Method,
    statistics: RolloutStatistics,
    verifier: Tensor,
    lengths: Tensor,
    facts: RolloutFacts | None,
) -> tuple[RolloutStatistics, TokenFacts]:
    """Return the statistics with gaps of 0 for rollouts without a teacher, and the facts of each token, with the
    verifier's weighted advantage ``[B]`` among them; refuse facts of other rollouts or tokens."""
    rollout, lengths = statistics.rollout, lengths.to(statistics.rollout.device)
    starts = lengths.cumsum(0) - lengths
    index = torch.arange(rollout.numel(), device=rollout.device)
    tokens = TokenFacts(
        verifier=verifier[rollout],
        taught=torch.ones_like(rollout, dtype=torch.bool),
        place=(index - starts[rollout] + 0.5) / lengths.double()[rollout],
        teacher_entropy=torch.zeros_like(statistics.gap),
    )
    if facts is None:
        return statistics, tokens
    for name in ("has_teacher", "is_right", "solve_rate"):
        shape = tuple(getattr(facts, name).shape)
        if shape != tuple(lengths.shape):
            raise ValueError(f"facts.{name} has shape {shape}; expected {tuple(lengths.shape)}")
    teacher_entropy = facts.teacher_entropy
    if teacher_entropy is not None and teacher_entropy.shape != rollout.shape:
        raise ValueError(
            f"facts.teacher_entropy has shape {tuple(teacher_entropy.shape)}; expected {tuple(rollout.shape)}"
        )
    has_teacher, right = (fact.to(rollout.device)[rollout] for fact in (facts.has_teacher, facts.is_right))
    statistics = statistics._replace(
        gap=torch.where(has_teacher, statistics.gap, 0.0), delta_bar=torch.where(has_teacher, statistics.delta_bar, 0.0)
    )
    if teacher_entropy is not None:
        tokens = tokens._replace(teacher_entropy=teacher_entropy.detach().to(rollout.device, torch.float64))
    return statistics, tokens._replace(taught=has_teacher & method.acts_on(right))


def _find_direction(
    method: Method,
    statistics: RolloutStatistics,
    tokens: TokenFacts,
    settings: MethodSettings,
    facts: RolloutFacts | None,
    sum_over_replicas: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Return ``[N]`` directions of a method's tokens before the reliability gate, with pushes scaled by the push gate;
    0 for tokens that it does not teach."""
    if method.direction is None:
        return torch.zeros_like(statistics.routed)
    direction = torch.where(tokens.taught, method.direction(statistics, tokens, settings), 0.0)
    if method.has_mean_one:
        totals = torch.stack([direction.sum(), tokens.taught.double().sum()])
        total, count = (totals if sum_over_replicas is None else sum_over_replicas(totals)).tolist()
        direction = direction * (count / total) if total > 0.0 else direction
    if settings.push_gate != NO_GATE:
        direction = _gate_pushes(settings, direction, statistics, facts)
    return direction


def _gate_pushes(
    settings: MethodSettings, direction: Tensor, statistics: RolloutStatistics, facts: RolloutFacts | None
) -> Tensor:
    """Return the directions with pushes scaled, or turned, by a gate."""
    name = settings.push_gate
    if name not in PUSH_GATES:
        raise ValueError(f"push_gate is {name!r}; expected {NO_GATE} or one of {', '.join(PUSH_GATES)}")
    if facts is None:
        raise ValueError(f"push_gate={name} needs the facts of the rollouts")
    factor = PUSH_GATES[name].factor(statistics, facts)
    if settings.push_gate_pulls:
        factor = 2.0 * factor - 1.0
    return torch.where(direction < 0, direction * factor, direction)
