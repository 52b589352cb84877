"""Rollout servers that die, hang, answer 500 or garbage; disks that fill up; input that is wrong. Nothing hangs, is
lost or comes twice."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from packaging.version import Version

from dasd_megatron.config import load_config
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.local_server import LocalServer
from tests.support.runs import (
    NO_EVALUATION,
    SMALL,
    finish,
    reproducible,
    rows,
    saved_rollouts,
    start,
    train,
    wait_for_steps,
)
from tests.support.servers import FaultyProxy

pytestmark = pytest.mark.integration

OVERRIDES = [
    *NO_EVALUATION,
    "run.steps=6",
    "checkpoint.every=2",
    "rollout.backoff_seconds=0.05",
    "rollout.request_timeout_seconds=3",
    "rollout.connect_timeout_seconds=1",
]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("healthy") / "run"
    train(*OVERRIDES, f"run.dir={path}")
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    config = load_config([*SMALL])
    make_tiny_model(folder / "model", config.model.tiny, 1)
    with LocalServer(folder / "model", "first", config.rollout, folder / "log") as embedded:
        yield embedded.url


def external(url: str) -> list[str]:
    return ["rollout.engine=external", f"rollout.servers=[{url}]"]


def test_passing_faults_change_nothing(server: str, healthy: Path, tmp_path: Path) -> None:
    """Requests for rollouts go wrong in every way, one by one and in a row; the run's metrics are those of an
    undisturbed one."""
    faults = {3: "500", 5: "garbage", 7: "short", 9: "hang", 11: "hang", 12: "garbage", 13: "500"}
    met: list[str] = []

    def fault(path: str, count: int) -> str | None:
        found = faults.get(count) if path == "/generate" else None
        met.extend([found] if found else [])
        return found

    proxy = FaultyProxy(server, fault)
    try:
        train(*OVERRIDES, *external(proxy.url), f"run.dir={tmp_path / 'run'}")
    finally:
        proxy.close()
    assert met == list(faults.values())
    assert reproducible(tmp_path / "run" / "metrics.jsonl") == reproducible(healthy / "metrics.jsonl")


def stopped_after_step_3(fault: str, server: str, run: Path) -> tuple[str, str]:
    """The proxy's address and the output of a run whose requests for rollouts go wrong from step 4 on."""
    proxy = FaultyProxy(
        server, lambda path, count: fault if path == "/generate" and count > 7 else None
    )  # the first is the trainer's look at the model
    try:
        status, output = finish(start(*OVERRIDES, *external(proxy.url), f"run.dir={run}"))
    finally:
        proxy.close()
    assert status == 1 and "Traceback" not in output, output[-4000:]
    assert "after step 3" in output, output[-4000:]
    return proxy.url, output


def test_lasting_fault_stops_the_run_with_a_usable_checkpoint(server: str, healthy: Path, tmp_path: Path) -> None:
    """From step 4 on every request fails: one line says so, steps 1 to 3 are saved, and a healthy server finishes the
    run."""
    run = tmp_path / "run"
    url, output = stopped_after_step_3("500", server, run)
    assert url in output and "resume=auto" in output, output[-4000:]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_000003"
    train(*OVERRIDES, *external(server), f"run.dir={run}", "resume=auto")
    assert reproducible(run / "metrics.jsonl") == reproducible(healthy / "metrics.jsonl")


