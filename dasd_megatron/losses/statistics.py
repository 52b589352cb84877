"""From partial sums to statistics and back to gradients: what ``vocab_parallel_token_stats`` and ``linear_token_stats``
share.

Every rank, and every block of columns of a rank, reduces its logits to a few numbers per token about its own maxima
(the kernels' ``local_partials``). :func:`merge_partials` joins blocks, :func:`finish` joins ranks after one all-gather
and makes the statistics, and :func:`gradient_coefficients` turns the incoming gradients into the per-token coefficients
of the kernels' ``backward``. All of it is arithmetic on ``[T]`` vectors, done in float64: differences of nearly equal
logarithms would lose float32's digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dasd_megatron.losses.divergences import DIVERGENCES, Divergence, GradientTerms, Probabilities, Sums
from dasd_megatron.losses.torch_kernels import (
    CROSS,
    MAX,
    MEAN,
    TARGET,
    TEACHER_MAX,
    TEACHER_MEAN,
    TEACHER_TARGET,
    TEACHER_Z,
    Z,
)


class TopK(NamedTuple):
    """Some entries of the vocabulary for each of T tokens: global ids ``[T, k]`` int64, -1 for no entry, and their
    log-probs in nats, ``[T, k]``, -inf for no entry."""

    ids: Tensor
    log_prob: Tensor


class TokenStats(NamedTuple):
    """Statistics of T tokens, in nats; float32 ``[T]`` (float64 for float64 logits), the same on every rank of the
    group."""

    log_prob: Tensor
    entropy: Tensor
    teacher_log_prob: Tensor | None
    divergence: Tensor | None


class EntryStats(NamedTuple):
    """:class:`TokenStats`, and the entries of the vocabulary that were asked for."""

    log_prob: Tensor
    entropy: Tensor
    teacher_log_prob: Tensor | None
    divergence: Tensor | None
    top: TopK


class Shard(NamedTuple):
    """This rank's part of the vocabulary, and the tokens whose statistics are asked for."""

    columns: int
    """Columns that belong to the vocabulary; the rest of the shard is padding."""
    first_column: int
    targets: Tensor
    inverse_temperature: float
    group: dist.ProcessGroup | None
    """None where the whole vocabulary is here."""
    world_size: int


