"""The commands as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dasd_megatron.observability.metric_docs import FILES
from dasd_megatron.observability.metric_pages import find_metric
from tests.support.runs import NO_EVALUATION, SMALL, one_threaded, rows, train

pytestmark = pytest.mark.integration


def dasd(*arguments: str, timeout: float = 180) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dasd_megatron.cli", *arguments], capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The whole job, small: warm start, evaluation, training, evaluation, report; with its output."""
    path = tmp_path_factory.mktemp("job") / "run"
    installed = {"wandb": "logging.wandb=offline", "mlflow": "logging.mlflow=true"}
    trackers = [override for module, override in installed.items() if importlib.util.find_spec(module)]
    overrides = [
        "parallel=tp2",
        "run.steps=3",
        "warm_start.steps=5",
        "evaluation.every=2",
        "logging.tensorboard=true",
        *trackers,
    ]
    return path, train(*overrides, f"run.dir={path}")


def test_the_job_leaves_what_the_documentation_promises(run: tuple[Path, str]) -> None:
    path, output = run
    assert "Avg@2" in output and "Pass@1" in output and str(path / "report.html") in output
    assert "\x1b" not in output, "control characters in a log file"
    for name in (
        "config.yaml",
        "environment.json",
        "data/train.jsonl",
        "data/heldout.jsonl",
        "report.html",
        "checkpoints/latest",
    ):
        assert (path / name).is_file(), name
    environment = json.loads((path / "environment.json").read_text())
    assert environment["seed"] == 1 and environment["packages"]["megatron-core"] and environment["packages"]["torch"]
    assert [row["step"] for row in rows(path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in rows(path / "warm_start.jsonl")] == [1, 2, 3, 4, 5]
    assert [(row["label"], row["step"]) for row in rows(path / "evaluation.jsonl")] == [
        ("before", 0),
        ("step", 2),
        ("after", 3),
    ]
    assert [row["weight_version"] for row in rows(path / "metrics.jsonl")] == [
        "step_000000",
        "step_000001",
        "step_000002",
    ]
    assert len(list((path / "weights").iterdir())) == 1
    assert list((path / "tensorboard").rglob("events*"))


@pytest.mark.parametrize(
    ("name", "files"), [("wandb", "wandb/offline-run-*/run-*.wandb"), ("mlflow", "mlruns/*/*/metrics/reward/mean")]
)
def test_trackers_have_got_everything(run: tuple[Path, str], name: str, files: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    path, output = run
    state = json.loads((path / "trackers" / f"{name}.json").read_text())
    assert state["sent"] == {
        "warm_start.jsonl": 5,
        "metrics.jsonl": 3,
        "evaluation.jsonl before": 0,
        "evaluation.jsonl step": 2,
        "evaluation.jsonl after": 3,
    }
    assert state["trouble"] == "" and "gets no numbers" not in output and "has not got" not in output
    assert len(list(path.glob(files))) == 1


@pytest.mark.parametrize("file", FILES)
def test_every_metric_is_documented_and_is_there(run: tuple[Path, str], file: str) -> None:
    names = {name for row in rows(run[0] / file) for name in row}
    assert [name for name in names if find_metric(name, file) is None] == []
    found = {find_metric(name, file).name for name in names}
    assert {metric.name for metric in FILES[file] if not metric.when} - found == set()


def test_reasoning_health_stands_in_metrics_and_evaluations(run: tuple[Path, str]) -> None:
    path, _ = run
    common = ["length_p50", "epistemic_per_100", "repetition", "distinct_paths", "calibration_error", "step_accuracy"]
    for row in rows(path / "metrics.jsonl"):
        assert {f"health/{name}" for name in [*common, "entropy_decile_1", "entropy_from_0"]} <= row.keys()
        # Responses of fewer than ten tokens leave deciles out, so these are not a tenth each.
        deciles = [row[f"health/entropy_decile_{place}"] for place in range(1, 11)]
        assert min(deciles) < row["entropy/mean"] < max(deciles)
        assert row["seconds/health"] > 0 and row["watch/warnings"] == 0
        assert row["credit/pushed_log_prob_mean"] < 0
    for row in rows(path / "evaluation.jsonl"):
        assert {f"health/{name}" for name in [*common, "nll_decile_1", "nll_from_0"]} <= row.keys()
        folder = path / "evaluations" / f"{row['label']}-step_{row['step']:06d}"
        table = json.loads((folder / "health.json").read_text())["calibration"]
        assert sum(entry["responses"] for entry in table) == row["num_problems"] * row["num_samples"]


def test_the_trained_model_is_a_hugging_face_directory(run: tuple[Path, str]) -> None:
    path, _ = run
    tokenizer = AutoTokenizer.from_pretrained(path / "model")
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 2 ="}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] == prompt.shape[1] + 3


def test_trainer_and_server_agree_on_log_probs(run: tuple[Path, str]) -> None:
    """The same weights, tokens and temperature give the same numbers in Megatron and in the rollout server."""
    for row in rows(run[0] / "metrics.jsonl"):
        assert row["rollout/log_prob_diff_max"] < 1e-4
        assert 0 <= row["rollout/kl"] < 1e-8


def test_evaluate_repeats_the_last_evaluation(run: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = run
    result = dasd("evaluate", *SMALL, "model=hf", f"model.path={path / 'model'}", f"run.dir={tmp_path}")
    assert result.returncode == 0 and "Avg@2" in result.stdout, result.stdout + result.stderr
    found, last = (
        json.loads((tmp_path / "metrics.json").read_text())["heldout"]["dasd"],
        rows(path / "evaluation.jsonl")[-1],
    )
    for name in ("avg@2", "pass@2", "maj@2", "response/length_mean", "nll_mean"):
        assert found[name] == last[name]
    # The same weights, as the trainer saved them.
    checkpoint = path / "checkpoints" / (path / "checkpoints" / "latest").read_text().strip()
    again = dasd("evaluate", *SMALL, "model=hf", f"model.path={checkpoint}", f"run.dir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "again" / "metrics.json").read_bytes() == (tmp_path / "metrics.json").read_bytes()


def test_report_is_written_again(run: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = run
    (path / "report.html").unlink()
    result = dasd("report", str(path))
    assert result.returncode == 0 and result.stdout.strip() == str(path / "report.html")
    assert (path / "report.html").is_file()
    other = tmp_path / "both.html"
    shutil.copytree(path, tmp_path / "again", ignore=shutil.ignore_patterns("checkpoints", "model", "start", "weights"))
    result = dasd("report", str(path), str(tmp_path / "again"), "--output", str(other))
    assert result.returncode == 0 and result.stdout.strip() == str(other) and "<h1>2 runs</h1>" in other.read_text()


def test_doctor_reports_this_machine() -> None:
    result = dasd("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for part in ("torch", "megatron-core", "transformer-engine", "sglang", "nemo", "apex", "gloo"):
        assert part in result.stdout.lower(), part


def test_unknown_commands_and_help() -> None:
    assert dasd("trian").returncode == 2
    listing = dasd("train", "--help").stdout
    assert "algorithm.scale_floor" in listing and "nats" in listing
    for absent in (["/nowhere"], [str(Path(__file__).parent)]):
        missing = dasd("report", *absent)
        assert missing.returncode == 1 and len(missing.stderr.strip().splitlines()) == 1


def test_under_an_outer_torchrun(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dasd_megatron.cli",
        "train",
    ]
    overrides = [*SMALL, *NO_EVALUATION, "parallel=tp2", "run.steps=1", f"run.dir={tmp_path / 'run'}"]
    environment = one_threaded()
    result = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 1
    wrong = subprocess.run(
        [*command, *overrides[:-1], "parallel.data_parallel_size=2", f"run.dir={tmp_path / 'other'}"],
        capture_output=True, text=True, timeout=180, env=environment,
    )  # fmt: skip
    assert wrong.returncode != 0 and "start 4 processes" in wrong.stderr
