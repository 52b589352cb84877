"""The training loop: rollout, verify, score, route, update, sync. Every rank runs :func:`train`; only the first one
reports."""

from __future__ import annotations

import bisect
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from dasd_megatron import backend, stopping
from dasd_megatron.algorithms import Credit, group_relative_advantage, token_advantages
from dasd_megatron.config import Config
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.templates import PromptRenderer, make_renderer
from dasd_megatron.evaluation.evaluate import evaluate
from dasd_megatron.files import atomic_file
from dasd_megatron.losses import importance_weights
from dasd_megatron.models.gpt import ShardedModel, build_model
from dasd_megatron.models.hf_config import load_tokenizer, read_hf_config
from dasd_megatron.observability.loggers import MetricsLogger
from dasd_megatron.observability.metric_files import read_metrics, truncate_after
from dasd_megatron.observability.progress import ProgressDisplay, format_duration, summary_table
from dasd_megatron.observability.report.page import write_report
from dasd_megatron.observability.trackers import Tracker
from dasd_megatron.observability.watch import CONTINUE, Watch, open_watch, record_alerts
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.run.checks import needs_teacher
from dasd_megatron.run.paths import RunPaths, run_problems, start_hf_files, start_path
from dasd_megatron.samples import Sample, rollouts_path, save_samples, version_name
from dasd_megatron.stopping import StopRequested, WatchStopped
from dasd_megatron.training.batching import BatchLayout, MicroBatch, make_micro_batches
from dasd_megatron.training.checkpoint import (
    CheckpointSaver,
    TrainerState,
    check_architecture,
    damage,
    find_checkpoint,
    load_checkpoint,
    read_state,
)
from dasd_megatron.training.checkpoint_files import checkpoint_path, depart_from, resumable
from dasd_megatron.training.export import export_model
from dasd_megatron.training.optimizer import OptimizerState, TrainingError, build_optimizer
from dasd_megatron.training.parallel import (
    broadcast_from_rank0,
    gather_replicas,
    gather_world,
    reduce_over_replicas,
    true_on_any,
)
from dasd_megatron.training.passes import Distillation, TeacherStates, UpdateResult, score, update
from dasd_megatron.training.rollout_plane import RolloutPlane, RolloutsUnavailableError
from dasd_megatron.training.scores import Importance, ScoredRollouts
from dasd_megatron.training.snapshots import WeightSnapshot
from dasd_megatron.training.step_metrics import reward_metrics, step_health, step_metrics
from dasd_megatron.training.warm_start import warm_start
from dasd_megatron.verify.grader import Grader

_PAUSE_POLL_SECONDS = 1.0
"""Between two looks for the file that lets a paused run go on."""


