"""Files and directories change whole: whatever fails on the way leaves the old ones, and nothing beside them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dasd_megatron.files import (
    RunDirectoryError,
    atomic_file,
    fsync_tree,
    publish_directory,
    replace_directory,
    replace_file,
)


def tree(folder: Path) -> dict[str, str]:
    """Return the text of every file under ``folder`` by its relative path."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_as_utf_8(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", "old")
    replace_file(tmp_path / "file", "π\nnew\n")
    assert (tmp_path / "file").read_bytes() == "π\nnew\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_readers_see_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path and partial.name.startswith(".")
    assert tree(tmp_path) == {"file": "new"}


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="half way"), atomic_file(tmp_path / "file") as partial:
        partial.write_text("ne")
        raise ValueError("half way")
    assert tree(tmp_path) == {"file": "old"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_leaves_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"), atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
    with pytest.raises(RunDirectoryError, match=r"cannot write .*/file: No space left on device; free space there"):
        replace_file(tmp_path / "file", "new")
    assert tree(tmp_path) == {"file": "old"}


def test_the_file_is_on_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the data would leave an empty file after a power loss."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noting_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
    assert calls == [partial.name, "rename", tmp_path.name]


def make(folder: Path, text: str) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text(text)
    return folder


def test_a_directory_is_published_where_none_is(tmp_path: Path) -> None:
    publish_directory(make(tmp_path / "model.partial", "new"), tmp_path / "model")
    assert tree(tmp_path) == {"model/inner/file": "new"}
    with pytest.raises(OSError, match="not empty"):
        publish_directory(make(tmp_path / "model.partial", "newer"), tmp_path / "model")
    assert (tmp_path / "model" / "inner" / "file").read_text() == "new"


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    make(tmp_path / "model", "old")
    # A crash has left this one.
    make(tmp_path / "model.replaced", "older")
    replace_directory(make(tmp_path / "model.partial", "new"), tmp_path / "model")
    assert tree(tmp_path) == {"model/inner/file": "new"}


def test_a_crash_between_the_two_renames_leaves_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "model", "old")
    partial = make(tmp_path / "model.partial", "new")
    rename = Path.rename

    def crash_on_partial(path: Path, target: Path) -> Path:
        if path == partial:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", crash_on_partial)
    with pytest.raises(KeyboardInterrupt):
        replace_directory(partial, tmp_path / "model")
    assert tree(tmp_path) == {"model.replaced/inner/file": "old", "model.partial/inner/file": "new"}


def test_everything_in_a_directory_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "model", "new")
    flushed = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.readlink(f"/proc/self/fd/{descriptor}")))
    fsync_tree(tmp_path / "model")
    root = tmp_path / "model"
    assert flushed == {str(root), str(root / "inner"), str(root / "inner" / "file")}
