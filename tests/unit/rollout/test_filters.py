"""The filter that leaves out groups without an advantage."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dasd_megatron.rollout.filters import rewards_differ


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ([1.0, 0.0, 0.0], True),
        ([0.0, 0.0, 1.0], True),
        ([0.25, 0.5], True),
        ([0.0, 0.0, 0.0], False),
        ([1.0, 1.0], False),
        ([1.0], False),
    ],
)
def test_a_group_is_kept_where_its_rewards_differ(rewards: list[float], kept: bool) -> None:
    assert rewards_differ([SimpleNamespace(reward=reward) for reward in rewards]) is kept
