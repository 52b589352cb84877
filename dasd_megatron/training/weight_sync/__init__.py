"""The ways of the policy's weights to the rollout servers, a module for each choice of ``rollout.weight_sync``.

A further way is a subclass of :class:`~dasd_megatron.training.weight_sync.base.WeightSync` in a module of its own, an
entry in :data:`WAYS`, and its name among the choices of ``rollout.weight_sync``.
"""

from __future__ import annotations

from dasd_megatron.config import RolloutConfig
from dasd_megatron.training.export import WeightDirectory
from dasd_megatron.training.weight_sync.base import Receivers, WeightSync
from dasd_megatron.training.weight_sync.disk import DiskSync
from dasd_megatron.training.weight_sync.distributed import DistributedSync
from dasd_megatron.training.weight_sync.tensor import TensorSync

WAYS: dict[str, type[WeightSync]] = {"disk": DiskSync, "distributed": DistributedSync, "tensor": TensorSync}


def make_weight_sync(config: RolloutConfig, receivers: Receivers, directory: WeightDirectory) -> WeightSync:
    """Return the way that ``rollout.weight_sync`` names."""
    return WAYS[config.weight_sync](config, receivers, directory)
