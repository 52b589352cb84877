"""The table of divergences between the student's distribution p and the teacher's q over the full vocabulary.

A :class:`Divergence` says which sums the kernels take, and how its value and gradient follow from them, so nothing else
compares names. To add one, write its value and its gradient here and its record in :data:`DIVERGENCES`; sums that no
divergence has needed yet are one more value of ``weighted_by`` and a branch in each kernel, where it is read. The
functions call tensors' own methods, so that this module, which the configuration takes its choices from, imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

# A Kullback-Leibler divergence beyond this is reported as infinite: only columns without mass in the second
# distribution lead there.
_INFINITE_NATS = 1e7


class Sums(NamedTuple):
    """Sums of the kernels over the whole vocabulary, ``[T]`` float64 in nats.

    The logits behind the means and the normalisers are shifted by their own distribution's maximum. Sums that a
    divergence does not ask for are 0.
    """

    student_mean: Tensor
    """Mean of the student's logits under p."""
    student_log_z: Tensor
    teacher_mean: Tensor
    """Mean of the teacher's logits under q; 0 unless ``weighted_by`` is ``teacher``."""
    teacher_log_z: Tensor
    cross: Tensor
    """Mean of the other distribution's logits under the one that ``weighted_by`` names."""
    student_to_mixture: Tensor
    """KL(p || m)."""
    teacher_to_mixture: Tensor
    """KL(q || m)."""


class GradientTerms(NamedTuple):
    """Per-token coefficients ``[T]`` that a divergence adds to the kernels' ``backward``; None stands for 0.

    The gradient at column v is ``p_v (constant + linear log p_v - cross X_v) - teacher_share q_v``, with X the
    logarithm of q, or of the mixture where the divergence uses it. Where the entries are clipped it is ``p_v constant +
    entries a_v``, with a the slope of an entry that is not clipped, see :class:`Entries`.
    """

    constant: Tensor
    linear: Tensor | None = None
    cross: Tensor | None = None
    teacher_share: Tensor | None = None
    entries: Tensor | None = None


class Probabilities(NamedTuple):
    """Probabilities of some entries of the vocabulary and their finite natural logarithms, all of one shape."""

    log_p: Tensor
    p: Tensor
    log_q: Tensor
    q: Tensor


class Entries(NamedTuple):
    """Summands of a divergence, one an entry of the vocabulary, and their slopes, shaped as the probabilities are."""

    contribution: Tensor
    """Nats; their sum over the vocabulary is the divergence."""
    slope: Tensor
    """Derivative of the contribution by log p, with q as it is."""


@dataclass(frozen=True)
class Divergence:
    """The sums, the value and the gradient of one divergence."""

    name: str
    """``algorithm.divergence`` in the configuration."""
    formula: str
    weighted_by: Literal["student", "teacher"] | None
    """The distribution whose probabilities weight the logarithms of both in the sums of the first pass. None: a second
    pass sums both distributions against the mixture m = w p + (1 - w) q instead."""
    value: Callable[[Sums, float], Tensor]
    """``[T]`` in nats, from the sums and the mixture's weight w of the student."""
    gradient: Callable[[Tensor, Tensor, float], GradientTerms]
    """Function of the incoming gradient ``[T]``, the value ``[T]`` in nats (KL(p || m) for one that uses the mixture),
    and the mixture's weight w of the student."""
    entries: Callable[[Probabilities, float], Entries]
    """The summands, from the probabilities and the mixture's weight w of the student. The results are new tensors."""
    note: str = ""
    """Addition to the name in the documentation of ``algorithm.divergence``."""

    @property
    def uses_mixture(self) -> bool:
        """True where a second pass sums both distributions against their mixture."""
        return self.weighted_by is None


def _kullback_leibler(mean: Tensor, log_z: Tensor, cross: Tensor, other_log_z: Tensor) -> Tensor:
    """Return the divergence of one distribution from another, from the means of both logits under the first one.

    Rounding below 0 is removed, and what stands for an infinite divergence is made infinite.
    """
    divergence = (mean - cross) - (log_z - other_log_z)
    return divergence.clamp_min(0.0).masked_fill(divergence > _INFINITE_NATS, math.inf)


def _reverse_kl(sums: Sums, _: float) -> Tensor:
    return _kullback_leibler(sums.student_mean, sums.student_log_z, sums.cross, sums.teacher_log_z)


def _forward_kl(sums: Sums, _: float) -> Tensor:
    return _kullback_leibler(sums.teacher_mean, sums.teacher_log_z, sums.cross, sums.student_log_z)


def _jensen_shannon(sums: Sums, weight: float) -> Tensor:
    return (weight * sums.student_to_mixture + (1.0 - weight) * sums.teacher_to_mixture).clamp_min(0.0)


def _reverse_kl_gradient(grad: Tensor, value: Tensor, _: float) -> GradientTerms:
    """``g p_v (log p_v - log q_v - KL)``."""
    # The gradient of an infinite divergence is not finite; such a token gets none.
    infinite = value == math.inf
    grad, value = grad.masked_fill(infinite, 0.0), value.masked_fill(infinite, 0.0)
    return GradientTerms(constant=-(grad * value), linear=grad, cross=grad)


def _forward_kl_gradient(grad: Tensor, _: Tensor, __: float) -> GradientTerms:
    """``g (p_v - q_v)``."""
    return GradientTerms(constant=grad, teacher_share=grad)


def _jensen_shannon_gradient(grad: Tensor, student_to_mixture: Tensor, weight: float) -> GradientTerms:
    """``g w p_v (log p_v - log m_v - KL(p || m))``."""
    grad = grad * weight
    return GradientTerms(constant=-(grad * student_to_mixture), linear=grad, cross=grad)


def _reverse_kl_entries(of: Probabilities, _: float) -> Entries:
    contribution = (of.log_p - of.log_q) * of.p
    return Entries(contribution, contribution + of.p)


def _forward_kl_entries(of: Probabilities, _: float) -> Entries:
    return Entries((of.log_q - of.log_p) * of.q, -of.q)


def _jensen_shannon_entries(of: Probabilities, weight: float) -> Entries:
    mixture = of.q.lerp(of.p, weight)
    # Where the mixture is 0 its logarithm is multiplied by 0, so any finite number does.
    log_m = mixture.masked_fill(mixture == 0, 1.0).log()
    slope = (of.log_p - log_m) * of.p * weight
    return Entries((of.log_q - log_m) * of.q * (1.0 - weight) + slope, slope)


DIVERGENCES: dict[str, Divergence] = {
    divergence.name: divergence
    for divergence in (
        Divergence(
            "reverse_kl",
            "KL(p || q)",
            "student",
            _reverse_kl,
            _reverse_kl_gradient,
            _reverse_kl_entries,
            note="KL(student || teacher)",
        ),
        Divergence("forward_kl", "KL(q || p)", "teacher", _forward_kl, _forward_kl_gradient, _forward_kl_entries),
        Divergence(
            "jsd",
            "w KL(p || m) + (1 - w) KL(q || m)",
            None,
            _jensen_shannon,
            _jensen_shannon_gradient,
            _jensen_shannon_entries,
        ),
    )
}
"""Every divergence by its name, in the order in which messages list them."""
