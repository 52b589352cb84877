"""The device that a run computes on. Nothing outside this package asks whether there is a GPU.

Call :func:`select` before anything imports ``megatron.core``: the CPU backend has to prepare torch for it first.
"""

from __future__ import annotations

from dasd_megatron.backend.base import Backend
from dasd_megatron.config import BackendConfig
from dasd_megatron.errors import ConfigError

__all__ = ["Backend", "current", "process_environment", "select"]

_selected: Backend | None = None


def select(config: BackendConfig) -> Backend:
    """Install and return the backend named by ``config.kind``; :class:`ConfigError` when it cannot run on this
    machine."""
    global _selected
    chosen = _load(config.kind)
    chosen.install(config)
    _selected = chosen
    return chosen


def _load(kind: str) -> Backend:
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
    environment = {"OMP_NUM_THREADS": str(config.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if config.kind == "cpu":
        # By default glibc hands large freed blocks back to the system at once. Every activation then pays for its page
        # faults again, which is a tenth of the quickstart's step.
        environment |= {
            "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
            "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
            "MALLOC_TOP_PAD_": str(1 << 26),
        }
    return environment


def current() -> Backend:
    """Return the backend that :func:`select` installed in this process."""
    if _selected is None:
        raise RuntimeError("no backend selected: call dasd_megatron.backend.select(config.backend) first")
    return _selected
