"""The results files of benchmarks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# A path from the root of a file system, or of a home directory, on its own or behind "name=".
ABSOLUTE_PATH = re.compile(r"(?<![^\s=:,'\"\[(])~?/(?:[^\s/,'\"\])]+/)*([^\s/,'\"\])]+)/?")


def without_places(value: Any) -> Any:
    """Return ``value``, in which every absolute path is only its last name: a result says which model it is of, and not
    where that lay on one machine."""
    if isinstance(value, dict):
        return {without_places(name): without_places(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(entry) for entry in value]
    if isinstance(value, Path):
        value = str(value)
    return ABSOLUTE_PATH.sub(r"\1", value) if isinstance(value, str) else value


def write_record(path: Path, record: Any, *, indent: int = 2) -> None:
    """Write a benchmark's results as JSON, without places of the machine."""
    path.write_text(json.dumps(without_places(record), indent=indent) + "\n")
