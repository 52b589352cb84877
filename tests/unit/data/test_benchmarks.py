from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dasd_megatron.data.benchmarks import BENCHMARKS, benchmark_problems
from dasd_megatron.data.prompts import DataError
from dasd_megatron.errors import ConfigError
from dasd_megatron.verify.answers import extract_answer
from dasd_megatron.verify.comparison import compare_answers

DATA = Path(os.environ.get("DASD_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))

# As each source spells its lines; the last value is the answer that comes out.
LINES = {
    "aime25": (
        {"id": "aime25-0", "problem": "P", "expected_answer": "70", "reference_solution": r"so \boxed{70}"},
        "70",
    ),
    "amc23": ({"id": 0, "question": "P", "answer": 27.0, "url": "https://x"}, "27"),
    "math-500": (
        {"problem": "P", "solution": r"so \boxed{\frac{1}{2}}", "answer": r"\frac{1}{2}", "unique_id": "a"},
        r"\frac{1}{2}",
    ),
    "minerva_math": ({"problem": "P", "solution": r"the answer is \boxed{1e-3}", "type": "astronomy"}, "1e-3"),
    "olympiadbench": ({"id": 7, "question": "P", "solution": ["one", "two"], "final_answer": ["$2,4$"]}, "2,4"),
    "hmmt_feb25": ({"problem_idx": 1, "problem": "P", "answer": "103", "problem_type": ["Algebra"]}, "103"),
    "gsm8k": ({"question": "P", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}, "1,004"),
}


def put(folder: Path, name: str, *records: object) -> Path:
    path = folder / name / "test.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("name", LINES)
def test_each_source_is_read_as_it_is(name: str, tmp_path: Path) -> None:
    record, answer = LINES[name]
    put(tmp_path, name, record)
    ((found, (problem,)),) = benchmark_problems([name], tmp_path, None).items()
    assert found == name and name in BENCHMARKS
    assert (problem.problem, problem.expected_answer) == ("P", answer)


def test_folders_of_other_names_files_and_sizes(tmp_path: Path) -> None:
    put(tmp_path, "math500", *({"problem": str(i), "answer": i} for i in range(5)))
    own = put(tmp_path, "mine", {"problem": "1", "expected_answer": 1}).rename(tmp_path / "mine.jsonl")
    found = benchmark_problems(["math500", str(own)], tmp_path, 1)
    assert {name: [problem.id for problem in problems] for name, problems in found.items()} == {
        "math-500": ["test-0"],
        "mine": ["mine-0"],
    }


@pytest.mark.parametrize(
    ("entries", "size", "message"),
    [
        (["gsm8"], None, "gsm8 is none of aime24"),
        (["aime24"], None, r"aime24/test.jsonl does not exist: put AIME 2024 there \(NeMo-Skills"),
        (["math-500", "math500"], None, "two that are called math-500"),
        (["math500"], 9, "holds 1 problems, but evaluation.size asks for 9"),
        (["gsm8k"], None, r"gsm8k/test.jsonl line 2: no answer \(fields: 'problem'\)"),
        (
            ["nowhere.jsonl"],
            None,
            "nowhere.jsonl does not exist; set evaluation.benchmarks to JSON lines, a JSON array or Parquet",
        ),
    ],
)
def test_what_cannot_be_read_is_named(entries: list[str], size: int | None, message: str, tmp_path: Path) -> None:
    put(tmp_path, "math-500", {"problem": "1", "answer": "1"})
    put(tmp_path, "gsm8k", {"question": "1", "answer": "#### 1"}, {"problem": "1"})
    with pytest.raises((ConfigError, DataError), match=message):
        benchmark_problems(entries, tmp_path, size)


def test_a_problem_that_its_authors_published_twice_is_said_and_more_are_refused(tmp_path: Path) -> None:
    rows = [{"problem": f"p{index}", "answer": "1"} for index in range(29)]
    put(tmp_path, "aime24", *rows, rows[3])
    said: list[str] = []
    assert len(benchmark_problems(["aime24"], tmp_path, None, say=said.append)["aime24"]) == 30
    assert "30 problems, 29 distinct: line 30 repeats line 4" in said[-1]
    path = put(tmp_path, "aime24", *rows, *rows)
    for entry in ("aime24", str(path)):
        with pytest.raises(DataError, match="58 problems, 29 distinct: line 30 repeats line 1; confidence"):
            benchmark_problems([entry], tmp_path, None)
    assert len(benchmark_problems(["aime24"], tmp_path, 29)["aime24"]) == 29


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl.gz", "mine.parquet", "folder/mine"])
def test_paths_of_other_forms(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; set evaluation.benchmarks"):
        benchmark_problems([str(tmp_path / name)], tmp_path, None)
    put(tmp_path, "aime24", {"problem": "1", "answer": 1}).rename(tmp_path / "aime24" / "test.json")
    assert len(benchmark_problems(["aime24"], tmp_path, None)["aime24"]) == 1


@pytest.mark.skipif(
    not DATA.is_dir(),
    reason=f"no benchmark files in {DATA}; set DASD_TEST_DATA to a folder with gsm8k, math500 and aime24",
)
def test_real_files() -> None:
    found = benchmark_problems(["gsm8k", "math500", "aime24"], DATA, None)
    for name, problems in found.items():
        assert len(problems) == BENCHMARKS[name].problems
        if name != "aime24":  # some of whose solutions mark other things too
            assert all(
                compare_answers(extract_answer(problem.reference_solution), problem.expected_answer)
                for problem in problems
            )