@dataclass
class Timers:
    """Wall seconds by phase of the step under way."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


@dataclass
class Trainer:
    """What the steps of one run share. ``start`` and ``average`` exist only where the configuration reads them."""

    config: Config
    paths: RunPaths
    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    grader: Grader
    heldout_problems: list[Problem]
    model: ShardedModel
    optimizer: OptimizerState
    start: WeightSnapshot | None
    average: WeightSnapshot | None
    state: TrainerState
    saver: CheckpointSaver
    plane: RolloutPlane
    display: ProgressDisplay
    logger: MetricsLogger | None
    reported_non_finite: bool = False


def train(config: Config, paths: RunPaths) -> None:
    """Run or resume the training that ``paths`` was prepared for. Needs the backend selected and the parallel state
    initialised.

    Raises:
        RolloutsUnavailableError: the rollout servers failed beyond repair; a checkpoint of the last finished step has
            been written.
        StopRequested: a signal asked for it, and likewise; WatchStopped: the watch did.
        CheckpointError: a checkpoint could not be written or read; the previous one is untouched.
        TrainingError: logits, loss or gradient were not finite in too many steps in a row, and going back to a
            checkpoint did not help.
    """
    rank0 = dist.get_rank() == 0
    tokenizer = load_tokenizer(start_hf_files(config, paths))
    renderer = make_renderer(config, tokenizer)
    problems = {name: run_problems(paths, name) for name in ("train", "heldout")}
    checkpoint = find_checkpoint(config.resume, paths.root)
    with contextlib.ExitStack() as stack:
        stream = sys.stdout if rank0 else stack.enter_context(open(os.devnull, "w"))
        first_step = 0
        if checkpoint is not None:
            saved, record = read_state(checkpoint)
            check_architecture(checkpoint, record, read_hf_config(start_hf_files(config, paths)))
            first_step = saved.step
        display = stack.enter_context(ProgressDisplay(config.run.steps, start_step=first_step, stream=stream))
        # Looked up on one rank: the others may see a shared file system later, and must not decide otherwise.
        warm_started = broadcast_from_rank0(_warm_started_model(paths, checkpoint) if rank0 else None)
        logger = None
        if rank0:
            if checkpoint is not None:
                depart_from(paths.root, checkpoint)
            truncate_after(
                paths.root, first_step if checkpoint is not None else -1, warm_start_step=None if warm_started else 0
            )
            chosen = [
                name
                for name, wanted in (("wandb", config.logging.wandb != "none"), ("mlflow", config.logging.mlflow))
                if wanted
            ]
            logger = stack.enter_context(
                MetricsLogger(
                    paths.root,
                    config.logging.tensorboard,
                    resume_step=first_step or None,
                    trackers=[Tracker(name, paths.root, fresh=checkpoint is None) for name in chosen],
                    warn=display.warning,
                )
            )
        model_path = start_path(config, paths)
        if config.warm_start.steps:
            if warm_started is None:
                with display.phase("warm start", total=config.warm_start.steps) as phase:

                    def report(metrics: dict[str, float]) -> None:
                        phase.advance(loss=metrics["loss"], lr=metrics["lr"])
                        if logger is not None:
                            logger.log_warm_start(metrics)

                    warm_start(config, paths, problems["train"], renderer, tokenizer, report)
            model_path = warm_started or paths.warm_started_model

        model, optimizer, start, average = build_policy(config, model_path)
        state = TrainerState()
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, model, optimizer, average)
            display.message(f"resumed from {checkpoint} at step {state.step}")
        saver = stack.enter_context(
            CheckpointSaver(
                paths.root,
                config.checkpoint,
                model,
                optimizer,
                average,
                template_dir=start_hf_files(config, paths),
                timeout_seconds=config.backend.timeout_seconds,
            )
        )
        grader = stack.enter_context(Grader(config.verify))
        plane = stack.enter_context(
            RolloutPlane(
                config, paths, problems["train"], grader, renderer, tokenizer, model.vocab_size, state.rollouts
            )
        )
        trainer = Trainer(
            config, paths, tokenizer, renderer, grader, problems["heldout"],
            model, optimizer, start, average, state, saver, plane, display, logger,
        )  # fmt: skip
        _run(trainer)
        export_model(model, paths.final_model, template_dir=start_hf_files(config, paths))
        if rank0:
            _conclude(trainer)


def build_policy(
    config: Config, model_path: Path
) -> tuple[ShardedModel, OptimizerState, WeightSnapshot | None, WeightSnapshot | None]:
    """The policy with the weights in ``model_path``, its optimizer, and copies of the weights where they are needed:
    one as they are now, and one to be averaged. Collective."""
    model = build_model(config, model_path)
    optimizer = build_optimizer(
        config.optimizer, model, steps=config.run.steps, updates_per_step=config.batch.minibatches * config.batch.epochs
    )
    keeps_start = config.loss.kl_coef > 0 or (needs_teacher(config) and config.teacher.weights == "frozen")
    start = WeightSnapshot(model) if keeps_start else None
    keeps_average = needs_teacher(config) and config.teacher.weights == "ema"
    return model, optimizer, start, WeightSnapshot(model, dtype=torch.float32) if keeps_average else None


def _warm_started_model(paths: RunPaths, checkpoint: Path | None) -> Path | None:
    """The warm-started model of this run, or of the run that the checkpoint is from; None where there is none yet."""
    candidates = [paths.warm_started_model]
    if checkpoint is not None:
        candidates.append(RunPaths(checkpoint.parent.parent).warm_started_model)
    return next((path for path in candidates if (path / "config.json").exists()), None)


def _run(trainer: Trainer) -> None:
    """All remaining steps, with evaluations and checkpoints between them."""
    config, state, saver = trainer.config, trainer.state, trainer.saver
    watch = _open_watch(trainer)
    try:
        sync_seconds = _sync(trainer)
        if config.evaluation.before and state.step == 0:
            _evaluate(trainer, "before")
        # A run that stopped between a step and its evaluation makes it up; one that is there already is not repeated.
        _evaluate_if_due(trainer)
        while state.step < config.run.steps:
            metrics = train_step(trainer)
            # Both belong to the end of the step before this one; a step's own line is written as soon as the step is
            # done.
            metrics |= {"seconds/sync": sync_seconds, "seconds/checkpoint": saver.stalled}
            saver.stalled = 0.0
            action, reason = "warn", ""
            if watch is not None:
                action, reason = _log_step(trainer, watch, metrics)
            state.skipped = state.skipped + 1 if metrics["update/skipped"] else 0
            stop, writing, end, pause = true_on_any(
                stopping.requested(), saver.writing(), action == "stop", action == "pause"
            )
            if saver.pending and not writing:
                saver.finish()
            if stop:
                raise StopRequested("between steps")
            if end and state.step < config.run.steps:
                raise WatchStopped(f"watch.action=stop: {reason}")
            went_back = state.skipped > config.loss.max_skipped_steps
            if went_back:
                _roll_back(trainer)
                watch = _open_watch(trainer)
            # The step is done and counted from here on, whatever happens to the servers.
            sync_seconds = _sync(trainer)
            every = config.checkpoint.every
            # Before the evaluation, which takes long, and which a resumed run makes up.
            if not went_back and (state.step == config.run.steps or (every and state.step % every == 0)):
                _save(trainer)
            _evaluate_if_due(trainer)
            if pause and not went_back and state.step < config.run.steps:
                _pause(trainer, reason)
        if config.evaluation.after:
            _evaluate(trainer, "after")
        saver.finish()
    except WatchStopped as stop:
        _save_once(trainer)
        raise WatchStopped(
            f"stopped after step {state.step}, which is saved; continue with resume=auto. {stop}"
        ) from stop
    except StopRequested as stop:
        saved = _save_once(trainer)
        raise StopRequested(
            f"stopped after step {state.step}{', which is saved' if saved else ''}; continue with resume=auto"
        ) from stop
    except RolloutsUnavailableError as failure:
        _save_once(trainer)
        raise RolloutsUnavailableError(
            f"after step {state.step}: {failure}; continue with resume=auto once the cause is mended"
        ) from failure


def _save_once(trainer: Trainer) -> bool:
    """A checkpoint of the last finished step, unless there is one; whether there was a step to save."""
    trainer.saver.finish()
    if trainer.state.step and not broadcast_from_rank0(
        checkpoint_path(trainer.paths.root, trainer.state.step).exists()
    ):
        _save(trainer)
        trainer.saver.finish()
    return trainer.state.step > 0


def _open_watch(trainer: Trainer) -> Watch | None:
    """On rank 0, which alone judges."""
    if trainer.logger is None:
        return None
    return open_watch(trainer.paths.root, trainer.config.watch, has_teacher=needs_teacher(trainer.config))


def _log_step(trainer: Trainer, watch: Watch, metrics: dict[str, Any]) -> tuple[str, str]:
    """Write and show a step's metrics and warnings; returns what the watch asks for (warn, pause or stop) and why."""
    alerts = watch.update(metrics)
    action = watch.action(alerts)
    # Before the row of metrics: a run that is killed between them says its warning again, and does not lose it.
    record_alerts(trainer.paths.root, alerts, action)
    trainer.logger.log_step(metrics | {"watch/warnings": len(alerts)})
    trainer.display.step(metrics)
    for alert in alerts:
        trainer.display.warning(alert.text)
    return action, "; ".join(alert.condition for alert in alerts if alert.condition in trainer.config.watch.act_on)


