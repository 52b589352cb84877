"""The training loop: when to take a step, evaluate, save, pause, go back and stop. Every rank runs :func:`train`; only
the first one reports."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dasd_megatron import stopping
from dasd_megatron.config import Config
from dasd_megatron.evaluation.evaluate import evaluate
from dasd_megatron.observability.metric_files import read_metrics
from dasd_megatron.observability.progress import format_duration, summary_table
from dasd_megatron.observability.report.page import write_report
from dasd_megatron.observability.watch import CONTINUE, Watch, open_watch, record_alerts
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.run.checks import needs_teacher
from dasd_megatron.run.paths import RunPaths
from dasd_megatron.samples import version_name
from dasd_megatron.stopping import StopRequested, WatchStopped
from dasd_megatron.training.decisions import Decision, Progress, Signals, decide, is_evaluation_due
from dasd_megatron.training.export import export_model
from dasd_megatron.training.offload import DeviceMemoryError
from dasd_megatron.training.parallel import broadcast_from_rank0, flags_of_all_ranks
from dasd_megatron.training.rollout_plane import RolloutsUnavailableError, ServersUnavailableError
from dasd_megatron.training.saving import begin_checkpoint, roll_back, save_last_step
from dasd_megatron.training.step import train_step
from dasd_megatron.training.trainer import Trainer, open_trainer

_PAUSE_POLL_SECONDS = 1.0
"""Time between two looks for the file that lets a paused run go on."""


def train(config: Config, paths: RunPaths) -> None:
    """Run or resume the training that ``paths`` was prepared for. Needs the backend selected and the parallel state
    initialised.

    Raises:
        RolloutsUnavailableError: the rollout servers failed beyond repair. Before it and the next three a checkpoint of
            the last finished step is written.
        DeviceMemoryError: the memory that the trainer has left to the servers is not there again.
        StopRequested: a signal asked for it. WatchStopped: the watch did.
        CheckpointError: a checkpoint could not be written or read; the previous one is untouched.
        UnsavedRolloutsError: rollouts could not be written; there is no checkpoint behind their step.
        TrainingError: logits, loss or gradient were not finite in too many steps in a row, and going back to a
            checkpoint did not help.
    """
    with open_trainer(config, paths) as trainer:
        try:
            _run(trainer)
        except WatchStopped as stop:
            save_last_step(trainer)
            raise WatchStopped(
                f"stopped after step {trainer.state.step}, which is saved; continue with resume=auto. {stop}"
            ) from stop
        except StopRequested as stop:
            saved = ", which is saved" if save_last_step(trainer) else ""
            raise StopRequested(f"stopped after step {trainer.state.step}{saved}; continue with resume=auto") from stop
        except RolloutsUnavailableError as failure:
            save_last_step(trainer)
            raise RolloutsUnavailableError(
                f"after step {trainer.state.step}: {failure}; continue with resume=auto once the cause is mended"
            ) from failure
        except DeviceMemoryError as failure:
            save_last_step(trainer)
            raise DeviceMemoryError(
                f"after step {trainer.state.step}: {failure}; continue with resume=auto"
            ) from failure
        trainer.plane.regain_weights()
        export_model(trainer.learner.model, paths.final_model, template_dir=trainer.hf_files)
        if trainer.logger is not None:
            _conclude(trainer)


def _run(trainer: Trainer) -> None:
    """Take all steps that are left, with evaluations and checkpoints between them."""
    config, state, saver = trainer.config, trainer.state, trainer.saver
    watch = _open_watch(trainer)
    sync_seconds = _sync(trainer)
    if config.evaluation.before and state.step == 0:
        _evaluate(trainer, "before")
    # A run that stopped between a step and its evaluation makes it up; one that is there already is not repeated.
    _evaluate_if_due(trainer)
    while state.step < config.run.steps:
        metrics = train_step(trainer)
        # Both belong to the end of the step before this one; a step's own row is written as soon as the step is done.
        metrics |= {"seconds/sync": sync_seconds, "seconds/checkpoint": saver.stalled}
        metrics |= trainer.memory.measures()
        metrics["evaluation/failures"] = trainer.failed_evaluations
        saver.stalled = 0.0
        advice = _log_step(trainer, watch, metrics)
        state.skipped = state.skipped + 1 if metrics["update/skipped"] else 0
        decision = _decide(trainer, advice)
        if decision.finish_checkpoint:
            saver.finish()
        if decision.end == "disk":
            trainer.rollout_writer.finish()
        if decision.end == "signal":
            raise StopRequested("between steps")
        if decision.end == "watch":
            raise WatchStopped(f"watch.action=stop: {advice.reason}")
        if decision.roll_back:
            roll_back(trainer)
            watch = _open_watch(trainer)
        # The step is done and counted from here on, whatever happens to the servers.
        sync_seconds = _sync(trainer)
        if decision.save:
            begin_checkpoint(trainer)
        _evaluate_if_due(trainer)
        if decision.pause:
            _pause(trainer, advice.reason)
    if config.evaluation.after:
        _evaluate(trainer, "after")
    saver.finish()


@dataclass(frozen=True)
class _Advice:
    """Request of the watch after a step, and its reason; on rank 0, which alone judges."""

    end: bool = False
    pause: bool = False
    reason: str = ""


def _decide(trainer: Trainer, advice: _Advice) -> Decision:
    """Decide what follows the step, alike on every rank; one all-reduce."""
    config, state = trainer.config, trainer.state
    signals = flags_of_all_ranks(
        Signals(
            disk=trainer.rollout_writer.failed,
            stop=stopping.requested(),
            writing=trainer.saver.is_writing(),
            end=advice.end,
            pause=advice.pause,
        )
    )
    progress = Progress(state.step, config.run.steps, state.skipped, trainer.saver.pending)
    return decide(
        signals,
        progress,
        checkpoint_every=config.checkpoint.every,
        max_skipped_steps=config.loss.max_skipped_steps,
    )


def _open_watch(trainer: Trainer) -> Watch | None:
    """Open the watch on rank 0, which alone judges."""
    if trainer.logger is None:
        return None
    return open_watch(trainer.paths.root, trainer.config.watch, has_teacher=needs_teacher(trainer.config.algorithm))


def _log_step(trainer: Trainer, watch: Watch | None, metrics: dict[str, Any]) -> _Advice:
    """Write and show a step's metrics and warnings on rank 0; returns what the watch asks for."""
    if trainer.logger is None or watch is None:
        return _Advice()
    alerts = watch.update(metrics)
    action = watch.action(alerts)
    # Before the row of metrics: a run that is killed between them says its warning again, and does not lose it.
    record_alerts(trainer.paths.root, alerts, action)
    trainer.logger.log_step(metrics | {"watch/warnings": len(alerts)})
    trainer.display.step(metrics)
    for alert in alerts:
        trainer.display.warning(alert.text)
    act_on = trainer.config.watch.act_on
    reason = "; ".join(alert.condition for alert in alerts if alert.condition in act_on)
    return _Advice(end=action == "stop", pause=action == "pause", reason=reason)


