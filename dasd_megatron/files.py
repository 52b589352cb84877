"""Writing files so that a crash or a full disk leaves the old file or the new one, never a part of either."""

from __future__ import annotations

import os
from pathlib import Path


class RunDirectoryError(RuntimeError):
    """A run directory that cannot be written or read. The message names the path and what to do."""


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) in place of ``path`` so that readers, and a crash, see the old file or the new one, never
    a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> RunDirectoryError:
    reason = error.strerror or str(error)
    return RunDirectoryError(
        f"cannot write {path}: {reason}; free space there, make it writable, or set run.dir to a directory that is"
    )


def fsync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for path in [*root.rglob("*"), root]:
        fsync_path(path)
