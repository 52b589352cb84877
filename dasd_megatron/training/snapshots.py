"""Copies of the policy's weights beside the live ones: the starting model, an exponential moving average, and the
weights of some steps ago."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor

from dasd_megatron.models.gpt import ShardedModel

KEPT_COPIES = {"ema": "average", "snapshot": "snapshot"}
"""For each ``teacher.weights`` that has weights of its own, the name of the copy, by which checkpoints keep it."""


class WeightSnapshot:
    """This rank's shard of every parameter, copied when made. An average is kept in float32, other copies in the
    parameters' dtype.

    ``name``: what a checkpoint calls the copy, before the names of the model's parameters.
    """

    def __init__(self, model: ShardedModel, name: str, *, dtype: torch.dtype | None = None) -> None:
        self.name = name
        self.tensors = [parameter.detach().to(dtype or parameter.dtype, copy=True) for parameter in model.parameters()]

    @contextlib.contextmanager
    def applied(self, model: ShardedModel) -> Iterator[None]:
        """Let the model compute with these weights inside the block. Live weights keep their storage, so DDP's buffers
        stay valid."""
        parameters = model.parameters()
        live = [parameter.data for parameter in parameters]
        for parameter, tensor in zip(parameters, self.tensors, strict=True):
            parameter.data = tensor.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, data in zip(parameters, live, strict=True):
                parameter.data = data

    @torch.no_grad()
    def average_in(self, model: ShardedModel, decay: float) -> None:
        """Move the average toward the live weights: ``snapshot = decay * snapshot + (1 - decay) * live``."""
        for tensor, parameter in zip(self.tensors, model.parameters(), strict=True):
            tensor.lerp_(parameter.detach().to(tensor.dtype), 1.0 - decay)

    @torch.no_grad()
    def copy(self, model: ShardedModel) -> None:
        """Take the live weights."""
        for tensor, parameter in zip(self.tensors, model.parameters(), strict=True):
            tensor.copy_(parameter)

    def sharded_state_dict(self, model: ShardedModel, model_state: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters in ``model_state`` (the live model's sharded state, by chunk and name), with this
        snapshot's tensors in their place and its name before their keys."""
        by_parameter = {
            id(parameter): tensor for parameter, tensor in zip(model.parameters(), self.tensors, strict=True)
        }
        replaced: dict[str, dict[str, Any]] = {}
        for chunk, values in model_state.items():
            replaced[chunk] = {}
            for name, value in values.items():
                if not isinstance(value, ShardedBase) or id(value.data) not in by_parameter:
                    continue
                changes: dict[str, Any] = {"key": f"{self.name}.{value.key}", "data": by_parameter[id(value.data)]}
                if isinstance(value, ShardedTensor):
                    changes["dtype"] = changes["data"].dtype
                replaced[chunk][name] = dataclasses.replace(value, **changes)
        return replaced
