"""Rollouts reach the replicas as they are, in every kind of layout."""

from __future__ import annotations

import secrets

import pytest

from tests.support.small_models import PP, TP
from tests.support.worker_scripts import torchrun

pytestmark = pytest.mark.distributed

DP = "parallel.data_parallel_size="


@pytest.mark.parametrize(
    ("processes", "overrides"), [(3, [TP + "1", DP + "3"]), (4, [TP + "2", PP + "1", DP + "2"]), (2, [PP + "2"])]
)
def test_every_rank_gets_its_replicas_samples(processes: int, overrides: list[str]) -> None:
    seed = secrets.randbelow(2**31)
    torchrun(
        "scatter_rollouts",
        processes,
        {"seed": seed, "overrides": ["parallel=single", "batch.groups=12", "warm_start.steps=0", *overrides]},
    )
