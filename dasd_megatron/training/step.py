"""One training step: sample, score, route, update. :mod:`~dasd_megatron.training.loop` says when."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dasd_megatron.config import AlgorithmConfig, why_scored_first
from dasd_megatron.run.checks import needs_teacher
from dasd_megatron.sample_columns import Columns
from dasd_megatron.samples import Sample
from dasd_megatron.training.batching import BatchLayout, MicroBatch, ReplicaShare, batch_samples
from dasd_megatron.training.decisions import is_multiple
from dasd_megatron.training.inspection import save_inspection
from dasd_megatron.training.offload import COPIES, GRADIENTS, WEIGHTS, DeviceMemoryError
from dasd_megatron.training.parallel import is_replica_source
from dasd_megatron.training.passes import UpdateResult, score, score_and_update, update
from dasd_megatron.training.policy_loss import Distillation, PolicyTargets, loss_weights
from dasd_megatron.training.rollout_plane import StepRollouts
from dasd_megatron.training.routing import judge, route, turn_switch
from dasd_megatron.training.scores import References, Routing, ScoredRollouts, TokenScores
from dasd_megatron.training.shared_pass import routed_loss
from dasd_megatron.training.step_checks import (
    check_agreement,
    compare_fp8,
    report_not_applied,
    score_in_bf16,
    scores_are_finite,
)
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
    learn = _learn_in_one_pass if why_scored_first(config) is None else _score_and_learn
    before = state.step
    try:
        metrics = learn(trainer, rollouts, timers)
    except DeviceMemoryError:
        # It comes before the first update is applied, and the step before this one is the last that is done.
        state.step = before
        raise
    return {"step": state.step, **metrics, **rollouts.metrics, "weight_version": share.samples[0].weight_version}


class _Learned(NamedTuple):
    """Results of a step that has been computed and applied."""

    algorithm: AlgorithmConfig
    scores: ScoredRollouts
    routing: Routing
    updates: list[UpdateResult]
    fp8_metrics: dict[str, float]


def _score_and_learn(trainer: Trainer, rollouts: StepRollouts, timers: Timers) -> dict[str, float]:
    """Score a step's rollouts, route and update by them; returns the step's metrics."""
    config, state, share = trainer.config, trainer.state, rollouts.share
    samples = share.samples
    with timers("score"):
        scores, references = score_rollouts(trainer, samples)
    check_agreement(config.rollout, scores)
    _count_step(trainer, rollouts.columns)
    if not scores_are_finite(trainer, samples, scores):
        return _skip(trainer, share, timers)
    algorithm = config.algorithm.at(state.step, config.run.steps)
    state.teacher_switch, algorithm = turn_switch(state.teacher_switch, algorithm, references)
    fp8_metrics = compare_fp8(trainer, scores, score_in_bf16(trainer, samples, state.step))
    with timers("route"):
        verdicts = judge(
            algorithm,
            share,
            config.teacher,
            samples_per_group=config.batch.samples_per_group,
            device=scores.lengths.device,
        )
        routing = route(algorithm, config.loss, verdicts, scores)
    with timers("update"):
        updates = update_policy(trainer, samples, scores, routing, algorithm)
    return _conclude(trainer, share, _Learned(algorithm, scores, routing, updates, fp8_metrics), timers)


def _learn_in_one_pass(trainer: Trainer, rollouts: StepRollouts, timers: Timers) -> dict[str, float]:
    """Update by a step's rollouts in the forward pass that scores them; returns the step's metrics. The checks of the
    scores come between its gradients and their use, and what is reported is routed once more from all scores."""
    config, state, share = trainer.config, trainer.state, rollouts.share
    samples = share.samples
    layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
    batches = batch_samples(samples, [sample.prompt_ids for sample in samples], layout)
    with timers("score"):
        references = score_references(trainer, samples, batches, layout)
        bf16 = score_in_bf16(trainer, samples, state.step + 1)
    algorithm = config.algorithm.at(state.step + 1, config.run.steps)
    switch, algorithm = turn_switch(state.teacher_switch, algorithm, references)
    verdicts = judge(
        algorithm, share, config.teacher, samples_per_group=config.batch.samples_per_group, device=layout.device
    )
    weight = loss_weights(config.loss, references.lengths, None, config.rollout.max_new_tokens)

    def accept(student: TokenScores) -> bool:
        scores = references.with_student(student)
        check_agreement(config.rollout, scores)
        _count_step(trainer, rollouts.columns)
        return scores_are_finite(trainer, samples, scores)

    with timers("update"):
        trainer.memory.restore(GRADIENTS)
        student, result = score_and_update(
            trainer.learner.model,
            trainer.learner.optimizer,
            batches,
            routed_loss(algorithm, config.loss, references, verdicts, weight),
            config.loss,
            temperature=config.rollout.temperature,
            teacher=references.teacher,
            algorithm=algorithm,
            accept=accept,
        )
        if result is not None:
            _settle(trainer)
    if result is None:
        return _skip(trainer, share, timers)
    state.teacher_switch = switch
    scores = references.with_student(student)
    with timers("route"):
        routing = route(algorithm, config.loss, verdicts, scores)
    learned = _Learned(algorithm, scores, routing, [result], compare_fp8(trainer, scores, bf16))
    return _conclude(trainer, share, learned, timers)


def _saves_rollouts(trainer: Trainer) -> bool:
    return is_multiple(trainer.state.step, trainer.config.logging.save_rollouts_every)


def _count_step(trainer: Trainer, columns: Columns) -> None:
    """Count the step, whose rollouts have turned out to be of the trainer's weights, and begin to save this replica's
    ``columns`` of them where it is due."""
    trainer.state.step += 1
    # Ranks that got the same rollouts as their replica's source, and a step that was itself replayed, save nothing.
    if _saves_rollouts(trainer) and is_replica_source() and trainer.config.rollout.replay is None:
        trainer.rollout_writer.save(trainer.state.step, columns)


def _skip(trainer: Trainer, share: ReplicaShare, timers: Timers) -> dict[str, float]:
    """Leave the weights as they are; returns the step's metrics."""
    config = trainer.config
    # A snapshot that is due is not put off by a whole interval.
    move_weights(trainer.learner, config.teacher, trainer.state.step)
    metrics = reward_metrics(share, timers.finish(), config.batch.samples_per_group)
    return metrics | {"update/skipped": config.batch.minibatches * config.batch.epochs}