def _pause(trainer: Trainer, reason: str) -> None:
    """Save, and wait until somebody lets the run go on. All ranks look together, so that no collective waits long.

    Raises:
        WatchStopped: nobody did within ``watch.pause_timeout_seconds``.
        StopRequested: a signal asked for it.
    """
    settings, rank0 = trainer.config.watch, dist.get_rank() == 0
    file = trainer.paths.root / CONTINUE
    limit = format_duration(settings.pause_timeout_seconds)
    if rank0:
        # Of an earlier pause.
        file.unlink(missing_ok=True)
    _save_once(trainer)
    trainer.display.warning(
        f"paused after step {trainer.state.step}, which is saved ({reason}). To go on: touch {file.absolute()}. "
        f"Otherwise the run ends in {limit} (watch.pause_timeout_seconds) with status {WatchStopped.exit_status}"
    )
    deadline = time.monotonic() + settings.pause_timeout_seconds
    while True:
        time.sleep(_PAUSE_POLL_SECONDS)
        stop, resumed, over = true_on_any(
            stopping.requested(), rank0 and file.exists(), rank0 and time.monotonic() > deadline
        )
        if stop:
            raise StopRequested("while paused")
        if resumed:
            break
        if over:
            raise WatchStopped(f"watch.action=pause: {reason}, and nobody made {CONTINUE} in {limit}")
    if rank0:
        file.unlink(missing_ok=True)
    trainer.display.message(f"{CONTINUE} is there: on with step {trainer.state.step + 1}")


