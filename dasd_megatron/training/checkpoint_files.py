"""The files of a run's checkpoints: which are whole, which is the newest, and which are to be removed. This module
knows no tensors.

``checkpoints/step_<n>`` appears by a rename when all in it is on disk, and ``checkpoints/latest`` then names it, by
rename again. A manifest lists every file with its size and SHA-256. Folders with a suffix are no checkpoints: a
``.partial`` one is being written, ``.replaced`` makes room for another of the same step, ``.damaged`` is not what its
manifest says, and ``.hf`` is the model of that step as a Hugging Face directory.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dasd_megatron.files import atomic_file, fsync_path, fsync_tree
from dasd_megatron.models.hf_weights import MANIFEST_FILE, WeightsError, file_sha256, read_manifest

STATE_FILE = "trainer.json"


def checkpoints_folder(run_dir: Path) -> Path:
    """Return the folder of checkpoints of a run."""
    return run_dir / "checkpoints"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint after ``step``."""
    return checkpoints_folder(run_dir) / f"step_{step:06d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint from its directory."""
    return int(path.name.removeprefix("step_"))


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints that have been written to the end, earliest first; their contents are not compared with
    their manifests."""
    return sorted(path for path in checkpoints_folder(run_dir).glob("step_*") if path.suffix == "" and path.is_dir())


def resumable(run_dir: Path) -> list[Path]:
    """Return the checkpoints that a run may go on from, newest first: the one that ``latest`` names, and those of
    earlier steps."""
    pointer = checkpoints_folder(run_dir) / "latest"
    if not pointer.is_file():
        return []
    newest = pointer.read_text().strip()
    return [path for path in reversed(complete_checkpoints(run_dir)) if path.name <= newest]


def hash_files(root: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of the files ``names``, relative to ``root``."""
    return {name: {"bytes": (root / name).stat().st_size, "sha256": file_sha256(root / name)} for name in names}


def listed_files(path: Path) -> dict[str, dict[str, Any]]:
    """Return the files that the manifest of a checkpoint lists, with size and hash.

    Raises:
        WeightsError: the checkpoint is not complete, or a file is missing or has another size.
    """
    if not (path / STATE_FILE).is_file():
        raise WeightsError(
            f"{path} is not a complete checkpoint: it has no {STATE_FILE}; give a folder like "
            "RUN/checkpoints/step_000010"
        )
    if not (path / MANIFEST_FILE).is_file():
        raise WeightsError(f"{path} has no {MANIFEST_FILE}")
    files = read_manifest(path / MANIFEST_FILE)["files"]
    for name, record in files.items():
        if not (path / name).is_file():
            raise WeightsError(f"{path / name} is missing")
        size = (path / name).stat().st_size
        if size != record["bytes"]:
            raise WeightsError(f"{path / name} has {size} bytes and not {record['bytes']}")
    return files


def changed_file(path: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """Return a line about the first of ``files``, from a manifest, that is not what was written; None where all
    are."""
    for name, record in files.items():
        try:
            if file_sha256(path / name) != record["sha256"]:
                return f"{path / name} is not what {MANIFEST_FILE} lists"
        except OSError as error:
            return f"{path / name} cannot be read ({error.strerror})"
    return None


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it is neither resumed from nor counted."""
    aside = path.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def publish(partial: Path, final: Path, hashes: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of ``partial`` and make it the checkpoint ``final`` and the latest. ``hashes``: those files'
    sizes and hashes that are known already."""
    others = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    files = hashes | hash_files(partial, [name for name in others if name not in hashes])
    (partial / MANIFEST_FILE).write_text(json.dumps({"format": 1, "files": files}, indent=2) + "\n")
    fsync_tree(partial)
    if final.exists():
        # It is moved and not removed: a crash between the two renames must leave something to resume from.
        final.rename(final.with_suffix(".replaced"))
    partial.rename(final)
    point_to(final)
    fsync_path(final.parent)


def point_to(path: Path) -> None:
    """Make ``path`` the latest checkpoint of its folder."""
    with atomic_file(path.parent / "latest") as partial:
        partial.write_text(path.name + "\n")


def prune(run_dir: Path, *, keep_last: int, keep_every: int) -> list[Path]:
    """Give up what is no longer needed and return the folders, which can then be removed: they no longer count.

    Needed are the newest ``keep_last`` checkpoints and those whose step ``keep_every``, if not 0, divides. What
    interrupted saves have left is not.
    """
    complete = complete_checkpoints(run_dir)
    old = [path for path in complete[:-keep_last] if not keep_every or step_of(path) % keep_every]
    for path in [*old, *checkpoints_folder(run_dir).glob("step_*.replaced")]:
        path.rename(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial"))
    return list(checkpoints_folder(run_dir).glob("step_*.partial"))


def depart_from(run_dir: Path, path: Path) -> None:
    """Remove the checkpoints and exports of ``run_dir`` that are later than its checkpoint ``path``, and make ``path``
    the latest. A checkpoint outside ``run_dir`` changes nothing.

    When a run goes on from an earlier checkpoint, what it departs from must not be resumed, counted or kept in place of
    its own.
    """
    folder = checkpoints_folder(run_dir)
    if path.resolve().parent != folder.resolve():
        return
    point_to(path)
    for later in folder.glob("step_*"):
        if later.suffix in ("", ".hf") and later.stem > path.name:
            shutil.rmtree(later)


def recover_replaced(run_dir: Path) -> None:
    """Put a checkpoint back that was moved aside for another of its step, where a crash came before the other took its
    place."""
    for aside in checkpoints_folder(run_dir).glob("step_*.replaced"):
        # Renaming fails where the new checkpoint is there.
        with contextlib.suppress(OSError):
            aside.rename(aside.with_suffix(""))
