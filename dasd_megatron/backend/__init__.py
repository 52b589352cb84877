"""Where a run computes. Nothing outside this package asks whether there is a GPU.

Call :func:`select` before anything imports ``megatron.core``: the CPU backend has to prepare torch for it first.
"""

from __future__ import annotations

from types import ModuleType

from dasd_megatron.config import BackendConfig, ConfigError

_selected: ModuleType | None = None


def select(config: BackendConfig) -> ModuleType:
    """Install and return the backend named by ``config.kind``; :class:`ConfigError` when it cannot run on this machine.

    A backend is a module with ``install``, ``device``, ``init_process_group``, ``layer_spec``, ``transformer_config_overrides``,
    ``capabilities``, ``get_rng_state`` and ``set_rng_state``.
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


def current() -> ModuleType:
    """The backend that :func:`select` installed in this process."""
    if _selected is None:
        raise RuntimeError("no backend selected: call dasd_megatron.backend.select(config.backend) first")
    return _selected