def _conclude(trainer: Trainer, share: ReplicaShare, learned: _Learned, timers: Timers) -> dict[str, float]:
    """Report updates that were not applied, save token statistics where they are wanted, and return the metrics of a
    step."""
    config, step = trainer.config, trainer.state.step
    algorithm, scores, routing, updates, fp8_metrics = learned
    report_not_applied(trainer, updates)
    if _saves_rollouts(trainer) and trainer.logger is not None:
        save_inspection(trainer, share.samples, scores, routing)
    health_metrics = {}
    if is_multiple(step, config.health.every):
        with timers("health"):
            health_metrics = step_health(share.samples, scores, config.health, config.data.train.generator)
    metrics = step_metrics(share, scores, routing, updates, timers.finish(), config.batch.samples_per_group)
    metrics |= schedule_metrics(algorithm) | switch_metrics(algorithm, trainer.state.teacher_switch)
    return {**metrics, **fp8_metrics, **health_metrics}


class _Scored(NamedTuple):
    scores: ScoredRollouts
    references: References


def score_rollouts(trainer: Trainer, samples: Sequence[Sample]) -> _Scored:
    """Score this replica's rollouts under the policy, and where the configuration needs them under the starting model
    and the teacher. Collective over all ranks; see :func:`~dasd_megatron.training.passes.score`."""
    config = trainer.config
    layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
    batches = batch_samples(samples, [sample.prompt_ids for sample in samples], layout)
    student = score(
        trainer.learner.model,
        batches,
        config.loss,
        temperature=config.rollout.temperature,
        top_k=config.algorithm.top_k_of("student"),
    )
    references = score_references(trainer, samples, batches, layout, student)
    return _Scored(references.with_student(student), references)


def score_references(
    trainer: Trainer,
    samples: Sequence[Sample],
    batches: list[MicroBatch],
    layout: BatchLayout,
    student: TokenScores | None = None,
) -> References:
    """Score this replica's rollouts under the starting model and the teacher, where the configuration needs them.
    ``student``: scores with entries of the vocabulary, where the teacher needs those. Collective over all ranks; see
    :func:`~dasd_megatron.training.passes.score`."""
    config, learner, device = trainer.config, trainer.learner, layout.device
    start_log_prob = None
    if config.loss.kl_coef > 0 and learner.start is not None:
        with learner.start.applied(learner.model):
            start_log_prob = score(learner.model, batches, config.loss, temperature=config.rollout.temperature).log_prob
    if needs_teacher(config.algorithm):
        teacher = score_teacher(trainer, samples, layout, None if student is None else student.top)
    else:
        teacher = without_teacher(samples, device)
    log_probs = np.concatenate([sample.of_sampled(sample.rollout_log_probs) for sample in samples])
    return References(
        teacher_log_prob=teacher.log_prob,
        teacher_entropy=teacher.entropy,
        has_teacher=teacher.has_teacher,
        start_log_prob=start_log_prob,
        rollout_log_prob=torch.from_numpy(log_probs).to(device),
        lengths=torch.tensor([len(sample.sampled) for sample in samples], device=device),
        teacher_ran=teacher.ran,
        teacher=teacher.distribution,
    )


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
    _settle(trainer)
    return results


def _settle(trainer: Trainer) -> None:
    """Bring in the weights of other replicas' updates, and let the teacher's follow. Collective over replicas."""
    trainer.learner.model.gather_parameters()
    move_weights(trainer.learner, trainer.config.teacher, trainer.state.step)
