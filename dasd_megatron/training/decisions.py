"""Decisions of the training loop: pure functions of what is known after a step, without ranks, files or clocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Signals:
    """Flags that the ranks exchange after a step; each is true if it is true on any rank.

    ``stop``: a signal asks the run to stop. ``writing``: a checkpoint is still being written. ``end`` and ``pause``:
    the watch on training asks for it. ``disk``: rollouts could not be written.
    """

    stop: bool = False
    writing: bool = False
    end: bool = False
    pause: bool = False
    disk: bool = False


@dataclass(frozen=True)
class Progress:
    """State of a run after a step, alike on every rank.

    ``step`` of ``steps`` are done, the last ``skipped`` of them without an update. ``checkpoint_pending``: a checkpoint
    has been begun and not finished.
    """

    step: int
    steps: int
    skipped: int = 0
    checkpoint_pending: bool = False


@dataclass(frozen=True)
class Decision:
    """Actions of the loop between two steps, in the order of the fields.

    ``end``: why the run ends here, if it does; nothing that follows is done then. ``save`` comes before the evaluation,
    which takes long and which a resumed run makes up.
    """

    finish_checkpoint: bool
    end: Literal["disk", "signal", "watch"] | None = None
    roll_back: bool = False
    save: bool = False
    pause: bool = False


def decide(signals: Signals, progress: Progress, *, checkpoint_every: int, max_skipped_steps: int) -> Decision:
    """Decide what follows a step.

    A disk that fails and a signal end the run in any case, the watch only if steps are left. A run that goes back to a
    checkpoint has that checkpoint already, and gets a chance before it is paused. ``checkpoint_every`` may be 0: then
    the last step alone is saved.
    """
    steps_left = progress.step < progress.steps
    finish_checkpoint = progress.checkpoint_pending and not signals.writing
    if signals.disk:
        return Decision(finish_checkpoint, end="disk")
    if signals.stop:
        return Decision(finish_checkpoint, end="signal")
    if signals.end and steps_left:
        return Decision(finish_checkpoint, end="watch")
    if progress.skipped > max_skipped_steps:
        return Decision(finish_checkpoint, roll_back=True)
    return Decision(
        finish_checkpoint,
        save=not steps_left or is_multiple(progress.step, checkpoint_every),
        pause=signals.pause and steps_left,
    )


def is_evaluation_due(step: int, steps: int, every: int) -> bool:
    """Return whether an evaluation follows ``step`` of ``steps``; those before the first and after the last step have
    settings of their own."""
    return 0 < step < steps and is_multiple(step, every)


def is_multiple(step: int, every: int) -> bool:
    """Return whether something that happens every so many steps is due; an interval of 0 means never."""
    return every > 0 and step % every == 0
