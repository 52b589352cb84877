"""Saving the last finished step of a run, and going back to a saved one."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from dasd_megatron.training.checkpoint import load_checkpoint
from dasd_megatron.training.checkpoint_files import checkpoint_path, depart_from, resumable
from dasd_megatron.training.checkpoint_search import TrainerState, damage, read_state
from dasd_megatron.training.decisions import is_multiple
from dasd_megatron.training.export import export_model
from dasd_megatron.training.offload import STATE, WEIGHTS
from dasd_megatron.training.optimizer import TrainingError
from dasd_megatron.training.parallel import broadcast_from_rank0
from dasd_megatron.training.trainer import Trainer


def begin_checkpoint(trainer: Trainer) -> None:
    """Begin a checkpoint of the last finished step, and export its weights beside it where that is due. Collective over
    all ranks.

    Raises:
        UnsavedRolloutsError: rollouts of the steps before it could not be written.
    """
    step = trainer.state.step
    # A run that goes on from this checkpoint does not take the steps before it again.
    trainer.rollout_writer.finish()
    trainer.state.rollouts = trainer.plane.state(step)
    trainer.saver.save(trainer.state)
    if is_multiple(step, trainer.config.checkpoint.export_every):
        trainer.plane.regain_weights()
        path = checkpoint_path(trainer.paths.root, step).with_suffix(".hf")
        # Hashing it would hold up training for a second pass over the bytes.
        export_model(trainer.learner.model, path, template_dir=trainer.hf_files, manifest=False)


def save_last_step(trainer: Trainer) -> bool:
    """Write a checkpoint of the last finished step, unless there is one; returns whether there was a step to save.
    Collective over all ranks."""
    step = trainer.state.step
    trainer.saver.finish()
    if step and not broadcast_from_rank0(checkpoint_path(trainer.paths.root, step).exists()):
        begin_checkpoint(trainer)
        trainer.saver.finish()
    return step > 0


def roll_back(trainer: Trainer) -> None:
    """Take weights, optimizer and generators from the last good checkpoint, and go on with problems that have not been
    drawn yet. Collective over all ranks.

    The problems of the steps since then are not drawn again, since they may be what broke the numbers.

    Raises:
        TrainingError: there is no good checkpoint, or ``loss.max_rollbacks`` are used up.
    """
    config, state, learner = trainer.config, trainer.state, trainer.learner
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
    path = _find_good_checkpoint(trainer.paths.root, state)
    if path is None:
        raise TrainingError(f"{reason}, and there is no checkpoint before them to go back to: {advice}")
    # The step whose numbers broke may not have come to its update.
    trainer.memory.restore(WEIGHTS, *STATE)
    saved = load_checkpoint(path, learner.model, learner.optimizer, learner.teacher)
    good_step = saved.step
    if config.rollout.replay is not None:
        state.discarded += state.step - good_step
    trainer.display.warning(f"{reason}: back to {path}, and on with other problems")
    state.step, state.rolled_back_to, state.teacher_switch = good_step, good_step, saved.teacher_switch
    state.skipped, state.rollbacks = 0, state.rollbacks + 1
    if trainer.logger is not None:
        depart_from(trainer.paths.root, path, good_step)
        trainer.logger.restart_after(state.step)
    trainer.plane.start_over()
    # This takes the place of the checkpoint gone back to: a run that is killed now must not draw the same problems
    # again.
    begin_checkpoint(trainer)


def _find_good_checkpoint(run_dir: Path, state: TrainerState) -> Path | None:
    """Return the last intact checkpoint after a step that was not skipped, and that has not been gone back to already.
    Collective over all ranks."""
    for path in broadcast_from_rank0(resumable(run_dir) if dist.get_rank() == 0 else None):
        if damage(path) is None:
            saved, _ = read_state(path)
            if saved.skipped == 0 and saved.step != state.rolled_back_to:
                return path
    return None
