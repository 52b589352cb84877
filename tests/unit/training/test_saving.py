"""Choice of the checkpoint that a run resumes from, and of the one that it goes back to."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dasd_megatron.training.checkpoint import CheckpointError, TrainerState, find_checkpoint
from dasd_megatron.training.checkpoint_files import checkpoint_path, hash_files, publish
from dasd_megatron.training.saving import _find_good_checkpoint
from tests.support.thread_ranks import ThreadRanks

RANKS = 2


def write(run: Path, step: int, skipped: int = 0) -> Path:
    """A checkpoint without tensors."""
    final = checkpoint_path(run, step)
    partial = final.with_name(final.name + ".1234.partial")
    partial.mkdir(parents=True)
    record = {"step": step, "skipped": skipped, "discarded": 0, "rollbacks": 0, "rolled_back_to": -1}
    record |= {"position": 16 * step, "pending": [], "collected": {}}
    (partial / "trainer.json").write_text(json.dumps(record))
    (partial / "__0_0.distcp").write_text("weights")
    publish(partial, final, hash_files(partial, ["__0_0.distcp"]))
    return final


def damage(path: Path) -> None:
    (path / "__0_0.distcp").write_text("weighty")


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> ThreadRanks:
    return ThreadRanks(RANKS, monkeypatch)


def found(ranks: ThreadRanks, run: Path, resume: str) -> list[object]:
    return ranks.run(lambda _: find_checkpoint(resume, run))


def test_the_newest_checkpoint_is_resumed_unless_none_is_wanted(ranks: ThreadRanks, tmp_path: Path) -> None:
    assert found(ranks, tmp_path, "auto") == [None] * RANKS
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert found(ranks, tmp_path, "auto") == [second] * RANKS
    assert found(ranks, tmp_path, str(first)) == [first] * RANKS
    assert found(ranks, tmp_path, "none") == [None] * RANKS


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    ranks: ThreadRanks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    damage(second)
    with caplog.at_level(logging.WARNING):
        assert found(ranks, tmp_path, "auto") == [first] * RANKS
    assert "set aside as step_000002.damaged" in caplog.text
    assert second.with_suffix(".damaged").is_dir() and not second.exists()


def test_a_run_without_an_intact_checkpoint_is_refused(ranks: ThreadRanks, tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    damage(path)
    for resume, message in ((str(path), "restore it, or name another checkpoint"), ("auto", "no checkpoint of")):
        errors = found(ranks, tmp_path, resume)
        assert all(isinstance(error, CheckpointError) and message in str(error) for error in errors)


def good(ranks: ThreadRanks, run: Path, state: TrainerState) -> list[object]:
    return ranks.run(lambda _: _find_good_checkpoint(run, state))


def test_a_run_goes_back_to_the_last_step_that_was_not_skipped(ranks: ThreadRanks, tmp_path: Path) -> None:
    state = TrainerState(step=5, skipped=4)
    assert good(ranks, tmp_path, state) == [None] * RANKS
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    write(tmp_path, 4, skipped=2)
    assert good(ranks, tmp_path, state) == [second] * RANKS
    damage(second)
    assert good(ranks, tmp_path, state) == [first] * RANKS


def test_a_run_does_not_go_back_to_one_checkpoint_twice(ranks: ThreadRanks, tmp_path: Path) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert good(ranks, tmp_path, TrainerState(step=5, skipped=4, rolled_back_to=2)) == [first] * RANKS
    assert good(ranks, tmp_path, TrainerState(step=5, skipped=4, rolled_back_to=1)) == [second] * RANKS
