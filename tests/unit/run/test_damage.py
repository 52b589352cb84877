"""A damaged file of a run directory leads to the right state or to one line that names it, and loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dasd_megatron import files
from dasd_megatron.config import Config, TeacherConfig, WatchConfig, read_config
from dasd_megatron.data.prompts import read_written_problems
from dasd_megatron.files import RunDirectoryError
from dasd_megatron.models.hf_config import read_hf_config
from dasd_megatron.observability.loggers import MetricsLogger
from dasd_megatron.observability.metric_files import missing_steps
from dasd_megatron.observability.watch import open_watch
from dasd_megatron.run import claim
from dasd_megatron.run.paths import RunPaths, run_problems
from dasd_megatron.run.prepare import prepare_run
from dasd_megatron.run.resume import check_same_prompts
from tests.support.damage import listed_damage, small_file_damage
from tests.support.small_configs import GOOD, configure, refusal

ROWS = 4
ROW_FILES = ("metrics.jsonl", "evaluation.jsonl", "warm_start.jsonl", "watch.jsonl")


def read_rows(run: Path) -> None:
    with MetricsLogger(run, tensorboard=False) as logger:
        logger.restart_after(ROWS)
    missing_steps(run, ROWS)
    open_watch(run, WatchConfig(), has_teacher=True)


def read_problems(run: Path) -> None:
    for name in ("train", "heldout"):
        read_written_problems(RunPaths(run).problems(name))
        run_problems(RunPaths(run), name)


def claim_it(run: Path) -> None:
    try:
        claim.claim_directory(run)
    finally:
        give_back()


def give_back() -> None:
    for file in claim._claimed.values():
        file.close()
    claim._claimed.clear()


READERS: dict[str, Callable[[Path], object]] = {
    "config.yaml": lambda run: read_config(run / "config.yaml"),
    "data/prompts.json": lambda run: check_same_prompts(RunPaths(run), {}, TeacherConfig()),
    "owner.json": claim_it,
    "start/config.json": lambda run: read_hf_config(run / "start"),
    **dict.fromkeys(("data/train.jsonl", "data/heldout.jsonl"), read_problems),
    **dict.fromkeys(ROW_FILES, read_rows),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the rows of four steps."""
    folder = tmp_path_factory.mktemp("sound")
    for name, first in (("train", 1), ("heldout", 5)):
        lines = [json.dumps({**GOOD, "problem": f"{number} + 1 ="}) + "\n" for number in range(first, first + 3)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    run = folder / "run"
    prepare_run(going_on(folder, "none"), run)
    for name in ROW_FILES:
        rows = [{"step": step, "time": 1.5, "label": "step", "entropy/mean": 0.25} for step in range(1, ROWS + 1)]
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    give_back()
    return run


def going_on(folder: Path, resume: str) -> Config:
    fields = [f"data.{name}.{field}=null" for name in ("train", "heldout") for field in ("generator", "size")]
    paths = [f"data.{name}.path={folder / name}.jsonl" for name in ("train", "heldout")]
    return configure("data=jsonl", *paths, *fields, f"resume={resume}", "verify.workers=0")


def open_run(config: Config, run: Path) -> None:
    """Read all that a run reads of its directory before its weights, as it does when it goes on."""
    try:
        prepare_run(config, run)
        read_problems(run)
        read_rows(run)
    finally:
        give_back()


def check_damage(sound: Path, run: Path, name: str, damage: Callable[[Path], None]) -> bool:
    """Read a damaged file as a run does; return whether it was refused."""
    (run / name).parent.mkdir(parents=True)
    for other in {*READERS} - {name}:
        (run / other).parent.mkdir(exist_ok=True)
        (run / other).hardlink_to(sound / other)
    shutil.copyfile(sound / name, run / name)
    damage(run / name)
    before = content(run / name)
    refused = None
    try:
        READERS[name](run)
    except Exception as error:
        refused = error
    if refused is not None:
        assert type(refused).__module__.startswith("dasd_megatron."), repr(refused)
        line = str(refused)
        assert "\n" not in str(refused) and (name if name != "start/config.json" else "start") in line, line
        assert content(run / name) == before, "a file that is refused is left as it is"
    for other in {*READERS} - {name, "owner.json"}:
        assert (run / other).read_bytes() == (sound / other).read_bytes(), f"{other} has changed"
    return refused is not None


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() and path.stat().st_size < 10**6 else None


@pytest.mark.parametrize("name", READERS)
def test_each_damage_of_each_file(name: str, sound: Path, tmp_path: Path) -> None:
    refused = 0
    for number, (kind, damage) in enumerate(listed_damage([*READERS].index(name), flips=5).items()):
        try:
            refused += check_damage(sound, tmp_path / str(number), name, damage)
        except AssertionError as error:
            raise AssertionError(f"{name}, {kind}: {error}") from error
    assert refused >= (3 if name in ("owner.json", "warm_start.jsonl") else 8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*READERS]), small_file_damage())
