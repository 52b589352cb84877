"""Named numbers of graded responses, from the function of the user's own that ``verify.measures`` names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from dasd_megatron.plugins import PluginError, call_own, function_path
from dasd_megatron.samples import LARGEST_REWARD, Sample

MOST_MEASURES = 32
"""Names that one function may give, over all responses."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")


class MeasureError(PluginError):
    """The user's function of measures failed, or gave what are no named numbers."""


class Measures:
    """The user's function, with the names that it has given so far."""

    def __init__(self, function: Callable[[Sample], Mapping[str, Any]]) -> None:
        self.function = function
        self._names: set[str] = set()

    def of(self, sample: Sample) -> dict[str, float]:
        """Return the numbers of a graded sample, without those that are None.

        Raises:
            MeasureError: the function failed, or gave something else, or more than :data:`MOST_MEASURES` names by now;
                the message names it and the sample.
        """
        path = function_path(self.function)
        where = f"verify.measures: {path} on problem {sample.problem_id}, sample {sample.sample}"
        found = call_own(
            lambda: {
                name: float(value) for name, value in dict(self.function(sample.copy())).items() if value is not None
            },
            lambda text: MeasureError(f"{where}: {text}; return a dict of names and numbers"),
        )
        for name, value in found.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise MeasureError(
                    f"{where} gave the name {name!r:.80}; a name has lower-case letters, digits and '_', and begins "
                    "with a letter"
                )
            if not (math.isfinite(value) and abs(value) <= LARGEST_REWARD):
                raise MeasureError(f"{where} gave {name}={value}; a measure is a finite number, or None for none")
        self._names.update(found)
        if len(self._names) > MOST_MEASURES:
            raise MeasureError(f"{where}: over {MOST_MEASURES} names by now, like {name}; give fewer")
        return found
