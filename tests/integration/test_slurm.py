"""The batch scripts on a real Slurm of four nodes: with the real programs on the CPU, and the big ones with stand-ins
for `dasd`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.runs import rows, rows_so_far
from tests.support.slurm_cluster import SlurmCluster, slurm_cluster

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
PORTS = 8

# `python -m dasd_megatron.cli COMMAND ...`: servers that answer everything, and a trainer that does what STUB says on
# each node. All of them leave a line about their surroundings.
_STUB = """#!{python} -S
import http.server, json, os, sys, time
command, arguments = sys.argv[3], sys.argv[4:]
names = ("SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "PET_NNODES", "PET_NODE_RANK")
names += ("PET_RDZV_ENDPOINT",)
if "--dry-run" in arguments:
    sys.exit()
said = {{name: os.environ.get(name) for name in names}}
with open("{log}", "a") as file:
    file.write(json.dumps({{"command": command, "arguments": arguments, **said}}) + "\\n")
if command == "train":
    exec(os.environ.get("STUB", ""))
else:
    port = int(arguments[arguments.index("--port") + 1])
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503 if "mute" in os.environ.get("STUB", "") else 200)
            self.end_headers()
    http.server.HTTPServer(("", port), Answer).serve_forever()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as started:
        yield started


def free_block() -> int:
    """The first of ``PORTS`` ports in a row that are free, below those that the system hands out."""
    taken = {connection.laddr.port for connection in psutil.net_connections("tcp")}
    return next(port for port in range(20000, 32000, PORTS) if not taken & set(range(port, port + PORTS)))


