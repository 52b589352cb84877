"""The CUDA backend: Megatron-Core on CUDA and NCCL, with Transformer Engine layers where it is installed."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from dasd_megatron.backend import blocks
from dasd_megatron.backend.base import NO_GPU_FOR_ROLLOUTS
from dasd_megatron.config import BackendConfig, PrecisionConfig
from dasd_megatron.errors import ConfigError


def install(config: BackendConfig) -> None:
    """Bind this process to its GPU; :class:`ConfigError` when there is none, or when Transformer Engine is asked for
    and missing."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "backend.kind=cuda, but torch sees no GPU: run on a GPU machine with a CUDA build of torch, or set "
            "backend.kind=cpu"
        )
    if config.transformer_impl == "transformer_engine" and not _transformer_engine_installed():
        raise ConfigError(
            "backend.transformer_impl=transformer_engine, but transformer-engine is not installed: install it, or "
            "write local"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"backend.kind=cuda: local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} visible): "
            "start fewer processes"
        )
    # With one queue, communication that was launched before a computation also starts before it. Megatron's overlap
    # relies on that.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(local_rank)
    torch.set_num_threads(config.threads)


def _transformer_engine_installed() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def process_environment() -> dict[str, str]:
    """Return nothing: no library needs a variable before Python runs."""
    return {}


# Each FP8 recipe needs at least this compute capability.
_FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def check_precision(config: PrecisionConfig) -> None:
    """Refuse (:class:`ConfigError`) what this GPU or this environment does not have."""
    if config.fp8 == "none":
        return
    if not _transformer_engine_installed():
        raise ConfigError(
            f"precision.fp8={config.fp8} needs transformer-engine, which is not installed: install it, or write none"
        )
    needed, found = _FP8_CAPABILITY[config.fp8], torch.cuda.get_device_capability()
    if found < needed:
        able = [name for name, capability in _FP8_CAPABILITY.items() if found >= capability]
        raise ConfigError(
            f"precision.fp8={config.fp8} needs compute capability {needed[0]}.{needed[1]}, and this GPU has "
            f"{found[0]}.{found[1]}: write one of {', '.join(['none', *able])}"
        )


def kernels(transformer_impl: str) -> dict[str, str]:
    """Return the implementation that each part of a training step runs on, by what is installed. Imports
    Megatron-Core."""
    from megatron.core.optimizer import Adam

    fused_gradients = transformer_config_overrides(transformer_impl)["gradient_accumulation_fusion"]
    layers = (
        "Transformer Engine"
        if uses_transformer_engine(transformer_impl)
        else "Megatron-Core local layers, PyTorch attention"
    )
    return {
        "layers": layers,
        "Adam": f"{Adam.__module__}.{Adam.__name__}",
        "weight gradients": "accumulated in the product (Apex)" if fused_gradients else "accumulated after the product",
        "token statistics": "Triton" if importlib.util.find_spec("triton") is not None else "PyTorch",
    }


def device() -> torch.device:
    """Return the GPU that this process is bound to."""
    return torch.device("cuda", torch.cuda.current_device())


def init_process_group(timeout_seconds: float) -> None:
    """Start NCCL, with gloo for host tensors; every collective fails after ``timeout_seconds``."""
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", timeout=datetime.timedelta(seconds=timeout_seconds), device_id=device()
    )


def collective_backend() -> str:
    """Return NCCL's name."""
    return "nccl"


def serving_device() -> torch.device:
    """Return a GPU that no rank of the trainer on this machine has, or else the first one, which is then shared."""
    # A cache that grows leaves blocks behind that are too small for it later. Segments that grow need no other place.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    count = torch.cuda.device_count()
    if not count:
        raise ConfigError(NO_GPU_FOR_ROLLOUTS)
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return torch.device("cuda", trainers if trainers < count else 0)


def free_memory(device: torch.device) -> int:
    """Return the bytes that no process on this GPU has taken."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def loss_block_tokens(columns: int) -> int:
    """Return what this GPU's memory allows."""
    return blocks.loss_block_tokens("cuda", _memory(), columns)


def kept_logits_bytes() -> int:
    """Return what this GPU's memory allows."""
    return blocks.kept_logits_bytes("cuda", _memory())


def _memory() -> int:
    return torch.cuda.get_device_properties(device()).total_memory


def release_cached_memory() -> None:
    """Let torch's allocator give back the blocks that hold no tensor."""
    torch.cuda.empty_cache()


def beside(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Return a context that puts its work on a stream of its own, and waits for it at the end."""
    return _on_stream_of_its_own(tensor)


@contextlib.contextmanager
def _on_stream_of_its_own(tensor: torch.Tensor) -> Iterator[None]:
    stream = torch.cuda.Stream(tensor.device)
    stream.wait_stream(torch.cuda.default_stream(tensor.device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def wait() -> None:
    """Wait for the kernels and copies of all streams."""
    torch.cuda.synchronize()


def host_memory(size: int) -> torch.Tensor:
    """Return pinned memory, uint8 [size]; MemoryError where it cannot be pinned."""
    # Torch's own pinned memory is rounded up to a power of two, which can be twice as much.
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Pages that are pinned cannot be shared with a forked process. It would get a copy of all of them.
    area.madvise(mmap.MADV_DONTFORK)
    memory = torch.frombuffer(area, dtype=torch.uint8)
    cudart, address = torch.cuda.cudart(), memory.data_ptr()
    status = int(cudart.cudaHostRegister(address, size, 0))
    if status != 0:
        raise MemoryError(f"{size / 1e9:.2f} GB of host memory could not be pinned (cudaHostRegister says {status})")
    weakref.finalize(memory, cudart.cudaHostUnregister, address)
    return memory


def readable_when_forked(host: torch.Tensor) -> torch.Tensor:
    """Return a copy, since a forked process does not have the pinned memory."""
    return host.clone()


def get_rng_state() -> torch.Tensor:
    """Return the state of the GPU's default generator, uint8."""
    return torch.cuda.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Continue the GPU's default generator from ``state``."""
    torch.cuda.set_rng_state(state)


def transformer_config_overrides(transformer_impl: str) -> dict[str, Any]:
    """Return the fields of the TransformerConfig that this backend fixes. Fusions that need Transformer Engine or Apex
    follow what is installed."""
    transformer_engine = uses_transformer_engine(transformer_impl)
    return dict(
        use_cpu_initialization=False,
        masked_softmax_fusion=transformer_engine,
        gradient_accumulation_fusion=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=transformer_engine,
        attention_softmax_in_fp32=True,
    )


def uses_transformer_engine(transformer_impl: str) -> bool:
    """Return True where layers are Transformer Engine's: as configured, or with ``auto`` wherever it is installed."""
    return transformer_impl == "transformer_engine" or (transformer_impl == "auto" and _transformer_engine_installed())
