"""Where the tests find real SGLang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sglang_python() -> str:
    """The interpreter of SGLang's environment; a test that needs it is skipped where there is none."""
    path = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
    if not path.is_file():
        pytest.skip(f"no SGLang: {path} is missing (make sglang-cpu builds it; SGLANG_PYTHON names another)")
    return str(path)