def _roll_back(trainer: Trainer) -> None:
    """Take weights, optimizer and generators from the last good checkpoint, and go on with problems that have not been
    drawn yet.

    Good is a checkpoint after a step that was not skipped, and that has not been gone back to already. The problems of
    the steps since then are not drawn again, since they may be what broke the numbers.

    Raises:
        TrainingError: there is none, or ``loss.max_rollbacks`` are used up.
    """
    config, state, rank0 = trainer.config, trainer.state, dist.get_rank() == 0
    trainer.saver.finish()
    reason = (
        f"step {state.step}: logits or gradients were not finite in {state.skipped} steps in a row, more than "
        f"loss.max_skipped_steps={config.loss.max_skipped_steps}"
    )
    advice = "continue from a checkpoint before them (resume=PATH) with a lower optimizer.lr"
    if state.rollbacks >= config.loss.max_rollbacks:
        raise TrainingError(
            f"{reason}, after {state.rollbacks} of loss.max_rollbacks={config.loss.max_rollbacks}: {advice}"
        )
    for path in broadcast_from_rank0(resumable(trainer.paths.root) if rank0 else None):
        if damage(path) is None:
            good, _ = read_state(path)
            if good.skipped == 0 and good.step != state.rolled_back_to:
                break
    else:
        raise TrainingError(f"{reason}, and there is no checkpoint before them to go back to: {advice}")
    load_checkpoint(path, trainer.model, trainer.optimizer, trainer.average)
    if config.rollout.replay is not None:
        state.discarded += state.step - good.step
    trainer.display.warning(f"{reason}: back to {path}, and on with other problems")
    state.step, state.skipped, state.rollbacks, state.rolled_back_to = good.step, 0, state.rollbacks + 1, good.step
    if rank0:
        depart_from(trainer.paths.root, path)
        trainer.logger.restart_after(state.step)
    trainer.plane.start_over()
    # In place of the one gone back to: a run that is killed now must not draw the same problems again.
    _save(trainer)


def _sync(trainer: Trainer) -> float:
    """Hand the weights of the last finished step to the servers; returns seconds."""
    started = time.perf_counter()
    trainer.plane.sync_weights(trainer.model, trainer.state.step, start_hf_files(trainer.config, trainer.paths))
    return time.perf_counter() - started


def _evaluate_if_due(trainer: Trainer) -> None:
    every, step = trainer.config.evaluation.every, trainer.state.step
    if every and 0 < step < trainer.config.run.steps and step % every == 0:
        _evaluate(trainer, "step")


