"""Rewards from the function of the user's own that ``verify.reward`` names."""

from __future__ import annotations

import math
from collections.abc import Callable

from dasd_megatron.errors import first_line
from dasd_megatron.plugins import PluginError
from dasd_megatron.samples import Sample


class RewardError(PluginError):
    """The user's reward function failed, or gave what is no reward."""


def own_reward(function: Callable[[Sample], float], sample: Sample) -> float:
    """Return ``function``'s reward of a sample, a finite number.

    Raises:
        RewardError: the function failed or gave something else; the message names it and the sample.
    """
    # A callable object, like a partial function, has no name.
    name = getattr(function, "__name__", repr(function))
    where = f"verify.reward: {function.__module__}:{name} on problem {sample.problem_id}, sample {sample.sample}"
    try:
        reward = float(function(sample))
    # The user's code may raise anything.
    except Exception as error:
        raise RewardError(f"{where}: {type(error).__name__}: {first_line(error)}") from error
    if not math.isfinite(reward):
        raise RewardError(f"{where} gave {reward}; a reward is a finite number")
    return reward
