"""Weights over a process group and out of shared memory: the runs that they make, to the bit those of weights from
disk; and what happens when a server is gone."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dasd_megatron.config import load_config
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.local_server import LocalServer
from tests.support.runs import NO_EVALUATION, SMALL, finish, reproducible, rows, rows_so_far, start, train
from tests.support.servers import FaultyProxy, sglang_python

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RUN = [*NO_EVALUATION, "run.steps=5", "checkpoint.every=0", "rollout.backoff_seconds=0.05", "rollout.max_retries=1"]
# Far smaller than the model, and no multiple of anything: tensors of all sizes end and begin buckets, and some have one
# of their own.
BUCKETS = ["rollout.weight_bucket_bytes=5001", "rollout.weight_sync_timeout_seconds=20"]
DISTRIBUTED = ["rollout.weight_sync=distributed", *BUCKETS]
TENSOR = ["rollout.weight_sync=tensor", *BUCKETS]


def test_the_run_is_that_of_weights_from_disk(tmp_path: Path) -> None:
    layout = ["parallel=tp2", "parallel.pipeline_model_parallel_size=2"]
    train(*RUN, *layout, f"run.dir={tmp_path / 'disk'}")
    train(*RUN, *DISTRIBUTED, *layout, f"run.dir={tmp_path / 'distributed'}")
    # The servers' memory comes and goes in every step, and what they hold is looked at.
    checked = ["rollout.release_memory=true", "rollout.verify_weights=5"]
    train(*RUN, *TENSOR, *checked, *layout, f"run.dir={tmp_path / 'tensor'}")
    metrics = reproducible(tmp_path / "disk" / "metrics.jsonl")
    assert metrics[0]["weight_version"] != metrics[-1]["weight_version"]
    for way in ("distributed", "tensor"):
        assert reproducible(tmp_path / way / "metrics.jsonl") == metrics
        # Only what the server was started from was ever written.
        assert [path.name for path in (tmp_path / way / "weights").iterdir()] == ["step_000000"]


def wait(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.005)


def server_of(process: subprocess.Popen) -> psutil.Process:
    for child in psutil.Process(process.pid).children(recursive=True):
        if "dasd_megatron.rollout.server" in child.cmdline():
            return child
    raise AssertionError("no server")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    train(*RUN, "run.steps=16", f"run.dir={path}")
    return path


@pytest.mark.parametrize("way", [pytest.param("distributed", marks=pytest.mark.drill), "tensor"])
def test_a_server_that_goes_is_replaced_and_nothing_changes(way: str, undisturbed: Path, tmp_path: Path) -> None:
    """Whatever it was doing, a sync or rollouts: it comes back on the weights that it was started from, and gets the
    current ones."""
    run = tmp_path / "run"
    limits = ["rollout.request_timeout_seconds=5", "rollout.weight_sync_timeout_seconds=5"]
    process = start(*RUN, *(DISTRIBUTED if way == "distributed" else TENSOR), *limits, "run.steps=16", f"run.dir={run}")
    # One that freezes takes its time to be found: once is enough.
    for step, how in [(3, "kill"), (8, "freeze" if way == "distributed" else "kill")]:
        wait(lambda step=step: len(rows_so_far(run)) >= step, process)
        server = server_of(process)
        server.kill() if how == "kill" else server.suspend()
    status, output = finish(process)
    assert status == 0, output[-4000:]
    assert reproducible(run / "metrics.jsonl") == reproducible(undisturbed / "metrics.jsonl")


def test_servers_of_others_give_their_memory_back_for_every_update(tmp_path: Path) -> None:
    config = load_config([*SMALL])
    make_tiny_model(tmp_path / "model", config.model.tiny, 1)
    asked: list[str] = []
    with LocalServer(tmp_path / "model", "first", config.rollout, tmp_path / "log") as server:
        proxy = FaultyProxy(server.url, lambda path, _count: asked.append(path))
        try:
            external = ["rollout.engine=external", f"rollout.servers=[{proxy.url}]", "rollout.release_memory=true"]
            train(*RUN, *external, "run.steps=3", f"run.dir={tmp_path / 'run'}")
        finally:
            proxy.close()
    wanted = ("/generate", "/release_memory_occupation", "/resume_memory_occupation", "/update_weights_from_disk")
    order = [path for path in asked if path in wanted]
    step = ["/generate"] * 2 + [
        "/release_memory_occupation",
        "/resume_memory_occupation",
        wanted[3],
        "/resume_memory_occupation",
    ]
    assert order == [wanted[3], "/generate", *step * 3]


# Its short forms in `make test` are test_the_run_is_that_of_weights_from_disk above, with the embedded server, and the
# contract of real SGLang's updates in tests/integration/rollout_contract/test_update_over_group.py and
# test_update_from_memory.py.
@pytest.mark.drill
@pytest.mark.parametrize("way", ["distributed", "tensor"])
def test_real_sglang_draws_from_the_weights_of_every_step(way: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Steps so large that last step's weights would be seen.
    moving = ["optimizer.lr=1e-2", "algorithm.beta=0.1", "run.steps=4"]
    sglang = ["rollout=sglang_cpu", f"rollout.sglang.python={sglang_python()}", f"rollout.weight_sync={way}"]
    sglang += ["rollout.verify_weights=4", "rollout.release_memory=true"]
    train(*RUN, *moving, *sglang, "rollout.weight_bucket_bytes=5001", f"run.dir={run}", timeout=400)
    steps = rows(run / "metrics.jsonl")
    assert [step["weight_version"] for step in steps] == [f"step_{index:06d}" for index in range(4)]
    for step in steps:
        assert step["rollout/log_prob_diff_max"] < 1e-3
    start_weights, end_weights = (load_file(path / "model.safetensors") for path in (run / "start", run / "model"))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert (start_weights[name] - end_weights[name]).abs().max() > 4 * 5e-3
    assert torch.isfinite(end_weights[name]).all()