def test_any_damage_of_any_file(sound: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    check_damage(sound, run, name, damage)


@pytest.mark.parametrize("trace", ["metrics.jsonl", "has_checkpoints", "checkpoints/step_000001", "evaluation.jsonl"])
@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_run_without_its_configuration_is_not_begun_anew(
    trace: str, resume: str, sound: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / trace).mkdir(parents=True) if trace.startswith("checkpoints") else run.mkdir()
    if not trace.startswith("checkpoints"):
        (run / trace).write_text('{"step": 1}\n')
    message = refusal(lambda: prepare_run(going_on(sound.parent, resume), run))
    assert "no config.yaml that says of which" in message and trace.rpartition("/")[2] in message
    assert [path.name for path in run.iterdir()] == [trace.partition("/")[0]]


def test_a_folder_made_for_the_checkpoints_is_no_run(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    prepare_run(going_on(sound.parent, "auto"), tmp_path / "run")


@pytest.mark.parametrize(
    ("call", "number"),
    [
        *(("open", number) for number in (errno.ENOSPC, errno.EROFS, errno.EACCES)),
        *(("fsync", errno.EIO), ("replace", errno.EDQUOT), ("pwrite", errno.ENOSPC)),
    ],
)
def test_a_disk_that_takes_nothing_is_one_line_and_leaves_every_file(
    call: str, number: int, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(sound, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    real = getattr(os, call)

    def fail(*arguments: object, **keywords: object) -> object:
        reads = call == "open" and not int(arguments[1]) & (os.O_WRONLY | os.O_RDWR)
        if reads:
            return real(*arguments, **keywords)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(RunDirectoryError, match=f"cannot write .*{run}.*: {os.strerror(number)}") as caught:
            open_run(going_on(sound.parent, "auto"), run)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    open_run(going_on(sound.parent, "auto"), run)


@pytest.mark.parametrize("name", ["environment.json", "config.yaml", "prompts.json"])
def test_a_full_disk_does_not_cut_a_file_short(
    name: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(sound, run)
    (path,) = run.rglob(name)
    before, flush = path.read_bytes(), files.fsync_path

    def full(flushed: Path) -> None:
        if flushed.name.startswith(f".{name}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(flushed)

    monkeypatch.setattr(files, "fsync_path", full)
    with pytest.raises(RunDirectoryError, match=f"cannot write {path}: No space left"):
        open_run(going_on(sound.parent, "auto"), run)
    assert path.read_bytes() == before and [*path.parent.glob(f".{name}.*")] == []


def test_the_owner_keeps_its_file_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner.json").write_text("x" * 200)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunDirectoryError, match="cannot write .*owner.json: No space left"):
        claim.claim_directory(tmp_path)
    assert (tmp_path / "owner.json").read_text() == "x" * 200
    monkeypatch.undo()
    claim.claim_directory(tmp_path)
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()
