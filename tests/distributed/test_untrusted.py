"""Files from others cannot make the loaders run code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.worker_scripts import run_alone

pytestmark = pytest.mark.distributed


def test_no_file_of_a_checkpoint_runs_code(tmp_path: Path) -> None:
    output = run_alone("refuses_code", {"folder": str(tmp_path)})
    assert "dangerous without the check" in output
