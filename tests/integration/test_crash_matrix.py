"""One run that is killed, starved, misled and resumed again and again until it is done ends with the numbers of one
that was left in peace.

``CRASH_MOMENTS`` says how often in the drill (20), ``CRASH_SEED`` repeats a series, ``CRASH_KINDS`` limits what happens
to some kinds; a series of two, of kinds for which no interpreter starts, is the drill's short form. Nothing may hang:
what is to end does so within a minute, and what goes on does a step within a minute.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dasd_megatron.training.checkpoint_files import complete_checkpoints, resumable, step_of
from tests.support import preloaded
from tests.support.runs import NO_EVALUATION, finish, kill, reproducible, rows_so_far, start, train

pytestmark = pytest.mark.integration

MOMENTS = int(os.environ.get("CRASH_MOMENTS", "20"))
SHORT = 2

LIMIT_SECONDS = 60.0
START_SECONDS = 180.0
DISK_BYTES = 16 * 2**20
LAYOUTS = ([*NO_EVALUATION, "parallel=tp2"], [*NO_EVALUATION, "parallel.data_parallel_size=2"])
KINDS = os.environ.get(
    "CRASH_KINDS", "rank 0,other rank,node,server,mid-checkpoint,mid-sync,start-up,pre-emption,disk full,clock,damage"
).split(",")
# Their processes are not forked from one that has imported everything, and take twenty seconds each.
REAL_STARTS = {"start-up", "clock"}

# What a step of the system clock is to every Python process of a run.
SITECUSTOMIZE = """
import os, time
real, began = time.time, time.monotonic()
jump, after = float(os.environ["CLOCK_JUMP"]), float(os.environ["CLOCK_AFTER"])
time.time = lambda: real() + (jump if time.monotonic() - began > after else 0.0)
"""


class Series:
    """A run directory and the process that works in it at present, if any."""

    def __init__(self, folder: Path, overrides: list[str], draw: random.Random) -> None:
        self.run, self.overrides, self.draw, self.folder = folder / "run", overrides, draw, folder
        self.process: subprocess.Popen | None = None
        self.ending_seconds = 0.0
        """Seconds that the last process that ended by itself took to do so."""

    def alive(self, environment: dict[str, str] | None = None) -> subprocess.Popen:
        if self.process is None:
            self.process = start(
                *self.overrides, "run.steps=9999", f"run.dir={self.run}", "resume=auto", environment=environment
            )
        return self.process

    def steps(self) -> int:
        return len(rows_so_far(self.run))

    def advance(self, least: int = 1, most: int = 4) -> None:
        """Wait for some steps that were not done before, and a part of the next."""
        process = self.alive()
        newest = resumable(self.run)
        done = max(self.steps(), step_of(newest[0]) if newest else 0)
        target = done + self.draw.randint(least, most)
        deadline = time.monotonic() + START_SECONDS
        while self.steps() < target:
            if self.steps() > done:
                done, deadline = self.steps(), time.monotonic() + LIMIT_SECONDS
            assert process.poll() is None, process.communicate()[0][-6000:]
            assert time.monotonic() < deadline, f"no progress after step {self.steps()}"
            time.sleep(0.005)
        time.sleep(self.draw.random() * min(2.0, rows_so_far(self.run)[-1]["seconds/total"]))

    def member(self, name: str) -> psutil.Process:
        """The worker of a rank, by its number, or the rollout server."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    command = child.cmdline()
                    if name == "server" and "dasd_megatron.rollout.server" in command:
                        return child
                    # A process that a worker has forked looks like it.
                    is_worker = "dasd_megatron.training.worker" in command and child.ppid() == self.process.pid
                    if is_worker and child.environ().get("RANK") == name:
                        return child
            time.sleep(0.01)
        raise AssertionError(f"no process of {name}")

    def ended(self) -> tuple[int, str]:
        """Status and output of the process, which is to end by itself soon and take all of its processes with it."""
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        began = time.monotonic()
        result = finish(self.process, timeout=LIMIT_SECONDS)
        self.ending_seconds = time.monotonic() - began
        _, left = psutil.wait_procs(family, timeout=20)
        assert not left, f"outlived their launcher: {left}"
        self.process = None
        return result

    def lose_node(self) -> None:
        kill(self.process)
        self.process = None

    def lose_rank(self, rank: str) -> None:
        self.member(rank).kill()
        status, output = self.ended()
        assert status not in (0, 75), output[-4000:]

    def wait_for(self, pattern: str) -> None:
        """Return while, or just after, a file is there whose presence is short."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not list(self.run.glob(pattern)):
            assert self.process.poll() is None and time.monotonic() < deadline, f"{pattern} did not appear"
            time.sleep(0.001)
        time.sleep(self.draw.random() * 0.05)


def moment(series: Series, kind: str) -> None:
    draw = series.draw
    if kind == "start-up":
        # While it imports, too, so nothing is preloaded.
        with preloaded.real_start():
            series.alive()
        time.sleep(draw.random() * 20)
        return series.lose_node()
    if kind == "clock":
        if series.process is not None:
            series.lose_node()
        (series.folder / "clock").mkdir(exist_ok=True)
        (series.folder / "clock" / "sitecustomize.py").write_text(SITECUSTOMIZE)
        path = os.pathsep.join([str(series.folder / "clock"), *filter(None, [os.environ.get("PYTHONPATH")])])
        after = 5 + draw.random() * 15
        began = time.monotonic()
        jump = {"PYTHONPATH": path, "CLOCK_JUMP": str(draw.choice((-86400, 86400))), "CLOCK_AFTER": str(after)}
        # Whoever imports the clock gets this one.
        with preloaded.real_start():
            series.alive(jump)
        series.advance()
        while time.monotonic() - began < after + 1:
            time.sleep(0.1)
        if series.process.poll() is None:
            series.lose_node()
        return None
    series.advance()
    if kind == "rank 0":
        series.lose_rank("0")
    elif kind == "other rank":
        series.lose_rank("1")
    elif kind == "node":
        series.lose_node()
    elif kind == "server":
        series.member("server").kill()
        series.advance(2, 2)
    elif kind == "mid-checkpoint":
        series.wait_for("checkpoints/*.partial")
        draw.choice((series.lose_node, lambda: series.lose_rank("0"), lambda: series.lose_rank("1")))()
    elif kind == "mid-sync":
        series.wait_for("weights/*.partial")
        if draw.random() < 0.5:
            series.lose_rank("0")
        else:
            series.member("server").kill()
            series.advance(2, 2)
    elif kind == "pre-emption":
        series.process.send_signal(draw.choice((signal.SIGTERM, signal.SIGUSR1)))
        status, output = series.ended()
        assert status == 75 and "Traceback" not in output, output[-4000:]
        assert step_of(resumable(series.run)[0]) == series.steps()
    elif kind == "disk full":
        with filled(series.run / "checkpoints"):
            status, output = series.ended()
        assert status == 1 and "previous checkpoint is untouched" in output and "Traceback" not in output, output[
            -4000:
        ]
    elif kind == "damage":
        while len(complete_checkpoints(series.run)) < 2:
            series.advance(1, 1)
        series.lose_node()
        newest = resumable(series.run)[0]
        victim = draw.choice([path for path in newest.rglob("*") if path.is_file() and path.stat().st_size > 0])
        content = bytearray(victim.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        victim.write_bytes(draw.choice((content, content[: len(content) // 2])))
        series.advance()
        assert newest.with_suffix(".damaged").is_dir(), f"{victim} was not noticed"
        series.lose_node()
    return None


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Return whether ``folder`` is on a disk of its own, which can be filled."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        print(f"no full disk: mounting a tmpfs needs root ({mounted.stderr.strip()})")
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """The disk of ``folder`` takes nothing more: the room of checkpoints that are removed is taken too."""
    done = threading.Event()

    def fill() -> None:
        with open(folder / "filler", "wb", buffering=0) as file:
            while not done.is_set():
                try:
                    file.write(bytes(4096))
                except OSError:
                    time.sleep(0.001)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        (folder / "filler").unlink()


@pytest.mark.parametrize(
    ("moments", "left_out"),
    [
        pytest.param(SHORT, REAL_STARTS, marks=pytest.mark.timeout(300 + 120 * SHORT)),
        pytest.param(MOMENTS, set(), marks=[pytest.mark.drill, pytest.mark.timeout(300 + 120 * MOMENTS)]),
    ],
    ids=["short", "drill"],
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    moments: int, left_out: set[str], tmp_path: Path
) -> None:
    seed = int(os.environ.get("CRASH_SEED", secrets.randbelow(2**31)))
    draw = random.Random(seed)
    layout = draw.choice(LAYOUTS)
    print(f"CRASH_SEED={seed} CRASH_MOMENTS={moments}, {layout}")
    overrides = [*layout, "checkpoint.every=2", "checkpoint.keep_last=3"]
    # One server after another is killed in one life.
    overrides += ["rollout.max_restarts=20", "rollout.max_retries=1", "rollout.backoff_seconds=0.05"]
    series = Series(tmp_path, overrides, draw)
    with small_disk(series.run / "checkpoints") as can_fill:
        kinds: list[str] = []
        while len(kinds) < moments:
            possible = [kind for kind in KINDS if can_fill or kind != "disk full"]
            possible = [kind for kind in possible if kind not in left_out] or possible
            kinds += draw.sample(possible, len(possible))
        try:
            for number, kind in enumerate(kinds[:moments], start=1):
                began, before, series.ending_seconds = time.monotonic(), series.steps(), 0.0
                moment(series, kind)
                ended = f", ended within {series.ending_seconds:.1f} s" if series.ending_seconds else ""
                print(
                    f"{number}. {kind}: from step {before} to {series.steps()} in {time.monotonic() - began:.0f} "
                    f"s{ended}",
                    flush=True,
                )
        finally:
            if series.process is not None and series.process.poll() is None:
                kill(series.process)
        length = f"run.steps={series.steps() + 2}"
        train(*overrides, length, f"run.dir={series.run}", "resume=auto")
        train(*overrides, length, f"run.dir={tmp_path / 'peace'}")
        assert reproducible(series.run / "metrics.jsonl") == reproducible(tmp_path / "peace" / "metrics.jsonl")
        mine, peaceful = (
            load_file(folder / "model" / "model.safetensors") for folder in (series.run, tmp_path / "peace")
        )
        assert (
            all(torch.equal(tensor, peaceful[name]) for name, tensor in mine.items()) and mine.keys() == peaceful.keys()
        )
        assert not list((series.run / "checkpoints").glob("*.partial"))