def wait_for(event: str, done: Callable[[], object], log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, (
            f"{event} did not happen within {seconds:g} s:\n{log.read_text() if log.exists() else 'no log'}"
        )
        time.sleep(0.2)


def finish(cluster: SlurmCluster, job: int, log: Path, seconds: float) -> str:
    """The final state of a job, none of whose processes is left."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(f"the end of job {job}", lambda: cluster.job(job)["JobState"] in ended, log, seconds)
    wait_for("the end of all processes", lambda: not cluster.processes(job), log, 20)
    return cluster.job(job)["JobState"]


def start(
    cluster: SlurmCluster, folder: Path, script: str, *overrides: str, options: tuple[str, ...] = (), **environment: str
) -> int:
    port = free_block()
    settings = {
        "DASD_ROOT": str(ROOT),
        "DASD_PYTHON": sys.executable,
        "DASD_RUNS": str(folder),
        "DASD_RUN_DIR": str(folder / "run"),
        "DASD_SERVER_PORT": str(port),
        "DASD_ROUTER_PORT": str(port + PORTS - 2),
        "DASD_RENDEZVOUS_PORT": str(port + PORTS - 1),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        **environment,
    }
    return cluster.submit(*options, f"--output={folder}/job.log", str(ROOT / "slurm" / script), *overrides, **settings)


# Two starts of five processes that import torch: seconds on an idle machine, minutes on a busy one. Its short forms in
# `make test` are test_a_trainer_that_asks_for_it_is_started_again below, for the second start of a job, and
# test_a_server_that_ends_is_started_again in tests/unit/test_shell_scripts.py, for the lost server. That a signal makes
# the trainers save is shown by tests/integration/test_stopping.py, without Slurm.
@pytest.mark.drill
@pytest.mark.timeout(900)
def test_a_job_loses_a_server_is_preempted_and_goes_on_to_its_end(cluster: SlurmCluster, tmp_path: Path) -> None:
    log, run, steps = tmp_path / "job.log", tmp_path / "run", 16
    job = start(cluster, tmp_path, "train_dasd_tiny.sh", f"run.steps={steps}")
    wait_for("the second step", lambda: len(rows_so_far(run)) >= 2, log, 300)
    server = next(
        process
        for process in cluster.processes(job)
        if process.name() != "srun" and {"serve", "embedded"} <= set(process.cmdline())
    )
    key = server.environ()["DASD_API_KEY"]
    assert not any(key in word for process in cluster.processes(job) for word in process.cmdline())
    server.kill()
    wait_for(
        "a restart of the server", lambda: "on n3 ended with status 137; started again" in log.read_text(), log, 60
    )
    urgent = cluster.submit("--partition=high", "--nodelist=n1", f"--output={tmp_path}/urgent.log", "--wrap", "true")
    wait_for("a second start", lambda: f"job {job}, start 2" in log.read_text(), log, 100)
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    first = log.read_text()
    assert "SIGUSR1: the run is to be saved" in first and "training ended with status 75" in first, first
    assert 2 <= len(rows(run / "metrics.jsonl")) < steps
    assert finish(cluster, job, log, 300) == "COMPLETED", log.read_text()
    assert cluster.job(job)["Restarts"] == "1"
    # What was saved was gone on from: no step twice, none left out.
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, steps + 1))
    trained = (run / "logs" / "train.0.n1.log").read_text()
    assert [int(step) for step in re.findall(rf"step +(\d+)/{steps}", trained)] == list(range(1, steps + 1))
    assert (run / "model" / "config.json").is_file()
    # Each rank's own, of both starts.
    for node in (0, 1):
        assert len(list((run / "logs" / "ranks" / f"node{node}").glob("*/attempt_0/0/stdout.log"))) == 2
    names = {path.name for path in (run / "logs").iterdir()}
    assert names >= {"model.n1.log", "train.0.n1.log", "train.1.n2.log", "server.0.n3.log", "server.1.n3.log"}
    # The key that the job has made up is nowhere to be read.
    assert len(key) > 30
    assert not any(key.encode() in path.read_bytes() for path in [log, *run.rglob("*")] if path.is_file())


# Its short forms in `make test` are test_a_trainer_that_fails_ends_the_job below, after which no process of the job is
# left either, and in tests/unit/test_shell_scripts.py test_colocated, for the layout, and
# test_the_end_of_a_job_ends_its_servers_and_starts_none_again.
@pytest.mark.drill
@pytest.mark.timeout(600)
def test_scancel_of_a_colocated_job_leaves_nothing(cluster: SlurmCluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    layout = {"DASD_PLACEMENT": "colocated", "DASD_TRAIN_NODES": "1", "DASD_SERVERS_PER_NODE": "1"}
    overrides = ("run.steps=1000", "parallel.data_parallel_size=1")
    job = start(cluster, tmp_path, "train_dasd_tiny.sh", *overrides, options=("--nodes=1",), **layout)
    wait_for("the first step", lambda: rows_so_far(tmp_path / "run"), log, 300)
    here = cluster.processes(job)
    assert {"serve", "train"} <= {word for process in here for word in process.cmdline()}
    cluster.command("scancel", str(job))
    assert finish(cluster, job, log, 30) == "CANCELLED"
    assert not any(process.is_running() for process in here)
    # Its last words may be that it is not requeued.
    assert "requeued; it goes on" not in log.read_text() and cluster.job(job)["Restarts"] == "0"


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """Settings of a job of stand-ins."""
    path = tmp_path / "dasd"
    path.write_text(_STUB.format(python=sys.executable, log=tmp_path / "said.jsonl"))
    path.chmod(0o755)
    return {"DASD_PYTHON": str(path), "DASD_MODEL": str(tmp_path), "DASD_END_SECONDS": "2"}


def said(folder: Path, command: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "said.jsonl").read_text().splitlines()]
    return [line for line in lines if line["command"] == command]


def option(line: dict, name: str) -> str:
    return line["arguments"][line["arguments"].index(name) + 1]


def test_32b_on_gpu_nodes(cluster: SlurmCluster, tmp_path: Path, stub: dict[str, str]) -> None:
    """Two nodes of two servers and a router, two nodes that train, with the script's own #SBATCH lines but for the
    number of nodes."""
    for name in ("TRAIN", "HELDOUT"):
        stub[f"DASD_{name}_DATA"] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").touch()
    layout = {"DASD_TRAIN_NODES": "2", "DASD_ROLLOUT_NODES": "2", "DASD_SERVER_TP": "4", "DASD_ROUTER": "1"}
    stub |= {**layout, "RANK": "3", "WORLD_SIZE": "4"}
    job = start(cluster, tmp_path, "train_dasd_32b.sh", "optimizer.lr=2e-6", options=("--nodes=4",), **stub)
    assert finish(cluster, job, tmp_path / "job.log", 60) == "COMPLETED", (tmp_path / "job.log").read_text()
    servers = {option(line, "--port"): line for line in said(tmp_path, "serve")}
    first = min(map(int, servers))
    places = [
        (servers[str(first + index)]["SLURMD_NODENAME"], servers[str(first + index)]["CUDA_VISIBLE_DEVICES"])
        for index in range(4)
    ]
    assert places == [("n3", "0,1,2,3"), ("n3", "4,5,6,7"), ("n4", "0,1,2,3"), ("n4", "4,5,6,7")]
    (router,) = said(tmp_path, "router")
    assert [word for word in router["arguments"] if word.startswith("http")] == [
        f"http://{node}:{first + index}" for index, (node, _) in enumerate(places)
    ]
    trainers = {line["SLURMD_NODENAME"]: line for line in said(tmp_path, "train")}
    assert {node: (line["PET_NODE_RANK"], line["PET_NNODES"]) for node, line in trainers.items()} == {
        "n1": ("0", "2"),
        "n2": ("1", "2"),
    }
    assert {line["PET_RDZV_ENDPOINT"].split(":")[0] for line in trainers.values()} == {"n1"}
    for line in trainers.values():
        # What a container with PyTorch says of each node is not taken for torchrun's.
        assert line["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7" and line["RANK"] is line["WORLD_SIZE"] is None
        assert {f"rollout.router=http://n3:{option(router, '--port')}", "experiment=dasd_32b", "resume=auto"} <= set(
            line["arguments"]
        )
        assert line["arguments"][-1] == "optimizer.lr=2e-6"


def test_a_trainer_that_fails_ends_the_job(cluster: SlurmCluster, tmp_path: Path, stub: dict[str, str]) -> None:
    act = "sys.exit('no more memory') if os.environ['PET_NODE_RANK'] == '1' else time.sleep(1000)"
    job = start(cluster, tmp_path, "train_dasd_tiny.sh", STUB=act, **stub)
    assert finish(cluster, job, tmp_path / "job.log", 40) == "FAILED"
    assert "no more memory" in (tmp_path / "run" / "logs" / "train.1.n2.log").read_text()
    assert "training failed" in (tmp_path / "job.log").read_text() and cluster.job(job)["Restarts"] == "0"


def test_a_trainer_that_asks_for_it_is_started_again(
    cluster: SlurmCluster, tmp_path: Path, stub: dict[str, str]
) -> None:
    """With status 75 on both nodes, one of which needs some time after the other, and without a signal to the batch
    shell."""
    act = (
        "first = 'SLURM_RESTART_COUNT' not in os.environ; time.sleep(first * int(os.environ['PET_NODE_RANK'])); "
        "sys.exit(75 * first)"
    )
    job = start(cluster, tmp_path, "train_dasd_tiny.sh", STUB=act, **stub)
    assert finish(cluster, job, tmp_path / "job.log", 60) == "COMPLETED", (tmp_path / "job.log").read_text()
    assert cluster.job(job)["Restarts"] == "1" and len(said(tmp_path, "train")) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [("optimizer.lrr=1", "optimizer.lrr"), ("data.train.path=/no/where.jsonl", "/no/where.jsonl is not there")],
)
def test_what_cannot_be_run_is_known_before_servers_start(
    cluster: SlurmCluster, tmp_path: Path, override: str, message: str
) -> None:
    job = start(cluster, tmp_path, "train_dasd_tiny.sh", override)
    assert finish(cluster, job, tmp_path / "job.log", 100) == "FAILED"
    assert message in (tmp_path / "job.log").read_text()
    assert not list((tmp_path / "run" / "logs").glob("server*"))


def test_servers_that_are_never_ready_end_the_job(cluster: SlurmCluster, tmp_path: Path, stub: dict[str, str]) -> None:
    job = start(cluster, tmp_path, "train_dasd_tiny.sh", STUB="mute", DASD_READY_SECONDS="3", **stub)
    assert finish(cluster, job, tmp_path / "job.log", 40) == "FAILED"
    assert "did not answer within DASD_READY_SECONDS=3" in (tmp_path / "job.log").read_text()
    assert not said(tmp_path, "train")