class Objective(NamedTuple):
    """The divergence that is asked for."""

    divergence: Divergence
    jsd_weight: float
    entry_clip: float | None = None
    """Bound on each entry's contribution, nats."""

    @property
    def needs_second_pass(self) -> bool:
        """True where the sums need both normalisers, so that they are made in a second pass."""
        return self.divergence.uses_mixture or self.entry_clip is not None

    def contributions(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return the summands of the divergence from finite logarithms of the probabilities, without the clip."""
        probabilities = Probabilities(log_p, log_p.exp(), log_q, log_q.exp())
        return self.divergence.entries(probabilities, self.jsd_weight).contribution


class Distribution(NamedTuple):
    """One distribution over the whole vocabulary: ``[T]`` maximum of the raw logits, and logarithm of the sum about it
    in nats."""

    maximum: Tensor
    log_z: Tensor


class Comparison(NamedTuple):
    """Statistics of T tokens with a teacher. ``log_prob``, ``divergence`` and ``centre`` are ``[T]`` float64."""

    teacher: Distribution
    log_prob: Tensor
    divergence: Tensor
    centre: Tensor
    """The value that the divergence's gradient contains: the divergence, KL(p || m) for one that uses the mixture m, or
    the sum of the slopes where the entries are clipped."""


class Finished(NamedTuple):
    """Statistics ``[T]`` in float64, and the distributions in the partials' dtype, from which the backward pass
    computes the probabilities again."""

    log_prob: Tensor
    entropy: Tensor
    student: Distribution
    comparison: Comparison | None
    """None without a teacher."""


class Saved(NamedTuple):
    """The statistics that the backward pass reads, ``[T]`` each."""

    entropy: Tensor
    student: Distribution
    teacher: Distribution | None
    centre: Tensor | None

    @classmethod
    def of(cls, finished: Finished) -> Saved:
        """Take what the backward pass reads out of finished statistics."""
        compared = finished.comparison
        if compared is None:
            return cls(finished.entropy, finished.student, None, None)
        return cls(finished.entropy, finished.student, compared.teacher, compared.centre)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors in a row, for autograd to keep."""
        if self.teacher is None or self.centre is None:
            return (self.entropy, *self.student)
        return (self.entropy, *self.student, *self.teacher, self.centre)

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> Saved:
        """Undo :meth:`tensors`."""
        entropy, maximum, log_z, *teacher = tensors
        if not teacher:
            return cls(entropy, Distribution(maximum, log_z), None, None)
        return cls(entropy, Distribution(maximum, log_z), Distribution(teacher[0], teacher[1]), teacher[2])


class Coefficients(NamedTuple):
    """Arguments of the kernels' ``backward`` that say how the loss depends on the logits, ``[T]`` each; None stands for
    0."""

    p_max: Tensor
    p_log_z: Tensor
    constant: Tensor
    linear: Tensor | None = None
    one_hot: Tensor | None = None
    cross: Tensor | None = None
    teacher_share: Tensor | None = None
    q_max: Tensor | None = None
    q_log_z: Tensor | None = None
    mixture_weight: float | None = None
    entries: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Return those that are given, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def of_rows(self, rows: slice) -> Coefficients:
        """Return the coefficients of some of the tokens."""
        chosen: dict[str, Any] = {
            name: value[rows] for name, value in self._asdict().items() if isinstance(value, Tensor)
        }
        return self._replace(**chosen)


def make_shard(
    width: int,
    targets: Tensor,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
    temperature: float,
    *,
    check_targets: bool,
) -> Shard:
    """Return the shard of this rank, ``width`` columns wide; ValueError on a vocabulary that does not fit the shards
    and, with ``check_targets``, on a target outside it."""
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if vocab_size is None:
        vocab_size = width * world_size
    if not 0 < vocab_size <= width * world_size:
        raise ValueError(
            f"vocab_size is {vocab_size}; {world_size} shard(s) of {width} columns hold 1 to {width * world_size}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets has dtype {targets.dtype}; expected int64")
    if check_targets:
        _check_targets(targets, vocab_size)
    columns = min(max(vocab_size - rank * width, 0), width)
    return Shard(columns, rank * width, targets, 1.0 / temperature, group if world_size > 1 else None, world_size)


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.numel() == 0:
        return
    lowest, highest = torch.stack(torch.aminmax(targets)).tolist()
    if lowest < 0 or highest >= vocab_size:
        position = int(((targets < 0) | (targets >= vocab_size)).nonzero()[0])
        raise ValueError(
            f"targets[{position}] is {int(targets[position])}, outside the vocabulary of {vocab_size}; "
            "drop masked positions before the call"
        )


def make_objective(divergence: str, jsd_weight: float, entry_clip: float | None) -> Objective:
    """Return the objective; ValueError on an unknown divergence, a weight outside 0 to 1, or a clip of 0 or less."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; expected one of {', '.join(DIVERGENCES)}")
    if not 0 < jsd_weight < 1:
        raise ValueError(f"jsd_weight is {jsd_weight}; expected a number between 0 and 1, both excluded")
    if entry_clip is not None and not entry_clip > 0:
        raise ValueError(f"entry_clip is {entry_clip}; expected more than 0 nats, or None for no clip")
    return Objective(DIVERGENCES[divergence], jsd_weight, entry_clip)


def all_gather(local: Tensor, shard: Shard) -> Tensor:
    """Return ``[n, T]`` of every rank as ``[ranks, n, T]``; one collective, none where the whole vocabulary is here."""
    if shard.group is None or local.numel() == 0:
        return local.expand(shard.world_size, *local.shape)
    gathered = local.new_empty(shard.world_size * local.shape[0], local.shape[1])
    # Newer PyTorch has the same collective under another name, and warns about the old one.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(gathered, local, group=shard.group)
    return gathered.view(shard.world_size, *local.shape)


class _Merged(NamedTuple):
    """One distribution made of parts: offsets of their maxima in nats and shares of the mass ``[parts, T]``; of the
    whole ``[T]``."""

    offsets: Tensor
    shares: Tensor
    maximum: Tensor
    z: Tensor

    def expectation(self, local: Tensor, offsets: Tensor) -> Tensor:
        """Expectation over all parts of logits whose own shifts lie ``offsets`` from the common one. Parts without mass
        drop out."""
        return torch.where(self.shares == 0, 0.0, self.shares * (local + offsets)).sum(0)


def _merge(maxima: Tensor, masses: Tensor, inverse_temperature: float) -> _Merged:
    maximum = maxima.amax(0)
    # Without mass in any part, -inf - -inf would be NaN. Such a whole has mass 0, and the shares of nothing are 0.
    offsets = torch.where(maximum == -math.inf, -math.inf, (maxima - maximum) * inverse_temperature)
    scaled = masses * offsets.exp()
    z = scaled.sum(0)
    return _Merged(offsets, torch.where(z == 0, 0.0, scaled / z), maximum, z)


class _TeacherExpectations(NamedTuple):
    """The teacher's distribution, its mean where it is the one that weights, and the mean of the other's logits."""

    whole: _Merged
    mean: Tensor
    cross: Tensor


class _Expectations(NamedTuple):
    """The student's distribution and mean, and the teacher's side."""

    whole: _Merged
    mean: Tensor
    teacher: _TeacherExpectations | None


def _expectations(rows: tuple[Tensor, ...], divergence: Divergence, inverse_temperature: float) -> _Expectations:
    """Return what partials of n numbers, each ``[parts, T]``, are together."""
    student = _merge(rows[MAX], rows[Z], inverse_temperature)
    mean = student.expectation(rows[MEAN], student.offsets)
    if len(rows) <= CROSS:
        return _Expectations(student, mean, None)
    teacher = _merge(rows[TEACHER_MAX], rows[TEACHER_Z], inverse_temperature)
    teacher_mean = cross = torch.zeros_like(mean)
    if divergence.weighted_by == "student":
        cross = student.expectation(rows[CROSS], teacher.offsets)
    elif divergence.weighted_by == "teacher":
        teacher_mean = teacher.expectation(rows[TEACHER_MEAN], teacher.offsets)
        cross = teacher.expectation(rows[CROSS], student.offsets)
    return _Expectations(student, mean, _TeacherExpectations(teacher, teacher_mean, cross))


def merge_partials(parts: Tensor, divergence: Divergence, inverse_temperature: float) -> Tensor:
    """Return the partials of all columns together ``[n, T]`` from those of blocks of columns ``[blocks, n, T]``."""
    rows = parts.double().unbind(1)
    student, mean, teacher = _expectations(rows, divergence, inverse_temperature)
    merged = [student.maximum, student.z, mean, rows[TARGET].sum(0)]
    if teacher is not None:
        merged += [teacher.whole.maximum, teacher.whole.z, teacher.mean, rows[TEACHER_TARGET].sum(0), teacher.cross]
    return torch.stack(merged).to(parts.dtype)


def finish(
    partials: Tensor,
    objective: Objective,
    shard: Shard,
    second_sums: Callable[[Distribution, Distribution], Tensor] | None,
) -> Finished:
    """Return all statistics from this rank's partials ``[n, T]``.

    ``second_sums`` makes the second pass over this rank's columns, ``[2, T]``, from the student's and the teacher's
    distribution. It is called only for an objective that needs it; None without a teacher.

    Collectives: one all-gather, and a second one after ``second_sums``.
    """
    rows = all_gather(partials, shard).double().unbind(1)
    inverse_temperature, dtype = shard.inverse_temperature, partials.dtype
    student, mean, teacher = _expectations(rows, objective.divergence, inverse_temperature)
    log_z = student.z.log()
    log_prob = (rows[TARGET].sum(0) - student.maximum) * inverse_temperature - log_z
    entropy = (log_z - mean).clamp_min(0.0)
    distribution = Distribution(student.maximum.to(dtype), log_z.to(dtype))
    if teacher is None:
        return Finished(log_prob, entropy, distribution, None)
    teacher_log_z = teacher.whole.z.log()
    teacher_log_prob = (rows[TEACHER_TARGET].sum(0) - teacher.whole.maximum) * inverse_temperature - teacher_log_z
    teacher_distribution = Distribution(teacher.whole.maximum.to(dtype), teacher_log_z.to(dtype))
    zeros = torch.zeros_like(mean)
    sums = Sums(mean, log_z, teacher.mean, teacher_log_z, teacher.cross, zeros, zeros)
    both = zeros, zeros
    if objective.needs_second_pass and second_sums is not None:
        summed = all_gather(second_sums(distribution, teacher_distribution), shard).double().sum(0)
        both = summed[0], summed[1]
    if objective.entry_clip is not None:
        value, centre = both
    else:
        sums = sums._replace(student_to_mixture=both[0], teacher_to_mixture=both[1])
        value = objective.divergence.value(sums, objective.jsd_weight)
        centre = sums.student_to_mixture if objective.divergence.uses_mixture else value
    return Finished(log_prob, entropy, distribution, Comparison(teacher_distribution, teacher_log_prob, value, centre))


def gradient_coefficients(
    saved: Saved,
    objective: Objective,
    inverse_temperature: float,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_divergence: Tensor | None,
) -> Coefficients:
    """Return the coefficients of the gradient from the incoming gradients ``[T]``, None where there is none.

    With g the incoming gradients, per column v and before the division by the temperature:

        log-prob    g (1[v = y] - p_v)
        entropy     -g p_v (log p_v + H)
        divergence  see :mod:`~dasd_megatron.losses.divergences`

    so all but the one-hot and the forward KL's q_v are p_v times ``constant + linear log p_v - cross X_v``, with X the
    logarithm of q or m.
    """
    constant = torch.zeros_like(saved.entropy)
    linear = one_hot = None
    if grad_log_prob is not None:
        one_hot = grad_log_prob.double() * inverse_temperature
        constant = constant - one_hot
    if grad_entropy is not None:
        linear = -grad_entropy.double() * inverse_temperature
        constant = constant + linear * saved.entropy
    without = Coefficients(saved.student.maximum, saved.student.log_z, constant, linear, one_hot)
    if grad_divergence is None or saved.teacher is None or saved.centre is None:
        return without
    grad_divergence = grad_divergence.double() * inverse_temperature
    if objective.entry_clip is not None:
        terms = GradientTerms(constant=-(grad_divergence * saved.centre), entries=grad_divergence)
    else:
        terms = objective.divergence.gradient(grad_divergence, saved.centre, objective.jsd_weight)
    if linear is not None and terms.linear is not None:
        linear = linear + terms.linear
    return without._replace(
        constant=constant + terms.constant,
        linear=terms.linear if linear is None else linear,
        cross=terms.cross,
        teacher_share=terms.teacher_share,
        q_max=saved.teacher.maximum,
        q_log_z=saved.teacher.log_z,
        mixture_weight=objective.jsd_weight if objective.divergence.uses_mixture and terms.cross is not None else None,
        entries=terms.entries,
    )
