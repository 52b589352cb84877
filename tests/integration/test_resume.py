"""A run that is killed without warning and resumed ends with the metrics of one that was never killed."""

from __future__ import annotations

import json
import random
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dasd_megatron.training.checkpoint_files import hash_files
from tests.support.runs import finish, kill, reproducible, rows, rows_so_far, start, train, wait_for_steps

pytestmark = pytest.mark.integration

# Everything that a checkpoint has to carry: optimizer and schedule over several updates a step, an averaged teacher,
# the starting model for the KL penalty, a scheduled weight of the teacher, two ranks, and data that is reshuffled in
# the middle of the run (40 problems, 4 a step, 14 steps).
OVERRIDES = [
    "parallel=tp2",
    "run.steps=14",
    "batch.minibatches=2",
    "loss.kl_coef=0.05",
    "teacher.weights=ema",
    "algorithm.beta_schedule.style=cosine",
    "optimizer.decay_style=cosine",
    "optimizer.warmup_steps=4",
    "checkpoint.every=3",
    "checkpoint.export_every=12",
    "evaluation.before=false",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(*OVERRIDES, f"run.dir={path}")
    values = [row["schedule/beta"] for row in rows(path / "metrics.jsonl")]
    assert len(values) == 14 and values == sorted(values, reverse=True) and values[0] == 0.02 and values[-1] == 0.0
    return path


def test_killed_and_resumed_run_has_the_same_metrics(uninterrupted: Path, tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    # A random share of a step after the metrics of the step before came out. test_crash_matrix.py has other moments.
    step = draw.randint(1, 12)
    run = tmp_path / "run"
    process = start(*OVERRIDES, f"run.dir={run}")
    wait_for_steps(process, run, step)
    time.sleep(draw.random() * rows_so_far(run)[-1]["seconds/total"])
    kill(process)
    done = len(rows_so_far(run))
    assert done < 14, "killed too late to show anything"
    # A step's metrics come out before its checkpoint, so the third step may be there without the first checkpoint.
    has_checkpoint = (run / "checkpoints" / "latest").exists()
    output = train(*OVERRIDES, f"run.dir={run}", "resume=auto")
    assert ("resumed from" in output) == has_checkpoint
    assert reproducible(run / "metrics.jsonl") == reproducible(uninterrupted / "metrics.jsonl")
    assert reproducible(run / "evaluation.jsonl") == reproducible(uninterrupted / "evaluation.jsonl")


def test_resume_in_another_layout_goes_on_from_the_same_weights(uninterrupted: Path, tmp_path: Path) -> None:
    """The checkpoint reshards: two replicas continue what two tensor-parallel ranks began, with the same losses up to
    rounding."""
    train(
        *OVERRIDES, "parallel=single", "parallel.data_parallel_size=2", "evaluation=none",
        f"run.dir={tmp_path / 'run'}",
        f"resume={uninterrupted / 'checkpoints' / 'step_000012'}", f"rollout.replay={uninterrupted / 'rollouts'}",
    )  # fmt: skip
    expected, found = rows(uninterrupted / "metrics.jsonl")[12:], rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in found] == [13, 14]
    for row, other in zip(found, expected, strict=True):
        for name in ("update/loss", "update/grad_norm", "entropy/mean", "credit/delta_mean", "update/kl_to_start"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
        assert row["update/loss"] == pytest.approx(other["update/loss"], rel=0, abs=1e-5)


def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    newest = run / "checkpoints" / "step_000014"
    weights = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    with open(weights, "r+b") as file:
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    status, output = finish(start(*OVERRIDES, f"run.dir={run}", f"resume={newest}"))
    assert status == 1 and f"{weights} is not what dasd_manifest.json lists" in output and "Traceback" not in output, (
        output[-3000:]
    )
    output = train(*OVERRIDES, f"run.dir={run}", "resume=auto")
    assert f"{weights} is not what dasd_manifest.json lists" in output and "step_000012 at step 12" in output, output
    assert reproducible(run / "metrics.jsonl") == reproducible(uninterrupted / "metrics.jsonl")
    assert (run / "checkpoints" / "step_000014.damaged").is_dir()


def test_what_is_left_of_a_damaged_run_is_gone_on_from_or_refused_and_never_emptied(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    checkpoints, metrics = run / "checkpoints", run / "metrics.jsonl"

    def refusal(*overrides: str) -> str:
        before = {path: path.read_bytes() for path in (metrics, run / "evaluation.jsonl")}
        kept = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.exists() else []
        status, output = finish(start(*OVERRIDES, f"run.dir={run}", *overrides))
        assert status == 1 and "Traceback" not in output, output[-3000:]
        assert {path: path.read_bytes() for path in before} == before
        assert kept == (sorted(path.name for path in checkpoints.iterdir()) if checkpoints.exists() else [])
        return output

    # A checkpoint that cannot be loaded to the end: the later one is still there.
    earlier = checkpoints / "step_000012"
    torch.save(["no generators"] * 2, earlier / "rng.pt")
    manifest = json.loads((earlier / "dasd_manifest.json").read_text())
    manifest["files"] |= hash_files(earlier, ["rng.pt"])
    (earlier / "dasd_manifest.json").write_text(json.dumps(manifest))
    assert "rng.pt has no generators of this run" in refusal(f"resume={earlier}")
    # The complete checkpoints decide, and rows that are lost are said.
    (checkpoints / "latest").write_text("")
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines()[:11]))
    output = train(*OVERRIDES, f"run.dir={run}", "resume=auto")
    assert "step_000014 is the newest complete checkpoint" in output, output
    assert "is shorter than step_000014: it lacks 3 of the steps up to 14" in " ".join(output.split()), output
    # As on a disk that is not mounted.
    shutil.rmtree(checkpoints)
    assert "has had checkpoints" in refusal("resume=auto")


def test_going_back_to_an_earlier_checkpoint_leaves_the_later_ones_and_takes_the_new_rate(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    checkpoints = run / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_000012", "step_000012.hf", "step_000014"]
    rate = ["optimizer.decay_style=constant", "optimizer.lr=3e-4"]
    back = [f"resume={checkpoints / 'step_000012'}", "run.steps=13", "evaluation=none", "checkpoint.every=0"]
    train(*OVERRIDES, f"run.dir={run}", *back, *rate)
    assert (checkpoints / "latest").read_text().strip() == "step_000013"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_000012", "step_000012.hf", "step_000013"]
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 14))
    assert metrics[-1]["update/lr"] == pytest.approx(3e-4)


