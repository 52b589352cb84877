"""Where a run computes. Nothing outside this package asks whether there is a GPU.

Call :func:`select` before anything imports ``megatron.core``: the CPU backend has to prepare torch for it first.
"""

from __future__ import annotations

from types import ModuleType

from dasd_megatron.config import BackendConfig
from dasd_megatron.errors import ConfigError

_selected: ModuleType | None = None


def select(config: BackendConfig) -> ModuleType:
    """Install and return the backend named by ``config.kind``; :class:`ConfigError` when it cannot run on this machine.

    A backend is a module with ``install``, ``check_precision``, ``kernels``, ``device``, ``init_process_group``,
    ``transformer_config_overrides``, ``uses_transformer_engine``, ``get_rng_state`` and ``set_rng_state``.
    """
    global _selected
    if config.kind == "cpu":
        from dasd_megatron.backend import cpu as module
    elif config.kind == "cuda":
        from dasd_megatron.backend import cuda as module
    else:
        raise ConfigError(f"backend.kind={config.kind!r} is unknown: write cpu or cuda")
    module.install(config)
    _selected = module
    return module


def process_environment(config: BackendConfig) -> dict[str, str]:
    """Environment variables that worker processes have to be started with; read by libraries before any Python runs."""
    # Spinning OpenMP threads starve the rollout server, and anything else on the machine, tenfold.
    environment = {"OMP_NUM_THREADS": str(config.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if config.kind == "cpu":
        # glibc hands large freed blocks back to the system at once, and every activation then pays for its page faults
        # again: a tenth of the quickstart's step.
        environment |= {
            "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
            "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
            "MALLOC_TOP_PAD_": str(1 << 26),
        }
    return environment


def current() -> ModuleType:
    """The backend that :func:`select` installed in this process."""
    if _selected is None:
        raise RuntimeError("no backend selected: call dasd_megatron.backend.select(config.backend) first")
    return _selected
