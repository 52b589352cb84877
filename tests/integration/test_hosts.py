"""A run over four hosts, two that train and two that serve, while links between them are cut and restored."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dasd_megatron.config import load_config
from dasd_megatron.models.tiny import make_tiny_model
from tests.support.hosts import Hosts, hosts, wait_until
from tests.support.runs import NO_EVALUATION, SMALL, finish, reproducible, rows_so_far, start

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 16
COLLECTIVE_SECONDS = 24
RUN = ["parallel=tp2", f"run.steps={STEPS}", *NO_EVALUATION, "checkpoint.every=1", "logging.save_rollouts_every=0"]
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


def start_training(net: Hosts, run: Path, folder: Path, name: str) -> dict[str, subprocess.Popen]:
    servers = ",".join(f"http://{net.addresses[host]}:{PORT}" for host in ("serve0", "serve1"))
    external = ["rollout=external", f"rollout.servers=[{servers}]", "rollout.weight_sync=distributed"]
    command = [
        sys.executable,
        "-m",
        "dasd_megatron.cli",
        "train",
        *SMALL,
        *RUN,
        *LIMITS,
        *external,
        f"run.dir={run}",
        "resume=auto",
    ]
    place = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"{net.addresses['train0']}:29500", "PET_RDZV_ID": name}
    return {
        f"train{rank}": net.start(
            f"train{rank}", command, folder / f"{name}.{rank}.log", PET_NODE_RANK=str(rank), **place
        )
        for rank in range(2)
    }


def held_version(net: Hosts, host: str, key: str) -> str:
    """The weights that a server holds, asked on its own host."""
    script = (
        "import httpx, sys; print(httpx.get(sys.argv[1], headers={'Authorization': sys.argv[2]}, trust_env=False).text)"
    )
    answer = net.run(
        host, sys.executable, "-c", script, f"http://{net.addresses[host]}:{PORT}/model_info", f"Bearer {key}"
    )
    return json.loads(answer)["weight_version"]


def test_links_are_cut_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = secrets.token_hex(16)
    monkeypatch.setenv("DASD_API_KEY", key)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    model = make_tiny_model(tmp_path / "model", load_config([*SMALL]).model.tiny, 7)
    run, log = tmp_path / "run", tmp_path / "first.0.log"
    with hosts("train0", "train1", "serve0", "serve1") as net:
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
            net.start(host, [*command, "--host", net.addresses[host], "--port", str(PORT)], tmp_path / f"{host}.log")
        trainers = start_training(net, run, tmp_path, "first")

        def steps(count: int, seconds: float) -> None:
            wait_until(f"step {count}", lambda: len(rows_so_far(run)) >= count, seconds, *trainers.values(), log=log)

        def taken_back(after: int) -> bool:
            return held_version(net, "serve0", key) >= f"step_{after:06d}"

        steps(2, 120)
        # A server is gone: the run goes on with the other, which gets its weights alone.
        net.cut("serve0")
        steps(len(rows_so_far(run)) + 3, 60)
        assert re.search(rf"{net.addresses['serve0']}:{PORT}: \w+ -> dead", log.read_text()), log.read_text()
        net.restore("serve0")
        # Back, it gets the next weights with the other one.
        done = len(rows_so_far(run))
        wait_until("serve0 is given weights again", lambda: taken_back(done), 60, *trainers.values(), log=log)
        # A cut so short that what was lost is sent again.
        net.cut("train1")
        time.sleep(1.5)
        net.restore("train1")
        steps(len(rows_so_far(run)) + 1, 30)
        # A long one ends the run, on both nodes, when the limit of a collective has run out.
        net.cut("train1")
        began = time.monotonic()
        # Meanwhile, what it is to be compared with.
        undisturbed = start(*RUN, f"run.dir={tmp_path / 'undisturbed'}")
        for process in trainers.values():
            process.wait(COLLECTIVE_SECONDS + 30)
        print(f"ended after {time.monotonic() - began:.1f} s, at step {len(rows_so_far(run))}")
        for rank, process in enumerate(trainers.values()):
            output = (tmp_path / f"first.{rank}.log").read_text()
            assert process.returncode == 1, output[-4000:]
            assert "dasd: error" in output and "resume=auto" in output and "Traceback" not in output, output[-4000:]
        assert len(rows_so_far(run)) < STEPS
        net.restore("train1")
        for rank, process in enumerate(start_training(net, run, tmp_path, "second").values()):
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
