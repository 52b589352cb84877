"""Reading of problem files, for training and for evaluation."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dasd_megatron.config import DataSourceConfig
from dasd_megatron.data.columns import Columns, Remedies, Taken, columns_of, parse_record, summaries
from dasd_megatron.data.prompts import DataError, Problem, normalize_text
from dasd_megatron.data.rows import FORMS, read_rows

# A file of this project's own needs no words about where its problems were found.
_OWN_NAMES = {
    Taken("problem", "expected_answer", "reference_solution"),
    Taken("problem", "expected_answer", ""),
}


def load_problems(
    source: DataSourceConfig,
    name: str,
    *,
    needs_solution: bool = True,
    max_answer_chars: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Problem]:
    """Read problems from the file ``source.path``, in file order.

    :func:`dasd_megatron.data.rows.read_rows` says which files there are, and
    :func:`dasd_megatron.data.columns.parse_record` what is a problem of a row. With ``source.size`` the file is read up
    to that many problems and no further.

    Args:
        source: the file, its fields, and the number of problems.
        name: the place of ``source`` in the configuration, ``train`` or ``heldout``; used in messages. Held-out
            problems must not repeat.
        needs_solution: refuse problems without a reference solution.
        max_answer_chars: longest answer that can be graded; None: any.
        say: gets lines for people: where the problems were found, and that some repeat.

    Raises:
        DataError: the file is missing, unreadable, empty or too short, or a row is not a usable problem.
    """
    place = f"data.{name}"
    if source.path is None:
        raise DataError(f"{place}.path is not set; set it to {FORMS}")
    if source.size is not None and source.size < 1:
        raise DataError(f"{place}.size is {source.size}; it must be at least 1, or null for the whole file")
    remedies = Remedies(
        f"set {place}.problem_field",
        f"set {place}.answer_field",
        f"set {place}.solution_field, or teacher.privileged=[peer] or [answer], which need none",
    )
    read = read_problems(
        Path(source.path),
        columns_of(source, remedies, needs_solution, max_answer_chars),
        path_setting=f"{place}.path",
        size=source.size,
        size_setting=f"{place}.size",
    )
    announce(read, say, may_repeat=name == "train")
    return read.problems


@dataclass(frozen=True)
class ProblemFile:
    """The problems of a file, and what people should know of it."""

    path: Path
    problems: list[Problem]
    found: list[str]
    """Where the parts of the problems were found, in lines for people; empty if under this project's own names."""
    repeats: str
    """How many problems repeat others, and the first that does; empty if none."""


def read_problems(
    path: Path, columns: Columns, *, path_setting: str, size: int | None, size_setting: str
) -> ProblemFile:
    """Read the problems of a file, or the first ``size`` of them.

    A problem's id is its ``id`` field, else ``<name of the file>-<index of the row, from 0>``.

    Args:
        path: the file, a folder or a pattern.
        columns: the fields of its rows.
        path_setting, size_setting: the options that gave them, for messages.

    Raises:
        DataError: as :func:`load_problems`.
    """
    problems: list[Problem] = []
    taken: dict[Taken, int] = collections.Counter()
    places: dict[str, str] = {}
    place_of_id: dict[str, str] = {}
    repeats = ""
    for row in read_rows(path, path_setting):
        if isinstance(row.value, DataError):
            raise row.value
        problem, found = parse_record(row.value, row.where, f"{stem_of(path)}-{row.index}", columns)
        place = row.where.removeprefix(f"{path} ")
        if problem.id in place_of_id:
            raise DataError(
                f"{row.where}: id {problem.id!r} already stands on {place_of_id[problem.id]}; give each problem an id "
                "of its own"
            )
        place_of_id[problem.id] = place
        first = places.setdefault(normalize_text(problem.problem), place)
        if first != place and not repeats:
            repeats = f"{place} repeats {first}"
        problems.append(problem)
        taken[found] += 1
        if len(problems) == size:
            break
    if not problems:
        raise DataError(f"{path} holds no problems; {path_setting} needs {FORMS} with a problem in each row")
    if size is not None and len(problems) < size:
        raise DataError(
            f"{path} holds {len(problems)} problems, but {size_setting} asks for {size}; lower it, or set it to null "
            "for all"
        )
    if repeats:
        repeats = f"{len(problems)} problems, {len(places)} distinct: {repeats}"
    return ProblemFile(path, problems, [] if taken.keys() <= _OWN_NAMES else list(summaries(taken)), repeats)


def announce(read: ProblemFile, say: Callable[[str], None], *, may_repeat: bool) -> None:
    """Say where the problems of a file were found, and that some repeat.

    Raises:
        DataError: they repeat and may not. An evaluation takes its problems for independent.
    """
    for line in read.found:
        say(f"{read.path}: {line}")
    if not read.repeats:
        return
    if not may_repeat:
        raise DataError(
            f"{read.path}: {read.repeats}; confidence intervals would be too narrow: drop the repetitions with "
            "tools/prepare_data.py"
        )
    say(f"{read.path}: {read.repeats}; tools/prepare_data.py drops the repetitions")


def stem_of(path: Path) -> str:
    """Return the name of a problem file without what says its form."""
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return name.removesuffix(".gz").rpartition(".")[0] or name
