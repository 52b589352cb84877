"""The memory that a trainer needs in each phase of a step, where rollout servers have its GPUs between two steps."""

from __future__ import annotations

from typing import NamedTuple

from dasd_megatron.config import Config
from dasd_megatron.planning.estimate import State


class StepBytes(NamedTuple):
    """Bytes on a GPU of what a step works with: the state that stays; copies of the weights; what the teacher leaves
    for the update; activations of a forward pass, and of forward and backward; buffers of the loss; the reserve."""

    state: State
    copies: float
    teacher: float
    scoring: float
    activations: float
    loss: float
    reserve: float


class Phases(NamedTuple):
    """Peak bytes of the trainer on a GPU while servers sample, while they get the weights, and in a step's phases."""

    sampling: float
    sending: float
    scoring: float
    backward: float
    optimizer: float

    @property
    def peak(self) -> float:
        """The most that the trainer needs at once."""
        return max(self)


def step_phases(config: Config, needs: StepBytes) -> Phases:
    """Return the peaks under ``backend.offload``, as :mod:`dasd_megatron.training.offload` releases and restores. With
    ``none`` all of the state stays in every phase."""
    state, kind = needs.state, config.backend.offload
    weights = needs.reserve + state.weights
    resident = state.gradients + state.optimizer + needs.copies if kind == "none" else 0
    # State that came back for the first optimizer step stays for the passes of the next minibatch.
    stays = kind == "none" or config.batch.minibatches * config.batch.epochs > 1
    update = weights + state.gradients + needs.copies + needs.teacher
    return Phases(
        sampling=weights + resident if kind != "all" else needs.reserve,
        sending=weights + resident,
        scoring=weights + (resident if kind == "none" else needs.copies) + needs.teacher + needs.scoring + needs.loss,
        backward=update + (state.optimizer if stays else 0) + needs.activations + needs.loss,
        optimizer=update + state.optimizer,
    )
