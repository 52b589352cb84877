"""The files of a checkpoint, and what a crash, a bad disk or a rule of retention leaves of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dasd_megatron.models.hf_weights import WeightsError
from dasd_megatron.training.checkpoint_files import (
    changed_file,
    checkpoint_path,
    complete_checkpoints,
    depart_from,
    hash_files,
    listed_files,
    point_to,
    prune,
    publish,
    recover_replaced,
    resumable,
    set_aside,
)


def write(run: Path, step: int, content: str = "weights") -> Path:
    final = checkpoint_path(run, step)
    partial = final.with_name(final.name + ".1234.partial")
    (partial / "hf").mkdir(parents=True)
    (partial / "trainer.json").write_text("{}")
    (partial / "hf" / "config.json").write_text("{}")
    (partial / "__0_0.distcp").write_text(content)
    publish(partial, final, hash_files(partial, ["__0_0.distcp"]))
    return final


def names(run: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(run)]


def test_published_checkpoint_is_the_latest_and_lists_every_file(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000002\n"
    files = listed_files(path)
    assert sorted(files) == ["__0_0.distcp", "hf/config.json", "trainer.json"]
    assert changed_file(path, files) is None
    assert [path.name for path in resumable(tmp_path)] == ["step_000002", "step_000001"]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: (path / "__0_0.distcp").write_text("weighty"), "__0_0.distcp is not what"),
        (lambda path: (path / "__0_0.distcp").write_text("weight"), "has 6 bytes and not 7"),
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda path: (path / "hf" / "config.json").write_text("[]"), "config.json is not what"),
        (lambda path: (path / "trainer.json").unlink(), "no trainer.json"),
        (lambda path: (path / "dasd_manifest.json").unlink(), "no dasd_manifest.json"),
        (lambda path: (path / "dasd_manifest.json").write_text('{"format": 1, "fil'), "dasd_manifest.json is damaged"),
    ],
)
def test_damage_is_found_and_named(damage, named: str, tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    damage(path)
    try:
        problem = changed_file(path, listed_files(path))
    except WeightsError as error:
        problem = str(error)
    assert problem is not None and named in problem and str(path) in problem


def remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path)


def test_retention_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    for step in range(1, 8):
        write(tmp_path, step)
        remove(prune(tmp_path, keep_last=2, keep_every=3))
    assert names(tmp_path) == ["step_000003", "step_000006", "step_000007"]
    removed = prune(tmp_path, keep_last=1, keep_every=0)
    # Before they are gone, they no longer count.
    assert len(removed) == 2 and complete_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 7)]
    remove(removed)
    assert names(tmp_path) == ["step_000007"]


def test_what_interrupted_saves_left_is_removed(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    for suffix in (".dead.partial", ".replaced"):
        path.with_name(path.name + suffix).mkdir()
    remove(prune(tmp_path, keep_last=2, keep_every=0))
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["latest", "step_000001"]


def test_a_step_is_saved_again_in_place_of_the_former(tmp_path: Path) -> None:
    write(tmp_path, 1, "old")
    path = write(tmp_path, 1, "new")
    assert (path / "__0_0.distcp").read_text() == "new" and changed_file(path, listed_files(path)) is None


def test_crash_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    path.rename(path.with_suffix(".replaced"))
    assert resumable(tmp_path) == []
    recover_replaced(tmp_path)
    assert resumable(tmp_path) == [path] and listed_files(path)
    # Where the new one is there, it stays.
    path.with_suffix(".replaced").mkdir()
    recover_replaced(tmp_path)
    assert listed_files(path)


def test_departing_removes_what_is_later_and_setting_aside_does_not(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step_000003.hf").mkdir()
    set_aside(checkpoint_path(tmp_path, 2))
    assert names(tmp_path) == ["step_000001", "step_000003"]
    depart_from(tmp_path, checkpoint_path(tmp_path, 1))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step_000001",
        "step_000002.damaged",
    ]
    # A checkpoint of another run is none of this run's business.
    write(tmp_path / "other", 5)
    depart_from(tmp_path, checkpoint_path(tmp_path / "other", 5))
    assert [path.name for path in resumable(tmp_path)] == ["step_000001"]


def test_latest_bounds_what_is_resumed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    point_to(checkpoint_path(tmp_path, 2))
    assert [path.name for path in resumable(tmp_path)] == ["step_000002", "step_000001"]
    (tmp_path / "checkpoints" / "latest").unlink()
    assert resumable(tmp_path) == []
