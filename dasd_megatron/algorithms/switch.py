"""A switch that turns the teacher's term off while the teacher is too certain."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class EntropySwitch:
    """AntiSD's gate (arXiv:2605.11609, equation 7): off in the first steps, which give the entropy to compare with;
    then on from a step on whose teacher has at least that entropy, until a step whose teacher has less than a share of
    it.

    The switch is a state of the run: it is saved with checkpoints, and equal on all ranks.
    """

    warm_up: tuple[float, ...] = ()
    """The teacher's entropies in the first steps, nats."""
    is_on: bool = False

    def after(self, entropy: float | None, *, warmup_steps: int, off_share: float) -> EntropySwitch:
        """Return the switch for a step.

        Args:
            entropy: median entropy of the teacher's distribution over the step's tokens, nats. None: no response of
                the step has a teacher, and the switch stays as it is.
            warmup_steps: first steps with a teacher, at least 1. Their median entropy is the one to compare with.
            off_share: share of that entropy below which the switch goes off, 0 to 1.
        """
        if entropy is None:
            return self
        if len(self.warm_up) < warmup_steps:
            return dataclasses.replace(self, warm_up=(*self.warm_up, entropy))
        before = statistics.median(self.warm_up)
        if entropy >= before:
            return dataclasses.replace(self, is_on=True)
        return dataclasses.replace(self, is_on=self.is_on and entropy >= off_share * before)
