"""From scores and rewards to what the loss trains toward: the verifier's verdicts, the teacher's switch, and each
token's advantage and direction."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from dasd_megatron.algorithms import METHODS, EntropySwitch, RolloutFacts, group_relative_advantage, token_advantages
from dasd_megatron.config import AlgorithmConfig, PolicyLossConfig, TeacherConfig
from dasd_megatron.losses import importance_weights, reject
from dasd_megatron.training.batching import ReplicaShare
from dasd_megatron.training.parallel import median_of_replicas, reduce_over_replicas
from dasd_megatron.training.scores import Importance, References, Routing, ScoredRollouts


class Verdicts(NamedTuple):
    """The verifier's view of some rollouts: float32 [B] rewards relative to their groups, bool [B] which are right, and
    float32 [B] shares of right ones in their groups."""

    advantage: torch.Tensor
    is_right: torch.Tensor
    solve_rate: torch.Tensor

    def at(self, places: torch.Tensor) -> Verdicts:
        """Return those of some of the rollouts."""
        return Verdicts(*(values[places] for values in self))


def judge(
    settings: AlgorithmConfig,
    share: ReplicaShare,
    teacher: TeacherConfig,
    *,
    samples_per_group: int,
    device: torch.device,
) -> Verdicts:
    """Return the verdicts on this replica's rollouts. No collectives: the share has the rewards of all groups."""
    rewards = torch.tensor(share.rewards, device=device)
    advantages = group_relative_advantage(
        rewards, samples_per_group=samples_per_group, normalize_std=settings.normalize_std
    )
    # Compared as the rewards are given: float32 would put one at the threshold on either side.
    is_right = torch.tensor([teacher.is_right(reward) for reward in share.rewards], device=device)
    solve_rate = is_right.float().view(-1, samples_per_group).mean(1).repeat_interleave(samples_per_group)
    return Verdicts(advantages, is_right, solve_rate).at(torch.tensor(share.places, device=device))


class Switched(NamedTuple):
    """The run's switch, and the section ``algorithm`` with the teacher's weights that follow from it."""

    switch: EntropySwitch
    algorithm: AlgorithmConfig


def turn_switch(switch: EntropySwitch, algorithm: AlgorithmConfig, references: References) -> Switched:
    """Return the run's switch after this step's entropies of the teacher, for a method that has one, and the section
    with the weights of the teacher that follow: 0 while the switch is off.

    Collective over replicas for such a method: those of
    :func:`~dasd_megatron.training.parallel.median_of_replicas`, so that all ranks turn it alike.
    """
    if not METHODS[algorithm.name].has_entropy_switch:
        return Switched(switch, algorithm)
    switch = switch.after(
        median_of_replicas(references.teacher_entropy[references.teacher_tokens]),
        warmup_steps=algorithm.antisd_warmup_steps,
        off_share=algorithm.antisd_off_share,
    )
    if not switch.is_on:
        algorithm = dataclasses.replace(algorithm, beta=0.0, divergence_weight=0.0)
    return Switched(switch, algorithm)


def route(
    settings: AlgorithmConfig,
    loss: PolicyLossConfig,
    verdicts: Verdicts,
    scores: ScoredRollouts,
    *,
    check_values: bool = True,
) -> Routing:
    """Make the tokens' advantages and directions of verdicts and scores of the same whole rollouts. One all-reduce over
    replicas for a method whose weights have a mean of 1, no collectives for others.

    ``check_values``: refuse (NonFiniteTokenError) statistics that are not numbers, which waits for the device.
    """
    advantage, credit = token_advantages(
        settings.name,
        settings.method_settings,
        rewards_advantage=verdicts.advantage,
        entropy=scores.student.entropy,
        delta=scores.delta,
        lengths=scores.lengths,
        facts=RolloutFacts(
            has_teacher=scores.has_teacher,
            is_right=verdicts.is_right,
            solve_rate=verdicts.solve_rate,
            teacher_entropy=scores.teacher_entropy if scores.teacher_ran else None,
        ),
        sum_over_replicas=reduce_over_replicas,
        check_values=check_values,
    )
    importance = None
    if loss.importance_sampling != "none":
        weights, cut = importance_weights(
            scores.student.log_prob,
            scores.rollout_log_prob,
            scores.lengths,
            level=loss.importance_sampling,
            cap=loss.importance_cap,
        )
        importance = Importance(weights, cut)
    rejected = None
    if loss.rejects:
        rejected = reject(
            scores.student.log_prob,
            scores.rollout_log_prob,
            scores.lengths,
            level=loss.rejection,
            low=loss.rejection_low,
            high=loss.rejection_high,
            veto=loss.rejection_veto,
        )
    return Routing(verdicts.advantage, advantage, credit, importance, rejected)
