"""The device that a run computes on: how a process is prepared for it, and the layers, collectives and environment that
fit it. Code that is given a tensor asks the tensor for its device.

Call :func:`select` before anything imports ``megatron.core``: the CPU backend has to prepare torch for it first.
"""

from __future__ import annotations

import subprocess
import sys

from dasd_megatron.backend.base import NO_GPU_FOR_ROLLOUTS, Backend
from dasd_megatron.config import BackendConfig
from dasd_megatron.errors import ConfigError

__all__ = ["Backend", "check_devices", "current", "load", "process_environment", "select"]

_selected: Backend | None = None


def select(config: BackendConfig) -> Backend:
    """Install and return the backend named by ``config.kind``; :class:`ConfigError` when it cannot run on this
    machine."""
    global _selected
    chosen = load(config.kind)
    chosen.install(config)
    _selected = chosen
    return chosen


def load(kind: str) -> Backend:
    """Return the backend of a kind of device, without a change to this process; :class:`ConfigError` for an unknown
    kind."""
    # Each is imported only where it is chosen, for the CPU's changes torch.
    if kind == "cpu":
        from dasd_megatron.backend import cpu

        return cpu
    if kind == "cuda":
        from dasd_megatron.backend import cuda

        return cuda
    raise ConfigError(f"backend.kind={kind!r} is unknown: write cpu or cuda")


def process_environment(config: BackendConfig) -> dict[str, str]:
    """Return the environment variables that worker processes have to be started with, since libraries read them before
    any Python runs."""
    # Spinning OpenMP threads make the rollout server, and anything else on the machine, ten times slower.
    common = {"OMP_NUM_THREADS": str(config.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return common | load(config.kind).process_environment()


def check_devices(config: BackendConfig, processes: int, rollout_device: str = "cpu") -> None:
    """Refuse (ConfigError) more processes on this machine than it has GPUs, and a rollout server on a GPU where there
    is none. Imports no torch.

    Args:
        processes: training processes on this machine; rollout_device: that of the server which this machine starts.
    """
    # The launcher has to block signals before torch makes threads, so it is not asked to load a backend for this.
    needed = processes if config.kind == "cuda" else 0
    if not needed and rollout_device != "cuda":
        return
    # Another process asks torch, since the launcher must not have a CUDA context beside its workers'.
    probe = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = int(probe.stdout)
    if found < needed:
        raise ConfigError(
            f"backend.kind=cuda: the parallel sizes need {needed} GPUs on this machine and torch sees "
            f"{found}; lower them, start on more machines, or set backend.kind=cpu"
        )
    if not found:
        raise ConfigError(NO_GPU_FOR_ROLLOUTS)


def current() -> Backend:
    """Return the backend that :func:`select` installed in this process."""
    if _selected is None:
        raise RuntimeError("no backend selected: call dasd_megatron.backend.select(config.backend) first")
    return _selected
