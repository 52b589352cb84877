"""Which groups of rollouts are trained on: functions for ``rollout.filter``."""

from __future__ import annotations

from collections.abc import Sequence

from dasd_megatron.samples import Sample


def rewards_differ(group: Sequence[Sample]) -> bool:
    """Keep a group where some responses fared better than others: in the others every group-relative advantage is 0."""
    return any(sample.reward != group[0].reward for sample in group)
