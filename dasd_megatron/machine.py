"""The machine that this process runs on, as its system files describe it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def free_memory() -> int:
    """Return the bytes that can still be allocated, by the machine and by a container's limit (cgroup v2, then v1)."""
    free = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        bound, taken = read_system_file(limit), read_system_file(used)
        if bound.isdigit() and taken.isdigit():
            free = min(free, max(0, int(bound) - int(taken)))
    return free


def read_system_file(path: str) -> str:
    """Return a small system file's text, "" where this system has no such file."""
    file = Path(path)
    return file.read_text().strip() if file.is_file() and os.access(file, os.R_OK) else ""