def _save(trainer: Trainer) -> None:
    """Begin a checkpoint of the last finished step, and export its weights beside it where that is due."""
    step, every = trainer.state.step, trainer.config.checkpoint.export_every
    trainer.state.rollouts = trainer.plane.state(step)
    trainer.saver.save(trainer.state)
    if every and step % every == 0:
        path = checkpoint_path(trainer.paths.root, step).with_suffix(".hf")
        # Hashing it would hold up training for a second pass over the bytes.
        export_model(trainer.model, path, template_dir=start_hf_files(trainer.config, trainer.paths), manifest=False)


def _evaluate(trainer: Trainer, label: str) -> None:
    """Evaluate the weights that the servers hold, on rank 0; skipped where a resumed run has this evaluation
    already."""
    step = trainer.state.step
    done = trainer.logger is not None and any(
        row["label"] == label and row["step"] == step for row in read_metrics(trainer.paths.root / "evaluation.jsonl")
    )
    if broadcast_from_rank0(done):
        return

    def work(client: RolloutClient) -> dict[str, Any]:
        return evaluate(
            trainer.config,
            client,
            trainer.grader,
            trainer.renderer,
            trainer.tokenizer,
            trainer.heldout_problems,
            step=step,
            label=label,
            weight_version=trainer.plane.weight_version,
            samples_path=trainer.paths.root / "evaluations" / f"{label}-{version_name(step)}" / "samples.jsonl",
        )

    with trainer.display.phase(f"evaluate {label}"):
        metrics = trainer.plane.on_rank0(work)
    if trainer.logger is not None:
        trainer.logger.log_evaluation(metrics)


def train_step(trainer: Trainer) -> dict[str, Any]:
    """One training step, counted in ``trainer.state`` when it is done; returns its metrics, all on rank 0 and most on
    every rank. If its rollouts fail, nothing of it is applied. If its logits are not finite it is skipped: its prompts
    count as seen, and the weights stay."""
    config, state = trainer.config, trainer.state
    timers, started = Timers(), time.perf_counter()
    with timers("rollout"):
        share, timers.seconds["verify"], collection = trainer.plane.rollouts(state.step + 1, state.discarded)
    samples = share.samples
    timers.seconds["rollout"] -= timers.seconds["verify"]
    with timers("score"):
        scores = _score(trainer, samples)
    _check_agreement(config, scores)
    state.step += 1
    saves = config.logging.save_rollouts_every and state.step % config.logging.save_rollouts_every == 0
    if saves:
        _save_rollouts(trainer, samples)
    if _report_non_finite(trainer, samples, scores):
        timers.seconds["total"] = time.perf_counter() - started
        metrics = reward_metrics(share, timers.seconds, config.batch.samples_per_group)
        metrics["update/skipped"] = config.batch.minibatches * config.batch.epochs
        return {"step": state.step, **metrics, **collection, "weight_version": samples[0].weight_version}
    fp8 = _compare_fp8(trainer, samples, scores)
    with timers("route"):
        rewards = torch.tensor(share.rewards, device=backend.current().device())
        verifier_advantage = group_relative_advantage(
            rewards, samples_per_group=config.batch.samples_per_group, normalize_std=config.algorithm.normalize_std
        )[share.places]
        advantage, credit = _route(config, scores, verifier_advantage)
        importance = _importance(config, scores)
    with timers("update"):
        weighted = advantage if importance is None else advantage * importance.weights
        results = _update(trainer, samples, scores, weighted, credit)
        if trainer.average is not None:
            trainer.average.average_in(trainer.model, config.teacher.ema_decay)
    _report_not_applied(trainer, results)
    if saves and trainer.logger is not None:
        _save_inspection(trainer, samples, scores, verifier_advantage, advantage, credit)
    health = {}
    if config.health.every and state.step % config.health.every == 0:
        with timers("health"):
            health = step_health(samples, scores, config)
    timers.seconds["total"] = time.perf_counter() - started
    metrics = step_metrics(share, scores, advantage, credit, importance, results, timers.seconds, config)
    return {"step": state.step, **metrics, **fp8, **health, **collection, "weight_version": samples[0].weight_version}


