"""The ways of the policy's weights to the rollout servers, a module for each choice of ``rollout.weight_sync``.

A further way is a subclass of :class:`~dasd_megatron.training.weight_sync.base.WeightSync` in a module of its own, and
its record in :data:`dasd_megatron.weight_ways.WEIGHT_WAYS`.
"""

from __future__ import annotations

import pkgutil

from dasd_megatron.config import RolloutConfig
from dasd_megatron.training.export import WeightDirectory
from dasd_megatron.training.weight_sync.base import Receivers, WeightSync
from dasd_megatron.weight_ways import WEIGHT_WAYS


def weight_sync_class(name: str) -> type[WeightSync]:
    """Return the class of the way ``name``, a key of :data:`~dasd_megatron.weight_ways.WEIGHT_WAYS`."""
    found: type[WeightSync] = pkgutil.resolve_name(WEIGHT_WAYS[name].implementation)
    return found


def make_weight_sync(config: RolloutConfig, receivers: Receivers, directory: WeightDirectory) -> WeightSync:
    """Return the way that ``rollout.weight_sync`` names."""
    return weight_sync_class(config.weight_sync)(config, receivers, directory)
