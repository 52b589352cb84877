"""Schedules of the settings that change over training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dasd_megatron.config.fields import setting

SCHEDULE_STYLES = ("constant", "linear", "cosine")


@dataclass
class ScheduleConfig:
    """The course of one setting over training, from its own value at step 1 to ``final``."""

    style: str = setting(
        "constant", "constant (the value itself, at every step), linear or cosine", choices=SCHEDULE_STYLES
    )
    final: float = setting(0.0, "linear and cosine: value at the end of the course, in the setting's unit", low=0)
    steps: int | None = setting(
        None,
        "linear and cosine: steps that the course takes, so that step 1 + steps and all later ones have the final "
        "value; null: the last step of the run has it",
        low=1,
    )

    @property
    def changes(self) -> bool:
        """True where the setting is not the same at every step."""
        return self.style != "constant"

    def value(self, initial: float, step: int, run_steps: int) -> float:
        """Return the setting's value at a step, counted from 1, of a run of ``run_steps``. It depends on nothing else,
        so that a resumed run goes on with the same values."""
        if not self.changes:
            return initial
        progress = (step - 1) / (self.steps or max(run_steps - 1, 1))
        if progress <= 0.0:
            return initial
        if progress >= 1.0:
            return self.final
        share = progress if self.style == "linear" else (1.0 - math.cos(math.pi * progress)) / 2.0
        return initial + share * (self.final - initial)
