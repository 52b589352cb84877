"""The files of a run's checkpoints: which are whole, which is the newest, and which are to be removed. This module
knows no tensors.

``checkpoints/step_<n>`` appears by a rename when all in it is on disk. A manifest lists every file with its size and
SHA-256. ``checkpoints/latest`` names the newest for whoever looks; nothing depends on it. Folders with a suffix are no
checkpoints: a ``.partial`` one is being written or removed, ``.replaced`` makes room for another of the same step,
``.damaged`` is not what its manifest says, and ``.hf`` is the model of that step as a Hugging Face directory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from dasd_megatron.files import RunDirectoryError, atomic_file, file_sha256, fsync_path, fsync_tree, replace_file
from dasd_megatron.models.hf_weights import MANIFEST_FILE, WeightsError, read_manifest
from dasd_megatron.reading import UnreadableError, read_json, read_text
from dasd_megatron.run.paths import RunPaths

STATE_FILE = "trainer.json"
LATEST = "latest"
_NAME = re.compile(r"step_([0-9]{6,})")
_NAME_WITH_SUFFIX = re.compile(r"step_([0-9]{6,})(\.hf)?")
# These are what a run is loaded from.
_LOADED = re.compile(r".*\.(distcp|pt|json|jsonl|safetensors)|\.metadata")
_STATE_SHAPE = {
    **dict.fromkeys(("step", "skipped", "discarded", "rollbacks", "rolled_back_to", "position", "world_size"), int),
    "pending": [int],
    "collected": {str: int},
    "architecture": {str: object},
    "teacher_switch?": {"warm_up": [float], "is_on": bool},
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do. Raised on every rank, unless
    ``on_all_ranks`` is false: then this process has to end, since the others wait for it."""

    on_all_ranks = True


def checkpoints_folder(run_dir: Path) -> Path:
    """Return the folder of checkpoints of a run."""
    return RunPaths(run_dir).checkpoints


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint after ``step``."""
    return checkpoints_folder(run_dir) / f"step_{step:06d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint from its directory."""
    return int(path.name.removeprefix("step_"))


def _entries(run_dir: Path) -> list[Path]:
    """Return what is in the folder of checkpoints, which may be missing.

    Raises:
        RunDirectoryError: it cannot be read. An empty answer would let a run start over.
    """
    folder = checkpoints_folder(run_dir)
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirectoryError(
            f"{folder} cannot be read ({error.strerror or error}): make it a directory that you can read, or write "
            "another run.dir"
        ) from error


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints that have been written to the end, earliest first; their contents are not compared with
    their manifests.

    Raises:
        RunDirectoryError: the folder of checkpoints cannot be read.
    """
    found = [path for path in _entries(run_dir) if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def resumable(run_dir: Path) -> list[Path]:
    """Return the checkpoints that a run may go on from, newest first. Raises RunDirectoryError, see
    :func:`complete_checkpoints`."""
    return complete_checkpoints(run_dir)[::-1]


def lost_checkpoints(run_dir: Path) -> str | None:
    """Return a phrase about what shows that a run without a complete checkpoint has had some, None where nothing
    does."""
    traces = [path.name for path in _entries(run_dir) if not path.name.endswith((".partial", ".tmp"))]
    if traces:
        return f"its checkpoints folder has {', '.join(traces[:3])}"
    mark = RunPaths(run_dir).checkpoint_mark
    return f"{mark} is there" if os.path.lexists(mark) else None


def named_latest(run_dir: Path) -> str | None:
    """Return the name in ``checkpoints/latest``, for a message; None where there is none to be read."""
    try:
        return read_text(checkpoints_folder(run_dir) / LATEST, advice="", limit=200).strip() or None
    except UnreadableError:
        return None


def read_record(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's ``trainer.json``.

    Raises:
        UnreadableError: it is missing, damaged, or holds numbers that no run has.
    """
    file, advice = path / STATE_FILE, "restore the checkpoint, or name another"
    record: dict[str, Any] = read_json(file, _STATE_SHAPE, advice=advice)
    counts = [record[name] for name in ("step", "skipped", "discarded", "rollbacks", "position")]
    counts += record["collected"].values()
    unknown = record["collected"].keys() - {"drawn", "filtered", "restarted"}
    wrong_places = [place for place in record["pending"] if not 0 <= place < record["position"]]
    entropies = record.get("teacher_switch", {"warm_up": []})["warm_up"]
    wrong_entropies = [entropy for entropy in entropies if not 0.0 <= entropy < math.inf]
    if min(counts) < 0 or record["rolled_back_to"] < -1 or unknown or wrong_places or wrong_entropies:
        raise UnreadableError(file, "is damaged (it has counts that no run has)", advice)
    return record


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
    files = read_manifest(path / MANIFEST_FILE, "files", advice="restore it")
    for name, record in files.items():
        place = PurePosixPath(name)
        if "\0" in name or place.is_absolute() or ".." in place.parts:
            raise WeightsError(f"{path / MANIFEST_FILE} is damaged (it lists {name!r}): restore it")
        if not (path / name).is_file():
            raise WeightsError(f"{path / name} is missing")
        size = (path / name).stat().st_size
        if size != record["bytes"]:
            raise WeightsError(f"{path / name} has {size} bytes and not {record['bytes']}")
    for file in path.iterdir():
        if _LOADED.fullmatch(file.name) and file.name != MANIFEST_FILE and file.name not in files:
            raise WeightsError(f"{file} is not listed in {MANIFEST_FILE}")
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


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither resumed from nor counted; return its new place."""
    aside, number = path.with_suffix(".damaged"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_suffix(f".damaged{number}")
    path.rename(aside)
    return aside


def publish(partial: Path, final: Path, hashes: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of ``partial`` and make it the checkpoint ``final`` and the latest. ``hashes``: those files'
    sizes and hashes that are known already."""
    others = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    files = hashes | hash_files(partial, [name for name in others if name not in hashes])
    (partial / MANIFEST_FILE).write_text(json.dumps({"format": 1, "files": files}, indent=2) + "\n")
    fsync_tree(partial)
    if final.exists():
        # It is moved and not removed: a crash between the two renames must leave something to resume from.
        replaced = final.with_suffix(".replaced")
        if replaced.exists():
            _discard(replaced)
        final.rename(replaced)
    partial.rename(final)
    fsync_path(final.parent)
    _mark(final.parent.parent)
    point_to(final)


