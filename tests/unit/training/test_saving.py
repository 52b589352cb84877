"""Choice of the checkpoint that a run resumes from, and of the one that it goes back to."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest

from dasd_megatron.algorithms import EntropySwitch
from dasd_megatron.training.checkpoint_files import CheckpointError, checkpoint_path, hash_files, publish
from dasd_megatron.training.checkpoint_search import TrainerState, find_checkpoint, read_state
from dasd_megatron.training.saving import _find_good_checkpoint
from tests.support.damage import trainer_record
from tests.support.thread_ranks import ThreadRanks

RANKS = 2


def write(run: Path, step: int, skipped: int = 0) -> Path:
    """A checkpoint without tensors."""
    final = checkpoint_path(run, step)
    partial = final.with_name(final.name + ".1234.partial")
    partial.mkdir(parents=True)
    (partial / "trainer.json").write_text(json.dumps(trainer_record(step, skipped=skipped)))
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


def test_a_run_that_has_lost_its_checkpoints_does_not_start_over(ranks: ThreadRanks, tmp_path: Path) -> None:
    shutil.rmtree(write(tmp_path, 1).parent)
    # A second attempt changes nothing, and is refused as well.
    for _ in range(2):
        errors = found(ranks, tmp_path, "auto")
        assert all(isinstance(error, CheckpointError) and "has had checkpoints" in str(error) for error in errors)
    path = write(tmp_path, 2)
    damage(path)
    for _ in range(2):
        errors = found(ranks, tmp_path, "auto")
        assert all(isinstance(error, CheckpointError) and "is intact" in str(error) for error in errors)
        assert path.is_dir()


@pytest.mark.parametrize("content", [None, "", "\n", "step_000001\n", "step_000009\n", "\x1b[2J"])
def test_latest_is_a_hint_and_a_wrong_one_is_said(
    ranks: ThreadRanks, tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    latest = newest.parent / "latest"
    latest.unlink()
    if content is not None:
        latest.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert found(ranks, tmp_path, "auto") == [newest] * RANKS
    (message,) = caplog.messages
    assert str(latest) in message and "step_000002 is the newest complete checkpoint" in message
    assert message.isprintable()


def test_a_checkpoint_under_the_name_of_another_step_is_not_taken(ranks: ThreadRanks, tmp_path: Path) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    second.rename(checkpoint_path(tmp_path, 7))
    assert found(ranks, tmp_path, "auto") == [first] * RANKS


def test_another_runs_checkpoint_does_not_take_the_place_of_later_ones(ranks: ThreadRanks, tmp_path: Path) -> None:
    run, other = tmp_path / "run", write(tmp_path / "other", 3)
    write(run, 2)
    assert found(ranks, run, str(other)) == [other] * RANKS
    write(run, 4)
    errors = found(ranks, run, str(other))
    assert all(isinstance(error, CheckpointError) and "has the later step_000004" in str(error) for error in errors)
    assert found(ranks, tmp_path / "other", str(other)) == [other] * RANKS


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


def test_the_switch_of_the_teacher_is_read_to_the_bit(ranks: ThreadRanks, tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    # Checkpoints of versions without a switch are taken as well.
    assert ranks.run(lambda _: read_state(path)[0].teacher_switch) == [EntropySwitch()] * RANKS
    switch = EntropySwitch((0.1 + 0.2, 1.0, 1e-300), is_on=True)
    (path / "trainer.json").write_text(json.dumps(trainer_record(3, teacher_switch=dataclasses.asdict(switch))))
    assert ranks.run(lambda _: read_state(path)[0].teacher_switch) == [switch] * RANKS
