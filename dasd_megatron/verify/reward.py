"""Rewards of the user's own: a Python function, named by its path in the configuration."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from dasd_megatron.config import ConfigError, first_line

if TYPE_CHECKING:
    from dasd_megatron.rollout.samples import Sample


class RewardError(RuntimeError):
    """The user's reward function failed, or gave what is no reward."""


def load_reward(path: str | None) -> Callable[[Sample], float] | None:
    """The function that ``verify.reward`` names, like ``my_package.rewards:score``; None for None.

    Raises:
        ConfigError: no such module or function.
    """
    if path is None:
        return None
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    # A module runs its author's code when it is imported.
    except Exception as error:
        raise ConfigError(
            f"verify.reward={path}: {type(error).__name__}: {first_line(error)}; write module:function, of a module that Python finds "
            "(PYTHONPATH)"
        ) from error
    if not callable(function):
        raise ConfigError(f"verify.reward={path} is {function!r} and no function")
    return function


def own_reward(function: Callable[[Sample], float], sample: Sample) -> float:
    """``function``'s reward of a sample, a finite number; :class:`RewardError` names the function and the sample otherwise."""
    where = f"verify.reward: {function.__module__}:{function.__name__} on problem {sample.problem_id}, sample {sample.sample}"
    try:
        reward = float(function(sample))
    except Exception as error:  # the user's code may raise anything
        raise RewardError(f"{where}: {type(error).__name__}: {first_line(error)}") from error
    if not math.isfinite(reward):
        raise RewardError(f"{where} gave {reward}; a reward is a finite number")
    return reward
