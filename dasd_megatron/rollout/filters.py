"""Functions for ``rollout.filter``, which choose the groups of rollouts that are trained on."""

from __future__ import annotations

from collections.abc import Sequence

from dasd_megatron.samples import Sample


def rewards_differ(group: Sequence[Sample]) -> bool:
    """Keep a group whose rewards differ: where they are all equal, every group-relative advantage is 0."""
    return any(sample.reward != group[0].reward for sample in group)
