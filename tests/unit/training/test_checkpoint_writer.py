"""The trainer learns how a process fared that writes its part of a checkpoint."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dasd_megatron.training.checkpoint_files import hash_files
from dasd_megatron.training.checkpoint_writer import PendingCheckpoint, ResultFile
from tests.support.thread_ranks import ThreadRanks


def test_a_result_is_read_once_and_not_before_it_is_there(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "results_0.pickle")
    with pytest.raises(queue.Empty):
        results.get_nowait()
    results.put({"bytes": 3})
    assert results.get_nowait() == {"bytes": 3}
    with pytest.raises(queue.Empty):
        results.get_nowait()


def write(path: Path) -> None:
    (path / "__0_0.distcp").write_text("weights")


def request(write: Callable[[Path], None], path: Path) -> SimpleNamespace:
    return SimpleNamespace(async_fn=write, async_fn_args=(path,), async_fn_kwargs={}, preload_fn=None)


@pytest.mark.parametrize("background", [False, True])
def test_files_are_hashed_where_they_are_written(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ThreadRanks(1, monkeypatch)
    checkpoint = PendingCheckpoint(tmp_path, tmp_path / "final", request(write, tmp_path))
    checkpoint.start(background=background)
    assert checkpoint.join(20.0) == hash_files(tmp_path, ["__0_0.distcp"])
    # The hashes themselves are no file of the checkpoint.
    assert [path.name for path in tmp_path.iterdir()] == ["__0_0.distcp"]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("has_tensors", [False, True])
def test_what_else_a_rank_has_is_written_and_hashed_in_the_background_too(
    background: bool, has_tensors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extra(folder: Path) -> list[str]:
        (folder / "ready.safetensors").write_text(f"written by {os.getpid()}")
        return ["ready.safetensors"]

    ThreadRanks(1, monkeypatch)
    asked = request(write, tmp_path) if has_tensors else SimpleNamespace(async_fn=None)
    checkpoint = PendingCheckpoint(tmp_path, tmp_path / "final", asked, extra=extra)
    checkpoint.start(background=background)
    names = ["ready.safetensors", *["__0_0.distcp"][:has_tensors]]
    assert checkpoint.join(20.0) == hash_files(tmp_path, names)
    assert (str(os.getpid()) in (tmp_path / "ready.safetensors").read_text()) is not background


def test_a_full_disk_is_the_same_error_here_and_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ThreadRanks(1, monkeypatch)
    for background in (False, True):
        checkpoint = PendingCheckpoint(tmp_path, tmp_path / "final", request(fail, tmp_path))
        checkpoint.start(background=background)
        with pytest.raises(OSError) as caught:
            checkpoint.join(20.0)
        assert caught.value.errno == errno.ENOSPC


def test_a_rank_that_has_nothing_to_write_has_no_hashes(tmp_path: Path) -> None:
    checkpoint = PendingCheckpoint(tmp_path, tmp_path / "final", SimpleNamespace(async_fn=None))
    checkpoint.start(background=True)
    assert checkpoint.process is None and checkpoint.join(20.0) == {}


def pending(work: Callable[[], object], tmp_path: Path) -> PendingCheckpoint:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return PendingCheckpoint(tmp_path, tmp_path / "final", SimpleNamespace(async_fn=write), process)


def test_a_writer_that_was_killed_is_named_by_its_signal(tmp_path: Path) -> None:
    checkpoint = pending(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path)
    with pytest.raises(RuntimeError, match="ended by SIGKILL"):
        checkpoint.join(20.0)


def test_a_writer_that_hangs_is_killed_at_the_limit(tmp_path: Path) -> None:
    checkpoint = pending(lambda: time.sleep(60), tmp_path)
    assert checkpoint.process is not None
    with pytest.raises(RuntimeError, match="not written within backend.timeout_seconds=0.2"):
        checkpoint.join(0.2)
    checkpoint.process.join(10.0)
    assert checkpoint.process.exitcode == -signal.SIGKILL


def test_hashes_of_a_writer_are_what_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ThreadRanks(1, monkeypatch)
    (tmp_path / "hashes_0.json").write_text(json.dumps({"a": {"bytes": 1, "sha256": "x"}}))
    assert pending(lambda: None, tmp_path).join(20.0) == {"a": {"bytes": 1, "sha256": "x"}}
