"""Rewards from the function of the user's own that ``verify.reward`` names."""

from __future__ import annotations

import math
from collections.abc import Callable

from dasd_megatron.plugins import PluginError, call_own
from dasd_megatron.samples import LARGEST_REWARD, Sample


class RewardError(PluginError):
    """The user's reward function failed, or gave what is no reward."""


def own_reward(function: Callable[[Sample], float], sample: Sample) -> float:
    """Return ``function``'s reward of a sample, a number of at most :data:`LARGEST_REWARD` in size.

    Raises:
        RewardError: the function failed or gave something else; the message names it and the sample.
    """
    # A callable object, like a partial function, has no name.
    name = getattr(function, "__name__", repr(function))
    where = f"verify.reward: {function.__module__}:{name} on problem {sample.problem_id}, sample {sample.sample}"
    reward = call_own(lambda: float(function(sample)), lambda text: RewardError(f"{where}: {text}"))
    if not math.isfinite(reward):
        raise RewardError(f"{where} gave {reward}; a reward is a finite number")
    if abs(reward) > LARGEST_REWARD:
        raise RewardError(
            f"{where} gave {reward:g}; a reward lies between -{LARGEST_REWARD:g} and {LARGEST_REWARD:g}, so that "
            "means and deviations of rewards are finite"
        )
    return reward
