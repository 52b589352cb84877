"""The parts of a training run and their opening: logger, model, checkpoints, grader and rollout servers."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from dasd_megatron.config import Config, LoggingConfig
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.templates import PromptRenderer, make_renderer
from dasd_megatron.files import cannot_write
from dasd_megatron.models.gpt import ShardedModel, build_model
from dasd_megatron.models.hf_config import load_tokenizer, read_hf_config
from dasd_megatron.observability.loggers import MetricsLogger
from dasd_megatron.observability.metric_files import (
    EVALUATION,
    METRICS,
    WARM_START,
    WARNINGS,
    missing_steps,
    set_rows_aside,
)
from dasd_megatron.observability.progress import ProgressDisplay
from dasd_megatron.observability.trackers import Tracker
from dasd_megatron.run.checks import needs_teacher
from dasd_megatron.run.paths import RunPaths, run_problems, start_hf_files, start_path
from dasd_megatron.samples import ReplayError
from dasd_megatron.training.checkpoint import CheckpointSaver, check_architecture, check_kept_teacher, load_checkpoint
from dasd_megatron.training.checkpoint_files import checkpoints_folder, depart_from
from dasd_megatron.training.checkpoint_search import TrainerState, find_checkpoint, read_state
from dasd_megatron.training.offload import OPTIMIZER, TrainerMemory
from dasd_megatron.training.optimizer import OptimizerState, build_optimizer
from dasd_megatron.training.parallel import broadcast_from_rank0, on_selected_rank
from dasd_megatron.training.rollout_plane import RolloutPlane, load_replayed, open_fleet
from dasd_megatron.training.rollout_writer import RolloutWriter
from dasd_megatron.training.snapshots import KEPT_COPIES, WeightSnapshot
from dasd_megatron.training.warm_start import warm_start
from dasd_megatron.verify.grader import Grader


class Learner(NamedTuple):
    """The policy that learns, its optimizer, and copies of its weights where the configuration reads them: ``start`` as
    they were when the run began, and ``teacher`` of a teacher that follows the policy, an average or a snapshot, which
    checkpoints hold."""

    model: ShardedModel
    optimizer: OptimizerState
    start: WeightSnapshot | None
    teacher: WeightSnapshot | None


@dataclass(kw_only=True)
class Trainer:
    """The parts of a run that its steps share.

    ``logger`` is there on rank 0 alone, which reports. ``reported_non_finite``: numbers that are not finite have been
    described once in this run.
    """

    config: Config
    paths: RunPaths
    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    grader: Grader
    heldout_problems: list[Problem]
    learner: Learner
    memory: TrainerMemory
    state: TrainerState
    saver: CheckpointSaver
    rollout_writer: RolloutWriter
    plane: RolloutPlane
    display: ProgressDisplay
    logger: MetricsLogger | None
    reported_non_finite: bool = False
    failed_evaluations: int = 0
    """Evaluations that the servers failed at, since this process began."""

    @property
    def hf_files(self) -> Path:
        """The directory with config and tokenizer, which every copy of the policy gets."""
        return start_hf_files(self.config.model, self.paths)


@contextlib.contextmanager
def open_trainer(config: Config, paths: RunPaths) -> Iterator[Trainer]:
    """Open the run that ``paths`` was prepared for, from its checkpoint if ``config.resume`` has one; what was opened
    is closed behind the block. Collective over all ranks.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is another model's.
    """
    hf_files = start_hf_files(config.model, paths)
    tokenizer = load_tokenizer(hf_files)
    renderer = make_renderer(config.data, config.teacher, tokenizer)
    train_problems, heldout_problems = run_problems(paths, "train"), run_problems(paths, "heldout")
    checkpoint = find_checkpoint(config.resume, paths.root)
    began = TrainerState() if checkpoint is None else _checked_state(checkpoint, hf_files, _teacher_weights(config))
    first_step = began.step
    _check_first_replayed(config, hf_files, began)
    fleet = open_fleet(config, paths, read_hf_config(hf_files))
    with contextlib.ExitStack() as stack:
        stream = sys.stdout if dist.get_rank() == 0 else stack.enter_context(open(os.devnull, "w"))
        display = stack.enter_context(ProgressDisplay(config.run.steps, start_step=first_step, stream=stream))
        warm_started = _find_warm_started_model(paths, checkpoint)
        logger = None
        if dist.get_rank() == 0:
            if checkpoint is None:
                _begin_files(config.resume, paths.root, display)
            if warm_started is None:
                set_rows_aside(paths.root, WARM_START)
            logger = stack.enter_context(
                open_logger(config.logging, paths.root, display, resumed=checkpoint is not None, first_step=first_step)
            )
        if config.warm_start.steps and warm_started is None:
            warm_started = _warm_start(config, paths, train_problems, renderer, tokenizer, display, logger)
        start = warm_started if config.warm_start.steps else None
        learner = build_learner(config, start or start_path(config.model, paths))
        memory = make_memory(config.backend.offload, learner)
        state = TrainerState() if checkpoint is None else _resume(checkpoint, paths.root, learner, logger, display)
        _warn_of_quantised_rollouts(config, display)
        saver = stack.enter_context(
            CheckpointSaver(
                paths.root,
                config.checkpoint,
                learner.model,
                learner.optimizer,
                learner.teacher,
                template_dir=hf_files,
                timeout_seconds=config.backend.timeout_seconds,
                memory=memory,
            )
        )
        writer = stack.enter_context(RolloutWriter.of_this_rank(config, paths.rollouts))
        grader = stack.enter_context(Grader(config.verify))
        plane = stack.enter_context(
            RolloutPlane(
                config,
                fleet=fleet,
                memory=memory,
                paths=paths,
                problems=train_problems,
                grader=grader,
                renderer=renderer,
                tokenizer=tokenizer,
                vocab_size=learner.model.vocab_size,
                state=state.rollouts,
            )
        )
        yield Trainer(
            config=config,
            paths=paths,
            tokenizer=tokenizer,
            renderer=renderer,
            grader=grader,
            heldout_problems=heldout_problems,
            learner=learner,
            memory=memory,
            state=state,
            saver=saver,
            rollout_writer=writer,
            plane=plane,
            display=display,
            logger=logger,
        )


def _warn_of_quantised_rollouts(config: Config, display: ProgressDisplay) -> None:
    """Warn where the servers' numbers are known to be others than the trainer's, and nothing corrects for it."""
    form = config.rollout.weight_format
    if form != "plain" and config.loss.importance_sampling == "none" and config.rollout.replay is None:
        display.warning(
            f"rollouts are drawn from weights in rollout.weight_format={form} and trained without a correction: write "
            "loss.importance_sampling=token, and look at rollout/kl and rollout/log_prob_diff_mean"
        )


def build_learner(config: Config, model_path: Path) -> Learner:
    """Build the policy with the weights in ``model_path``, its optimizer, and copies of the weights where they are
    needed. Collective over all ranks."""
    model = build_model(config, model_path)
    optimizer = build_optimizer(
        config.optimizer, model, steps=config.run.steps, updates_per_step=config.batch.minibatches * config.batch.epochs
    )
    weights = _teacher_weights(config)
    start = teacher = None
    if config.loss.kl_coef > 0 or weights in ("frozen", "trust_region"):
        start = WeightSnapshot(model, "start")
    if weights in KEPT_COPIES:
        teacher = WeightSnapshot(model, KEPT_COPIES[weights], dtype=torch.float32 if weights == "ema" else None)
    return Learner(model, optimizer, start, teacher)


def make_memory(offload: str, learner: Learner) -> TrainerMemory:
    """Return what releases and restores the learner's memory as ``backend.offload`` says; the optimizer brings its
    state back when it takes a step."""
    memory = TrainerMemory(offload, learner.model, learner.optimizer, [learner.start, learner.teacher])
    learner.optimizer.before_step = functools.partial(memory.restore, OPTIMIZER)
    return memory


def _teacher_weights(config: Config) -> str:
    """Return the kind of the teacher's weights, ``live`` where no teacher is needed."""
    return config.teacher.weights if needs_teacher(config.algorithm) else "live"