def test_log_probs_of_another_model_are_not_trained_on(server: str, healthy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, output = stopped_after_step_3("shift", server, run)
    assert "1.5 nats" in output and "rollout.max_log_prob_diff=1" in output, output[-4000:]
    train(*OVERRIDES, *external(server), f"run.dir={run}", "resume=auto")
    assert reproducible(run / "metrics.jsonl") == reproducible(healthy / "metrics.jsonl")


def test_weight_update_that_hangs_stops_the_run(server: str, tmp_path: Path) -> None:
    proxy = FaultyProxy(server, lambda path, count: "hang" if path == "/update_weights_from_disk" else None)
    started = time.monotonic()
    try:
        status, output = finish(start(*OVERRIDES, *external(proxy.url), f"run.dir={tmp_path / 'run'}"))
    finally:
        proxy.close()
    assert status == 1 and "/update_weights_from_disk" in output and "Traceback" not in output, output[-4000:]
    assert time.monotonic() - started < 120


def test_weight_update_that_fails_after_a_step_loses_and_repeats_nothing(
    server: str, healthy: Path, tmp_path: Path
) -> None:
    """The update after step 3 fails for good: step 3 has been done, so its checkpoint is of step 3, and the rest
    follows from there."""
    proxy = FaultyProxy(
        server, lambda path, count: "500" if path == "/update_weights_from_disk" and count > 3 else None
    )
    run = tmp_path / "run"
    try:
        status, output = finish(start(*OVERRIDES, *external(proxy.url), f"run.dir={run}"))
    finally:
        proxy.close()
    assert status == 1 and "after step 3" in output and "Traceback" not in output, output[-4000:]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_000003"
    train(*OVERRIDES, *external(server), f"run.dir={run}", "resume=auto")
    assert reproducible(run / "metrics.jsonl") == reproducible(healthy / "metrics.jsonl")


def _embedded_server(process: subprocess.Popen) -> psutil.Process | None:
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "dasd_megatron.rollout.server" in child.cmdline():
                return child
        except psutil.NoSuchProcess:
            continue
    return None


def test_killed_embedded_server_is_restarted_and_nothing_changes(healthy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*OVERRIDES, f"run.dir={run}", "rollout.max_retries=1")
    wait_for_steps(process, run, 2)
    server = _embedded_server(process)
    assert server is not None
    server.kill()
    status, output = finish(process)
    assert status == 0, output[-4000:]
    assert reproducible(run / "metrics.jsonl") == reproducible(healthy / "metrics.jsonl")


def test_everything_ends_with_its_launcher(tmp_path: Path) -> None:
    """Only the launcher is killed, in the middle of a long run: its workers and their server must not go on without
    it."""
    process = start(*OVERRIDES, "run.steps=5000", "checkpoint.every=0", f"run.dir={tmp_path / 'run'}")
    wait_for_steps(process, tmp_path / "run", 1)
    assert _embedded_server(process) is not None
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    for member in alive:
        member.kill()
    assert not alive, "processes outlived their launcher"


@pytest.mark.skipif(sys.platform != "linux", reason="the port of a dead server is held on Linux alone")
def test_nobody_gets_the_port_of_a_server_that_died_before_it_is_back(tmp_path: Path) -> None:
    config = load_config([*SMALL])
    make_tiny_model(tmp_path / "model", config.model.tiny, 1)
    with LocalServer(tmp_path / "model", "first", config.rollout, tmp_path / "log") as server:
        url = server.url
        port = int(url.rsplit(":", 1)[1])
        server._process.kill()
        server._process.wait()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        server.restart(server.model_path, "second")
        assert server.url == url and server.alive()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))


@contextlib.contextmanager
def small_disk_at(folder: Path, size: str) -> Iterator[Path]:
    """Mount a disk of this size at a folder that is to be made."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs needs root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run directory whose checkpoints lie on a disk that holds one of them and not two."""
    with small_disk_at(tmp_path / "run" / "checkpoints", "1100k") as folder:
        yield folder


