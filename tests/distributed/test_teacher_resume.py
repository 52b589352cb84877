"""A run goes on from a checkpoint with the teacher that it had, whichever weights that has."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from benchmarks.parity import draw_rollouts
from tests.support.worker_scripts import torchrun

pytestmark = pytest.mark.distributed


def test_steps_from_a_checkpoint_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw_rollouts(tmp_path, seed)
    torchrun("teacher_resume", 2, {"folder": str(tmp_path)})