def open_logger(
    settings: LoggingConfig, run_dir: Path, display: ProgressDisplay, *, resumed: bool, first_step: int
) -> MetricsLogger:
    """Open the files and trackers of a run's metrics. ``resumed``: the run goes on behind ``first_step`` steps."""
    wanted = {"wandb": settings.wandb != "none", "mlflow": settings.mlflow}
    return MetricsLogger(
        run_dir,
        settings.tensorboard,
        resume_step=first_step or None,
        trackers=[Tracker(name, run_dir, fresh=not resumed) for name, is_wanted in wanted.items() if is_wanted],
        warn=display.warning,
    )


def _checked_state(checkpoint: Path, hf_files: Path, teacher_weights: str) -> TrainerState:
    """Return how far a checkpoint of this run's model is; CheckpointError if it is another's, or another teacher's.
    Collective over all ranks."""
    state, record = read_state(checkpoint)
    check_architecture(checkpoint, record, read_hf_config(hf_files))
    check_kept_teacher(checkpoint, teacher_weights)
    return state


def _check_first_replayed(config: Config, hf_files: Path, began: TrainerState) -> None:
    """Refuse rollouts of ``rollout.replay`` that the first step cannot be trained on, before the model takes its time;
    each later file is checked before its step. Collective: rank 0 reads."""
    if config.rollout.replay is None or began.step >= config.run.steps:
        return
    vocab_size = read_hf_config(hf_files).vocab_size
    check = functools.partial(load_replayed, config, began.step + began.discarded + 1, vocab_size)
    on_selected_rank(dist.get_rank() == 0, check, (ReplayError,))


