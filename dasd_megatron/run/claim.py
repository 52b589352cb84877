"""A run directory belongs to one process at a time."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import platform
import stat
import time
from pathlib import Path
from typing import BinaryIO

from dasd_megatron.errors import ConfigError, printable
from dasd_megatron.files import PARTIAL_FILE, RunDirectoryError, naming_path

_LOST_NODE_SECONDS = 300.0
_OWNER_BYTES = 1000
# Trackers write beside the run, in a directory of their own.
_WRITTEN_BY_RUNS = ("checkpoints", "data", "evaluations", "inspect", "rollouts")
# Open files hold the locks, so they stay open as long as this process lives.
_claimed: dict[Path, BinaryIO] = {}

logger = logging.getLogger(__name__)


def claim_directory(root: Path) -> None:
    """Keep other processes from working in the run directory until this one ends: they would remove each other's
    checkpoints.

    A requeued job may come back before a file system has heard that its node is lost, and waits for that.

    Raises:
        ConfigError: another process works in it. RunDirectoryError: owner.json cannot be written.
    """
    path = root / "owner.json"
    if path in _claimed:
        return
    with naming_path(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    file = os.fdopen(descriptor, "r+b", buffering=0)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RunDirectoryError(f"{path} is no regular file: remove it, or write another run.dir")
        is_locked = _lock(file, root, os.environ.get("SLURM_JOB_ID"))
        record = {"host": platform.node(), "pid": os.getpid(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
        content = json.dumps(record).encode()
        # The lock is on this file, so no other may take its place. It is cut last: where the disk is full, it keeps
        # what it has.
        with naming_path(path):
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
    except (ConfigError, RunDirectoryError):
        file.close()
        raise
    _claimed[path] = file
    if is_locked:
        _remove_partial_files(root)


def _remove_partial_files(root: Path) -> None:
    """Remove what writers that were killed have left, which can be as large as the files themselves; see
    :func:`~dasd_megatron.files.atomic_file`."""
    for path in itertools.chain(root.iterdir(), *((root / name).glob("*") for name in _WRITTEN_BY_RUNS)):
        if PARTIAL_FILE.fullmatch(path.name):
            with naming_path(path):
                path.unlink(missing_ok=True)


def _lock(file: BinaryIO, root: Path, job: str | None) -> bool:
    """Lock the file; where the file system knows no locks, say so and return False."""
    deadline = None
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError as error:
            owner = printable(os.pread(file.fileno(), _OWNER_BYTES, 0).decode("utf-8", "replace"))
            if deadline is None:
                # A lock can be one that is already lost only where it is of this job's own former process.
                patience = _LOST_NODE_SECONDS if job is not None and f'"{job}"' in owner else 0.0
                deadline = time.monotonic() + patience
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"run.dir={root} is in use by another process ({owner}): wait for it or stop it, or write another "
                    "run.dir"
                ) from error
            time.sleep(1.0)
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): see to it that no other run uses run.dir=%s",
                root / "owner.json",
                error.strerror,
                root,
            )
            return False
