"""Token statistics, credit and policy loss over gloo groups of 1, 2 and 4: features one by one, and properties over
random shapes and settings."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dasd_megatron.losses import DIVERGENCES
from tests.support.gloo_pool import GlooPool

pytestmark = pytest.mark.distributed

CHECKS = "tests.support.token_stats_checks"
PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda size: f"tp{size}")
def pool(request: pytest.FixtureRequest) -> Iterator[GlooPool]:
    with GlooPool(request.param) as pool:
        yield pool


@pytest.mark.parametrize(
    ("module", "check"),
    [
        (CHECKS, "check_features"),
        (CHECKS, "check_top_k"),
        (CHECKS, "check_target_refused_everywhere"),
        (CHECKS, "check_context_parallel"),
        ("tests.support.policy_checks", "check_shared_responses"),
    ],
)
def test_groups_agree_with_one_process(pool: GlooPool, module: str, check: str) -> None:
    seed = int.from_bytes(os.urandom(3), "big")
    pool.run(module, check, {"seed": seed}, f"seed {seed}")


DIVERGENCE = st.sampled_from([None, *DIVERGENCES])
SEED = st.integers(0, 2**31 - 1)


@PROPERTY
@given(
    data=st.data(),
    width=st.integers(1, 60),
    tokens=st.integers(0, 12),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
    shift=st.sampled_from([0.0, -300.0]),
    gap=st.sampled_from([0.0, 0.0, 900.0]),
    temperature=st.floats(0.3, 3.0),
    inplace=st.booleans(),
    chunk_size=st.sampled_from([None, 1, 5]),
    divergence=DIVERGENCE,
    seed=SEED,
)
def test_any_shard_of_logits(pool: GlooPool, data: st.DataObject, width: int, **case: object) -> None:
    vocab_size = data.draw(st.integers(1, width * pool.world_size))
    pool.run(
        CHECKS, "check_case", case | {"width": width, "vocab_size": vocab_size, "masked": False, "dtype": torch.float64}
    )


@PROPERTY
@given(
    data=st.data(),
    width=st.integers(1, 40),
    tokens=st.integers(0, 12),
    hidden_size=st.integers(1, 9),
    scale=st.sampled_from([0.01, 1.0, 4.0]),
    temperature=st.floats(0.3, 3.0),
    chunk_size=st.none() | st.integers(1, 13),
    vocab_chunk_size=st.none() | st.integers(1, 50),
    reduces=st.booleans(),
    divergence=DIVERGENCE,
    seed=SEED,
)
def test_any_shard_of_the_head(pool: GlooPool, data: st.DataObject, width: int, **case: object) -> None:
    vocab_size = data.draw(st.integers(1, width * pool.world_size))
    pool.run(CHECKS, "check_linear_case", case | {"width": width, "vocab_size": vocab_size})
