"""Writing files and directories so that a crash or a full disk leaves the old ones or the new ones, and no part of
either."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path


class RunDirectoryError(RuntimeError):
    """A run directory that cannot be written or read. The message names the path and what to do."""


PARTIAL_FILE = re.compile(r"\..+\.\d+\.tmp")
"""Names of the temporary files of :func:`atomic_file`, of which a writer that is killed leaves its own."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; the file written there takes the place of ``path`` when the block ends.

    The file is on disk before it is renamed, and its name is afterwards. If the block fails, ``path`` stays as it was
    and the temporary file is removed. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) in place of ``path``, as :func:`atomic_file` does.

    Raises:
        RunDirectoryError: the file cannot be written.
    """
    try:
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> RunDirectoryError:
    """Return the error that names ``path`` and what to do when writing it has failed with ``error``."""
    reason = error.strerror or str(error)
    return RunDirectoryError(
        f"cannot write {path}: {reason}; free space there, make it writable, or set run.dir to a directory that is"
    )


def write_whole(descriptor: int, data: bytes) -> None:
    """Write ``data`` with a single write; raises OSError where the disk takes only a part of it."""
    written = os.write(descriptor, data)
    if written != len(data):
        raise OSError(f"only {written} of {len(data)} bytes were written (is the disk full?)")


@contextlib.contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Turn an OSError of writing ``path`` inside the block into a RunDirectoryError, as :func:`cannot_write` says."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def publish_directory(partial: Path, final: Path) -> None:
    """Flush the directory ``partial`` to disk and rename it to ``final``, which must not exist, or be empty."""
    fsync_tree(partial)
    partial.rename(final)
    fsync_path(final.parent)


def replace_directory(partial: Path, final: Path) -> None:
    """Flush the directory ``partial`` to disk and rename it to ``final``; a directory that is there is removed."""
    # The old directory is moved and not removed at first: a crash between the two renames must leave one of the two.
    # What such a crash has left goes when the new directory is on disk.
    replaced = final.with_name(final.name + ".replaced")
    fsync_tree(partial)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    fsync_path(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read piece by piece, since files of checkpoints have gigabytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush a directory and everything in it to disk."""
    for path in [*root.rglob("*"), root]:
        fsync_path(path)
