"""Records of a training step: the scores of its rollouts, and the advantages and directions made of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from dasd_megatron.algorithms import Credit
from dasd_megatron.losses import Rejected, TopK


class TokenScores(NamedTuple):
    """Packed statistics of the response tokens of one batch, float32 [N], equal on all ranks of a replica. ``top`` has
    [N, k] entries of the vocabulary, where they were asked for and on the last pipeline stage."""

    log_prob: torch.Tensor
    entropy: torch.Tensor
    top: TopK | None = None


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's next-token distributions, from which its statistics and the full-vocabulary divergence are made, on
    the last pipeline stage.

    The logits are ``states @ weight.T``. A mixture of two models' logits is the product of their states side by side
    with their heads side by side, each head times its share.

    Attributes:
        parts: of each model ``[M, h / TP]``, each tensor-parallel rank's part of the states of the tokens that the
            teacher has scored.
        weight: ``[V_local, parts * h]``, this rank's shard of the LM head that the teacher was scored with.
        rows: ``[N]`` int64, the row in ``parts`` of each packed token; -1 for a token without a teacher.
    """

    parts: tuple[torch.Tensor, ...]
    weight: torch.Tensor
    rows: torch.Tensor

    def of(self, index: torch.Tensor) -> torch.Tensor:
        """Return the whole states ``[R, parts * h]`` of these packed tokens, zeros without a teacher; one all-gather
        over tensor-parallel ranks for each part."""
        rows = self.rows[index]
        # Zeros are a teacher that says the same of every token. Its divergence is finite, and its direction is 0.
        states = [torch.where(rows[:, None] >= 0, part[rows], 0.0) for part in self.parts]
        return torch.cat([gather_from_tensor_model_parallel_region(part) for part in states], dim=1)

    def at(self, rows: torch.Tensor) -> TeacherStates:
        """Return the states with other ``rows``."""
        return TeacherStates(self.parts, self.weight, rows)


@dataclass(frozen=True)
class TeacherEntries:
    """The teacher's probabilities of some entries of the vocabulary, from which the divergence over them is made, on
    the last pipeline stage.

    Attributes:
        top: int32 ids and float32 log-probs ``[M, k]`` of the tokens that the teacher has scored; the same on all ranks
            of the stage.
        rows: ``[N]`` int64, the row in ``top`` of each packed token; -1 for a token without a teacher.
    """

    top: TopK
    rows: torch.Tensor

    def of(self, index: torch.Tensor) -> TopK:
        """Return the entries of these packed tokens; one without a teacher has none, which makes its divergence 0."""
        rows = self.rows[index]
        ids, log_prob = (values[rows] for values in self.top)
        without = (rows < 0)[:, None]
        return TopK(ids.masked_fill(without, -1).long(), log_prob.masked_fill(without, -torch.inf))

    def at(self, rows: torch.Tensor) -> TeacherEntries:
        """Return the entries with other ``rows``."""
        return TeacherEntries(self.top, rows)


class TeacherScores(NamedTuple):
    """The teacher's scores of a replica's rollouts.

    ``log_prob`` and ``entropy`` are float32 [N], equal on all ranks of a replica, and 0 where a sample has no teacher.
    ``has_teacher`` is bool [B]. ``ran``: some sample of some replica has a teacher. ``distribution`` is for
    the distributional objective, on the last pipeline stage.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    has_teacher: torch.Tensor
    ran: bool
    distribution: TeacherStates | TeacherEntries | None = None


@dataclass(frozen=True)
class References:
    """Facts of some rollouts from before the policy scores them: packed response tokens that the policy sampled,
    float32 [N], equal on all ranks of the replica; all at the sampling temperature.

    ``teacher_log_prob`` and ``teacher_entropy`` are 0 where a sample has no teacher. ``has_teacher`` is bool [B].
    ``start_log_prob`` is the starting model's, None without a KL penalty. ``lengths`` is int64 [B]. ``teacher_ran``:
    some sample of some replica has a teacher. ``teacher`` is for the distributional objective, on the last pipeline
    stage.
    """

    teacher_log_prob: torch.Tensor
    teacher_entropy: torch.Tensor
    has_teacher: torch.Tensor
    start_log_prob: torch.Tensor | None
    rollout_log_prob: torch.Tensor
    lengths: torch.Tensor
    teacher_ran: bool
    teacher: TeacherStates | TeacherEntries | None = None

    @property
    def teacher_tokens(self) -> torch.Tensor:
        """The tokens that have a teacher, bool [N]."""
        return self.has_teacher.repeat_interleave(self.lengths, output_size=len(self.teacher_log_prob))

    def with_student(self, student: TokenScores) -> ScoredRollouts:
        """Return the rollouts with the policy's scores, which stand for the teacher's where there is none."""
        taught = self.teacher_tokens
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(References)}
        known["teacher_log_prob"] = torch.where(taught, self.teacher_log_prob, student.log_prob)
        known["teacher_entropy"] = torch.where(taught, self.teacher_entropy, student.entropy)
        return ScoredRollouts(**known, student=student._replace(top=None))

    def of(self, sequences: torch.Tensor, index: torch.Tensor) -> References:
        """Return those of some whole rollouts, without the teacher's distribution. ``sequences``: int64 places of the
        rollouts; ``index``: int64 places of their packed tokens, in the same order."""
        return References(
            teacher_log_prob=self.teacher_log_prob[index],
            teacher_entropy=self.teacher_entropy[index],
            has_teacher=self.has_teacher[sequences],
            start_log_prob=None if self.start_log_prob is None else self.start_log_prob[index],
            rollout_log_prob=self.rollout_log_prob[index],
            lengths=self.lengths[sequences],
            teacher_ran=self.teacher_ran,
        )


@dataclass(frozen=True, kw_only=True)
class ScoredRollouts(References):
    """The same with the policy's own scores.

    ``teacher_log_prob`` and ``teacher_entropy`` are the student's where a sample has no teacher.
    """

    student: TokenScores

    @property
    def delta(self) -> torch.Tensor:
        """Teacher log-prob minus student log-prob, exactly 0 for tokens without a teacher."""
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
    each response token's from verifier and teacher together; ``importance`` is None without importance sampling, and
    ``rejected`` without rejection.
    """

    verifier_advantage: torch.Tensor
    advantage: torch.Tensor
    credit: Credit
    importance: Importance | None
    rejected: Rejected | None = None

    @property
    def weighted_advantage(self) -> torch.Tensor:
        """The tokens' advantages times their importance weights."""
        return self.advantage if self.importance is None else self.advantage * self.importance.weights