def test_full_disk_leaves_the_previous_checkpoint(small_disk: Path, healthy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, output = finish(start(*OVERRIDES, f"run.dir={run}"))
    assert status == 1 and "step_000004" in output and "previous checkpoint is untouched" in output, output[-4000:]
    assert "No space left" in output or "no space" in output.lower(), output[-4000:]
    assert (small_disk / "latest").read_text().strip() == "step_000002"
    assert not list(small_disk.glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    train(*OVERRIDES, f"run.dir={run}", "resume=auto")
    assert reproducible(run / "metrics.jsonl") == reproducible(healthy / "metrics.jsonl")


def test_a_full_disk_for_rollouts_ends_the_run_in_one_line_and_nothing_is_lost(healthy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # It holds the rollouts of two steps, and there is a checkpoint behind the second.
    with small_disk_at(run / "rollouts", "32k") as folder:
        status, output = finish(start(*OVERRIDES, f"run.dir={run}"))
        assert status == 1 and "Traceback" not in output, output[-4000:]
        assert f"cannot write {folder}/step_" in output and "No space left on device" in output, output[-4000:]
        saved = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
        assert saved > 0 and all((folder / f"step_{step:06d}.safetensors").exists() for step in range(1, saved + 1))
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        train(*OVERRIDES, f"run.dir={run}", "resume=auto")
        assert reproducible(run / "metrics.jsonl") == reproducible(healthy / "metrics.jsonl")
        assert list(saved_rollouts(run)) == [row["step"] for row in rows(run / "metrics.jsonl")]


# Rank 0 writes these while the other ranks wait for it. At the second checkpoint of a process a folder stands where one
# of them belongs.
IN_THE_WAY = """
import os, sys
checkpoints = 0
def at(event, arguments):
    global checkpoints
    if event == "open" and str(arguments[0]).endswith("/reserve.partial"):
        checkpoints += 1
        folder = os.path.dirname(arguments[0])
        for name in os.listdir(folder) if checkpoints == 2 else ():
            if name.startswith("step_") and name.endswith(".partial"):
                os.mkdir(os.path.join(folder, name, os.environ["IN_THE_WAY"]))
sys.addaudithook(at)
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["common.pt", ".metadata", "metadata.json"])
def test_a_checkpoint_that_fails_on_rank_0_alone_ends_the_run_at_once(name: str, tmp_path: Path) -> None:
    if name == "common.pt" and Version(version("megatron-core")) >= Version("0.19"):
        pytest.skip("Megatron-Core 0.19 writes no common.pt")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(IN_THE_WAY)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = tmp_path / "run"
    process = start(*OVERRIDES, "parallel=tp2", f"run.dir={run}", environment={"PYTHONPATH": path, "IN_THE_WAY": name})
    wait_for_steps(process, run, 4)
    status, output = finish(process, timeout=60)
    assert status == 1 and output.count("previous checkpoint is untouched") == 1 and "Traceback" not in output, output[
        -6000:
    ]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_000002"


def _refused(*overrides: str) -> str:
    """The one line on which a run was refused, before any process started."""
    status, output = finish(start(*overrides), timeout=120)
    lines = [line for line in output.splitlines() if line.strip()]
    assert status == 1 and len(lines) == 1 and lines[0].startswith("dasd: error: "), output[-3000:]
    return lines[0]


def test_bad_problem_sets_are_refused(tmp_path: Path) -> None:
    good = {"problem": "1 + 1 =", "expected_answer": "2", "reference_solution": "#### 2"}
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({**good, "problem": "2 + 2 ="}) + "\n")
    common = ["data=jsonl", f"data.heldout.path={heldout}", "batch.groups=1", f"run.dir={tmp_path / 'run'}"]
    cases = {
        "missing": (
            json.dumps(good) + "\n" + json.dumps({"problem": "1 + 2 ="}),
            "missing.jsonl line 2",
            "expected_answer",
        ),
        "empty": ("", "empty.jsonl", "empty"),
        "broken": (json.dumps(good) + "\n{oops", "broken.jsonl line 2", "JSON"),
        "long": (json.dumps({**good, "problem": "1 + " * 40 + "1 ="}), "rollout.max_prompt_tokens", "64"),
        "leak": (json.dumps({**good, "problem": "2 + 2 ="}), "2 + 2 =", "heldout"),
    }
    for name, (text, *named) in cases.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        message = _refused(*[override for override in common], f"data.train.path={path}", *_without_generator())
        for part in named:
            assert part in message, (name, message)


def _without_generator() -> list[str]:
    return [
        "data.train.generator=null",
        "data.heldout.generator=null",
        "data.train.size=null",
        "data.heldout.size=null",
    ]


def test_bad_surroundings_are_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = _refused(f"rollout.port={port}", f"run.dir={tmp_path / 'run'}")
        assert f"rollout.port={port}" in message
    assert "run.dir=/proc/nowhere" in _refused("run.dir=/proc/nowhere")
    assert "backend.kind=cuda" in _refused("backend.kind=cuda", f"run.dir={tmp_path / 'run'}")
    assert "algorithm.beta" in _refused("algorithm.betta=1", f"run.dir={tmp_path / 'run'}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "gpt2" in _refused(f"model.path={tmp_path / 'model'}", f"run.dir={tmp_path / 'run'}")
