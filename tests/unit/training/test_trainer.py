"""What a run is told before it begins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dasd_megatron.training.trainer import _warn_of_quantised_rollouts
from tests.support.small_configs import configure

FP8 = ["rollout.engine=sglang", "rollout.dtype=bfloat16", "rollout.weight_format=fp8_blockwise"]


@pytest.mark.parametrize(
    ("overrides", "warns"),
    [
        (FP8, True),
        ([*FP8, "loss.importance_sampling=token"], False),
        (["rollout.engine=sglang"], False),
    ],
)
def test_quantised_rollouts_without_a_correction_are_warned_of(overrides: list[str], warns: bool) -> None:
    warnings: list[str] = []
    config = configure(*overrides)
    _warn_of_quantised_rollouts(config, SimpleNamespace(warning=warnings.append))
    # Rollouts that are replayed are drawn by nobody now.
    config.rollout.replay = "rollouts"
    _warn_of_quantised_rollouts(config, SimpleNamespace(warning=warnings.append))
    assert len(warnings) == warns and all("write loss.importance_sampling=token" in text for text in warnings)
