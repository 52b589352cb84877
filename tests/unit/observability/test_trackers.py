from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dasd_megatron.observability import trackers
from dasd_megatron.observability.loggers import MetricsLogger
from dasd_megatron.observability.metric_files import set_rows_aside, truncate_after
from dasd_megatron.observability.trackers import Tracker, follow, public_settings

SETTINGS = {
    "wandb": "offline",
    "wandb_project": "project",
    "mlflow": True,
    "mlflow_uri": None,
    "mlflow_experiment": "experiment",
}


def needs(module: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


REAL = [pytest.param("wandb", marks=needs("wandb")), pytest.param("mlflow", marks=needs("mlflow"))]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    config = {
        "run": {"name": "toy"},
        "logging": SETTINGS,
        "algorithm": {"beta": 0.25, "name": "dasd"},
        "batch": {"groups": 4},
    }
    (path / "config.yaml").write_text(json.dumps(config))
    return path


class Book:
    """A service that keeps what it gets, and fails as often as it is told."""

    def __init__(self, failures: int = 0) -> None:
        self.logged: list[tuple[str, int, dict]] = []
        self.ids: list[str | None] = []
        self.failures, self.closed, self.settings = failures, 0, {}

    def connect(self, settings, run_name, run_dir, state, config):
        self.ids.append(state["id"])
        self.settings = config
        return self, state["id"] or "an id"

    def log(self, values, axis, step, seconds):
        if self.failures:
            self.failures -= 1
            raise OSError("no route to host")
        self.logged.append((axis, step, values))

    def close(self):
        self.closed += 1


def rounds(*happenings):
    """``ended`` that lets one thing happen before each look, and then says that it is over."""
    left = list(happenings)

    def ended() -> bool:
        if not left:
            return True
        happening = left.pop(0)
        if happening:
            happening()
        return False

    return ended


def append(path: Path, text: str) -> None:
    (path.parent).mkdir(exist_ok=True)
    with open(path, "a") as file:
        file.write(text)


def test_every_line_is_sent_once_with_its_step(run_dir, monkeypatch):
    monkeypatch.setattr(trackers, "_sleep", lambda *_: None)
    book = Book()
    noise = random.Random(0)
    values = [noise.random() for _ in range(3)]
    metrics, evaluation, warm = run_dir / "metrics.jsonl", run_dir / "evaluation.jsonl", run_dir / "warm_start.jsonl"
    (run_dir / "trackers").mkdir()

    def line(step):
        return json.dumps({"step": step, "time": 5.0, "reward/mean": values[step - 1], "weight_version": "v"}) + "\n"

    follow(
        "book",
        run_dir,
        rounds(
            lambda: append(warm, '{"step": 1, "loss": 2.0}\n'),
            lambda: append(metrics, line(1) + line(2)[:9]),
            lambda: append(metrics, line(2)[9:]),
            lambda: append(
                evaluation,
                '{"step": 2, "label": "step", "avg@4": 0.5}\n{"step": 2, "label": "after", "avg@4": "NaN"}\n',
            ),
            lambda: append(metrics, line(3)),
        ),
        book.connect,
    )
    assert [(axis, step) for axis, step, _ in book.logged] == [
        ("warm_start", 1),
        ("", 1),
        ("", 2),
        ("", 2),
        ("", 2),
        ("", 3),
    ]
    assert [row["reward/mean"] for *_, row in book.logged if "reward/mean" in row] == values
    assert book.logged[0][2] == {"warm_start/loss": 2.0} and book.logged[3][2] == {"evaluation/avg@4": 0.5}
    assert math.isnan(book.logged[4][2]["evaluation/avg@4"]) and book.closed == 1


def test_a_resumed_run_goes_on_without_steps_twice(run_dir, monkeypatch):
    monkeypatch.setattr(trackers, "_sleep", lambda *_: None)
    (run_dir / "trackers").mkdir()
    book = Book()
    for step in (1, 2, 3):
        append(run_dir / "metrics.jsonl", json.dumps({"step": step, "x": step}) + "\n")
    follow("book", run_dir, rounds(), book.connect)
    truncate_after(run_dir, 1)
    for step in (2, 3, 4):
        append(run_dir / "metrics.jsonl", json.dumps({"step": step, "x": 10 * step}) + "\n")
    follow("book", run_dir, rounds(), book.connect)
    assert [(step, row["x"]) for _, step, row in book.logged] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert book.ids == [None, "an id"]


def test_files_replaced_under_way_are_read_again(run_dir, monkeypatch):
    monkeypatch.setattr(trackers, "_sleep", lambda *_: None)
    (run_dir / "trackers").mkdir()
    book = Book()
    metrics = run_dir / "metrics.jsonl"
    follow(
        "book",
        run_dir,
        rounds(
            lambda: append(metrics, '{"step": 1}\n{"step": 2}\n{"step": 3}\n'),
            lambda: truncate_after(run_dir, 1),
            lambda: append(metrics, '{"step": 2}\n{"step": 3}\n{"step": 4}\n'),
        ),
        book.connect,
    )
    assert [step for _, step, _ in book.logged] == [1, 2, 3, 4]


def test_failures_are_tried_again_and_lose_nothing(run_dir, monkeypatch):
    waits = []
    monkeypatch.setattr(trackers, "_sleep", lambda seconds, ended: waits.append(seconds))
    (run_dir / "trackers").mkdir()
    append(run_dir / "metrics.jsonl", '{"step": 1, "x": 1}\n{"step": 2, "x": 2}\n')
    book = Book(failures=3)
    troubles = []

    def look():
        troubles.append(trackers._read_state(run_dir, "book")["trouble"])

    follow("book", run_dir, rounds(*[look] * 5), book.connect)
    assert [step for _, step, _ in book.logged] == [1, 2] and len(book.ids) == 1
    assert waits == [2, 4, 8, 1, 1]
    assert troubles == ["", *["OSError: no route to host"] * 3, ""]
    with pytest.raises(OSError, match="no route"):
        append(run_dir / "metrics.jsonl", '{"step": 3, "x": 1}\n')
        follow("book", run_dir, rounds(), Book(failures=1).connect)


def test_secrets_are_left_out(run_dir):
    settings = public_settings(
        {
            "rollout": {
                "sglang": {"arguments": ["--api-key", "hush"], "max_total_tokens": 7},
                "servers": "http://me:hush@host:1/x",
            },
            "auth_token": "hush",
            "password": "hush",
            "model": {"tokenizer": "t", "path": None},
            "some": {"api_key": "hush", "list": [1, 2]},
        }
    )
    assert "hush" not in json.dumps(settings)
    assert (
        settings["rollout.sglang.max_total_tokens"] == 7
        and settings["model.tokenizer"] == "t"
        and settings["some.list"] == "[1, 2]"
    )
    assert settings["rollout.servers"] == "http://(left out)@host:1/x"


# The tests from here on use the real libraries, in their real process, without a network.


def leveldb_records(data: bytes, header: int):
    """The records of a file in LevelDB's log format, which is W&B's behind its header."""
    place, parts = header, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, first, middle, last.
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_runs(run_dir: Path) -> list[SimpleNamespace]:
    """Return what W&B's files hold, one entry for each session in order: id, config, and rows of history."""
    from wandb.proto import wandb_internal_pb2

    sessions = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        session = SimpleNamespace(id=None, project=None, config={}, rows=[])
        for data in leveldb_records(path.read_bytes(), header=7):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                session.id, session.project = record.run.run_id, record.run.project
                session.config |= {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.run.config.update
                }
            if record.WhichOneof("record_type") == "history":
                session.rows.append(
                    {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                )
        sessions.append(session)
    return sessions


def history(name: str, run_dir: Path, key: str) -> tuple[set[str], list[tuple[int, float]], dict[str, str]]:
    """(ids of the runs, (step, value) of a metric, settings) in the files of a library, read by the library."""
    if name == "wandb":
        sessions = wandb_runs(run_dir)
        axis = "warm_start/step" if key.startswith("warm_start/") else "step"
        rows = [row for session in sessions for row in session.rows]
        counts = [row["_step"] for row in rows]
        assert counts == list(range(len(rows))), "lower ones would be dropped by the server"
        settings = {key: str(value) for session in sessions for key, value in session.config.items() if key != "_wandb"}
        return {session.id for session in sessions}, [(row[axis], row[key]) for row in rows if key in row], settings
    from mlflow.tracking import MlflowClient

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = MlflowClient(tracking_uri=(run_dir / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("experiment")
    runs = client.search_runs([experiment.experiment_id])
    points = client.get_metric_history(runs[0].info.run_id, key.replace("@", "_at_"))
    assert runs[0].info.status == "FINISHED" and runs[0].info.run_name == "toy"
    return {run.info.run_id for run in runs}, [(point.step, point.value) for point in points], dict(runs[0].data.params)


@pytest.mark.parametrize("name", REAL)
def test_a_run_and_its_resumption(name, run_dir, monkeypatch):
    """The numbers arrive, under one id, each step once; with no host to reach, and without waiting for one."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("DASD_API_KEY", "0123456789abcdef-hush")
    noise = random.Random(1)
    rewards = {step: noise.random() for step in range(1, 6)}
    warnings: list[str] = []
    started = time.monotonic()
    tracker = Tracker(name, run_dir, fresh=True)
    with MetricsLogger(run_dir, tensorboard=False, trackers=[tracker], warn=warnings.append) as logger:
        logger.log_warm_start({"step": 1, "loss": 2.5})
        logger.log_evaluation({"step": 0, "label": "before", "avg@16": 0.5})
        for step in (1, 2, 3):
            logger.log_step(
                {"step": step, "reward/mean": rewards[step], "update/loss": math.nan, "weight_version": "v"}
            )
    truncate_after(run_dir, 2)
    tracker = Tracker(name, run_dir, fresh=False)
    with MetricsLogger(run_dir, tensorboard=False, resume_step=2, trackers=[tracker], warn=warnings.append) as logger:
        for step in (3, 4, 5):
            logger.log_step({"step": step, "reward/mean": rewards[step]})
        logger.log_evaluation({"step": 5, "label": "after", "avg@16": 0.75})
    assert time.monotonic() - started < 60
    assert warnings == []
    ids, points, settings = history(name, run_dir, "reward/mean")
    assert len(ids) == 1 and points == sorted(rewards.items())
    assert history(name, run_dir, "warm_start/loss")[1] == [(1, 2.5)]
    assert history(name, run_dir, "evaluation/avg@16")[1] == [(0, 0.5), (5, 0.75)]
    assert (settings["algorithm.beta"], settings["batch.groups"]) == ("0.25", "4")
    assert not [path for path in run_dir.rglob("*") if path.is_file() and b"abcdef-hush" in path.read_bytes()]


@pytest.mark.parametrize("content", ["", "[]", '{"id": 3}', '{"sent": []}', "{", '{"lines": true}', "[" * 10**5])
def test_a_damaged_record_of_what_was_sent_is_said_and_ends_no_training(run_dir, content):
    tracker = Tracker.__new__(Tracker)
    tracker.name, tracker._run_dir, tracker._warned = "book", run_dir, False
    tracker._process = SimpleNamespace(poll=lambda: None)
    (run_dir / "trackers").mkdir()
    (run_dir / "trackers" / "book.json").write_text(content)
    assert "book.json is damaged" in tracker.trouble() and tracker.trouble() is None


@pytest.mark.parametrize("name", REAL)
def test_a_run_that_begins_again_is_another(name, run_dir):
    for _ in range(2):
        set_rows_aside(run_dir, "metrics.jsonl")
        with MetricsLogger(
            run_dir, tensorboard=False, trackers=[Tracker(name, run_dir, fresh=True)], warn=pytest.fail
        ) as logger:
            logger.log_step({"step": 1, "reward/mean": 0.5})
    if name == "wandb":
        assert len({session.id for session in wandb_runs(run_dir)}) == 2
    else:
        assert len(history(name, run_dir, "reward/mean")[0]) == 2


@pytest.mark.parametrize("name", REAL)
def test_a_trainer_that_is_killed_leaves_no_process_and_no_gap(name, run_dir):
    script = (
        "import sys, os, signal; from pathlib import Path\n"
        "from dasd_megatron.observability.trackers import Tracker; from dasd_megatron.observability.loggers import "
        "MetricsLogger\n"
        "run = Path(sys.argv[1]); tracker = Tracker(sys.argv[2], run, fresh=True)\n"
        "logger = MetricsLogger(run, False, trackers=[tracker])\n"
        "for step in (1, 2, 3): logger.log_step({'step': step, 'reward/mean': step / 8})\n"
        "print(tracker._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(run_dir), name], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    child = int(result.stdout)
    until = time.monotonic() + 60
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < until, "the tracker outlives its trainer"
        time.sleep(0.1)
    assert history(name, run_dir, "reward/mean")[1] == [(step, step / 8) for step in (1, 2, 3)]


def test_a_tracker_that_cannot_work_is_said_once_and_ends_nothing(run_dir):
    # No store can be made below a file; and who has no library here has the same.
    config = json.loads((run_dir / "config.yaml").read_text())
    config["logging"]["mlflow_uri"] = f"file:{run_dir / 'config.yaml'}/store"
    (run_dir / "config.yaml").write_text(json.dumps(config))
    warnings: list[str] = []
    with MetricsLogger(
        run_dir, tensorboard=False, trackers=[Tracker("mlflow", run_dir, fresh=True)], warn=warnings.append
    ) as logger:
        until, step = time.monotonic() + 60, 0
        while not warnings and time.monotonic() < until:
            step += 1
            logger.log_step({"step": step, "reward/mean": 0.5})
            time.sleep(0.1)
        for more in (step + 1, step + 2):
            logger.log_step({"step": more})
        assert (
            len(warnings) == 1
            and warnings[0].startswith("mlflow gets no numbers: ")
            and "training goes on" in warnings[0]
        )
    assert len(warnings) == 2 and "mlflow has not got all numbers" in warnings[1]
    assert all("\n" not in warning for warning in warnings)


def test_a_tracker_that_hangs_is_not_waited_for(run_dir, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    tracker = Tracker("mlflow", run_dir, fresh=True)
    tracker._process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    assert "has not got all numbers" in tracker.close()
    assert time.monotonic() - started < 5 and tracker._process.poll() is not None


@pytest.mark.parametrize("name", REAL)
def test_what_was_not_sent_can_be_sent_by_hand(name, run_dir):
    with MetricsLogger(run_dir, tensorboard=False) as logger:
        for step in (1, 2):
            logger.log_step({"step": step, "reward/mean": step / 4})
    (run_dir / "trackers").mkdir()
    for _ in range(2):
        command = [sys.executable, "-m", "dasd_megatron.observability.trackers", name, str(run_dir)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
    assert history(name, run_dir, "reward/mean")[1] == [(1, 0.25), (2, 0.5)]
    shutil.rmtree(run_dir)
