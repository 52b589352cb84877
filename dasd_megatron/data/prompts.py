"""Problems, and the form in which this project writes them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dasd_megatron.files import atomic_file
from dasd_megatron.reading import read_written

# NFKC would make 32 of a power of three.
_RAISED = str.maketrans(
    {chr(code): f"^{unicodedata.normalize('NFKC', chr(code))}" for code in (0xB2, 0xB3, 0xB9, *range(0x2070, 0x2080))}
    | {chr(code): f"_{unicodedata.normalize('NFKC', chr(code))}" for code in range(0x2080, 0x208F)}
)


class DataError(ValueError):
    """A problem set that cannot be used. The message names the file, the line, the field and the fix."""


class NoAnswerError(DataError):
    """A row without an answer that a response could be compared with, like that of a proof."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with its answer; ``reference_solution`` is empty where the source has none."""

    id: str
    problem: str
    expected_answer: str
    reference_solution: str


_SHAPE = {field.name: str for field in fields(Problem)}


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems as JSON lines, which :func:`read_written_problems` reads back.

    The file appears whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems)


def read_written_problems(path: Path) -> list[Problem]:
    """Return the problems that :func:`write_problems` has written, as they were.

    Raises:
        UnreadableError: the file is missing or damaged.
    """
    return read_written(path, _SHAPE, lambda row: Problem(**{name: row[name] for name in _SHAPE}))


def normalize_text(text: str) -> str:
    """Return the text by which two problems count as the same: Unicode NFKC, case folded, runs of white space as one
    space. Raised and lowered digits stay told apart from others."""
    return " ".join(unicodedata.normalize("NFKC", text.translate(_RAISED)).casefold().split())


def check_disjoint(train: Sequence[Problem], heldout: Sequence[Problem]) -> None:
    """Refuse held-out problems that also stand in the training set, compared by :func:`normalize_text`.

    Raises:
        DataError: names the first held-out problem that is also trained on, and how many there are.
    """
    trained = {normalize_text(problem.problem): problem.id for problem in train}
    shared = [problem for problem in heldout if normalize_text(problem.problem) in trained]
    if shared:
        first = shared[0]
        raise DataError(
            f"held-out problem {first.id!r} also stands in the training set, as "
            f"{trained[normalize_text(first.problem)]!r}: {first.problem[:80]!r} ({len(shared)} such in all); "
            "remove them from data.train or data.heldout"
        )
