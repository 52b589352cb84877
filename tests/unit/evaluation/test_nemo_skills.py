"""NeMo-Skills' files are read and looked at; its commands are driven, here with a small stand-in for it that can fail
in its ways."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import textwrap
from pathlib import Path

import pytest

from dasd_megatron.config import Config, load_config
from dasd_megatron.data.prompts import Problem
from dasd_megatron.errors import ConfigError
from dasd_megatron.evaluation import nemo_skills
from dasd_megatron.evaluation.nemo_skills import compare_folders, compare_grading, read_graded, run_eval
from dasd_megatron.evaluation.sampling import EvaluationError
from dasd_megatron.observability.progress import ProgressDisplay

REPOSITORY = Path(__file__).parents[3]
PROBLEMS = [Problem(f"p{i}", f"{i}+1 =", str(i + 1), "") for i in range(4)]
# Grades by equal text, as evaluate_results and as part of eval; FAULT says what goes wrong.
STAND_IN = """
    import glob, json, os, sys, time
    sys.path.append({repository!r})
    from pathlib import Path

    fault = os.environ.get("FAULT", "")

    def grade(file):
        rows = [json.loads(line) for line in open(file)]
        for row in rows:
            marked = "####" in row["generation"]
            row["predicted_answer"] = row["generation"].split("####")[1].strip() if marked else None
            row["symbolic_correct"] = row["predicted_answer"] == row["expected_answer"]
        if fault == "lines": rows = rows[:-1]
        if fault == "problem": rows[1]["problem"] = rows[0]["problem"]
        if fault == "field": del rows[0]["symbolic_correct"]
        if fault == "value": rows[0]["symbolic_correct"] = "yes"
        if fault == "torn":
            open(file, "w").write("".join(json.dumps(row) + "\\n" for row in rows)[:-9])
        else:
            open(file, "w").write("".join(json.dumps(row) + "\\n" for row in rows))

    def summarize(folder):
        from dasd_megatron.evaluation.pass_at_k import nemo_skills_metrics
        for part in folder.glob("*/"):
            columns = [[json.loads(line) for line in open(file)] for file in sorted(part.glob("output-rs*.jsonl"))]
            keys = "predicted_answer", "symbolic_correct", "num_generated_tokens"
            tables = ([[row.get(key, 0) for row in rows] for rows in zip(*columns)] for key in keys)
            found = nemo_skills_metrics(*tables)
            if fault == "metrics": found["pass@2"]["symbolic_correct"] += 1
            for place in (folder, part):
                (place / "metrics.json").write_text(json.dumps({{part.name: found}}))

    def main(options):
        print("working as", sys.executable, sys.argv)
        assert not any(name.startswith("PYTHON") for name in os.environ), "the trainer's environment has come along"
        if fault == "hang": time.sleep(60)
        if fault == "status": sys.exit("CUDA is not there")
        if fault == "crash": return  # with status 0
        if "input_files" in options:
            for file in glob.glob(options["input_files"]): grade(file)
        elif "benchmarks" in options:
            for part in options["benchmarks"].split(","):
                name, samples = part.split(":")
                folder = Path(options["output_dir"]) / "eval-results" / name
                folder.mkdir(parents=True)
                assert "METRICS_TYPE = 'math'" in (Path(options["data_dir"]) / name / "__init__.py").read_text()
                rows = [json.loads(line) for line in open(Path(options["data_dir"]) / name / "test.jsonl")]
                for sample in range(int(samples) - (fault == "files")):
                    for number, row in enumerate(rows):
                        row["generation"] = f"#### {{int(row['expected_answer']) + (number + sample) % 2}}"
                    (folder / f"output-rs{{sample}}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
                    grade(folder / f"output-rs{{sample}}.jsonl")
            assert options["server_address"] == "http://server/v1" and options["inference.temperature"] == "1.0"
            summarize(Path(options["output_dir"]) / "eval-results")
        else:
            summarize(Path(sys.argv[2]))

    main(dict(one.lstrip("+-").split("=", 1) for one in sys.argv[1:] if "=" in one))
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """With an interpreter that finds the stand-in as nemo_skills."""
    package = tmp_path / "environment" / "nemo_skills"
    for module in ("evaluation/evaluate_results", "pipeline/cli"):
        (package / module).parent.mkdir(parents=True, exist_ok=True)
        (package / module).with_suffix(".py").write_text(textwrap.dedent(STAND_IN).format(repository=str(REPOSITORY)))
    python = tmp_path / "environment" / "python"
    run_module = f"import sys; sys.path.insert(0, {str(package.parent)!r}); import runpy; sys.argv = sys.argv[1:]"
    run_module += "; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "{run_module}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return load_config(
        [
            "experiment=quickstart",
            "evaluation.nemo_skills=grade",
            f"evaluation.nemo_skills_python={python}",
            "evaluation.samples=2",
            "evaluation.ks=[1]",
            "evaluation.nemo_skills_timeout_seconds=20",
        ]
    )


def put(folder: Path, *columns: list[str | None], wrong: tuple[int, ...] = ()) -> list[list[dict]]:
    """Responses with these answers, one column a file, in NeMo-Skills' layout; those of the problems ``wrong`` called
    so, right or not."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        [
            {
                "problem": problem.problem,
                "expected_answer": problem.expected_answer,
                "generation": f"#### {answer}" if answer else "no",
                "predicted_answer": answer,
                "symbolic_correct": answer == problem.expected_answer and number not in wrong,
                "num_generated_tokens": 4 + number,
            }
            for answer in (column[number] for column in columns)
        ]
        for number, problem in enumerate(PROBLEMS)
    ]
    for sample in range(len(columns)):
        (folder / f"output-rs{sample}.jsonl").write_text("".join(json.dumps(row[sample]) + "\n" for row in records))
    return records


def display() -> ProgressDisplay:
    return ProgressDisplay(total_steps=0, stream=io.StringIO())


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path, *([str(sample)] * 4 for sample in range(11)))
    assert [record["predicted_answer"] for record in read_graded(tmp_path)[0]] == [
        "0",
        "1",
        "10",
        *map(str, range(2, 10)),
    ]


def test_grading_is_compared_and_differences_are_listed(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    records = put(run / "sums", ["1", "2", "3", "9"], ["1", None, "3", "4"], wrong=(2,))
    compare_grading(config.evaluation, run, {"sums": records}, display())
    output = capsys.readouterr().out
    assert "2 different verdicts" in output and "right in the second alone" in output
    found = [json.loads(line) for line in (run / "nemo_skills" / "differences.jsonl").read_text().splitlines()]
    assert [
        (row["problem"], row["first"]["symbolic_correct"], row["second"]["symbolic_correct"]) for row in found
    ] == 2 * [("2+1 =", False, True)]
    assert read_graded(run / "sums") == records, "our own files are not touched"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", "output-rs0.jsonl line 1 is no graded response .predicted_answer is missing"),
        ("status", "ended with status 1: .*CUDA is not there"),
        ("hang", "did not end within evaluation.nemo_skills_timeout_seconds"),
        ("lines", "has 3 problems and not just the 4"),
        ("problem", "has 4 problems and not just the 4"),
        ("field", "line 1 is no graded response .symbolic_correct is missing"),
        ("value", "line 1: symbolic_correct is 'yes'"),
        ("torn", "line 4 is no graded response .not JSON"),
        ("metrics", "sums pass@2 symbolic_correct is .* and by our formulas"),
    ],
)
def test_what_it_leaves_out_is_found_though_it_ends_well(
    fault: str, message: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", fault)
    if fault == "hang":
        config.evaluation.nemo_skills_timeout_seconds = 1.0
    records = put(tmp_path / "run" / "sums", ["1", "2", "3", "9"], ["1", None, "3", "4"])
    with pytest.raises(EvaluationError, match=message) as error:
        compare_grading(config.evaluation, tmp_path / "run", {"sums": records}, display())
    assert "\n" not in str(error.value)


def test_an_interpreter_that_is_none(config: Config, tmp_path: Path) -> None:
    config.evaluation.nemo_skills_python = str(tmp_path)
    records = put(tmp_path / "run" / "sums", ["1", "2", "3", "9"])
    with pytest.raises(ConfigError, match="nemo_skills_python=.* cannot be started"):
        compare_grading(config.evaluation, tmp_path / "run", {"sums": records}, display())


@pytest.mark.parametrize(
    ("fault", "message"), [("", None), ("files", "has 1 files of responses and not 2"), ("crash", "has no output-rs")]
)
def test_ns_eval(
    fault: str,
    message: str | None,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAULT", fault)
    evaluation, rollout = config.evaluation, config.rollout
    arguments = (evaluation, rollout, tmp_path, {"sums": PROBLEMS}, ["http://server"], tmp_path / "model", display())
    with pytest.raises(ConfigError, match="the embedded server lacks"):
        run_eval(*arguments)
    rollout.engine = "external"
    if message is None:
        run_eval(*arguments)
        assert "ns eval: sums 50.0% of 4 problems x 2" in capsys.readouterr().out
    else:
        with pytest.raises(EvaluationError, match=message):
            run_eval(*arguments)


def test_folders_that_cannot_be_compared(tmp_path: Path) -> None:
    put(tmp_path / "one" / "sums", ["1"] * 4)
    put(tmp_path / "two" / "sums", ["1"] * 4, ["2"] * 4)
    put(tmp_path / "three" / "eval-results" / "other", ["1"] * 4)
    with pytest.raises(EvaluationError, match="hold other problems or numbers of samples"):
        compare_folders(tmp_path / "one", tmp_path / "two")
    with pytest.raises(EvaluationError, match="no benchmark in common"):
        compare_folders(tmp_path / "one", tmp_path / "three")


def test_no_files_at_all(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="has no output-rs"):
        nemo_skills.read_graded(tmp_path)
    assert os.listdir(tmp_path) == []
