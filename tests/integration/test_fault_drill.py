"""Two servers under a run, and the run itself: killed, frozen, answering errors and garbage, gone in the middle of a
request or an update.

Every prompt is trained on once, under weights no older than allowed, or is still kept for a later step. The embedded
server gives equal rollouts for equal seeds whichever of two serves them, so there the metrics have to be those of an
undisturbed run to the bit.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from dasd_megatron.config import RolloutConfig, load_config
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.local_server import LocalServer
from dasd_megatron.rollout_files import read_samples
from tests.support.runs import NO_EVALUATION, SMALL, kill, reproducible, rows_so_far, saved_rollouts, start, train
from tests.support.servers import FaultyProxy, sglang_python

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

START_SECONDS = 600
GROUPS = 8
LEAST_GROUPS = {"embedded": 100, "sglang": 200}
RUN = [
    *NO_EVALUATION,
    f"batch.groups={GROUPS}",
    "batch.samples_per_group=2",
    "checkpoint.every=4",
    "rollout.backoff_seconds=0.05",
    "rollout.groups_per_request=2",
    "rollout.connect_timeout_seconds=1",
    "rollout.max_restarts=20",
]


@dataclass
class Place:
    """A server behind a proxy, whose next request of a path can be made to go wrong."""

    server: LocalServer
    faults: dict[str, list[Callable[[], str | None]]]
    proxy: FaultyProxy | None = None

    def serve(self) -> None:
        def fault(path: str, _count: int) -> str | None:
            waiting = self.faults.get(path)
            return waiting.pop(0)() if waiting else None

        self.proxy = FaultyProxy(self.server.url, fault)

    def family(self) -> list[psutil.Process]:
        """SGLang is several processes."""
        first = psutil.Process(self.server.pid)
        return [first, *first.children(recursive=True)]

    def kill(self) -> None:
        for member in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()

    def next(self, path: str, *actions: Callable[[], str | None]) -> None:
        self.faults[path] = list(actions)


class Drill:
    """A run in the background, and how far it is."""

    def __init__(self, folder: Path, options: list[str]):
        self.folder, self.options = folder, options
        self.process = start(*options, "run.steps=100000", f"run.dir={folder}")
        self.text = ""
        self.worst = 0.0
        self._read()

    def _read(self) -> None:
        def collect() -> None:
            for line in self.process.stdout:
                self.text += line

        threading.Thread(target=collect, daemon=True).start()

    def steps(self) -> int:
        return len(rows_so_far(self.folder))

    def wait(self, condition: Callable[[], bool], seconds: float) -> float:
        begun = time.monotonic()
        while not condition():
            assert self.process.poll() is None, self.text[-6000:]
            assert time.monotonic() < begun + seconds, self.text[-6000:]
            time.sleep(0.005)
        return time.monotonic() - begun

    def go_on(self, steps: int = 2, seconds: float = 60.0) -> None:
        """So many steps more."""
        wanted = self.steps() + steps
        self.worst = max(self.worst, self.wait(lambda: self.steps() >= wanted, seconds))


@pytest.fixture
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Place]]:
    config = load_config([*SMALL])
    make_tiny_model(tmp_path / "model", config.model.tiny, 1)
    rollout: RolloutConfig = config.rollout
    if request.param == "sglang":
        sglang = [f"rollout.sglang.python={sglang_python()}", "rollout.sglang.max_total_tokens=8192"]
        # A start takes 40 s of CPU time in three processes. Beside the trainer, the other server and other drills it
        # was seen to last 165 s with 14 processes on two cores. A start that hangs fails here too, and says where.
        limit = f"rollout.startup_timeout_seconds={START_SECONDS}"
        rollout = load_config([*SMALL, "rollout=sglang_cpu", *sglang, limit]).rollout
    with ExitStack() as stack:
        found = [
            Place(LocalServer(tmp_path / "model", "first", rollout, tmp_path / f"log{index}"), {}) for index in range(2)
        ]
        starts = [threading.Thread(target=place.server.start) for place in found]
        for place, thread in zip(found, starts, strict=True):
            stack.callback(place.server.stop)
            thread.start()
        for place, thread in zip(found, starts, strict=True):
            thread.join()
            assert place.server.alive()
            place.serve()
            stack.callback(place.proxy.close)
        yield found


AHEAD = [
    "rollout.max_staleness=1",
    "rollout.unfinished=retract",
    "rollout.over_sampling=1.25",
    "loss.importance_sampling=token",
]


@pytest.mark.parametrize(
    ("places", "weight_sync", "more"),
    [
        ("embedded", "disk", []),
        pytest.param(
            "sglang", "distributed", AHEAD, marks=[pytest.mark.drill, pytest.mark.timeout(900 + START_SECONDS)]
        ),
    ],
    indirect=["places"],
    ids=["embedded-disk", "sglang-distributed-ahead"],
)
def test_drill(weight_sync: str, more: list[str], places: list[Place], tmp_path: Path) -> None:
    first, second = places
    engine = first.server.rollout.engine
    patience, least_groups = {"embedded": 2, "sglang": 10}[engine], LEAST_GROUPS[engine]
    options = [
        *RUN,
        *more,
        "rollout.engine=external",
        f"rollout.servers=[{first.proxy.url},{second.proxy.url}]",
        f"rollout.weight_sync={weight_sync}",
        f"rollout.request_timeout_seconds={patience}",
        f"rollout.weight_sync_timeout_seconds={patience}",
    ]
    run = tmp_path / "run"
    drill = Drill(run, options)
    begins_update = "/update_weights_from_disk" if weight_sync == "disk" else "/begin_weight_update"

    def happens(place: Place, path: str, act: Callable[[], None]) -> None:
        """``act`` at the next request of ``path``, before the server gets it."""
        done = threading.Event()

        def once() -> None:
            act()
            done.set()

        place.next(path, once)
        drill.wait(done.is_set, 60)

    def comes_back(place: Place) -> None:
        place.server.restart(place.server.model_path, "first")
        # Nobody is to be taken down before the other serves again.
        served = threading.Event()
        place.next("/generate", served.set)
        drill.wait(served.is_set, 90)

    def freeze(place: Place, name: str) -> None:
        for member in place.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(member, name)()

    drill.wait(lambda: drill.steps() >= 3, 120)
    happens(first, "/generate", first.kill)
    drill.go_on()
    comes_back(first)
    freeze(second, "suspend")
    drill.go_on()
    freeze(second, "resume")
    served = threading.Event()
    second.next("/generate", served.set)
    drill.wait(served.is_set, 90)
    for fault in ("500", "garbage"):
        # One after the other: of two requests in flight the second would meet a server that is suspected already.
        second.next("/generate", lambda fault=fault: fault, served.set)
        drill.wait(lambda: not second.faults["/generate"], 60)
        drill.go_on()
    happens(second, begins_update, second.kill)
    drill.go_on()
    comes_back(second)
    drill.go_on()
    drill.wait(lambda: drill.steps() * GROUPS > least_groups, 120)
    trainer_is_gone = threading.Event()

    def kill_trainer() -> None:
        kill(drill.process)
        trainer_is_gone.set()

    second.next(begins_update, kill_trainer)
    assert trainer_is_gone.wait(60)
    last = drill.steps() + 3
    resumed = train(*options, f"run.steps={last}", f"run.dir={run}", "resume=auto", timeout=200)
    assert "resumed from" in resumed
    assert drill.worst < 30

    # Every prompt was trained on once or is kept; each sample under weights of its step, or as much older as is
    # allowed.
    staleness = 1 if more else 0
    trained: list[int] = []
    for step in range(1, last + 1):
        samples = saved_rollouts(run)[step]
        assert len({(sample["position"], sample["sample"]) for sample in samples}) == len(samples) == 2 * GROUPS
        trained += sorted({sample["position"] for sample in samples})
        allowed = {f"step_{version:06d}" for version in range(step - 1 - staleness, step)}
        assert {version for sample in samples for version, _ in sample["weight_versions"]} <= allowed
    assert len(trained) == len(set(trained)) == last * GROUPS >= least_groups
    checkpoint = run / "checkpoints" / f"step_{last:06d}"
    state = json.loads((checkpoint / "trainer.json").read_text())
    ready = checkpoint / "ready.safetensors"
    # There is no such file where no group was ahead of its step.
    kept = {*state["pending"], *(sample.position for sample in (read_samples(ready) if ready.exists() else []))}
    assert not kept & set(trained) and kept | set(trained) == set(range(state["position"]))
    if not more:
        undisturbed = tmp_path / "undisturbed"
        train(*RUN, f"run.steps={last}", f"run.dir={undisturbed}")
        assert reproducible(run / "metrics.jsonl") == reproducible(undisturbed / "metrics.jsonl")
    # A plain line for what happened, and those that were away served again.
    for place in places:
        assert re.search(rf"rollout server {place.proxy.url}: \w+ -> (suspect|dead) \(", drill.text), drill.text[-6000:]
        assert re.search(rf"rollout server {place.proxy.url}: (dead|suspect) -> (stale|serving) \(", drill.text), (
            drill.text[-6000:]
        )
    for reason in ("answered 500: injected", "answered what is not JSON"):
        assert re.search(rf"rollout server {second.proxy.url}: serving -> suspect \(.*{reason}", drill.text), (
            drill.text[-6000:]
        )
