"""A run over four hosts, two that train and two that serve, while links between them are cut and restored. The short
form cuts off a server alone, and has one host that trains."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dasd_megatron.config import load_config
from dasd_megatron.models.tiny import make_tiny_model
from tests.support.hosts import Hosts, hosts, wait_until
from tests.support.runs import NO_EVALUATION, SMALL, finish, reproducible, rows_so_far, start

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 16
COLLECTIVE_SECONDS = 24
RUN = [*NO_EVALUATION, "checkpoint.every=1", "logging.save_rollouts_every=0"]
WHOLE = [*RUN, "parallel=tp2", f"run.steps={STEPS}"]
# A link that is cut answers nothing, so every limit runs out.
LIMITS = [
    f"backend.timeout_seconds={COLLECTIVE_SECONDS}",
    "rollout.step_timeout_seconds=15",
    "rollout.startup_timeout_seconds=8",
    "rollout.weight_sync_timeout_seconds=3",
    "rollout.request_timeout_seconds=5",
    "rollout.connect_timeout_seconds=1",
    "rollout.max_retries=4",
    "rollout.backoff_seconds=0.1",
]
PORT = 30000


def start_training(
    net: Hosts, run: Path, folder: Path, name: str, overrides: list[str], hosts: int
) -> list[subprocess.Popen]:
    """Start a run on hosts of the name trainN; its output goes to ``folder/name.N.log``."""
    servers = ",".join(f"http://{net.addresses[host]}:{PORT}" for host in ("serve0", "serve1"))
    external = ["rollout=external", f"rollout.servers=[{servers}]", "rollout.weight_sync=distributed"]
    command = [
        sys.executable,
        "-m",
        "dasd_megatron.cli",
        "train",
        *SMALL,
        *overrides,
        *LIMITS,
        *external,
        f"run.dir={run}",
        "resume=auto",
    ]
    place = {"PET_NNODES": str(hosts), "PET_RDZV_ENDPOINT": f"{net.addresses['train0']}:29500", "PET_RDZV_ID": name}
    return [
        net.start(f"train{rank}", command, folder / f"{name}.{rank}.log", PET_NODE_RANK=str(rank), **place)
        for rank in range(hosts)
    ]


def start_serving(net: Hosts, folder: Path) -> None:
    model = make_tiny_model(folder / "model", load_config([*SMALL]).model.tiny, 7)
    for host in ("serve0", "serve1"):
        command = [
            sys.executable,
            "-m",
            "dasd_megatron.cli",
            "serve",
            "--model-path",
            str(model),
            "--deterministic",
        ]
        net.start(host, [*command, "--host", net.addresses[host], "--port", str(PORT)], folder / f"{host}.log")


def held_version(net: Hosts, host: str, key: str) -> str:
    """The weights that a server holds, asked on its own host."""
    script = (
        "import httpx, sys; print(httpx.get(sys.argv[1], headers={'Authorization': sys.argv[2]}, trust_env=False).text)"
    )
    answer = net.run(
        host, sys.executable, "-c", script, f"http://{net.addresses[host]}:{PORT}/model_info", f"Bearer {key}"
    )
    return json.loads(answer)["weight_version"]


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    key = secrets.token_hex(16)
    monkeypatch.setenv("DASD_API_KEY", key)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    return key


class Watched:
    """A run on these hosts, and how far it is."""

    def __init__(self, net: Hosts, run: Path, trainers: list[subprocess.Popen], log: Path) -> None:
        self.net, self.run, self.trainers, self.log = net, run, trainers, log

    def done(self) -> int:
        return len(rows_so_far(self.run))

    def wait_for(self, event: str, condition: Callable[[], bool], seconds: float) -> None:
        wait_until(event, condition, seconds, *self.trainers, log=self.log)

    def steps(self, count: int, seconds: float) -> None:
        self.wait_for(f"step {count}", lambda: self.done() >= count, seconds)

    def goes_on_without_serve0(self, steps: int, key: str) -> None:
        """Cut a server off: the run goes on with the other. Back, it gets the next weights with the other one."""
        self.net.cut("serve0")
        self.steps(self.done() + steps, 60)
        text = self.log.read_text()
        assert re.search(rf"{self.net.addresses['serve0']}:{PORT}: \w+ -> dead", text), text
        self.net.restore("serve0")
        after = f"step_{self.done():06d}"
        self.wait_for("serve0 is given weights again", lambda: held_version(self.net, "serve0", key) >= after, 60)


def test_a_server_is_cut_off_and_comes_back(tmp_path: Path, key: str) -> None:
    with hosts("train0", "serve0", "serve1") as net:
        start_serving(net, tmp_path)
        run, overrides = tmp_path / "run", [*RUN, "run.steps=1000"]
        trainers = start_training(net, run, tmp_path, "short", overrides, hosts=1)
        watched = Watched(net, run, trainers, tmp_path / "short.0.log")
        watched.steps(1, 120)
        watched.goes_on_without_serve0(2, key)


# Its short form is the test above.
@pytest.mark.drill
def test_links_are_cut_and_restored(tmp_path: Path, key: str) -> None:
    run, log = tmp_path / "run", tmp_path / "first.0.log"
    with hosts("train0", "train1", "serve0", "serve1") as net:
        start_serving(net, tmp_path)
        trainers = start_training(net, run, tmp_path, "first", WHOLE, hosts=2)
        watched = Watched(net, run, trainers, log)
        watched.steps(2, 120)
        watched.goes_on_without_serve0(3, key)
        # A cut so short that what was lost is sent again.
        net.cut("train1")
        time.sleep(1.5)
        net.restore("train1")
        watched.steps(watched.done() + 1, 30)
        # A long one ends the run, on both nodes, when the limit of a collective has run out.
        net.cut("train1")
        began = time.monotonic()
        # Meanwhile, what it is to be compared with.
        undisturbed = start(*WHOLE, f"run.dir={tmp_path / 'undisturbed'}")
        for process in trainers:
            process.wait(COLLECTIVE_SECONDS + 30)
        print(f"ended after {time.monotonic() - began:.1f} s, at step {watched.done()}")
        for rank, process in enumerate(trainers):
            output = (tmp_path / f"first.{rank}.log").read_text()
            assert process.returncode == 1, output[-4000:]
            assert "dasd: error" in output and "resume=auto" in output and "Traceback" not in output, output[-4000:]
        assert watched.done() < STEPS
        net.restore("train1")
        for rank, process in enumerate(start_training(net, run, tmp_path, "second", WHOLE, hosts=2)):
            assert process.wait(240) == 0, (tmp_path / f"second.{rank}.log").read_text()[-4000:]
    assert "resumed from" in (tmp_path / "second.0.log").read_text()
    status, output = finish(undisturbed)
    assert status == 0, output[-4000:]
    assert len(rows_so_far(run)) == STEPS
    assert reproducible(run / "metrics.jsonl") == reproducible(tmp_path / "undisturbed" / "metrics.jsonl")
    assert not [
        path
        for path in Path("/proc").glob("[0-9]*/environ")
        if os.access(path, os.R_OK) and key.encode() in _read(path)
    ]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
