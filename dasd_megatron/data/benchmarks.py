"""Public benchmarks of mathematics: the sources of their problems, and the reading of a local file of them.

No problem comes with this package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasd_megatron.config import DataSourceConfig
from dasd_megatron.data.prompts import DataError, Problem, load_problems
from dasd_megatron.errors import ConfigError
from dasd_megatron.verify.answers import extract_answer


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A public benchmark and the source of its problems."""

    title: str
    problems: int
    """Number of problems in the test split."""
    source: str
    rights: str
    """Known facts about the licence."""
    aliases: tuple[str, ...] = ()
    """Other names of its folder."""


_FIELD_SETTING = re.compile(r"set data\.benchmark\.[a-z_]+,? or ")
_MAA = "problems by the Mathematical Association of America, all rights reserved"
# The names are those of NeMo-Skills, so that it finds the right metric for a folder of results.
BENCHMARKS = {
    "aime24": Benchmark("AIME 2024", 30, "NeMo-Skills, nemo_skills/dataset/aime24/test.txt", _MAA),
    "aime25": Benchmark("AIME 2025", 30, "NeMo-Skills, nemo_skills/dataset/aime25/test.txt", _MAA),
    "amc23": Benchmark("AMC 2023", 40, "QwenLM/Qwen2.5-Math, evaluation/data/amc23/test.jsonl", _MAA),
    "math-500": Benchmark("MATH-500", 500, "openai/prm800k, prm800k/math_splits/test.jsonl", "MIT", ("math500",)),
    "minerva_math": Benchmark(
        "Minerva",
        272,
        "QwenLM/Qwen2.5-Math, evaluation/data/minerva_math/test.jsonl",
        "problems from MIT OpenCourseWare, CC BY-NC-SA 4.0",
        ("minerva",),
    ),
    "olympiadbench": Benchmark(
        "OlympiadBench",
        675,
        "QwenLM/Qwen2.5-Math, evaluation/data/olympiadbench/test.jsonl",
        "of the problems themselves unclear",
    ),
    "hmmt_feb25": Benchmark(
        "HMMT February 2025", 30, "Hugging Face, MathArena/hmmt_feb_2025", "CC BY-NC-SA 4.0", ("hmmt25",)
    ),
    "gsm8k": Benchmark("GSM8K", 1319, "openai/grade-school-math, grade_school_math/data/test.jsonl", "MIT"),
}


def benchmark_problems(entries: list[str], data_dir: Path, size: int | None) -> dict[str, list[Problem]]:
    """Return the problems of each entry of ``evaluation.benchmarks``, by the name of its folder of results.

    An entry is a name of :data:`BENCHMARKS` or one of its aliases, read from ``<data_dir>/<name>/test.jsonl``, or the
    path of a JSONL file, whose name without its suffix is the folder's.

    Args:
        entries: names and paths.
        data_dir: folder of the benchmarks.
        size: problems to take from the head of each; None: all.

    Raises:
        ConfigError: an unknown name, or two entries with one name.
        DataError: a file that is missing, or that has an unusable problem.
    """
    found: dict[str, list[Problem]] = {}
    names = {alias: name for name, benchmark in BENCHMARKS.items() for alias in (name, *benchmark.aliases)}
    for entry in entries:
        name = names.get(entry, Path(entry).stem)
        if entry in names:
            path = _find_file(name, data_dir)
        elif entry.endswith(".jsonl"):
            path = Path(entry)
        else:
            raise ConfigError(
                f"evaluation.benchmarks: {entry} is none of {', '.join(BENCHMARKS)}, nor the path of a .jsonl file"
            )
        if name in found:
            raise ConfigError(
                f"evaluation.benchmarks has two that are called {name}: rename a file, or evaluate it into another "
                "run.dir"
            )
        try:
            problems = load_problems(
                DataSourceConfig(path=str(path)), "benchmark", needs_solution=False, prepare=usual_fields
            )
        except DataError as error:
            message = str(error).replace(
                "set data.benchmark.path to", f"evaluation.benchmarks names {entry}, which has to be"
            )
            # The names of a benchmark's fields are no setting.
            raise DataError(_FIELD_SETTING.sub("", message)) from error
        if size is not None and size > len(problems):
            raise DataError(
                f"{path} holds {len(problems)} problems, but evaluation.size asks for {size}: lower it, or set it to "
                "null for all"
            )
        found[name] = problems[:size]
    return found


def _find_file(name: str, data_dir: Path) -> Path:
    benchmark = BENCHMARKS[name]
    places = [data_dir / folder / "test.jsonl" for folder in (name, *benchmark.aliases)]
    for place in places:
        if place.is_file():
            return place
    raise DataError(
        f"{places[0]} does not exist: put {benchmark.title} there ({benchmark.source}; {benchmark.rights}), or set "
        "evaluation.data_dir"
    )


def usual_fields(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a record under this project's names of fields, from the names that the benchmarks' own files use.

    ``question`` is a problem. ``answer`` and the first of ``final_answer`` are expected answers; where there is
    neither, the answer is taken from the solution. ``solution`` is a reference solution.

    Raises:
        DataError: there is no problem or no answer; the message begins with ``where``.
    """
    solution = _first(record, "reference_solution", "solution")
    if isinstance(solution, list):
        solution = "\n".join(map(str, solution))
    answer = _first(record, "expected_answer", "answer", "final_answer")
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, str) and re.fullmatch(r"\$[^$]*\$", answer.strip()):
        answer = answer.strip().strip("$")
    if answer is None and isinstance(solution, str):
        answer = extract_answer(solution)
    problem = _first(record, "problem", "question")
    if problem is None or answer is None:
        raise DataError(
            f"{where}: no {'problem' if problem is None else 'answer'} (fields: {', '.join(map(repr, record))}): name "
            "it problem or question, and expected_answer, answer or final_answer"
        )
    fields = {"id": record.get("id"), "problem": problem, "expected_answer": answer, "reference_solution": solution}
    return {name: value for name, value in fields.items() if value is not None}


def _first(record: dict[str, Any], *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)