def _compare_fp8(trainer: Trainer, samples: list[Sample], scores: ScoredRollouts) -> dict[str, float]:
    """What FP8 does to the log-probs of a few rollouts, at the first step and then as often as configured: the same
    weights score them in bf16. Nothing without FP8. Collective over all ranks."""
    config, step = trainer.config, trainer.state.step
    every = config.precision.fp8_check_every
    if config.precision.fp8 == "none" or not every or (step != 1 and step % every):
        return {}
    # Interleaved schedules need a sequence for each stage.
    chosen = samples[: max(config.batch.samples_per_group, config.parallel.pipeline_model_parallel_size)]
    batches = _micro_batches(config, [sample.prompt_ids for sample in chosen], chosen)
    with trainer.model.without_fp8():
        bf16 = score(trainer.model, batches, config.loss, temperature=config.rollout.temperature).log_prob
    gap = (scores.student.log_prob[: len(bf16)] - bf16).abs()
    mean = _mean_over_replicas(gap)
    largest = reduce_over_replicas(gap.max(), dist.ReduceOp.MAX).item()
    if mean > config.precision.fp8_max_diff:
        trainer.display.warning(
            f"step {step}: log-probs under precision.fp8={config.precision.fp8} differ from those of bf16 by "
            f"{mean:.3g} nats a token, over precision.fp8_max_diff={config.precision.fp8_max_diff:g}: leave the outer "
            "layers in bf16 (precision.bf16_first_layers, precision.bf16_last_layers), or choose another recipe"
        )
    return {"precision/fp8_log_prob_diff_mean": mean, "precision/fp8_log_prob_diff_max": largest}


def _mean_over_replicas(values: torch.Tensor) -> float:
    """Of the elements on all replicas; collective over them."""
    values = values.double()
    total, count = reduce_over_replicas(torch.stack([values.sum(), torch.ones_like(values).sum()])).tolist()
    return total / count


def _check_agreement(config: Config, scores: ScoredRollouts) -> None:
    """Refuse rollouts whose log-probs are not those of the trainer's weights; collective over replicas."""
    limit = config.rollout.max_log_prob_diff
    if limit is None or config.rollout.replay is not None:
        return
    mean = _mean_over_replicas((scores.student.log_prob - scores.rollout_log_prob).abs())
    # Not a number is not above: logits that are not finite are another matter.
    if mean > limit:
        raise RolloutsUnavailableError(
            f"the servers' log-probs differ from the trainer's by {mean:.3g} nats a token, over "
            f"rollout.max_log_prob_diff={limit:g}: they serve another model or other weights; check what they were "
            "started with, or raise the limit"
        )


def _report_non_finite(trainer: Trainer, samples: list[Sample], scores: ScoredRollouts) -> bool:
    """Whether any token's statistics are not finite on any replica; the first time in a run it is said where.
    Collective."""
    found = [scores.student.log_prob, scores.student.entropy, scores.start_log_prob]
    # -inf is what a teacher says of a token that it rules out, and routing can take it.
    bad = torch.isnan(scores.teacher_log_prob) | (scores.teacher_log_prob == math.inf)
    for values in found:
        if values is not None:
            bad |= ~torch.isfinite(values)
    place = None
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        ends = scores.lengths.cumsum(0).tolist()
        index = bisect.bisect_right(ends, token)
        # Counted from the response's end.
        position = samples[index].sampled[token - ends[index]]
        broken = next(
            (name for name, one in trainer.model.named_parameters() if not bool(torch.isfinite(one).all())), None
        )
        place = (
            f"rank {dist.get_rank()}: {int(bad.sum())} of {bad.numel()} tokens, first response token {position} of "
            f"problem {samples[index].problem_id}, sample {samples[index].sample}; "
            + (f"parameter {broken} is not finite here" if broken else "the parameters here are finite")
        )
    places = [one for one in gather_world(place) if one]
    if places and not trainer.reported_non_finite:
        trainer.reported_non_finite = True
        trainer.display.warning(
            f"step {trainer.state.step} is skipped, its logits are not finite ({' | '.join(places[:8])}); "
            "further skipped steps are counted in update/skipped and not described"
        )
    return bool(places)


