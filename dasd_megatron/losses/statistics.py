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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

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

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")

# A Kullback-Leibler divergence beyond this is reported as infinite: only columns without mass in the second
# distribution lead there.
_INFINITE_NATS = 1e7


class TokenStats(NamedTuple):
    """Statistics of T tokens, in nats; float32 ``[T]`` (float64 for float64 logits), the same on every rank of the
    group."""

    log_prob: Tensor
    entropy: Tensor
    teacher_log_prob: Tensor | None
    divergence: Tensor | None


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
    """Which divergence is asked for."""

    divergence: str
    jsd_weight: float


class Distribution(NamedTuple):
    """One distribution over the whole vocabulary: ``[T]`` maximum of the raw logits, and logarithm of the sum about it
    in nats."""

    maximum: Tensor
    log_z: Tensor


class Finished(NamedTuple):
    """Statistics ``[T]`` in float64, and the distributions that the backward pass computes again; in the partials'
    dtype."""

    log_prob: Tensor
    entropy: Tensor
    student: Distribution
    teacher_log_prob: Tensor | None = None
    divergence: Tensor | None = None
    teacher: Distribution | None = None


def make_shard(
    width: int, targets: Tensor, vocab_size: int | None, group: dist.ProcessGroup | None, temperature: float
) -> Shard:
    """The shard of this rank, ``width`` columns wide; ValueError on a vocabulary that does not fit the shards or a
    target outside it."""
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if vocab_size is None:
        vocab_size = width * world_size
    if not 0 < vocab_size <= width * world_size:
        raise ValueError(
            f"vocab_size is {vocab_size}; {world_size} shard(s) of {width} columns hold 1 to {width * world_size}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    _check_targets(targets, vocab_size)
    columns = min(max(vocab_size - rank * width, 0), width)
    return Shard(columns, rank * width, targets, 1.0 / temperature, group if world_size > 1 else None, world_size)


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.dtype != torch.int64:
        raise ValueError(f"targets has dtype {targets.dtype}; expected int64")
    if targets.numel() == 0:
        return
    lowest, highest = torch.stack(torch.aminmax(targets)).tolist()
    if lowest < 0 or highest >= vocab_size:
        position = int(((targets < 0) | (targets >= vocab_size)).nonzero()[0])
        raise ValueError(
            f"targets[{position}] is {int(targets[position])}, outside the vocabulary of {vocab_size}; "
            "drop masked positions before the call"
        )


def make_objective(divergence: str, jsd_weight: float) -> Objective:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; expected one of {', '.join(DIVERGENCES)}")
    if not 0 < jsd_weight < 1:
        raise ValueError(f"jsd_weight is {jsd_weight}; expected a number between 0 and 1, both excluded")
    return Objective(divergence, jsd_weight)


def all_gather(local: Tensor, shard: Shard) -> Tensor:
    """``[n, T]`` of every rank as ``[ranks, n, T]``; one collective, none where the whole vocabulary is here."""
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


def _expectations(
    rows: tuple[Tensor, ...], divergence: str, inverse_temperature: float
) -> tuple[_Merged, Tensor, _Merged | None, Tensor | None, Tensor | None]:
    """Student, its mean, teacher, its mean, cross expectation, from partials ``[n][parts, T]``."""
    student = _merge(rows[MAX], rows[Z], inverse_temperature)
    mean = student.expectation(rows[MEAN], student.offsets)
    if len(rows) <= CROSS:
        return student, mean, None, None, None
    teacher = _merge(rows[TEACHER_MAX], rows[TEACHER_Z], inverse_temperature)
    teacher_mean = cross = torch.zeros_like(mean)
    if divergence == "reverse_kl":
        cross = student.expectation(rows[CROSS], teacher.offsets)
    elif divergence == "forward_kl":
        teacher_mean = teacher.expectation(rows[TEACHER_MEAN], teacher.offsets)
        cross = teacher.expectation(rows[CROSS], student.offsets)
    return student, mean, teacher, teacher_mean, cross


def merge_partials(parts: Tensor, divergence: str, inverse_temperature: float) -> Tensor:
    """Partials of blocks of columns ``[blocks, n, T]`` as those of all the columns together ``[n, T]``."""
    rows = parts.double().unbind(1)
    student, mean, teacher, teacher_mean, cross = _expectations(rows, divergence, inverse_temperature)
    merged = [student.maximum, student.z, mean, rows[TARGET].sum(0)]
    if teacher is not None:
        merged += [teacher.maximum, teacher.z, teacher_mean, rows[TEACHER_TARGET].sum(0), cross]
    return torch.stack(merged).to(parts.dtype)


def finish(gathered: Tensor, objective: Objective, shard: Shard) -> Finished:
    """All statistics but the Jensen-Shannon divergence, from the partials of all ranks ``[ranks, n, T]``."""
    rows = gathered.double().unbind(1)
    inverse_temperature = shard.inverse_temperature
    student, mean, teacher, teacher_mean, cross = _expectations(rows, objective.divergence, inverse_temperature)
    log_z = student.z.log()
    log_prob = (rows[TARGET].sum(0) - student.maximum) * inverse_temperature - log_z
    entropy = (log_z - mean).clamp_min(0.0)
    dtype = gathered.dtype
    finished = Finished(log_prob, entropy, Distribution(student.maximum.to(dtype), log_z.to(dtype)))
    if teacher is None:
        return finished
    teacher_log_z = teacher.z.log()
    value = None
    if objective.divergence == "reverse_kl":
        value = _infinite((mean - cross) - (log_z - teacher_log_z))
    elif objective.divergence == "forward_kl":
        value = _infinite((teacher_mean - cross) - (teacher_log_z - log_z))
    return finished._replace(
        teacher_log_prob=(rows[TEACHER_TARGET].sum(0) - teacher.maximum) * inverse_temperature - teacher_log_z,
        divergence=value,
        teacher=Distribution(teacher.maximum.to(dtype), teacher_log_z.to(dtype)),
    )


def _infinite(divergence: Tensor) -> Tensor:
    """Rounding below 0 removed, and what stands for an infinite divergence made infinite."""
    return torch.where(divergence > _INFINITE_NATS, math.inf, divergence.clamp_min(0.0))


def jensen_shannon(sums: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Divergence and its student's part KL(p || m), float64 ``[T]``, from the mixture's sums of all ranks ``[ranks, 2,
    T]``."""
    student_to_mixture, teacher_to_mixture = sums.double().sum(0).unbind(0)
    return (weight * student_to_mixture + (1.0 - weight) * teacher_to_mixture).clamp_min(0.0), student_to_mixture


def gradient_coefficients(
    finished: Finished,
    student_to_mixture: Tensor | None,
    objective: Objective,
    inverse_temperature: float,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_divergence: Tensor | None,
) -> dict[str, Any]:
    """Arguments of the kernels' ``backward`` that say how the loss depends on the logits.

    With g the incoming gradients, per column v and before the division by the temperature:

        log-prob    g (1[v = y] - p_v)
        entropy     -g p_v (log p_v + H)
        reverse KL  g p_v (log p_v - log q_v - KL)
        forward KL  g (p_v - q_v)
        JSD         g w p_v (log p_v - log m_v - KL(p || m))

    so all but the one-hot and the forward KL's q_v are p_v times ``constant + linear log p_v - cross X_v``, with X the
    logarithm of q or m.
    """
    constant = torch.zeros_like(finished.entropy)
    linear = cross = teacher_share = one_hot = mixture_weight = None
    if grad_log_prob is not None:
        one_hot = grad_log_prob.double() * inverse_temperature
        constant = constant - one_hot
    if grad_entropy is not None:
        linear = -grad_entropy.double() * inverse_temperature
        constant = constant + linear * finished.entropy
    if grad_divergence is not None:
        grad = grad_divergence.double() * inverse_temperature
        if objective.divergence == "forward_kl":
            constant, teacher_share = constant + grad, grad
        else:
            if objective.divergence == "jsd":
                mixture_weight = objective.jsd_weight
                grad, value = grad * mixture_weight, student_to_mixture
            else:
                # The gradient of an infinite divergence is not finite; such a token gets none.
                infinite = finished.divergence == math.inf
                grad, value = torch.where(infinite, 0.0, grad), torch.where(infinite, 0.0, finished.divergence)
            constant = constant - grad * value
            linear = grad if linear is None else linear + grad
            cross = grad
    coefficients = dict(
        p_max=finished.student.maximum, p_log_z=finished.student.log_z, constant=constant, linear=linear, cross=cross,
        teacher_share=teacher_share, one_hot=one_hot, mixture_weight=mixture_weight,
    )  # fmt: skip
    if grad_divergence is not None:
        coefficients |= dict(q_max=finished.teacher.maximum, q_log_z=finished.teacher.log_z)
    return coefficients
