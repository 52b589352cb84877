"""Fields of the configuration: each has its default, its documentation, its bounds and its choices in one place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

REQUIRED: Any = "???"
"""Default of a field that has to be given. The text is OmegaConf's mark of a missing value, so that no section needs to
import it."""

FUNCTION_PATH = re.compile(r"[\w.]+:\w+")
"""``module:function``, the form in which fields name Python functions; see
:func:`dasd_megatron.plugins.load_function`."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds and choices of a field; None leaves a side open, and no choices leave all values.

    ``low`` and ``high`` are inclusive bounds. The value itself may not reach ``above`` and ``below``.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Make a field of a section.

    Args:
        default: the value, :data:`REQUIRED`, or the class of a section within the section. Lists and dicts are copied.
        doc: its documentation, with its unit.
        low, high, above, below, choices: see :class:`Limits`.
    """
    metadata = {"doc": doc, "limits": Limits(low, high, above, below, choices)}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def limits_of(field: dataclasses.Field[Any]) -> Limits:
    """Return what a field that :func:`setting` made accepts."""
    limits: Limits = field.metadata["limits"]
    return limits


def walk_fields(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield (dotted name, field) for every field of a section's class and of the sections within, in their order."""
    for field in dataclasses.fields(section):
        inner = field.default_factory
        if dataclasses.is_dataclass(inner):
            yield from walk_fields(inner, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field
