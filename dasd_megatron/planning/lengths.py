"""Lengths of made-up prompts and responses, for times that depend on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist, fmean

from dasd_megatron.config import Config
from dasd_megatron.planning.assumptions import Assumptions
from dasd_megatron.planning.layout import longest_teacher_prompt

_QUANTILES = 1024


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompts of student and teacher, and of equally likely responses in rising order."""

    prompt: float
    teacher_prompt: float
    responses: tuple[int, ...]

    @property
    def response(self) -> float:
        """Tokens of a response, on average."""
        return fmean(self.responses)

    def squares(self, prompt: float) -> float:
        """Return the square of the tokens of a prompt and its response, on average."""
        return fmean((prompt + response) ** 2 for response in self.responses)

    def drawn(self, count: int) -> list[int]:
        """Return ``count`` responses that stand for the distribution, in rising order."""
        total = len(self.responses)
        return [self.responses[(2 * index + 1) * total // (2 * count)] for index in range(count)]


def typical_lengths(config: Config, assumed: Assumptions) -> Lengths:
    """Return log-normal responses about ``median_share`` of the longest, cut at ``rollout.max_new_tokens``."""
    longest, normal = config.rollout.max_new_tokens, NormalDist()
    median = assumed.median_share * longest
    responses = []
    for index in range(_QUANTILES):
        # An exponent beyond this one is past every longest response, and would overflow.
        exponent = min(assumed.length_sigma * normal.inv_cdf((index + 0.5) / _QUANTILES), 50.0)
        responses.append(max(1, min(longest, round(median * math.exp(exponent)))))
    return Lengths(
        max(1.0, assumed.prompt_share * config.rollout.max_prompt_tokens),
        max(1.0, assumed.prompt_share * longest_teacher_prompt(config)),
        tuple(responses),
    )


def longest_lengths(config: Config) -> Lengths:
    """Return prompts and responses that are all of the greatest length."""
    rollout = config.rollout
    return Lengths(rollout.max_prompt_tokens, longest_teacher_prompt(config), (rollout.max_new_tokens,))
