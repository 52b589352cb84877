"""Megatron's optimizer and learning-rate schedule, with torch's AdamW made resumable where Apex and Transformer Engine
are missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dasd_megatron.config import OptimizerConfig as OptimizerSettings
from dasd_megatron.models.gpt import ShardedModel


class TrainingError(RuntimeError):
    """The run cannot go on; the message says what to do. The latest checkpoint is usable. Raised on every rank."""

    on_all_ranks = True


class StepResult(NamedTuple):
    """Norm of the gradient before clipping, learning rate, and whether the gradients were applied."""

    grad_norm: float
    lr: float
    applied: bool


@dataclass
class OptimizerState:
    """The optimizer of this rank's shard and its schedule, counted in optimizer updates."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    settings: OptimizerSettings
    before_step: Callable[[], None] = lambda: None
    """Done at the beginning of every step, on every rank: what brings back state that has been moved away."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield this rank's weights as Adam changes them, and Adam's state of them, as far as it has made any.

        Without float32 copies, the weights are the model's own or parts of them.
        """
        for inner in _inner_optimizers(self.optimizer):
            for group in inner.optimizer.param_groups:
                yield from group["params"]
            for state in inner.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def step(self) -> StepResult:
        """Clip and apply the accumulated gradients and advance the schedule.

        Gradients that are not finite anywhere are not applied: weights, moments and schedule stay as they are.
        Megatron's own ``step`` would apply them, since it looks for infinities only when it scales the loss.
        """
        self.before_step()
        lr = self.optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            self.optimizer.prepare_grads()
            # The same number on every rank: it is reduced over all that hold a part of the model.
            grad_norm = float(self.optimizer.get_grad_norm())
            if not math.isfinite(grad_norm):
                return StepResult(grad_norm, lr, applied=False)
            if self.settings.clip_grad > 0:
                for inner in _inner_optimizers(self.optimizer):
                    if parameters := inner.get_parameters():
                        clip_grad_by_total_norm_fp32(parameters, self.settings.clip_grad, grad_norm)
            self.optimizer.step_with_ready_grads()
        self.scheduler.step(1)
        return StepResult(grad_norm, lr, applied=True)

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        *,
        is_loading: bool,
        read: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> dict[str, Any]:
        """Optimizer state for Megatron's dist checkpointing, for any other parallel layout to load. No collectives, and
        no copies: what is loaded goes straight into the optimizer's tensors.

        read: gives the tensor that has the values of one of the optimizer's, where these are parted; whole tensors are
        the optimizer's own.
        """
        (*others, optimizer) = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        if others or not isinstance(optimizer, DistributedOptimizer):
            state = self.optimizer.sharded_state_dict(model_sharded_state_dict, is_loading=is_loading)
        else:
            state = {**optimizer.state_dict(), "pieces": _sharded_pieces(optimizer, model_sharded_state_dict, read)}
        return {"optimizer": state, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moments, steps and the place in the schedule. The learning rates themselves are the configuration's,
        which may have changed."""
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group.update(max_lr=self.settings.lr, min_lr=self.settings.min_lr)
        self.scheduler.load_state_dict(state["scheduler"])
        for inner in _torch_adam_optimizers(self.optimizer):
            # DistributedOptimizer restores one step tensor for all parameters; AdamW would advance it once for each of
            # them.
            for parameter_state in inner.optimizer.state.values():
                parameter_state["step"] = parameter_state["step"].clone()


def _inner_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers of this rank that have parameters to change."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [inner for inner in chained if not getattr(inner, "is_stub_optimizer", False)]


def _torch_adam_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [inner for inner in chained if isinstance(inner.optimizer, (torch.optim.Adam, torch.optim.AdamW))]


def _sharded_pieces(
    optimizer: DistributedOptimizer,
    model_sharded_state_dict: dict[str, Any],
    read: Callable[[torch.Tensor], torch.Tensor],
) -> list[ShardedTensor]:
    """Return this rank's share of the float32 weights and moments, as rectangles of the parameters that they belong to.

    Megatron's own format for any layout ("fully_reshardable", with the same names) gathers everything on the ranks'
    hosts first, while training waits: three float32 copies of the whole model-parallel shard on each. With several
    buckets that end in padding, it also shifts what follows (0.16.1 warns that a range exceeds the unpadded buffer).
    """
    if not optimizer.optimizer.state:
        # A fused Adam makes its moments in its first step. Here they are made by loading, and then are not zeros.
        optimizer.load_state_dict(optimizer.state_dict())
        for state in optimizer.optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
    shardings = {
        sharding.data: sharding
        for sharding in nested_values(model_sharded_state_dict)
        if hasattr(sharding, "replica_id")
    }
    pieces: list[ShardedTensor] = []
    # This map holds only the parameters that this rank has a share of.
    for parameter in optimizer.model_param_gbuf_map:
        start = optimizer._get_model_param_range_map(parameter)["param"].start
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        for name in ("param", "exp_avg", "exp_avg_sq"):
            # The float32 weights of a float32 model are the model's own, which are saved with it.
            if name != "param" or parameter.dtype != torch.float32:
                pieces += _rectangles(
                    shardings[parameter], parameter, read(states[name]), start, f"optimizer.state.{name}"
                )
    return pieces


def _rectangles(
    sharding: ShardedTensor | ShardedTensorFactory,
    parameter: torch.Tensor,
    values: torch.Tensor,
    start: int,
    prefix: str,
) -> Iterator[ShardedTensor]:
    """Yield ``values`` as tensors of one or two axes, placed where ``sharding`` places the parameter.

    The values belong to the elements of ``parameter`` from ``start`` on, in row-major order.
    """
    parts: Iterable[ShardedTensor] = [sharding]
    if isinstance(sharding, ShardedTensorFactory):
        # Places alone are asked for. The parameter's memory may be released, and then it cannot be divided.
        parts = nested_values(replace(sharding, data=torch.empty_like(parameter, device="meta")).build())
    for part in parts:
        first = 0 if part is sharding else part.data.storage_offset()
        begin, end = max(start - first, 0), min(start + values.numel() - first, part.data.numel())
        columns = part.data.shape[-1] if part.data.ndim == 2 else 1
        while begin < end:
            row, column = divmod(begin, columns)
            # A piece is the rest of a row, several whole rows, or the beginning of a row.
            count = (
                (end - begin) // columns * columns
                if column == 0 and end - begin >= columns
                else min(columns - column, end - begin)
            )
            shape = (max(count // columns, 1), min(count, columns))[: part.data.ndim]
            place = part.global_offset[part.prepend_axis_num :]
            offset = part.global_offset[: part.prepend_axis_num] + tuple(
                map(sum, zip(place, (row, column), strict=False))
            )
            data = values[first + begin - start :][:count].view((1,) * part.prepend_axis_num + shape)
            yield replace(
                part,
                key=f"{prefix}.{part.key}",
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_offset=offset,
                axis_fragmentations=None,
                # No other data-parallel rank has this piece.
                replica_id=(*part.replica_id[:2], 0),
                prepend_axis_num=0,
            )
            begin += count


def _allocate_moments(optimizer: DistributedOptimizer) -> None:
    """Give every parameter its Adam state now, so that there is something to save and to load into before the first
    step. DistributedOptimizer, which is made for fused Adams, fills in a parameter's ``step`` on loading only where it
    finds one."""
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def build_optimizer(
    settings: OptimizerSettings, model: ShardedModel, *, steps: int, updates_per_step: int
) -> OptimizerState:
    """Make Adam over ``model``, sharded over data-parallel ranks when ``settings.distributed``, with a schedule of
    ``steps`` training steps of ``updates_per_step`` updates each."""
    warmup_updates = settings.warmup_steps * updates_per_step
    bf16 = model.config.params_dtype is torch.bfloat16
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=settings.distributed,
        fp8_recipe=model.config.fp8_recipe if model.config.fp8 else None,
    )
    optimizer = get_megatron_optimizer(config, model.chunks)
    for inner in _torch_adam_optimizers(optimizer):
        if isinstance(inner, DistributedOptimizer):
            _allocate_moments(inner)
    model.config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        # Megatron would start a warm-up from a rate of zero; here the first update already moves.
        init_lr=settings.lr / (warmup_updates + 1),
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_updates,
        lr_decay_steps=max(steps * updates_per_step, warmup_updates + 1),
        lr_decay_style=settings.decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return OptimizerState(optimizer, scheduler, settings)
