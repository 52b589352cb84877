"""One training step: sample, score, route, update. :mod:`~dasd_megatron.training.loop` says when."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dasd_megatron import backend
from dasd_megatron.algorithms import METHODS, RolloutFacts, group_relative_advantage, token_advantages
from dasd_megatron.config import AlgorithmConfig, PolicyLossConfig, TeacherConfig
from dasd_megatron.losses import importance_weights, reject
from dasd_megatron.run.checks import needs_teacher
from dasd_megatron.samples import Sample
from dasd_megatron.training.batching import BatchLayout, ReplicaShare, batch_samples
from dasd_megatron.training.checkpoint_search import TrainerState
from dasd_megatron.training.decisions import is_multiple
from dasd_megatron.training.inspection import save_inspection, save_rollouts
from dasd_megatron.training.offload import COPIES, GRADIENTS, WEIGHTS, DeviceMemoryError
from dasd_megatron.training.parallel import median_of_replicas, reduce_over_replicas
from dasd_megatron.training.passes import UpdateResult, score, update
from dasd_megatron.training.policy_loss import Distillation, PolicyTargets, loss_weights
from dasd_megatron.training.scores import Importance, Routing, ScoredRollouts
from dasd_megatron.training.step_checks import check_agreement, compare_fp8, report_not_applied, scores_are_finite
from dasd_megatron.training.step_metrics import (
    reward_metrics,
    schedule_metrics,
    step_health,
    step_metrics,
    switch_metrics,
)
from dasd_megatron.training.teacher import move_weights, score_teacher, without_teacher
from dasd_megatron.training.trainer import Trainer


class Timers:
    """Wall seconds of a step by phase, from its begin on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count seconds of one phase as another's."""
        self.seconds[source] -= seconds
        self.seconds[target] = seconds

    def finish(self) -> dict[str, float]:
        """Return the seconds of all phases and of the whole step."""
        self.seconds["total"] = time.perf_counter() - self._started
        return self.seconds


def train_step(trainer: Trainer) -> dict[str, Any]:
    """Take one training step, counted in ``trainer.state`` when it is done; returns its metrics, all on rank 0 and most
    on every rank.

    If its rollouts fail, nothing of it is applied. If its logits are not finite it is skipped: its prompts count as
    seen, and the weights stay.
    """
    config, state, timers = trainer.config, trainer.state, Timers()
    with timers("rollout"):
        rollouts = trainer.plane.rollouts(state.step + 1, state.discarded)
    share = rollouts.share
    timers.move("rollout", "verify", rollouts.grading_seconds)
    trainer.memory.restore(WEIGHTS, COPIES)
    with timers("score"):
        scores = score_rollouts(trainer, share.samples)
    check_agreement(config.rollout, scores)
    state.step += 1
    saves = is_multiple(state.step, config.logging.save_rollouts_every)
    if saves:
        save_rollouts(trainer, share.samples)
    if scores_are_finite(trainer, share.samples, scores):
        try:
            metrics = _learn(trainer, share, scores, timers, inspects=saves and trainer.logger is not None)
        except DeviceMemoryError:
            # It comes before the first update is applied, and the step before this one is the last that is done.
            state.step -= 1
            raise
    else:
        # A snapshot that is due is not put off by a whole interval.
        move_weights(trainer.learner, config.teacher, state.step)
        metrics = reward_metrics(share, timers.finish(), config.batch.samples_per_group)
        metrics["update/skipped"] = config.batch.minibatches * config.batch.epochs
    return {"step": state.step, **metrics, **rollouts.metrics, "weight_version": share.samples[0].weight_version}


def _learn(
    trainer: Trainer, share: ReplicaShare, scores: ScoredRollouts, timers: Timers, *, inspects: bool
) -> dict[str, float]:
    """Route and update by rollouts that have been scored; returns the step's metrics. ``inspects``: this rank writes
    token statistics of the first rollouts."""
    config, step = trainer.config, trainer.state.step
    algorithm = set_teacher_switch(trainer.state, config.algorithm.at(step, config.run.steps), scores)
    fp8_metrics = compare_fp8(trainer, share.samples, scores)
    with timers("route"):
        routing = route(
            algorithm,
            config.loss,
            share,
            scores,
            samples_per_group=config.batch.samples_per_group,
            teacher=config.teacher,
        )
    with timers("update"):
        updates = update_policy(trainer, share.samples, scores, routing, algorithm)
    report_not_applied(trainer, updates)
    if inspects:
        save_inspection(trainer, share.samples, scores, routing)
    health_metrics = {}
    if is_multiple(step, config.health.every):
        with timers("health"):
            health_metrics = step_health(share.samples, scores, config.health, config.data.train.generator)
    metrics = step_metrics(share, scores, routing, updates, timers.finish(), config.batch.samples_per_group)
    metrics |= schedule_metrics(algorithm) | switch_metrics(algorithm, trainer.state.teacher_switch)
    return {**metrics, **fp8_metrics, **health_metrics}


