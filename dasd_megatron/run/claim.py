"""A run directory belongs to one process at a time."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import TextIO

from dasd_megatron.errors import ConfigError
from dasd_megatron.files import PARTIAL_FILE

_LOST_NODE_SECONDS = 300.0
# Trackers write beside the run, in a directory of their own.
_WRITTEN_BY_RUNS = ("checkpoints", "data", "evaluations", "inspect", "rollouts")
# Open files hold the locks, so they stay open as long as this process lives.
_claimed: dict[Path, TextIO] = {}

logger = logging.getLogger(__name__)


def claim_directory(root: Path) -> None:
    """Keep other processes from working in the run directory until this one ends: they would remove each other's
    checkpoints.

    A requeued job may come back before a file system has heard that its node is lost, and waits for that.

    Raises:
        ConfigError: another process works in it.
    """
    path = root / "owner.json"
    if path in _claimed:
        return
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it holds the lock as long as the process lives
    job = os.environ.get("SLURM_JOB_ID")
    try:
        is_locked = _lock(file, root, job)
    except ConfigError:
        file.close()
        raise
    file.truncate(0)
    file.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "slurm_job": job}))
    file.flush()
    _claimed[path] = file
    if is_locked:
        _remove_partial_files(root)


def _remove_partial_files(root: Path) -> None:
    """Remove what writers that were killed have left, which can be as large as the files themselves; see
    :func:`~dasd_megatron.files.atomic_file`."""
    for path in itertools.chain(root.iterdir(), *((root / name).glob("*") for name in _WRITTEN_BY_RUNS)):
        if PARTIAL_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _lock(file: TextIO, root: Path, job: str | None) -> bool:
    """Lock the file; where the file system knows no locks, say so and return False."""
    deadline = None
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip()
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
                file.name,
                error.strerror,
                root,
            )
            return False
