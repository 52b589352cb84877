"""Functions of the user's own, named by their path in the configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, overload

from dasd_megatron.errors import ConfigError, first_line


class PluginError(RuntimeError):
    """A function of the user's own failed, or gave what cannot be used. It would fail again, so nothing tries again."""


@overload
def load_function(path: str, field: str) -> Callable[..., Any]: ...


@overload
def load_function(path: str | None, field: str) -> Callable[..., Any] | None: ...


def load_function(path: str | None, field: str) -> Callable[..., Any] | None:
    """Return the function at ``path``, ``module:function`` like ``my_package.rewards:score``; None for None.

    Args:
        path: where the function is, or None.
        field: the field of the configuration that names it, like ``verify.reward``; used in messages.

    Raises:
        ConfigError: no such module or function, or the module fails when it is imported.
    """
    if path is None:
        return None
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    # A module runs its author's code when it is imported.
    except Exception as error:
        raise ConfigError(
            f"{field}={path}: {type(error).__name__}: {first_line(error)}; write module:function, of a module that "
            "Python finds (PYTHONPATH)"
        ) from error
    if not callable(function):
        raise ConfigError(f"{field}={path} is {function!r} and no function")
    return function
