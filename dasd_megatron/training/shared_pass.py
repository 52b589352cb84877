"""The loss of an update whose forward pass scores its rollouts as well: old log-probs are the pass's own, and the
tokens of each micro-batch are routed by its own statistics."""

from __future__ import annotations

import torch

from dasd_megatron.config import AlgorithmConfig, PolicyLossConfig
from dasd_megatron.losses import TokenStats
from dasd_megatron.training.batching import MicroBatch
from dasd_megatron.training.passes import BatchLoss
from dasd_megatron.training.policy_loss import Distillation, PolicyTargets, policy_loss
from dasd_megatron.training.routing import Verdicts, route
from dasd_megatron.training.scores import References, TokenScores


def routed_loss(
    algorithm: AlgorithmConfig,
    settings: PolicyLossConfig,
    references: References,
    verdicts: Verdicts,
    weight: torch.Tensor,
) -> BatchLoss:
    """Return the loss of micro-batches of whole rollouts, which
    :func:`~dasd_megatron.config.why_scored_first` lets share a pass: that of
    :func:`~dasd_megatron.training.policy_loss.policy_loss`, routed by
    :func:`~dasd_megatron.training.routing.route` on the micro-batch alone, without gradient.

    Args:
        references, verdicts: of all rollouts of the update, in the order of the micro-batches' sequences.
        weight: float32 [N], see :func:`~dasd_megatron.training.policy_loss.loss_weights`.

    No collectives, and nothing is read back from the device but what importance sampling checks. A token whose
    statistics are not finite counts as one of log-prob and entropy 0 for the others, so that only its own loss is not a
    number: whoever applies the gradients has to look at the scores first.
    """

    def loss(stats: TokenStats, micro_batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        index, sequences = micro_batch.packed_index, micro_batch.sequences
        log_prob = stats.log_prob.detach()
        student = TokenScores(_finite_or_zero(log_prob), _finite_or_zero(stats.entropy.detach()))
        scores = references.of(sequences, index).with_student(student)
        routing = route(algorithm, settings, verdicts.at(sequences), scores, check_values=False)
        distillation = None
        if algorithm.is_distributional and references.teacher_ran:
            # The statistics have the divergence from the teacher already.
            distillation = Distillation(routing.credit.omega, scores.teacher_tokens, None, algorithm)
        targets = PolicyTargets(
            old_log_prob=log_prob,
            advantage=routing.weighted_advantage,
            weight=weight[index],
            lengths=scores.lengths,
            start_log_prob=scores.start_log_prob,
            distillation=distillation,
        )
        return policy_loss(targets, settings)(stats, torch.arange(index.numel(), device=index.device))

    return loss


def _finite_or_zero(values: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isfinite(values), values, 0.0)
