"""Memory that the trainer gives to servers and takes again changes nothing of training, nor of a checkpoint that is
saved meanwhile."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from benchmarks.parity import draw_rollouts
from tests.support.worker_scripts import torchrun

pytestmark = pytest.mark.distributed


def test_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw_rollouts(tmp_path, seed)
    torchrun("offload_matches", 2, {"folder": str(tmp_path)}, timeout=400)
