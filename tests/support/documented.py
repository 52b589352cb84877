"""The commands that the documentation tells people to type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
_PROGRAMS = (
    r"(?:dasd|make|python|pip|python3\.11|sbatch|bash|torchrun|docker|docker/\S+|tools/\S+|enroot|apptainer"
    r"|\.venv\S*/bin/\w+)"
)


class Command(NamedTuple):
    text: str
    needs: str | None
    """The words of its comment after ``needs``, like ``a cluster``: something that the tests' machines lack."""


def commands(page: str) -> list[Command]:
    """Every command in a page's code blocks, lines joined and without its comment."""
    lines = re.findall(r"^    (?! )((?:.*\\\n)*.*)", page, re.MULTILINE)
    for block in re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        lines += re.findall(r"((?:.*\\\n)*.+)", block)
    found = []
    for line in lines:
        text, _, comment = re.sub(r"\\\n\s*", "", line).partition(" #")
        if re.match(rf"(?:[A-Z_]+=\S+ )*{_PROGRAMS} ", text):
            needs = re.search(r"\bneeds (an? \w+|\w+)", comment)
            found.append(Command(text.strip(), needs and needs.group(1)))
    return found
