"""The choice between PyTorch's and Triton's kernels."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dasd_megatron.losses import torch_kernels
from dasd_megatron.losses.statistics import Objective

IMPLEMENTATIONS = ("auto", "torch", "triton")


class Kernels(NamedTuple):
    """The three passes over a shard's logits; see :mod:`~dasd_megatron.losses.torch_kernels`."""

    local_partials: Callable[..., Tensor]
    second_sums: Callable[..., Tensor]
    """``mixture_sums``, or ``entry_sums`` where the entries are clipped."""
    backward: Callable[..., None]


def choose_kernels(
    implementation: str, tensors: tuple[Tensor, ...], chunk_size: int | None, objective: Objective
) -> Kernels:
    """Return the kernels for ``tensors``; ValueError on an unknown implementation and where Triton's do not fit.

    ``auto`` takes Triton for CUDA tensors where Triton is installed, and PyTorch otherwise and where Triton's kernels
    do not fit. Triton's take logits of any row stride whose columns lie side by side, in half or single precision.
    ``chunk_size`` is the PyTorch kernels' number of rows at once; Triton's need no buffers. Clipped entries have
    PyTorch kernels alone, which then make the second pass and the gradient beside Triton's first pass.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1, or None to choose it")
    fits = all(tensor.dtype != torch.float64 and tensor.stride(-1) == 1 for tensor in tensors)
    if implementation == "auto":
        implementation = (
            "triton" if fits and tensors[0].is_cuda and importlib.util.find_spec("triton") is not None else "torch"
        )
    if implementation == "triton":
        if not fits:
            raise ValueError(
                "implementation is 'triton', which needs tensors that are not float64 and whose last stride is 1; "
                "take 'auto'"
            )
        from dasd_megatron.losses import triton_kernels

        chosen = Kernels(triton_kernels.local_partials, triton_kernels.mixture_sums, triton_kernels.backward)
    else:
        chosen = Kernels(
            functools.partial(torch_kernels.local_partials, chunk_size=chunk_size),
            functools.partial(torch_kernels.mixture_sums, chunk_size=chunk_size),
            functools.partial(torch_kernels.backward, chunk_size=chunk_size),
        )
    if objective.entry_clip is None:
        return chosen._replace(second_sums=functools.partial(chosen.second_sums, weight=objective.jsd_weight))
    clip = torch_kernels.EntryClip(objective.divergence, objective.jsd_weight, objective.entry_clip)
    return Kernels(
        chosen.local_partials,
        functools.partial(torch_kernels.entry_sums, clip=clip, chunk_size=chunk_size),
        _clipped_backward(
            chosen.backward, functools.partial(torch_kernels.entry_backward, clip=clip, chunk_size=chunk_size)
        ),
    )


def _clipped_backward(plain: Callable[..., None], clipped: Callable[..., None]) -> Callable[..., None]:
    """Return the gradient's kernel for clipped entries, which is the plain one where nothing depends on them."""

    def backward(*arguments: Any, **coefficients: Any) -> None:
        (clipped if "entries" in coefficients else plain)(*arguments, **coefficients)

    return backward
