"""Functions of the user's own, named by their path in the configuration."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar, overload

from dasd_megatron.errors import ConfigError, first_line

T = TypeVar("T")


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
    # A module runs its author's code when it is imported.
    function = call_own(
        lambda: getattr(importlib.import_module(module_name), name),
        lambda text: ConfigError(
            f"{field}={path}: {text}; write module:function, of a module that Python finds (PYTHONPATH)"
        ),
    )
    if not callable(function):
        raise ConfigError(f"{field}={path} is {function!r} and no function")
    return function


def call_own(work: Callable[[], T], make_error: Callable[[str], Exception]) -> T:
    """Return the result of ``work``, which runs code of the user's own.

    That code may raise anything. A library that calls ``sys.exit`` raises SystemExit, which would end a thread and
    leave the run waiting for it. So everything becomes the error that ``make_error`` makes of a line that says what
    was raised. The exception is the interrupt of the person at the keyboard, which comes to the main thread alone.

    Raises:
        Exception: what ``make_error`` returns, where ``work`` fails.
    """
    try:
        return work()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        raise make_error(describe_raised(error)) from error


def function_path(function: Callable[..., Any]) -> str:
    """Return ``module:name`` of a function, for messages."""
    # A callable object, like a partial function, has no name.
    return f"{function.__module__}:{getattr(function, '__name__', repr(function))}"


def describe_raised(error: BaseException) -> str:
    """Return a line that says what the user's code has raised."""
    return f"{type(error).__name__}: {first_line(error)}"
