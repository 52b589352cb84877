"""The interface of a backend."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from dasd_megatron.config import BackendConfig, PrecisionConfig

if TYPE_CHECKING:
    import torch

NO_GPU_FOR_ROLLOUTS = (
    "rollout.device=cuda, but torch sees no GPU: run on a GPU machine with a CUDA build of torch, or set "
    "rollout.device=cpu"
)


class Backend(Protocol):
    """One kind of device that a run computes on. The modules ``cpu`` and ``cuda`` are the two implementations."""

    def install(self, config: BackendConfig) -> None:
        """Prepare this process; :class:`~dasd_megatron.errors.ConfigError` when the backend cannot run on this machine.

        Has to come before the first import of ``megatron.core``.
        """

    def process_environment(self) -> dict[str, str]:
        """Return the environment variables that worker processes on this device have to be started with."""

    def check_precision(self, config: PrecisionConfig) -> None:
        """Refuse (ConfigError) what this device, or what is installed here, cannot compute in."""

    def kernels(self, transformer_impl: str) -> dict[str, str]:
        """Return the implementation that each part of a training step runs on, for people to read."""

    def device(self) -> torch.device:
        """Return the device of this process."""

    def init_process_group(self, timeout_seconds: float) -> None:
        """Start the default process group over the environment's rendezvous. Every collective fails after
        ``timeout_seconds``."""

    def collective_backend(self) -> str:
        """Return torch's name of the collectives for tensors on this device."""

    def serving_device(self) -> torch.device:
        """Return the device for the model of a rollout server, in its own process, which need not be prepared for
        training; :class:`~dasd_megatron.errors.ConfigError` when this machine has none."""

    def free_memory(self, device: torch.device) -> int:
        """Return the bytes of ``device`` that no process has taken."""

    def loss_block_tokens(self, columns: int) -> int:
        """Return the tokens of one block of the fused loss's logits, of ``columns`` columns, on this process's device;
        see :func:`~dasd_megatron.backend.blocks.loss_block_tokens`."""

    def kept_logits_bytes(self) -> int:
        """Return the bytes of logits that the fused loss may keep on this process's device; see
        :func:`~dasd_megatron.backend.blocks.kept_logits_bytes`."""

    def release_cached_memory(self) -> None:
        """Give memory that this process has freed and kept back, so that other processes can take it."""

    def beside(self, tensor: torch.Tensor) -> AbstractContextManager[None]:
        """Return a context for work of a thread on ``tensor`` that nothing else on its device waits for.

        The work begins after all that was queued before. At the end of the context it is done.
        """

    def wait(self) -> None:
        """Wait until the device has done all that this process has asked of it."""

    def host_memory(self, size: int) -> torch.Tensor:
        """Return memory of the host that the device copies to and from at full speed, uint8 [size].

        Raises:
            MemoryError: the host has none; the message is one line.
        """

    def readable_when_forked(self, host: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`host_memory` holds, as a process that is forked now will see it, whatever this one does
        to it meanwhile."""

    def get_rng_state(self) -> torch.Tensor:
        """Return the state of the device's default generator, uint8 on the host."""

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Continue the device's default generator from a state of :meth:`get_rng_state`."""

    def transformer_config_overrides(self, transformer_impl: str) -> dict[str, Any]:
        """Return the fields of Megatron's TransformerConfig that this backend fixes."""

    def uses_transformer_engine(self, transformer_impl: str) -> bool:
        """Return True where the layers are Transformer Engine's, False where they are Megatron's local ones."""
