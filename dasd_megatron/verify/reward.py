"""Rewards from the function of the user's own that ``verify.reward`` names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from dasd_megatron.plugins import PluginError, call_own, function_path
from dasd_megatron.samples import LARGEST_REWARD, Sample

LONGEST_FEEDBACK = 2**16
"""Characters of a reward function's text that are kept."""


class RewardError(PluginError):
    """The user's reward function failed, or gave what is no reward."""


class Judgement(NamedTuple):
    """A reward, and what the function says of the response; None where it says nothing."""

    reward: float
    feedback: str | None


def own_reward(function: Callable[[Sample], Any], sample: Sample, *, needs_feedback: bool = False) -> Judgement:
    """Return what ``function`` makes of a sample: a number of at most :data:`LARGEST_REWARD` in size, or a tuple of it
    and a text. Of a text the first :data:`LONGEST_FEEDBACK` characters are kept.

    ``needs_feedback``: refuse a function that gives a number alone.

    Raises:
        RewardError: the function failed or gave something else; the message names it and the sample.
    """
    where = f"verify.reward: {function_path(function)} on problem {sample.problem_id}, sample {sample.sample}"

    def refuse(text: str) -> RewardError:
        return RewardError(f"{where}: {text}")

    given = call_own(lambda: function(sample.copy()), refuse)
    if isinstance(given, tuple) and len(given) == 2:
        number, text = given
    elif needs_feedback:
        raise RewardError(
            f"{where} gave {given!r:.80}, and teacher.privileged has feedback; return (number, text), with None for "
            "nothing to say"
        )
    else:
        number, text = given, None
    reward = call_own(lambda: float(number), lambda text: refuse(f"{text}; return a number, or (number, text)"))
    if not math.isfinite(reward):
        raise RewardError(f"{where} gave {reward}; a reward is a finite number")
    if abs(reward) > LARGEST_REWARD:
        raise RewardError(
            f"{where} gave {reward:g}; a reward lies between -{LARGEST_REWARD:g} and {LARGEST_REWARD:g}, so that "
            "means and deviations of rewards are finite"
        )
    if text is not None and not isinstance(text, str):
        raise RewardError(
            f"{where} gave the feedback {text!r:.80}; return (number, text), with None for nothing to say"
        )
    return Judgement(reward, _bounded(text))


def _bounded(text: str | None) -> str | None:
    """Return the beginning of a text, which is Unicode as a file can hold it; None for one without a word."""
    if text is None or not text.strip():
        return None
    # Text of other programs may hold halves of surrogate pairs, which stand for bytes that are no text.
    return str(text[:LONGEST_FEEDBACK]).encode("utf-8", "replace").decode()
