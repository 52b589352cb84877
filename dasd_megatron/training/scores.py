"""Records of what the scoring passes of a step have found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dasd_megatron.training.passes import TeacherStates, TokenScores


@dataclass
class ScoredRollouts:
    """Packed response tokens of this replica that the policy sampled, float32 [N], equal on all its ranks; all at the
    sampling temperature.

    ``delta`` is teacher log-prob minus student log-prob, all zero for an algorithm without a teacher;
    ``start_log_prob`` is the starting model's, None without a KL penalty. ``lengths`` is int64 [B].
    """

    student: TokenScores
    teacher_log_prob: torch.Tensor
    start_log_prob: torch.Tensor | None
    rollout_log_prob: torch.Tensor
    lengths: torch.Tensor
    teacher: TeacherStates | None = None
    """For the distributional objective, on the last pipeline stage."""

    @property
    def delta(self) -> torch.Tensor:
        return self.teacher_log_prob - self.student.log_prob


class Importance(NamedTuple):
    """Truncated importance weights of this replica's response tokens, float32 [N], and which of them the cap has
    lowered, bool [N]."""

    weights: torch.Tensor
    cut: torch.Tensor
