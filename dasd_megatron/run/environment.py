"""The record of what a run was made with: ``environment.json``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import dasd_megatron

_PACKAGES = (
    "dasd-megatron",
    "torch",
    "megatron-core",
    "mbridge",
    "transformers",
    "transformer-engine",
    "reasoning-gym",
    "math-verify",
    "sglang",
)


def describe_environment(seed: int) -> dict[str, Any]:
    """Return the seed, the versions of the packages that a run uses, and the revision of this one's sources."""
    return {
        "seed": seed,
        "git_revision": _git_revision(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Return the revision of this package's sources, or None where they are no checkout, or lie inside another
    project's, or git does not work."""
    package = Path(dasd_megatron.__file__).resolve().parent
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        if not top or Path(top).resolve() / package.name != package:
            return None
        return _git(package, "describe", "--always", "--dirty", "--abbrev=40") or None
    # A run does not depend on this record, and git may be missing or hang on a slow disk.
    except (OSError, subprocess.TimeoutExpired):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10).stdout.strip()
