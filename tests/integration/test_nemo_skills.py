"""Real NeMo-Skills, in the environment whose interpreter NEMO_SKILLS_PYTHON names; docs/evaluation.md says how it is
made."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dasd_megatron.config import EvaluationConfig, TinyModelConfig
from dasd_megatron.evaluation.nemo_skills import check_metrics, compare_grading, read_graded
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.observability.progress import ProgressDisplay
from tests.support.runs import rows
from tests.support.servers import sglang_python

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PYTHON = os.environ.get("NEMO_SKILLS_PYTHON")
GOLDEN = Path(__file__).parents[1] / "unit" / "verify" / "nemo_skills_graded.jsonl"
# Its metrics of every folder in one process: starting it takes seconds.
MEASURE = """
import glob, json, sys
from nemo_skills.evaluation.metrics import ComputeMetrics
folders = sorted(glob.glob(sys.argv[1] + "/*/"))
found = {}
for folder in folders:
    files = glob.glob(folder + "output-rs*.jsonl")
    found[folder.rstrip("/").split("/")[-1]] = ComputeMetrics("x", metric_type="math").compute_metrics(files)["_all_"]
json.dump(found, open(sys.argv[1] + "/metrics.json", "w"))
"""


@pytest.fixture
def python() -> str:
    if not PYTHON:
        pytest.skip("no NeMo-Skills: set NEMO_SKILLS_PYTHON to the interpreter of its environment")
    return PYTHON


def put(folder: Path, records: list[list[dict]]) -> None:
    folder.mkdir(parents=True)
    for sample in range(len(records[0])):
        (folder / f"output-rs{sample}.jsonl").write_text("".join(json.dumps(row[sample]) + "\n" for row in records))


def test_metrics_are_its_own_on_random_outcomes(python: str, tmp_path: Path) -> None:
    """Every number of metrics.json, on 60 random matrices with many ties, missing answers and up to 12 samples."""
    for number in range(60):
        problems, samples, right = random.randint(1, 9), random.randint(1, 12), random.random()
        records = []
        for problem in range(problems):
            row = []
            for _ in range(samples):
                answer = random.choice(["1", "2", "3", None])
                correct = answer is not None and random.random() < right
                row.append(
                    {
                        "problem": f"{problem}",
                        "expected_answer": "1",
                        "generation": "",
                        "predicted_answer": answer,
                        "symbolic_correct": correct,
                        "num_generated_tokens": random.randint(1, 999),
                    }
                )
            records.append(row)
        put(tmp_path / f"{number}", records)
    subprocess.run([python, "-c", MEASURE, str(tmp_path)], check=True, timeout=200, cwd=tmp_path, env=environment())
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert len(found) == 60
    check_metrics(tmp_path / "metrics.json", {name: read_graded(tmp_path / name) for name in found})


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_its_grader_says_what_the_golden_file_says(python: str, tmp_path: Path) -> None:
    golden = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    records = [[{"problem": f"{number}", **row}] for number, row in enumerate(golden)]
    put(tmp_path / "golden", records)
    settings = EvaluationConfig(nemo_skills="grade", nemo_skills_python=python)
    compare_grading(settings, tmp_path, {"golden": records}, ProgressDisplay(total_steps=0, stream=io.StringIO()))
    assert (tmp_path / "nemo_skills" / "differences.jsonl").read_text() == ""
    found = read_graded(tmp_path / "nemo_skills" / "golden")
    assert [row[0]["predicted_answer"] for row in found] == [row["predicted_answer"] for row in golden]


# Its short form in `make test` is the grading above, without a server.
@pytest.mark.drill
def test_ns_eval_asks_real_sglang(python: str, tmp_path: Path) -> None:
    config = TinyModelConfig(hidden_size=32, num_layers=2, num_attention_heads=4, head_dim=8, intermediate_size=48)
    model = make_tiny_model(tmp_path / "model", config, seed=1)
    sums = [{"problem": f"{n} + 1 =", "expected_answer": str(n + 1)} for n in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    command = [
        sys.executable,
        "-m",
        "dasd_megatron.cli",
        "evaluate",
        f"model.path={model}",
        f"evaluation.benchmarks=[{tmp_path / 'sums.jsonl'}]",
    ]
    command += [
        f"run.dir={tmp_path / 'run'}",
        "evaluation.samples=2",
        "rollout=sglang_cpu",
        f"rollout.sglang.python={sglang_python()}",
    ]
    command += [
        "rollout.max_new_tokens=16",
        "rollout.max_prompt_tokens=200",
        "rollout.sglang.max_total_tokens=4096",
        "rollout.threads=1",
    ]
    command += ["evaluation.nemo_skills=eval", f"evaluation.nemo_skills_python={python}", "verify.workers=0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ns eval: sums" in result.stdout
    written = rows(tmp_path / "run" / "nemo_skills" / "eval-results" / "sums" / "output-rs1.jsonl")
    assert len(written) == 4 and all(row["num_generated_tokens"] > 0 for row in written)
