"""The files of a checkpoint, and what a crash, a bad disk or a rule of retention leaves of them."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dasd_megatron.files import RunDirectoryError
from dasd_megatron.models.hf_weights import WeightsError
from dasd_megatron.reading import UnreadableError
from dasd_megatron.training.checkpoint_files import (
    changed_file,
    checkpoint_path,
    complete_checkpoints,
    depart_from,
    hash_files,
    listed_files,
    lost_checkpoints,
    named_latest,
    prune,
    publish,
    read_record,
    recover_replaced,
    resumable,
    set_aside,
)
from tests.support.damage import small_file_damage, trainer_record


def write(run: Path, step: int, content: str = "weights") -> Path:
    final = checkpoint_path(run, step)
    partial = final.with_name(final.name + ".1234.partial")
    (partial / "hf").mkdir(parents=True)
    (partial / "trainer.json").write_text(json.dumps(trainer_record(step)))
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
    for step in (1, 2, 3, 1_000_000):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step_000003.hf").mkdir()
    set_aside(checkpoint_path(tmp_path, 2))
    assert names(tmp_path) == ["step_000001", "step_000003", "step_1000000"]
    (tmp_path / "checkpoints" / "notes").mkdir()
    depart_from(tmp_path, checkpoint_path(tmp_path, 1), 1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "notes",
        "step_000001",
        "step_000002.damaged",
    ]
    # A checkpoint of another run is none of this run's business.
    write(tmp_path / "other", 5)
    depart_from(tmp_path, checkpoint_path(tmp_path / "other", 5), 5)
    assert [path.name for path in resumable(tmp_path)] == ["step_000001"]


def test_departing_from_a_checkpoint_of_another_name_keeps_the_earlier_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    best = shutil.copytree(checkpoint_path(tmp_path, 2), tmp_path / "checkpoints" / "best")
    depart_from(tmp_path, best, 2)
    assert names(tmp_path) == ["step_000001", "step_000002"] and best.is_dir()


def test_a_crash_while_departing_leaves_one_of_the_checkpoints_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    rename, renamed = Path.rename, []

    def crash_on_the_second(path: Path, target: Path) -> Path:
        renamed.append(path.name)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", crash_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        depart_from(tmp_path, checkpoint_path(tmp_path, 1), 1)
    assert renamed == ["step_000003", "step_000002"] and names(tmp_path) == ["step_000001", "step_000002"]


def test_a_checkpoint_that_is_damaged_twice_is_kept_twice(tmp_path: Path) -> None:
    assert [set_aside(write(tmp_path, 1)).name for _ in range(3)] == [
        "step_000001.damaged",
        "step_000001.damaged2",
        "step_000001.damaged3",
    ]


def put_binary(path: Path) -> None:
    path.write_bytes(b"\xff\0" * 50)


def put_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def put_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        Path.touch,
        lambda path: path.write_text(""),
        lambda path: path.write_text("step_000002"),
        lambda path: path.write_text("step_000099\n"),
        lambda path: path.write_text("x" * 10**6),
        put_binary,
        put_loop,
        put_directory,
    ],
)
def test_complete_checkpoints_decide_whatever_latest_is(spoil, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    latest = tmp_path / "checkpoints" / "latest"
    spoil(latest)
    assert [path.name for path in resumable(tmp_path)] == ["step_000003", "step_000002", "step_000001"]
    assert named_latest(tmp_path) in (None, "step_000002", "step_000003", "step_000099")


def test_steps_are_compared_as_numbers_and_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        write(tmp_path, step)
    for name in ("step_best", "step_000007 (copy)", "step_7", "step_000008.orig"):
        shutil.copytree(checkpoint_path(tmp_path, 999_999), tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "step_000009").touch()
    assert names(tmp_path) == ["step_999999", "step_1000000"]
    remove(prune(tmp_path, keep_last=1, keep_every=2))
    assert names(tmp_path) == ["step_1000000"]


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(RunDirectoryError, match=r"checkpoints cannot be read \(Not a directory\)"):
        resumable(tmp_path)
    (tmp_path / "checkpoints").unlink()
    write(tmp_path, 1)

    def refuse(path: Path) -> list[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RunDirectoryError, match=r"checkpoints cannot be read \(Permission denied\)"):
        resumable(tmp_path)


def test_traces_of_lost_checkpoints_are_found(tmp_path: Path) -> None:
    assert lost_checkpoints(tmp_path) is None
    partial = tmp_path / "checkpoints" / "step_000001.1234.partial"
    partial.mkdir(parents=True)
    (tmp_path / "checkpoints" / "reserve.partial").touch()
    assert lost_checkpoints(tmp_path) is None
    shutil.rmtree(write(tmp_path, 1))
    assert "checkpoints folder has latest" in str(lost_checkpoints(tmp_path))
    # As on a disk that is not mounted.
    shutil.rmtree(tmp_path / "checkpoints")
    assert "has_checkpoints is there" in str(lost_checkpoints(tmp_path))


def test_a_folder_that_a_crash_left_does_not_keep_a_step_from_being_saved_again(tmp_path: Path) -> None:
    path = write(tmp_path, 1, "old")
    shutil.copytree(path, path.with_suffix(".replaced"))
    write(tmp_path, 1, "new")
    assert (path / "__0_0.distcp").read_text() == "new"
    remove(prune(tmp_path, keep_last=1, keep_every=0))
    assert names(tmp_path) == ["step_000001"] and not list(path.parent.glob("*.replaced*"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": "1"}, "step is not an integer"),
        ({"step": -1}, "counts that no run has"),
        ({"pending": [0, 99]}, "counts that no run has"),
        ({"pending": [-1]}, "counts that no run has"),
        ({"pending": None}, "pending is not a list"),
        ({"collected": {"drawn": 1, "other": 2}}, "counts that no run has"),
        ({"collected": []}, "collected is not an object"),
        ({"position": 2**70}, "position is not an integer"),
        ({"rolled_back_to": -2}, "counts that no run has"),
        ({"teacher_switch": {"warm_up": [-0.1], "is_on": True}}, "counts that no run has"),
        ({"teacher_switch": {"warm_up": [math.nan], "is_on": True}}, "counts that no run has"),
        ({"teacher_switch": {"warm_up": [0.1]}}, "is_on"),
    ],
)
def test_a_record_with_other_numbers_than_a_runs_is_refused(change: dict, named: str, tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text(json.dumps(trainer_record(1)))
    assert read_record(tmp_path)["position"] == 16
    (tmp_path / "trainer.json").write_text(json.dumps(trainer_record(1) | change))
    with pytest.raises(UnreadableError, match=re.escape(named)):
        read_record(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a\0b", "a\ud800"])
def test_a_manifest_names_files_of_its_own_folder_alone(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    manifest = json.loads((path / "dasd_manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "f"}
    (path / "dasd_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match="dasd_manifest.json is damaged"):
        listed_files(path)


def test_a_file_that_the_manifest_does_not_list_is_not_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "README").touch()
    listed_files(path)
    (path / "ready.safetensors").touch()
    with pytest.raises(WeightsError, match="ready.safetensors is not listed"):
        listed_files(path)


def test_every_flipped_bit_of_the_small_files_is_found_and_named(tmp_path: Path) -> None:
    """A bit of each byte, of the manifest and of the record that it lists."""
    path, draw = write(tmp_path, 1), random.Random(1)
    for name in ("dasd_manifest.json", "trainer.json"):
        content = (path / name).read_bytes()
        for place in range(len(content)):
            bit = draw.randrange(8)
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            (path / name).write_bytes(flipped)
            try:
                found = changed_file(path, listed_files(path))
            except WeightsError as error:
                found = str(error)
            # A blank may become another one.
            same = name == "dasd_manifest.json" and json.loads(content) == parse_or_none(flipped)
            assert same or (found is not None and "\n" not in found and str(path) in found), (name, place, bit)
        (path / name).write_bytes(content)


def parse_or_none(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["dasd_manifest.json", "trainer.json"]), small_file_damage())
def test_any_damage_is_found_and_named(tmp_path: Path, name: str, damage) -> None:
    run = Path(tempfile.mkdtemp(dir=tmp_path))
    path = checkpoint_path(run, 1)
    path.mkdir(parents=True)
    (path / "trainer.json").write_text(json.dumps(trainer_record(1)))
    files = hash_files(path, ["trainer.json"])
    (path / "dasd_manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=2))
    before = (path / name).read_bytes()
    damage(path / name)
    try:
        read_record(path)
        found = changed_file(path, listed_files(path))
    except (WeightsError, UnreadableError) as error:
        found = str(error)
    if found is None:
        assert json.loads((path / name).read_bytes()) == json.loads(before)
    else:
        assert "\n" not in found and str(path) in found
    assert names(run) == ["step_000001"]
