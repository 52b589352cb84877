"""Whole training runs of a very small model, as a user would start them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from dasd_megatron.rollout_files import read_samples, whole_steps
from dasd_megatron.rollout_json import as_json

# Seconds, not minutes: 30k parameters, two groups of four short responses. Rewards are rare at this size, but the
# teacher term always acts.
SMALL = [
    "experiment=quickstart",
    "parallel=single",
    "model.tiny.hidden_size=32",
    "model.tiny.intermediate_size=48",
    "model.tiny.num_attention_heads=4",
    "model.tiny.head_dim=8",
    "model.tiny.num_layers=4",
    "data.train.size=40",
    "data.heldout.size=6",
    "batch.groups=4",
    "batch.samples_per_group=4",
    "batch.micro_batch_size=3",
    "rollout.max_new_tokens=12",
    "rollout.max_prompt_tokens=64",
    "rollout.threads=1",
    "rollout.groups_per_request=2",
    "verify.workers=0",
    "warm_start.steps=0",
    "evaluation.samples=2",
    "evaluation.ks=[1,2]",
    "optimizer.lr=1e-3",
    "optimizer.decay_style=constant",
    "optimizer.warmup_steps=0",
    "optimizer.adam_eps=1e-8",
    "algorithm.beta=0.02",
    "algorithm.scale_floor=0.0",
    "logging.tensorboard=false",
    "logging.save_rollouts_every=1",
]
NO_EVALUATION = ["evaluation=none"]
_NOT_REPRODUCIBLE = ("seconds/", "throughput/", "time", "seconds", "rollout/groups_restarted")


def one_threaded(**more: str) -> dict[str, str]:
    """The environment of processes that leave each other the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **more}


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "dasd_megatron.cli", "train", *SMALL, *overrides]


def start(*overrides: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start a run in a process group of its own, its output in one pipe."""
    return subprocess.Popen(
        command(*overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=one_threaded(PYTHONFAULTHANDLER="1", **(environment or {})),
        start_new_session=True,
    )


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """SIGKILL for the launcher and all its descendants at once, as a node that goes down; returns when all are gone. At
    SIGABRT each
    writes the stack of all its threads first."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    process.wait()
    psutil.wait_procs(family, timeout=30)


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    """Exit status and output; a run that outlives ``timeout`` seconds is killed and fails the test, which shows where
    each process was."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process, signal.SIGABRT)
        output, _ = process.communicate(timeout=30)
        raise AssertionError(f"the run did not end within {timeout} s: {process.args}\n{output[-20000:]}") from None
    return process.returncode, output


def train(*overrides: str, timeout: float = 240, environment: Mapping[str, str] | None = None) -> str:
    """Run to the end and return the output; a failure is shown."""
    status, output = finish(start(*overrides, environment=environment), timeout)
    assert status == 0, output[-6000:]
    return output


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def saved_rollouts(run: Path) -> dict[int, list[dict[str, Any]]]:
    """The saved rollouts of each step as JSON has them, in order of (group, sample)."""
    folder = run / "rollouts"
    found = {}
    for step, names in whole_steps(os.listdir(folder)).items():
        samples = [sample for name in names for sample in read_samples(folder / name)]
        found[step] = [as_json(sample) for sample in sorted(samples, key=lambda one: (one.group, one.sample))]
    return found


def rows_so_far(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file that is being written."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_steps(process: subprocess.Popen, run: Path, count: int, timeout: float = 180) -> None:
    """Return as soon as ``count`` steps of the run are done."""
    deadline = time.monotonic() + timeout
    while len(rows_so_far(run)) < count:
        assert process.poll() is None, process.communicate()[0][-6000:]
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.01)


def reproducible(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file without wall-clock values, and without the count of rollouts that servers had to be asked
    for again."""
    return [{key: value for key, value in row.items() if not key.startswith(_NOT_REPRODUCIBLE)} for row in rows(path)]