def _report_not_applied(trainer: Trainer, results: list[UpdateResult]) -> None:
    """Say the first time in a run that an update was not applied for its gradient."""
    norms = [one.grad_norm for one in results if not one.applied]
    if norms and not trainer.reported_non_finite:
        trainer.reported_non_finite = True
        trainer.display.warning(
            f"step {trainer.state.step}: {len(norms)} of {len(results)} updates are skipped, their gradient norm is "
            f"{norms[0]}; further ones are counted in update/skipped and not described"
        )


def _micro_batches(config: Config, prompts: list[list[int]], samples: list[Sample]) -> list[MicroBatch]:
    """The responses of ``samples`` behind ``prompts``, which are the student's or the teacher's."""
    return make_micro_batches(
        prompts,
        [sample.response_ids for sample in samples],
        BatchLayout.of_this_rank(config.batch, config.parallel, config.precision),
        response_mask=[sample.response_mask for sample in samples],
    )


def _score(trainer: Trainer, samples: list[Sample]) -> ScoredRollouts:
    config, model, device = trainer.config, trainer.model, backend.current().device()
    temperature = config.rollout.temperature
    batches = _micro_batches(config, [sample.prompt_ids for sample in samples], samples)
    student = score(model, batches, config.loss, temperature=temperature)
    start_log_prob = None
    if config.loss.kl_coef > 0:
        with trainer.start.applied(model):
            start_log_prob = score(model, batches, config.loss, temperature=temperature).log_prob
    teacher_log_prob, teacher = student.log_prob, None
    if needs_teacher(config):
        prompts = {
            sample.group: trainer.renderer.teacher(
                Problem(sample.problem_id, sample.problem, sample.expected_answer, sample.reference_solution)
            )
            for sample in samples
        }
        batches = _micro_batches(config, [prompts[sample.group] for sample in samples], samples)
        weights = {"live": None, "frozen": trainer.start, "ema": trainer.average}[config.teacher.weights]
        keep_hidden = [] if config.algorithm.objective == "distributional" else None
        with weights.applied(model) if weights is not None else contextlib.nullcontext():
            teacher_log_prob = score(
                model, batches, config.loss, temperature=temperature, keep_hidden=keep_hidden
            ).log_prob
            if keep_hidden:
                # The head that the teacher was scored with: the first update would change the live one, while a
                # snapshot stays as it is.
                changes = weights is None and config.batch.minibatches * config.batch.epochs > 1
                head = model.head_weight().detach()
                teacher = TeacherStates(keep_hidden[0], head.clone() if changes else head)
    log_probs = [sample.rollout_log_probs[place] for sample in samples for place in sample.sampled]
    rollout_log_prob = torch.tensor(log_probs, dtype=torch.float32, device=device)
    lengths = torch.tensor([len(sample.sampled) for sample in samples], device=device)
    return ScoredRollouts(student, teacher_log_prob, start_log_prob, rollout_log_prob, lengths, teacher)


def _route(config: Config, scores: ScoredRollouts, verifier_advantage: torch.Tensor) -> tuple[torch.Tensor, Credit]:
    settings = config.algorithm
    return token_advantages(
        settings.name,
        rewards_advantage=verifier_advantage,
        entropy=scores.student.entropy,
        delta=scores.delta,
        lengths=scores.lengths,
        verifier_weight=settings.verifier_weight,
        beta=settings.beta,
        rho=settings.rho,
        quantile_side=settings.quantile_side,
        scale_floor=settings.scale_floor,
        gate=settings.gate,
        rlsd_clip=settings.rlsd_clip,
        objective=settings.objective,
    )


