"""Megatron-Core on CPU and gloo: the shim that lets it run unpatched there, and the layer spec it needs.

Megatron-Core names CUDA in a handful of places that have an exact CPU meaning. :func:`install` gives each of them that
meaning, in this process only and only when the configuration asks for the CPU. Imported for its side effects before
``megatron.core``.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import time
import warnings
from typing import Any

import torch

from dasd_megatron.config import BackendConfig, PrecisionConfig

_installed = False


class _Event:
    """A torch.cuda.Event whose work is always done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded_at = 0.0

    def record(self, *_: Any) -> None:
        self.recorded_at = time.perf_counter()

    def elapsed_time(self, later: _Event) -> float:
        return (later.recorded_at - self.recorded_at) * 1e3

    def synchronize(self) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    """A torch.cuda.Stream on which everything is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()


def _cuda_literal_to_cpu(factory: Any) -> Any:
    """Wrap a tensor factory so that ``device="cuda"`` means the CPU."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def install(config: BackendConfig) -> None:
    """Prepare torch in this process for Megatron-Core on CPU; later calls only set the thread count."""
    global _installed
    torch.set_num_threads(config.threads)
    if _installed:
        return
    _installed = True
    # Megatron's jit_fuser is torch.compile, which needs a C++ compiler at run time and gains nothing here.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    torch.compile = lambda model=None, **_: model if model is not None else (lambda function: function)

    # True, expected, or about streams, which there are none of here, and printed by every process.
    for message in (r".*Apex (is|are) not installed", r"When using async grad allreduce"):
        warnings.filterwarnings("ignore", message=message)

    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *_, **__: None)
    # A no-op would leave Megatron's RNG tracker, and so dropout and initialisation, unseeded.
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.Event, cuda.Stream = _Event, _Stream
    cuda.current_stream = cuda.default_stream = lambda *_, **__: _Stream()
    cuda.stream = lambda *_: contextlib.nullcontext()

    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        setattr(torch, name, _cuda_literal_to_cpu(getattr(torch, name)))
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self
    # Megatron's optimizer sorts parameters by the type string "torch.cuda.FloatTensor".
    tensor_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_as_on_cuda

    import megatron.core.tensor_parallel.random as megatron_random

    # The one generator there is serves where Megatron expects a GPU's to change and the CPU's to stay.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def check_precision(config: PrecisionConfig) -> None:
    """Nothing that the configuration lets through is missing here."""


def kernels(transformer_impl: str) -> dict[str, str]:
    """Which implementation each part of a training step runs on."""
    return {
        "layers": "Megatron-Core local layers, PyTorch attention",
        "Adam": "torch.optim.AdamW",
        "token statistics": "PyTorch",
    }


def device() -> torch.device:
    return torch.device("cpu")


def init_process_group(timeout_seconds: float) -> None:
    """Start gloo over the environment's rendezvous; every collective fails after ``timeout_seconds``."""
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_seconds))


def get_rng_state() -> torch.Tensor:
    """State of the device's default generator, uint8."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    torch.set_rng_state(state)


def transformer_config_overrides(transformer_impl: str) -> dict[str, Any]:
    """TransformerConfig fields that this backend fixes: no CUDA-only fusion, weights initialised on the host."""
    return dict(
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        attention_softmax_in_fp32=True,
    )


def uses_transformer_engine(transformer_impl: str) -> bool:
    return False