def _find_warm_started_model(paths: RunPaths, checkpoint: Path | None) -> Path | None:
    """Return the warm-started model of this run, or of the run that the checkpoint is from; None where there is none
    yet. Collective: rank 0 looks, since the others may see a shared file system later, and must not decide
    otherwise."""
    candidates = [paths.warm_started_model]
    if checkpoint is not None:
        candidates.append(RunPaths(checkpoint.parent.parent).warm_started_model)
    found = None
    if dist.get_rank() == 0:
        found = next((path for path in candidates if (path / "config.json").exists()), None)
    return broadcast_from_rank0(found)


def _begin_files(resume: str, run_dir: Path, display: ProgressDisplay) -> None:
    """Give a run that begins at its first step files of its own; what an attempt without a checkpoint has written
    stays beside them."""
    moved = [moved for name in (METRICS, EVALUATION, WARNINGS) if (moved := set_rows_aside(run_dir, name)) is not None]
    if resume == "auto":
        kept = f"; what an attempt before its first checkpoint wrote is in {', '.join(moved)}" if moved else ""
        display.message(f"resume=auto: {run_dir} has no checkpoint to go on from, training begins at step 1{kept}")


def _resume(
    checkpoint: Path, run_dir: Path, learner: Learner, logger: MetricsLogger | None, display: ProgressDisplay
) -> TrainerState:
    """Load a checkpoint into the learner; results of later steps are dropped. Collective over all ranks."""
    state = load_checkpoint(checkpoint, learner.model, learner.optimizer, learner.teacher)
    if logger is not None:
        _drop_later_results(run_dir, checkpoint, state.step, logger, display)
    display.message(f"resumed from {checkpoint} at step {state.step}")
    return state


def _drop_later_results(
    run_dir: Path, checkpoint: Path, step: int, logger: MetricsLogger, display: ProgressDisplay
) -> None:
    """Remove what the run directory has of steps that are taken again, once the checkpoint of ``step`` is loaded.

    Raises:
        RunDirectoryError: the directory cannot be written.
    """
    try:
        depart_from(run_dir, checkpoint, step)
    except OSError as error:
        raise cannot_write(checkpoints_folder(run_dir), error) from error
    logger.restart_after(step)
    is_own = checkpoint.resolve().parent == checkpoints_folder(run_dir).resolve()
    lacking = missing_steps(run_dir, step) if is_own else 0
    if lacking:
        display.warning(
            f"{run_dir / METRICS} is shorter than {checkpoint.name}: it lacks {lacking} of the steps up to {step}. The "
            "run goes on, and its report and its watch do without them"
        )


def _warm_start(
    config: Config,
    paths: RunPaths,
    problems: list[Problem],
    renderer: PromptRenderer,
    tokenizer: PreTrainedTokenizerBase,
    display: ProgressDisplay,
    logger: MetricsLogger | None,
) -> Path:
    """Warm-start the model and report every step of it; returns where it is."""
    with display.phase("warm start", total=config.warm_start.steps) as phase:

        def report(metrics: dict[str, float]) -> None:
            phase.advance(loss=metrics["loss"], lr=metrics["lr"])
            if logger is not None:
                logger.log_warm_start(metrics)

        warm_start(config, paths, problems, renderer, tokenizer, report)
    return paths.warm_started_model
