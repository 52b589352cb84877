"""The table of divergences between the student's distribution p and the teacher's q over the full vocabulary.

A :class:`Divergence` says which sums the kernels take and how the gradient follows from them, so nothing else compares
names. To add one, write its gradient here and its record in :data:`DIVERGENCES`; sums that no divergence has needed yet
are one more value of ``weighted_by`` and a branch in each kernel, where it is read. The functions call tensors' own
methods, so that this module, which the configuration takes its choices from, imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class GradientTerms(NamedTuple):
    """Per-token coefficients ``[T]`` that a divergence adds to the kernels' ``backward``; None stands for 0.

    The gradient at column v is ``p_v (constant + linear log p_v - cross X_v) - teacher_share q_v``, with X the
    logarithm of q, or of the mixture where the divergence uses it.
    """

    constant: Tensor
    linear: Tensor | None = None
    cross: Tensor | None = None
    teacher_share: Tensor | None = None


@dataclass(frozen=True)
class Divergence:
    """The sums and the gradient of one divergence."""

    name: str
    """``algorithm.divergence`` in the configuration."""
    formula: str
    weighted_by: Literal["student", "teacher"] | None
    """Whose probabilities weight the logarithms of both distributions in the sums of the first pass. None: a second
    pass sums both distributions against the mixture m = w p + (1 - w) q instead."""
    gradient: Callable[[Tensor, Tensor, float], GradientTerms]
    """From the incoming gradient ``[T]``, the value ``[T]`` in nats (KL(p || m) for one that uses the mixture), and the
    mixture's weight w of the student."""

    @property
    def uses_mixture(self) -> bool:
        return self.weighted_by is None


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


DIVERGENCES: dict[str, Divergence] = {
    divergence.name: divergence
    for divergence in (
        Divergence("reverse_kl", "KL(p || q)", "student", _reverse_kl_gradient),
        Divergence("forward_kl", "KL(q || p)", "teacher", _forward_kl_gradient),
        Divergence("jsd", "w KL(p || m) + (1 - w) KL(q || m)", None, _jensen_shannon_gradient),
    )
}
"""Every divergence by its name, in the order in which messages list them."""
