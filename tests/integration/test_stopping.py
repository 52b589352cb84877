"""SIGTERM, SIGUSR1 and Ctrl-C lead to a checkpoint and exit status 75 on every node, also while rollouts are waited
for."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from dasd_megatron.config import load_config
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.local_server import LocalServer
from tests.support.runs import NO_EVALUATION, SMALL, finish, reproducible, start, train, wait_for_steps
from tests.support.servers import FaultyProxy

pytestmark = pytest.mark.integration

OVERRIDES = [*NO_EVALUATION, "run.steps=5", "parallel.data_parallel_size=2", "checkpoint.every=0"]


def two_nodes(*overrides: str, port: int) -> list[subprocess.Popen]:
    common = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"localhost:{port}", "PET_RDZV_ID": "test"}
    return [start(*OVERRIDES, *overrides, environment={**common, "PET_NODE_RANK": rank}) for rank in ("0", "1")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_signal_to_one_of_two_nodes_breaks_rollouts_off_saves_and_ends_both(tmp_path: Path) -> None:
    config = load_config([*SMALL])
    make_tiny_model(tmp_path / "model", config.model.tiny, 1)
    run, port = tmp_path / "run", free_port()
    with LocalServer(tmp_path / "model", "first", config.rollout, tmp_path / "log") as server:
        # Two requests a step and one for the trainer's look at the model: from the third step on none is answered.
        proxy = FaultyProxy(server.url, lambda path, count: "hang" if path == "/generate" and count > 5 else None)
        external = ["rollout.engine=external", f"rollout.servers=[{proxy.url}]", f"run.dir={run}"]
        try:
            nodes = two_nodes(*external, port=port)
            wait_for_steps(nodes[0], run, 2)
            time.sleep(1.0)
            nodes[1].send_signal(signal.SIGUSR1)
            began = time.monotonic()
            outputs = [finish(node, timeout=60) for node in nodes]
            seconds = time.monotonic() - began
        finally:
            proxy.close()
        assert [status for status, _ in outputs] == [75, 75], outputs
        assert seconds < 20, outputs
        assert "stopped after step 2, which is saved; continue with resume=auto" in outputs[0][1]
        assert "Traceback" not in outputs[0][1] + outputs[1][1], outputs
        assert (run / "checkpoints" / "latest").read_text().strip() == "step_000002"
        external[1] = f"rollout.servers=[{server.url}]"
        outputs = [finish(node) for node in two_nodes(*external, "resume=auto", port=port)]
        assert [status for status, _ in outputs] == [0, 0], outputs
        assert "resumed from" in outputs[0][1]
    train(*OVERRIDES, f"run.dir={tmp_path / 'one'}")
    assert reproducible(run / "metrics.jsonl") == reproducible(tmp_path / "one" / "metrics.jsonl")


def test_nodes_that_differ_are_refused_on_both(tmp_path: Path) -> None:
    """The first node's error is the others' too, at once and not when they have waited long enough."""
    port = free_port()
    common = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"localhost:{port}"}
    first = start(*OVERRIDES, f"run.dir={tmp_path / 'run'}", environment={**common, "PET_NODE_RANK": "0"})
    other = start(
        *OVERRIDES,
        "parallel.data_parallel_size=4",
        f"run.dir={tmp_path / 'run'}",
        environment={**common, "PET_NODE_RANK": "1"},
    )
    for process in (first, other):
        status, output = finish(process, timeout=60)
        assert (
            status == 1 and "node 1 was started for 2 nodes of 2 processes" in output and "Traceback" not in output
        ), output
    assert not (tmp_path / "run" / "config.yaml").exists()


def blocks(pid: int, signum: int) -> bool:
    """Return whether the main thread of a process blocks a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line for line in lines if line.startswith("SigBlk:")).split()[1], 16)
    return bool(mask >> (signum - 1) & 1)


def test_ctrl_c_before_training_ends_at_once(tmp_path: Path) -> None:
    """A node that waits for the first one has nothing to save."""
    process = start(
        *OVERRIDES, f"run.dir={tmp_path / 'run'}",
        environment={"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": f"localhost:{free_port()}"},
    )  # fmt: skip
    # The launcher blocks the signals when its thread waits for them; it begins to look for the first node then.
    deadline = time.monotonic() + 60
    while not blocks(process.pid, signal.SIGINT):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    status, output = finish(process, timeout=10)
    assert status == 75 and "stopped before training began" in output, output


@pytest.mark.real_start
def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path) -> None:
    """While the workers import, the first one waits for them, and the second does not."""
    process = start(*OVERRIDES, f"run.dir={tmp_path / 'run'}")
    launcher, deadline = psutil.Process(process.pid), time.monotonic() + 120
    while len(launcher.children()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    workers = launcher.children()
    assert process.poll() is None and len(workers) == 2
    process.send_signal(signal.SIGINT)
    status, output = finish(process, timeout=10)
    assert status == 128 + signal.SIGINT and "a second SIGINT: ended at once" in output, output
    assert not psutil.wait_procs(workers, timeout=5)[1]