def test_export_beside_a_checkpoint_is_what_the_checkpoint_converts_to(uninterrupted: Path, tmp_path: Path) -> None:
    checkpoint = uninterrupted / "checkpoints" / "step_000012"
    convert = [sys.executable, "-m", "dasd_megatron.cli", "convert", "megatron-to-hf"]
    convert += ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "converted")]
    subprocess.run(convert, check=True, capture_output=True, timeout=240)
    exported, converted = (
        load_file(path / "model.safetensors") for path in (checkpoint.with_suffix(".hf"), tmp_path / "converted")
    )
    assert exported.keys() == converted.keys()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in exported.items())


def test_a_run_is_not_overwritten_and_not_changed_on_resume(uninterrupted: Path) -> None:
    for overrides, named in (
        ([], "resume=auto"),
        (["resume=auto", "data.train.size=39"], "data.train.size"),
        (["resume=auto", "run.seed=5"], "run.seed"),
    ):
        status, output = finish(start(*OVERRIDES, f"run.dir={uninterrupted}", *overrides))
        assert status == 1 and len(output.strip().splitlines()) == 1 and named in output, output


def test_checkpoint_of_another_shape_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "model.tiny.hidden_size=64", f"run.dir={tmp_path / 'other'}"]
    status, output = finish(start(*overrides, f"resume={uninterrupted / 'checkpoints' / 'step_000012'}"))
    assert status == 1 and "model.tiny.hidden_size=64" in output and len(output.strip().splitlines()) == 1, output[
        -3000:
    ]
    # A checkpoint that was moved away from its run says itself what it is.
    checkpoint = tmp_path / "alone" / "step_000012"
    shutil.copytree(uninterrupted / "checkpoints" / "step_000012", checkpoint)
    status, output = finish(
        start(*OVERRIDES, "model.tiny.hidden_size=64", f"run.dir={tmp_path / 'run'}", f"resume={checkpoint}")
    )
    assert status == 1 and "hidden_size=32" in output and "this model has 64" in output and "Traceback" not in output, (
        output[-3000:]
    )