def _importance(config: Config, scores: ScoredRollouts) -> Importance | None:
    if config.loss.importance_sampling == "none":
        return None
    return Importance(
        *importance_weights(
            scores.student.log_prob,
            scores.rollout_log_prob,
            scores.lengths,
            level=config.loss.importance_sampling,
            cap=config.loss.importance_cap,
        )
    )


def _update(
    trainer: Trainer, samples: list[Sample], scores: ScoredRollouts, advantage: torch.Tensor, credit: Credit
) -> list[UpdateResult]:
    """All epochs of minibatches over one batch of rollouts; one result for each optimizer step."""
    config = trainer.config
    share = len(samples) // config.batch.minibatches
    bounds = [0, *scores.lengths.cumsum(0).tolist()]
    results = []
    for _ in range(config.batch.epochs):
        for first in range(0, len(samples), share):
            chosen = samples[first : first + share]
            tokens = slice(bounds[first], bounds[first + share])
            distillation = None
            if config.algorithm.objective == "distributional":
                teacher = (
                    None
                    if scores.teacher is None
                    else TeacherStates(scores.teacher.hidden[tokens], scores.teacher.weight)
                )
                distillation = Distillation(credit.omega[tokens], teacher, config.algorithm)
            results.append(
                update(
                    trainer.model,
                    trainer.optimizer,
                    _micro_batches(config, [sample.prompt_ids for sample in chosen], chosen),
                    old_log_prob=scores.student.log_prob[tokens],
                    advantage=advantage[tokens],
                    start_log_prob=scores.start_log_prob[tokens] if scores.start_log_prob is not None else None,
                    distillation=distillation,
                    settings=config.loss,
                    temperature=config.rollout.temperature,
                )
            )
    trainer.model.gather_parameters()
    return results


def _save_rollouts(trainer: Trainer, samples: list[Sample]) -> None:
    """The step's rollouts of all replicas, for replay; written by rank 0."""
    everyone = gather_replicas(samples)
    if trainer.logger is not None and trainer.config.rollout.replay is None:
        ordered = sorted(
            (sample for part in everyone for sample in part), key=lambda sample: (sample.group, sample.sample)
        )
        save_samples(rollouts_path(trainer.paths.rollouts, trainer.state.step), ordered)


def _save_inspection(
    trainer: Trainer,
    samples: list[Sample],
    scores: ScoredRollouts,
    verifier_advantage: torch.Tensor,
    advantage: torch.Tensor,
    credit: Credit,
) -> None:
    """Token statistics of the first rollouts of this replica, for the report."""
    config, step = trainer.config, trainer.state.step
    bounds = [0, *scores.lengths.cumsum(0).tolist()]
    records = []
    for index, sample in enumerate(samples[: config.logging.inspect_rollouts]):
        tokens = slice(bounds[index], bounds[index + 1])
        records.append(
            {
                "problem_id": sample.problem_id,
                "problem": sample.problem,
                "text": sample.text,
                "reward": sample.reward,
                "advantage": verifier_advantage[index].item(),
                "tokens": [trainer.tokenizer.decode([sample.response_ids[place]]) for place in sample.sampled],
                "entropy": scores.student.entropy[tokens].tolist(),
                "delta": scores.delta[tokens].tolist(),
                "omega": credit.omega[tokens].tolist(),
                "token_advantage": advantage[tokens].tolist(),
                "student_log_prob": scores.student.log_prob[tokens].tolist(),
                "teacher_log_prob": scores.teacher_log_prob[tokens].tolist(),
                "tau": credit.tau[index].item(),
                "sigma": credit.sigma[index].item(),
            }
        )
    path = trainer.paths.root / "inspect" / f"step_{step:06d}.json"
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(records))


def _conclude(trainer: Trainer) -> None:
    """Write the report and print the closing table."""
    report = write_report([trainer.paths.root])
    rows = {row["label"]: row for row in read_metrics(trainer.paths.root / "evaluation.jsonl")}
    facts = {
        "model": trainer.paths.final_model.absolute(),
        "metrics": (trainer.paths.root / "metrics.jsonl").absolute(),
        "report": report.absolute(),
    }
    summary_table(rows.get("before"), rows.get("after"), facts)
