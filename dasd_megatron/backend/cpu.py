"""The CPU backend: Megatron-Core on CPU and gloo, with a shim that lets it run there unpatched.

Megatron-Core names CUDA in a handful of places that have an exact CPU meaning. :func:`install` gives each of them that
meaning, in this process only and only when the configuration asks for the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._device import _device_constructors

from dasd_megatron import machine
from dasd_megatron.backend import blocks
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


def _replace(owner: Any, **members: Any) -> None:
    """Put other members into a module or class."""
    for name, member in members.items():
        setattr(owner, name, member)


def install(config: BackendConfig) -> None:
    """Prepare torch in this process for Megatron-Core on CPU. Later calls only set the thread count."""
    global _installed
    torch.set_num_threads(config.threads)
    if _installed:
        return
    _installed = True
    # Megatron's jit_fuser is torch.compile, which needs a C++ compiler at run time and gains nothing here.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    _replace(torch, compile=lambda model=None, **_: model if model is not None else (lambda function: function))

    # Every process would print these warnings. They are expected here, or about streams, of which there are none.
    for message in (r".*Apex (is|are) not installed", r"When using async grad allreduce"):
        warnings.filterwarnings("ignore", message=message)

    _replace(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        # These are three functions, and not one under three names: torch.compile's tables have an entry for each
        # function.
        **{name: lambda *_, **__: None for name in ("synchronize", "empty_cache", "set_device")},
        # If this did nothing, Megatron's RNG tracker, and so dropout and initialisation, would stay unseeded.
        manual_seed=torch.manual_seed,
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
        Event=_Event,
        Stream=_Stream,
        **dict.fromkeys(("current_stream", "default_stream"), lambda *_, **__: _Stream()),
        stream=lambda *_: contextlib.nullcontext(),
    )
    # `with torch.device("meta")` knows the functions below by their identity, from its first use on. If that came after
    # this, it would know the replacements alone, and a model of 70B parameters would take real memory.
    _device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        _replace(torch, **{name: _cuda_literal_to_cpu(getattr(torch, name))})
    for owner in (torch.Tensor, torch.nn.Module):
        _replace(owner, cuda=lambda self, *_, **__: self)
    # Megatron's optimizer sorts parameters by the type string "torch.cuda.FloatTensor".
    tensor_type: Callable[..., Any] = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    _replace(torch.Tensor, type=type_as_on_cuda)

    import megatron.core.tensor_parallel.random as megatron_random

    # Megatron expects a GPU's generator to change and the CPU's to stay. Here one generator serves as both, so it would
    # warn each time.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )

    _replace(
        megatron_random,
        _get_cuda_rng_state=lambda *_, **__: torch.get_rng_state(),
        _set_cuda_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
    )


def process_environment() -> dict[str, str]:
    """Return the settings of the C library's allocator."""
    # By default glibc hands large freed blocks back to the system at once. Every activation then pays for its page
    # faults again, which is a tenth of the quickstart's step.
    return {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "MALLOC_TOP_PAD_": str(1 << 26),
    }


def check_precision(config: PrecisionConfig) -> None:
    """Accept everything that the configuration lets through."""


def kernels(transformer_impl: str) -> dict[str, str]:
    """Return the implementation that each part of a training step runs on."""
    return {
        "layers": "Megatron-Core local layers, PyTorch attention",
        "Adam": "torch.optim.AdamW",
        "token statistics": "PyTorch",
    }


def device() -> torch.device:
    """Return the CPU."""
    return torch.device("cpu")


def init_process_group(timeout_seconds: float) -> None:
    """Start gloo over the environment's rendezvous; every collective fails after ``timeout_seconds``."""
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_seconds))


def collective_backend() -> str:
    """Return gloo."""
    return "gloo"


def serving_device() -> torch.device:
    """Return the CPU."""
    return torch.device("cpu")


def free_memory(device: torch.device) -> int:
    """Return the bytes that the machine and a container's limit leave free."""
    return machine.free_memory()


def loss_block_tokens(columns: int) -> int:
    """Return the CPU's own choice."""
    return blocks.loss_block_tokens("cpu", 0, columns)


def kept_logits_bytes() -> int:
    """Return 0: the CPU keeps none."""
    return blocks.kept_logits_bytes("cpu", 0)


def release_cached_memory() -> None:
    """Let the C library give back what was freed; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def beside(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Return a context that does nothing, since a thread of the host holds up no other."""
    return contextlib.nullcontext()


def wait() -> None:
    """Do nothing: work is done when a call returns."""


def host_memory(size: int) -> torch.Tensor:
    """Return plain memory, uint8 [size], not filled."""
    return torch.empty(size, dtype=torch.uint8)


def readable_when_forked(host: torch.Tensor) -> torch.Tensor:
    """Return the same memory, of which a forked process has its own from then on."""
    return host


def get_rng_state() -> torch.Tensor:
    """Return the state of the default generator, uint8."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Continue the default generator from ``state``."""
    torch.set_rng_state(state)


def transformer_config_overrides(transformer_impl: str) -> dict[str, Any]:
    """Return the fields of the TransformerConfig that this backend fixes: no CUDA-only fusion, weights initialised on
    the host."""
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
    """Return False: Transformer Engine has no layers for the CPU."""
    return False
