"""The table of the ways in which the policy's weights reach the rollout servers.

A :class:`WeightWay` says all that the configuration needs to know of a way, so nothing compares names of ways. To add
one, write its class in a module of :mod:`dasd_megatron.training.weight_sync`, and its record here. The class is named
and not imported, because the configuration, which takes its choices from here, imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT_FORMAT_NAMES = ("plain", "fp8_blockwise")
"""Forms of the weights on their way; :data:`dasd_megatron.models.weight_formats.WEIGHT_FORMATS` makes them."""


@dataclass(frozen=True)
class WeightWay:
    """A way, as far as the configuration needs to know it."""

    name: str
    """``rollout.weight_sync`` in the configuration."""
    description: str
    """Carrier of the weights, in words for people."""
    implementation: str
    """``module:Class`` of its :class:`~dasd_megatron.training.weight_sync.base.WeightSync`."""
    gpu_route: str | None = None
    """Route of the weights between the GPUs of trainer and servers, in messages. None: the servers need no GPU."""
    shares_memory: bool = False
    """True where servers open the trainer's memory: they run on its machine, and on the same kind of device."""
    needs_own_gpus: bool = False
    """True where no server may be on a GPU that the trainer has."""
    reaches_replicas: bool = False
    """True where all replicas behind a server's one address get the weights."""


WEIGHT_WAYS: dict[str, WeightWay] = {
    way.name: way
    for way in (
        WeightWay(
            "disk",
            "a Hugging Face directory that trainer and servers share",
            "dasd_megatron.training.weight_sync.disk:DiskSync",
            reaches_replicas=True,
        ),
        WeightWay(
            "distributed",
            "broadcast by the source of every pipeline stage, over process groups with the servers",
            "dasd_megatron.training.weight_sync.distributed:DistributedSync",
            gpu_route="over NCCL",
            # It refuses two processes of a group on one GPU.
            needs_own_gpus=True,
        ),
        WeightWay(
            "tensor",
            "memory that trainer and servers share, on one machine",
            "dasd_megatron.training.weight_sync.tensor:TensorSync",
            gpu_route="out of GPU memory",
            shares_memory=True,
        ),
    )
}
"""Every way by its name, in the order in which messages list them."""
