"""Records of a training step: the scores of its rollouts, and the advantages and directions made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from dasd_megatron.algorithms import Credit


class TokenScores(NamedTuple):
    """Packed statistics of the response tokens of one batch, float32 [N], equal on all ranks of a replica.

    ``hidden``, where it was asked for and on the last pipeline stage alone: ``[N, h / TP]`` in the model's dtype, each
    tensor-parallel rank's part of the states that the LM head was applied to.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's side of the full-vocabulary divergence, on the last pipeline stage.

    Attributes:
        hidden: ``[N, h / TP]``, see :class:`TokenScores`.
        weight: ``[V_local, h]``, this rank's shard of the LM head that the teacher was scored with.
    """

    hidden: torch.Tensor
    weight: torch.Tensor

    def of(self, index: torch.Tensor) -> torch.Tensor:
        """Return the whole states ``[R, h]`` of these packed tokens; one all-gather over tensor-parallel ranks."""
        return gather_from_tensor_model_parallel_region(self.hidden[index])

    def part(self, tokens: slice) -> TeacherStates:
        """Return the states of a range of the packed tokens."""
        return TeacherStates(self.hidden[tokens], self.weight)


@dataclass(frozen=True)
class ScoredRollouts:
    """Packed response tokens of this replica that the policy sampled, float32 [N], equal on all its ranks; all at the
    sampling temperature.

    ``start_log_prob`` is the starting model's, None without a KL penalty. ``lengths`` is int64 [B]. ``teacher`` is for
    the distributional objective, on the last pipeline stage.
    """

    student: TokenScores
    teacher_log_prob: torch.Tensor
    start_log_prob: torch.Tensor | None
    rollout_log_prob: torch.Tensor
    lengths: torch.Tensor
    teacher: TeacherStates | None = None

    @property
    def delta(self) -> torch.Tensor:
        """Teacher log-prob minus student log-prob, all zero for an algorithm without a teacher."""
        return self.teacher_log_prob - self.student.log_prob

    @property
    def bounds(self) -> list[int]:
        """Places among the packed tokens where each rollout begins, and where the last one ends; B + 1 numbers."""
        return [0, *self.lengths.cumsum(0).tolist()]


class Importance(NamedTuple):
    """Truncated importance weights of this replica's response tokens, float32 [N], and which of them the cap has
    lowered, bool [N]."""

    weights: torch.Tensor
    cut: torch.Tensor


class Routing(NamedTuple):
    """Advantages and directions of a step's rollouts.

    ``verifier_advantage`` is float32 [B], each rollout's reward relative to its group; ``advantage`` is float32 [N],
    each response token's from verifier and teacher together; ``importance`` is None without importance sampling.
    """

    verifier_advantage: torch.Tensor
    advantage: torch.Tensor
    credit: Credit
    importance: Importance | None

    @property
    def weighted_advantage(self) -> torch.Tensor:
        """The tokens' advantages times their importance weights."""
        return self.advantage if self.importance is None else self.advantage * self.importance.weights
