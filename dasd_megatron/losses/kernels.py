"""The choice between PyTorch's and Triton's kernels."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dasd_megatron.losses import torch_kernels

IMPLEMENTATIONS = ("auto", "torch", "triton")


class Kernels(NamedTuple):
    """The three passes over a shard's logits; see :mod:`~dasd_megatron.losses.torch_kernels`."""

    local_partials: Callable[..., Tensor]
    mixture_sums: Callable[..., Tensor]
    backward: Callable[..., None]


def choose_kernels(implementation: str, tensors: tuple[Tensor, ...], chunk_size: int | None) -> Kernels:
    """Return the kernels for ``tensors``; ValueError on an unknown implementation and where Triton's do not fit.

    ``auto`` takes Triton for CUDA tensors where Triton is installed, and PyTorch otherwise and where Triton's kernels
    do not fit. Triton's take logits of any row stride whose columns lie side by side, in half or single precision.
    ``chunk_size`` is the PyTorch kernels' number of rows at once; Triton's need no buffers.
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

        return Kernels(triton_kernels.local_partials, triton_kernels.mixture_sums, triton_kernels.backward)
    return Kernels(
        functools.partial(torch_kernels.local_partials, chunk_size=chunk_size),
        functools.partial(torch_kernels.mixture_sums, chunk_size=chunk_size),
        functools.partial(torch_kernels.backward, chunk_size=chunk_size),
    )
