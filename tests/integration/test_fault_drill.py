"""Two servers under a run: killed, frozen, answering garbage, gone in the middle of an update. Nothing is lost or comes twice.

The embedded server gives equal rollouts for equal seeds whichever of two serves them, so the metrics of a disturbed run have to be those of
an undisturbed one to the bit: every rollout once, under the weights of its step.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from runs import NO_EVALUATION, SMALL, finish, reproducible, rows, start, train

from dasd_megatron.config import load_config
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.launch import LocalServer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 50
RUN = [
    *NO_EVALUATION,
    f"run.steps={STEPS}",
    "checkpoint.every=0",
    "rollout.backoff_seconds=0.05",
    "rollout.groups_per_request=1",
    "rollout.request_timeout_seconds=4",
    "rollout.weight_sync_timeout_seconds=4",
    "rollout.connect_timeout_seconds=1",
]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("healthy") / "run"
    train(*RUN, f"run.dir={path}")
    return path


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[LocalServer]]:
    config = load_config([*SMALL])
    make_tiny_model(tmp_path / "model", config.model.tiny, 1)
    with ExitStack() as stack:
        servers = [LocalServer(tmp_path / "model", "first", config.rollout, tmp_path / f"log{index}") for index in range(2)]
        for server in servers:
            stack.enter_context(server)
        yield servers


@pytest.mark.parametrize("weight_sync", ["disk", "distributed"])
def test_drill(weight_sync: str, pair: list[LocalServer], healthy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = pair
    urls = f"rollout.servers=[{first.url},{second.url}]"
    process = start(*RUN, "rollout.engine=external", urls, f"rollout.weight_sync={weight_sync}", f"run.dir={run}")
    output: list[tuple[int, str]] = []
    reader = threading.Thread(target=lambda: output.append(finish(process, 400)))
    reader.start()
    worst = 0.0

    def at(step: int, act: Callable[[], object]) -> None:
        """Do it when the step is done, and see that two more follow soon."""
        nonlocal worst
        deadline = time.monotonic() + 120
        while len(rows(run / "metrics.jsonl")) < step:
            assert time.monotonic() < deadline and not output, output
            time.sleep(0.005)
        act()
        acted = time.monotonic()
        while len(rows(run / "metrics.jsonl")) < step + 2:
            assert time.monotonic() < acted + 60 and not output, output
            time.sleep(0.005)
        worst = max(worst, time.monotonic() - acted)

    frozen = psutil.Process(second.pid)
    at(5, lambda: psutil.Process(first.pid).kill())
    at(12, lambda: first.restart(first.model_path, "first"))
    at(20, frozen.suspend)
    at(28, frozen.resume)
    at(36, lambda: psutil.Process(second.pid).kill())
    reader.join()
    status, text = output[0]
    assert status == 0, text[-4000:]
    assert worst < 30
    assert reproducible(run / "metrics.jsonl") == reproducible(healthy / "metrics.jsonl")
    # Every group of every step once, and each sample under its own step's weights.
    for step in range(1, STEPS + 1):
        samples = rows(run / "rollouts" / f"step_{step:06d}.jsonl")
        assert len({(sample["group"], sample["sample"]) for sample in samples}) == len(samples) == 16
        assert {sample["weight_version"] for sample in samples} == {f"step_{step - 1:06d}"}
    # A plain line for what happened, and the restarted server served again.
    for url in (first.url, second.url):
        assert re.search(rf"rollout server {url}: \w+ -> (suspect|dead)", text), text[-4000:]
    # From step 36 on there was only the one that had been killed and restarted, with the weights of the beginning.
    assert re.search(rf"rollout server {first.url}: dead -> (stale|serving)", text), text[-6000:]