@dataclass(frozen=True)
class _PauseSignals:
    stop: bool
    resumed: bool
    expired: bool


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
        # A file left from an earlier pause would end this one at once.
        file.unlink(missing_ok=True)
    save_last_step(trainer)
    trainer.display.warning(
        f"paused after step {trainer.state.step}, which is saved ({reason}). To go on: touch {file.absolute()}. "
        f"Otherwise the run ends in {limit} (watch.pause_timeout_seconds) with status {WatchStopped.exit_status}"
    )
    deadline = time.monotonic() + settings.pause_timeout_seconds
    while True:
        time.sleep(_PAUSE_POLL_SECONDS)
        signals = flags_of_all_ranks(
            _PauseSignals(
                stop=stopping.requested(),
                resumed=rank0 and file.exists(),
                expired=rank0 and time.monotonic() > deadline,
            )
        )
        if signals.stop:
            raise StopRequested("while paused")
        if signals.resumed:
            break
        if signals.expired:
            raise WatchStopped(f"watch.action=pause: {reason}, and nobody made {CONTINUE} in {limit}")
    if rank0:
        file.unlink(missing_ok=True)
    trainer.display.message(f"{CONTINUE} is there: on with step {trainer.state.step + 1}")


def _sync(trainer: Trainer) -> float:
    """Hand the weights of the last finished step to the servers; returns seconds."""
    started = time.perf_counter()
    trainer.plane.sync_weights(trainer.learner.model, trainer.state.step, trainer.hf_files)
    return time.perf_counter() - started


def _evaluate_if_due(trainer: Trainer) -> None:
    if is_evaluation_due(trainer.state.step, trainer.config.run.steps, trainer.config.evaluation.every):
        _evaluate(trainer, "step")


def _evaluate(trainer: Trainer, label: str) -> None:
    """Evaluate the weights that the servers hold, on rank 0; skipped where a resumed run has this evaluation already.

    Where the servers fail at it, the run goes on without its result. If they are gone for good, the next step ends it.
    """
    step, evaluations = trainer.state.step, trainer.paths.root / "evaluation.jsonl"
    done = trainer.logger is not None and any(
        row.get("label") == label and row.get("step") == step for row in read_metrics(evaluations)
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

    try:
        with trainer.display.phase(f"evaluate {label}"):
            metrics = trainer.plane.on_rank0(work)
    except ServersUnavailableError as error:
        trainer.failed_evaluations += 1
        trainer.display.warning(f"evaluation {label} of step {step} failed, and the run goes on without it: {error}")
        return
    if trainer.logger is not None and metrics is not None:
        trainer.logger.log_evaluation(metrics)


def _conclude(trainer: Trainer) -> None:
    """Write the report and print the closing table."""
    root = trainer.paths.root
    report = write_report([root])
    rows = {row.get("label"): row for row in read_metrics(root / "evaluation.jsonl")}
    facts = {
        "model": trainer.paths.final_model.absolute(),
        "metrics": (root / "metrics.jsonl").absolute(),
        "report": report.absolute(),
    }
    summary_table(rows.get("before"), rows.get("after"), facts)
