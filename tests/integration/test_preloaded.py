"""A process that is forked from a preloaded one cannot be told from a process that was started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import preloaded
from tests.support.runs import NO_EVALUATION, one_threaded, reproducible, start, train, wait_for_steps
from tests.support.worker_scripts import WORKERS

pytestmark = pytest.mark.integration
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


def describe(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str, str]:
    """Status, what the process says of itself, the rest of its output, and its last error."""
    command = [sys.executable, str(WORKERS / "describe_process.py"), *arguments]
    environment = one_threaded(DASD_TEST_VARIABLE="x", PYTHONPATH=f"{folder}/marker")
    mask = os.umask(0o027)
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
    finally:
        os.umask(mask)
    output, errors = process.communicate("an input", timeout=120)
    first, _, rest = output.partition("\n")
    assert errors.startswith("an error\n")
    return process.returncode, json.loads(first), rest, errors.splitlines()[-1]


@needs_linux
@pytest.mark.parametrize("end", ["", "seven", "fail", "text", "kill", "interrupt", "thread"])
def test_a_forked_process_is_as_a_started_one(end: str, tmp_path: Path) -> None:
    with preloaded.real_start():
        expected = describe(tmp_path, end)
    found = describe(tmp_path, end)
    assert found == expected
    _, said, _, _ = found
    assert said["parent"] == os.getpid() and said["leads_session"] and said["input"] == "an input"
    assert said["shown"] == said["variable"] == "x" and said["path"][1] == f"{tmp_path}/marker"


@needs_linux
def test_masks_and_ignored_signals_are_inherited(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        _, said, _, _ = describe(tmp_path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGUSR2, before)
    assert signal.SIGTERM in said["blocked"] and signal.SIGUSR2 in said["ignored"]


@needs_linux
def test_all_processes_of_a_run_are_forked_and_end_with_the_launcher(tmp_path: Path) -> None:
    process = start(*NO_EVALUATION, "run.steps=5000", "checkpoint.every=0", f"run.dir={tmp_path / 'run'}")
    try:
        wait_for_steps(process, tmp_path / "run", 1)
        # A process that was forked for a moment may be on its way out.
        relatives = psutil.Process(process.pid).children(recursive=True)
        family = [member for member in relatives if member.status() != psutil.STATUS_ZOMBIE]
        commands = [member.cmdline() for member in family]
        templates = [member for member in family if preloaded.is_template(member)]
    finally:
        process.kill()
        process.wait()
    for name in ("dasd_megatron.training.worker", "dasd_megatron.rollout.server"):
        assert sum(name in command for command in commands) == 1, commands
    # Launcher, worker and server have a template each.
    assert len(templates) == 3, commands
    assert not psutil.wait_procs(family, timeout=20)[1]


# Its short form in `make test` is the fixture `folder` of tests/integration/test_documented_commands.py: a whole run by
# the program that a user calls.
@pytest.mark.drill
def test_interpreters_that_are_started_make_the_same_run(tmp_path: Path) -> None:
    """The way of a user: nothing is preloaded, in the launcher, two ranks and a server."""
    options = [*NO_EVALUATION, "parallel=tp2", "run.steps=2"]
    with preloaded.real_start():
        train(*options, f"run.dir={tmp_path / 'started'}")
    train(*options, f"run.dir={tmp_path / 'forked'}")
    assert reproducible(tmp_path / "forked" / "metrics.jsonl") == reproducible(tmp_path / "started" / "metrics.jsonl")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("started", "forked")]
    assert weights[0] == weights[1]