def _mark(run_dir: Path) -> None:
    mark = RunPaths(run_dir).checkpoint_mark
    if not mark.exists():
        replace_file(mark, "While this file is here, resume=auto does not begin this run anew.\n")


def point_to(path: Path) -> None:
    """Make ``path`` the latest checkpoint of its folder."""
    with atomic_file(path.parent / LATEST) as partial:
        partial.write_text(path.name + "\n")


def _discard(path: Path) -> Path:
    """Rename a folder, so that it no longer counts and can be removed; return its new place."""
    return path.rename(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial"))


def prune(run_dir: Path, *, keep_last: int, keep_every: int) -> list[Path]:
    """Give up what is no longer needed and return the folders, which can then be removed: they no longer count.

    Needed are the newest ``keep_last`` checkpoints and those whose step ``keep_every``, if not 0, divides. What
    interrupted saves have left is not.
    """
    complete = complete_checkpoints(run_dir)
    old = [path for path in complete[:-keep_last] if not keep_every or step_of(path) % keep_every]
    for path in [*old, *checkpoints_folder(run_dir).glob("step_*.replaced")]:
        _discard(path)
    return list(checkpoints_folder(run_dir).glob("step_*.partial"))


def depart_from(run_dir: Path, path: Path, step: int) -> None:
    """Remove the checkpoints and exports of ``run_dir`` that are later than ``step``, and make its checkpoint ``path``,
    which a run has gone on from, the latest. A checkpoint outside ``run_dir`` changes nothing.

    What a run departs from must not be resumed, counted or kept in place of its own. A crash on the way leaves the run
    as it was behind one of the later checkpoints.
    """
    folder = checkpoints_folder(run_dir)
    if path.resolve().parent != folder.resolve():
        return
    found = [(match, entry) for entry in _entries(run_dir) if (match := _NAME_WITH_SUFFIX.fullmatch(entry.name))]
    later = sorted((int(match.group(1)), entry) for match, entry in found if int(match.group(1)) > step)
    discarded = [_discard(entry) for _, entry in reversed(later)]
    point_to(path)
    for entry in discarded:
        shutil.rmtree(entry, ignore_errors=True)


def recover_replaced(run_dir: Path) -> None:
    """Put a checkpoint back that was moved aside for another of its step, where a crash came before the other took its
    place."""
    for aside in checkpoints_folder(run_dir).glob("step_*.replaced"):
        # Renaming fails where the new checkpoint is there.
        with contextlib.suppress(OSError):
            aside.rename(aside.with_suffix(""))
