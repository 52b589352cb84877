"""Where the tests find real SGLang and its router."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sglang_python() -> str:
    """The interpreter of SGLang's environment; a test that needs it is skipped where there is none."""
    path = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
    if not path.is_file():
        pytest.skip(f"no SGLang: {path} is missing (make sglang-cpu builds it; SGLANG_PYTHON names another)")
    return str(path)


def router_python() -> str:
    """The interpreter of SGLang's environment where that has sglang-router too; a test that needs it is skipped where it has not."""
    python = sglang_python()
    if subprocess.run([python, "-c", "import sglang_router"], capture_output=True, timeout=60).returncode:
        pytest.skip(f"no sglang-router: {python} does not have it (make sglang-cpu installs it; SGLANG_PYTHON names another)")
    return python
