"""Rollouts are written while training goes on, and a run learns in one line that they could not be."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import pytest

from dasd_megatron.rollout_files import load_samples, rollouts_path
from dasd_megatron.sample_columns import to_columns
from dasd_megatron.training import rollout_writer
from dasd_megatron.training.rollout_writer import RolloutWriter, UnsavedRolloutsError
from tests.support.random_samples import random_group
from tests.support.thread_ranks import ThreadRanks

SAMPLES = random_group(random.Random(0), 0, 4, with_teacher=False)


def writer(folder: Path, replica: int = 0, replicas: int = 1, timeout_seconds: float = 20.0) -> RolloutWriter:
    return RolloutWriter(folder, replica=replica, replicas=replicas, timeout_seconds=timeout_seconds)


def test_each_replica_writes_its_own_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, written = ThreadRanks(2, monkeypatch), threading.Event()
    save = rollout_writer.save_columns
    monkeypatch.setattr(rollout_writer, "save_columns", lambda *arguments: (written.wait(20), save(*arguments)))
    (tmp_path / "step_000003.safetensors").touch()

    def be_rank(rank: int) -> bool:
        with writer(tmp_path, rank, 2) as own:
            own.save(3, to_columns(SAMPLES[2 * rank : 2 * rank + 2], with_teacher=False))
            before = rollouts_path(tmp_path, 3, rank, 2).exists()
            written.set()
            own.finish()
        return before

    assert ranks.run(be_rank) == [False, False]
    assert load_samples(tmp_path, 3, groups=1, samples_per_group=4) == SAMPLES
    assert not (tmp_path / "step_000003.safetensors").exists()


def test_a_full_disk_ends_the_run_on_every_rank_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ThreadRanks(2, monkeypatch)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rollout_writer, "save_columns", fail)

    def be_rank(rank: int) -> None:
        own = writer(tmp_path)
        if rank == 1:
            own.save(3, {})
        own.finish()

    for error in ranks.run(be_rank):
        assert type(error) is UnsavedRolloutsError and error.on_all_ranks
        assert str(error).startswith(f"cannot write {tmp_path / 'step_000003.safetensors'}: No space left on device")
        assert "resume=auto" in str(error) and "\n" not in str(error)


def test_a_disk_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ThreadRanks(1, monkeypatch)
    end = threading.Event()
    monkeypatch.setattr(rollout_writer, "save_columns", lambda *_: end.wait(20))
    own = writer(tmp_path, timeout_seconds=0.1)
    own.save(1, {})
    assert not own.failed
    own.save(2, {})
    assert own.failed
    with pytest.raises(UnsavedRolloutsError, match="not written within backend.timeout_seconds=0.1"):
        own.finish()
    end.set()
