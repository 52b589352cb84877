"""The section of the configuration for the trainer's devices and processes."""

from __future__ import annotations

from dataclasses import dataclass

from dasd_megatron.config.fields import setting


@dataclass
class BackendConfig:
    """The hardware of the trainer and the limits of its processes."""

    kind: str = setting(
        "cpu", "cpu (gloo, local layers) or cuda (NCCL); cuda without a GPU is refused", choices=("cpu", "cuda")
    )
    transformer_impl: str = setting(
        "auto",
        "auto, transformer_engine or local; auto takes Transformer Engine where it is installed",
        choices=("auto", "transformer_engine", "local"),
    )
    threads: int = setting(1, "CPU threads of each training process", low=1)
    offload: str = setting(
        "none",
        "memory of the trainer's devices that rollout servers on the same devices get while they sample: none; state "
        "(optimizer state, float32 weights and copies of the weights wait in host memory, gradients are given up); all "
        "(the policy's weights wait there too). Needs rollout.release_memory=true",
        choices=("none", "state", "all"),
    )
    timeout_seconds: float = setting(
        1800.0,
        "limit of every collective, of the process group's start-up and of nodes waiting for one another, seconds; "
        "more than rollout.step_timeout_seconds",
        low=1,
    )
