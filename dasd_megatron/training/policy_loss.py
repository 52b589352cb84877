"""The loss of a policy update: from the statistics of a micro-batch's tokens to what is minimised and reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dasd_megatron.config import AlgorithmConfig, PolicyLossConfig
from dasd_megatron.losses import (
    SURROGATES,
    TokenStats,
    aggregation_weights,
    count_trained,
    kl_k3,
    policy_surrogate,
    response_means,
    rollouts_of_tokens,
    routed_divergence,
)
from dasd_megatron.training.parallel import reduce_over_replicas
from dasd_megatron.training.scores import TeacherEntries, TeacherStates

TokenLoss = Callable[[TokenStats, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""A loss of a micro-batch: from the statistics of its R response tokens and their places ``[R]`` in the packed batch to
the loss summed over them, and sums over them to report, by the name of their mean. The names are the same for any
tokens, none included."""


_TEACHER_SHARE = "teacher_share"
"""Sum of the tokens with a teacher, over which the divergence is averaged."""
_TEACHER_MEANS = ("divergence", "capped_share")


@dataclass(frozen=True)
class Distillation:
    """The distributional objective of one update: direction ``omega`` [N] float32, which tokens have a teacher, bool
    [N], and the teacher, None before the last stage."""

    omega: torch.Tensor
    has_teacher: torch.Tensor
    teacher: TeacherStates | TeacherEntries | None
    settings: AlgorithmConfig


@dataclass(frozen=True)
class PolicyTargets:
    """What one update trains its response tokens toward, packed in the order of the micro-batches' sequences and equal
    on all ranks of a replica.

    Attributes:
        old_log_prob, advantage: float32 [N].
        weight: float32 [N], of each token's loss in the mean over all tokens of the update; see
            :func:`loss_weights`.
        lengths: int64 [B], response tokens of each rollout.
        start_log_prob: float32 [N], the starting model's log-prob; None without a KL penalty.
        distillation: None for the sampled objective.
    """

    old_log_prob: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    lengths: torch.Tensor
    start_log_prob: torch.Tensor | None = None
    distillation: Distillation | None = None


def loss_weights(
    settings: PolicyLossConfig, lengths: torch.Tensor, kept: torch.Tensor | None, max_tokens: int
) -> torch.Tensor:
    """Return the weights ``[N]`` that make the mean over the tokens of an update what ``loss.aggregation`` asks for.

    Args:
        lengths: int64 [B], response tokens of this replica's rollouts in the update.
        kept: bool [N], the tokens that rejection has left; None: all.
        max_tokens: rollout.max_new_tokens.

    Collectives: one all-reduce of three numbers over replicas.
    """
    trained, counts = count_trained(lengths, kept)
    reduce_over_replicas(counts)
    return aggregation_weights(lengths, kept, trained, counts, aggregation=settings.aggregation, max_tokens=max_tokens)


def policy_loss(
    targets: PolicyTargets, settings: PolicyLossConfig, *, group: dist.ProcessGroup | None = None
) -> TokenLoss:
    """Return the loss of an update: the surrogate, the KL penalty and the divergence from the teacher, weighted by
    token.

    Its reports are the loss and, as means over all tokens whatever they weigh, clip_share, with a KL penalty
    kl_to_start, and under the distributional objective what :func:`over_teacher_tokens` turns into means.

    ``group``: the ranks that have different tokens of the same rollouts (context parallelism); None: this rank has all.
    Collectives of each call of the loss, for surrogates of the whole response alone: one all-reduce over ``group``.
    """
    whole_response = SURROGATES[settings.surrogate].uses_response_ratio
    rollout = rollouts_of_tokens(targets.lengths, len(targets.weight)) if whole_response else None

    def token_loss(stats: TokenStats, index: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        weight, old_log_prob = targets.weight[index], targets.old_log_prob[index]
        response_log_ratio = None
        if rollout is not None:
            log_ratio = stats.log_prob.detach() - old_log_prob
            response_log_ratio = response_means(log_ratio, rollout[index], targets.lengths, group=group)
        surrogate, clipped = policy_surrogate(
            stats.log_prob,
            old_log_prob,
            targets.advantage[index],
            surrogate=settings.surrogate,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            response_log_ratio=response_log_ratio,
        )
        loss = (weight * surrogate).sum()
        sums = {"clip_share": clipped.sum()}
        if targets.start_log_prob is not None:
            penalty = kl_k3(stats.log_prob, targets.start_log_prob[index])
            loss = loss + settings.kl_coef * (weight * penalty).sum()
            sums["kl_to_start"] = penalty.sum()
        if targets.distillation is not None and stats.divergence is not None:
            algorithm = targets.distillation.settings
            term, capped = routed_divergence(
                stats.divergence,
                targets.distillation.omega[index],
                cap=algorithm.divergence_cap,
                pull_cap=algorithm.divergence_pull_cap,
            )
            loss = loss + algorithm.divergence_weight * (weight * term).sum()
            # An infinite divergence, of which the term has taken nothing, would hide all others in the mean.
            has_teacher = targets.distillation.has_teacher[index]
            counted = has_teacher & ~torch.isinf(stats.divergence)
            sums["divergence"] = torch.where(counted, stats.divergence, 0.0).sum()
            sums["capped_share"] = capped.sum()
            sums[_TEACHER_SHARE] = has_teacher.sum()
        return loss, {"loss": loss, **sums}

    return token_loss


def over_teacher_tokens(means: dict[str, float]) -> dict[str, float]:
    """Turn the divergence's means over all tokens into means over the tokens with a teacher, and leave them out where
    no token has one."""
    others = dict(means)
    share = others.pop(_TEACHER_SHARE, 0.0)
    of_teacher = {name: others.pop(name) for name in _TEACHER_MEANS if name in others}
    return others | ({name: value / share for name, value in of_teacher.items()} if share else {})
