"""Public benchmarks of mathematics: the sources of their problems, and the reading of a local file of them.

No problem comes with this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dasd_megatron.data.columns import ANSWER_FIELDS, PROBLEM_FIELDS, Columns, Remedies
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.data.reader import announce, read_problems, stem_of
from dasd_megatron.errors import ConfigError


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


_REMEDIES = Remedies(
    f"name its field {' or '.join(PROBLEM_FIELDS)}", f"name its field {' or '.join(ANSWER_FIELDS)}", "add one"
)
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


def benchmark_problems(
    entries: list[str],
    data_dir: Path,
    size: int | None,
    *,
    max_answer_chars: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Problem]]:
    """Return the problems of each entry of ``evaluation.benchmarks``, by the name of its folder of results.

    An entry is a name of :data:`BENCHMARKS` or one of its aliases, read from ``<data_dir>/<name>/test.jsonl``, or the
    path of a problem file, whose name without its suffix is the folder's.

    Args:
        entries: names and paths.
        data_dir: folder of the benchmarks.
        size: problems to take from the head of each; None: all.
        max_answer_chars: longest answer that can be graded; None: any.
        say: gets lines for people: where the problems were found, and that some repeat.

    Raises:
        ConfigError: an unknown name, or two entries with one name.
        DataError: a file that is missing, or that has an unusable problem. Problems that repeat are refused, but for
            those that the authors of a named benchmark have published twice.
    """
    found: dict[str, list[Problem]] = {}
    names = {alias: name for name, benchmark in BENCHMARKS.items() for alias in (name, *benchmark.aliases)}
    columns = Columns(_REMEDIES, needs_solution=False, max_answer_chars=max_answer_chars)
    for entry in entries:
        name = names.get(entry) or stem_of(Path(entry))
        if entry in names:
            path = _find_file(name, data_dir)
        elif "/" in entry or "." in entry:
            path = Path(entry)
        else:
            raise ConfigError(
                f"evaluation.benchmarks: {entry} is none of {', '.join(BENCHMARKS)}, nor the path of a problem file"
            )
        if name in found:
            raise ConfigError(
                f"evaluation.benchmarks has two that are called {name}: rename a file, or evaluate it into another "
                "run.dir"
            )
        read = read_problems(
            path, columns, path_setting="evaluation.benchmarks", size=size, size_setting="evaluation.size"
        )
        announce(read, say, may_repeat=entry in names and len(read.problems) <= BENCHMARKS[name].problems)
        found[name] = read.problems
    return found


def _find_file(name: str, data_dir: Path) -> Path:
    benchmark = BENCHMARKS[name]
    folders = [data_dir / folder for folder in (name, *benchmark.aliases)]
    places = [folder / f"test{suffix}" for suffix in (".jsonl", ".json", ".parquet") for folder in folders]
    for place in places:
        if place.is_file():
            return place
    raise DataError(
        f"{places[0]} does not exist: put {benchmark.title} there ({benchmark.source}; {benchmark.rights}), or set "
        "evaluation.data_dir"
    )
