"""The three readers of problem files, each with what it takes and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dasd_megatron.commands.prepare_data import main
from dasd_megatron.config import DataSourceConfig
from dasd_megatron.data.benchmarks import benchmark_problems
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.data.reader import load_problems

MAX_ANSWER_CHARS = 512


class Outcome(NamedTuple):
    """The problems as (problem, answer, solution), or the error; and the lines for people."""

    problems: list[tuple[str, str, str]]
    error: str
    said: list[str]


def train(path: Path) -> Outcome:
    """Read a file as ``data.train.path`` of a run whose teacher sees answers."""
    said: list[str] = []
    return _outcome(
        lambda: load_problems(
            DataSourceConfig(path=str(path)),
            "train",
            needs_solution=False,
            max_answer_chars=MAX_ANSWER_CHARS,
            say=said.append,
        ),
        said,
    )


def evaluate(path: Path) -> Outcome:
    """Read a file as one of ``evaluation.benchmarks``."""
    said: list[str] = []
    return _outcome(
        lambda: next(
            iter(
                benchmark_problems(
                    [str(path)], Path("."), None, max_answer_chars=MAX_ANSWER_CHARS, say=said.append
                ).values()
            )
        ),
        said,
    )


def prepare(path: Path) -> Outcome:
    """Make a file of this project's form with ``tools/prepare_data.py``, and train on that."""
    output = path.with_name(f"{path.name}-prepared.jsonl")
    try:
        main(["--input", str(path), "--output", str(output), "--allow-missing-solution"])
    except DataError as error:
        return Outcome([], str(error), [])
    found = json.loads(output.with_suffix(".manifest.json").read_text())["found"]
    return train(output)._replace(said=found)


USERS = {"training": train, "evaluation": evaluate, "preparation": prepare}


def _outcome(read: Callable[[], list[Problem]], said: list[str]) -> Outcome:
    try:
        problems = read()
    except DataError as error:
        return Outcome([], str(error), said)
    return Outcome(
        [(problem.problem, problem.expected_answer, problem.reference_solution) for problem in problems], "", said
    )