def score_rollouts(trainer: Trainer, samples: Sequence[Sample]) -> ScoredRollouts:
    """Score this replica's rollouts under the policy, and where the configuration needs them under the starting model
    and the teacher. Collective over all ranks; see :func:`~dasd_megatron.training.passes.score`."""
    config, learner, device = trainer.config, trainer.learner, backend.current().device()
    temperature = config.rollout.temperature
    layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
    batches = batch_samples(samples, [sample.prompt_ids for sample in samples], layout)
    student = score(
        learner.model, batches, config.loss, temperature=temperature, top_k=config.algorithm.top_k_of("student")
    )
    start_log_prob = None
    if config.loss.kl_coef > 0 and learner.start is not None:
        with learner.start.applied(learner.model):
            start_log_prob = score(learner.model, batches, config.loss, temperature=temperature).log_prob
    if needs_teacher(config.algorithm):
        teacher = score_teacher(trainer, samples, student, layout)
    else:
        teacher = without_teacher(samples, student)
    log_probs = np.concatenate([sample.of_sampled(sample.rollout_log_probs) for sample in samples])
    return ScoredRollouts(
        student=student._replace(top=None),
        teacher_log_prob=teacher.log_prob,
        teacher_entropy=teacher.entropy,
        has_teacher=teacher.has_teacher,
        start_log_prob=start_log_prob,
        rollout_log_prob=torch.from_numpy(log_probs).to(device),
        lengths=torch.tensor([len(sample.sampled) for sample in samples], device=device),
        teacher_ran=teacher.ran,
        teacher=teacher.distribution,
    )


def set_teacher_switch(state: TrainerState, algorithm: AlgorithmConfig, scores: ScoredRollouts) -> AlgorithmConfig:
    """Set the run's switch by the teacher's entropies at this step, for a method that has one, and return the section
    with the weights of the teacher that follow: 0 while the switch is off.

    Collective over replicas for such a method: those of
    :func:`~dasd_megatron.training.parallel.median_of_replicas`, so that all ranks set it alike.
    """
    if not METHODS[algorithm.name].has_entropy_switch:
        return algorithm
    state.teacher_switch = state.teacher_switch.after(
        median_of_replicas(scores.teacher_entropy[scores.teacher_tokens]),
        warmup_steps=algorithm.antisd_warmup_steps,
        off_share=algorithm.antisd_off_share,
    )
    if state.teacher_switch.is_on:
        return algorithm
    return dataclasses.replace(algorithm, beta=0.0, divergence_weight=0.0)


def route(
    settings: AlgorithmConfig,
    loss: PolicyLossConfig,
    share: ReplicaShare,
    scores: ScoredRollouts,
    *,
    samples_per_group: int,
    teacher: TeacherConfig,
) -> Routing:
    """Make the tokens' advantages and directions of rewards and scores. One all-reduce over replicas for a method whose
    weights have a mean of 1, no collectives for others."""
    rewards = torch.tensor(share.rewards, device=scores.lengths.device)
    all_advantages = group_relative_advantage(
        rewards, samples_per_group=samples_per_group, normalize_std=settings.normalize_std
    )
    verifier_advantage = all_advantages[share.places]
    # Compared as the rewards are given: float32 would put one at the threshold on either side.
    is_right = torch.tensor([teacher.is_right(reward) for reward in share.rewards], device=rewards.device)
    solve_rate = is_right.float().view(-1, samples_per_group).mean(1).repeat_interleave(samples_per_group)
    advantage, credit = token_advantages(
        settings.name,
        settings.method_settings,
        rewards_advantage=verifier_advantage,
        entropy=scores.student.entropy,
        delta=scores.delta,
        lengths=scores.lengths,
        facts=RolloutFacts(
            has_teacher=scores.has_teacher,
            is_right=is_right[share.places],
            solve_rate=solve_rate[share.places],
            teacher_entropy=scores.teacher_entropy if scores.teacher_ran else None,
        ),
        sum_over_replicas=reduce_over_replicas,
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
    return Routing(verifier_advantage, advantage, credit, importance, rejected)


def update_policy(
    trainer: Trainer,
    samples: Sequence[Sample],
    scores: ScoredRollouts,
    routing: Routing,
    algorithm: AlgorithmConfig,
) -> list[UpdateResult]:
    """Take an optimizer step on each minibatch of the rollouts, over all epochs, and let the teacher's weights follow
    the live ones; returns one result for each optimizer step. Collective over all ranks."""
    config, learner = trainer.config, trainer.learner
    layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
    advantage, bounds = routing.weighted_advantage, scores.bounds
    share = len(samples) // config.batch.minibatches
    results = []
    trainer.memory.restore(GRADIENTS)
    for first in [*range(0, len(samples), share)] * config.batch.epochs:
        minibatch = samples[first : first + share]
        tokens = slice(bounds[first], bounds[first + share])
        distillation = None
        if config.algorithm.is_distributional and scores.teacher_ran:
            teacher = None if scores.teacher is None else scores.teacher.at(scores.teacher.rows[tokens])
            distillation = Distillation(routing.credit.omega[tokens], scores.teacher_tokens[tokens], teacher, algorithm)
        lengths = scores.lengths[first : first + share]
        kept = None if routing.rejected is None else routing.rejected.kept[tokens]
        targets = PolicyTargets(
            old_log_prob=scores.student.log_prob[tokens],
            advantage=advantage[tokens],
            weight=loss_weights(config.loss, lengths, kept, config.rollout.max_new_tokens),
            lengths=lengths,
            start_log_prob=None if scores.start_log_prob is None else scores.start_log_prob[tokens],
            distillation=distillation,
        )
        batches = batch_samples(minibatch, [sample.prompt_ids for sample in minibatch], layout)
        temperature = config.rollout.temperature
        results.append(update(learner.model, learner.optimizer, batches, targets, config.loss, temperature=temperature))
    learner.model.gather_parameters()
    move_weights(learner, config.teacher, trainer.state.step)
    return results
