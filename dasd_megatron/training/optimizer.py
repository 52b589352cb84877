"""Megatron's optimizer and learning-rate schedule, with torch's AdamW made resumable where Apex and Transformer Engine are missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dasd_megatron.config import OptimizerConfig as OptimizerSettings
from dasd_megatron.models.gpt import ShardedModel

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


class TrainingError(RuntimeError):
    """The run cannot go on; the message says what to do. The latest checkpoint is usable. Raised on every rank."""

    on_all_ranks = True


@dataclass
class OptimizerState:
    """The optimizer of this rank's shard and its schedule, counted in optimizer updates."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    settings: OptimizerSettings

    def step(self) -> tuple[float, float, bool]:
        """Clip and apply the accumulated gradients and advance the schedule; returns (norm before clipping, rate, whether applied).

        Gradients that are not finite anywhere are not applied: weights, moments and schedule stay as they are. Megatron's own ``step``
        would apply them, since it looks for infinities only when it scales the loss.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            self.optimizer.prepare_grads()
            # The same number on every rank: it is reduced over all that hold a part of the model.
            grad_norm = float(self.optimizer.get_grad_norm())
            if not math.isfinite(grad_norm):
                return grad_norm, lr, False
            if self.settings.clip_grad > 0:
                for inner in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
                    if not getattr(inner, "is_stub_optimizer", False) and (parameters := inner.get_parameters()):
                        clip_grad_by_total_norm_fp32(parameters, self.settings.clip_grad, grad_norm)
            self.optimizer.step_with_ready_grads()
        self.scheduler.step(1)
        return grad_norm, lr, True

    def sharded_state_dict(self, model_sharded_state_dict: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """Reshardable optimizer state for Megatron's dist checkpointing; collective over data-parallel ranks."""
        state = self.optimizer.sharded_state_dict(model_sharded_state_dict, is_loading=is_loading, metadata=_SHARDING)
        return {"optimizer": state, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore moments, steps and the place in the schedule. The rates themselves are the configuration's, which may have changed."""
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group.update(max_lr=self.settings.lr, min_lr=self.settings.min_lr)
        self.scheduler.load_state_dict(state["scheduler"])
        for inner in _torch_adam_optimizers(self.optimizer):
            # DistributedOptimizer restores one step tensor for all parameters; AdamW would advance it once for each of them.
            for parameter_state in inner.optimizer.state.values():
                parameter_state["step"] = parameter_state["step"].clone()


def _torch_adam_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in inner if isinstance(one.optimizer, (torch.optim.Adam, torch.optim.AdamW))]


def _make_torch_adam_resumable(optimizer: DistributedOptimizer) -> None:
    """Give every parameter its Adam state now, and keep the per-parameter ``step`` that torch's AdamW needs through a load.

    DistributedOptimizer was written for fused Adams that keep one step per parameter group; its loader looks for a ``step`` beside each
    parameter's moments and finds none in the checkpoint.
    """
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    set_states = optimizer._set_main_param_and_optimizer_states

    def set_states_keeping_step(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group_index, group_order = optimizer.model_param_group_index_map[model_param]
        parameter = optimizer.optimizer.param_groups[group_index]["params"][group_order]
        set_states(model_param, {"step": optimizer.optimizer.state[parameter]["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = set_states_keeping_step


def build_optimizer(settings: OptimizerSettings, model: ShardedModel, *, steps: int, updates_per_step: int) -> OptimizerState:
    """Adam over ``model``, sharded over data-parallel ranks when ``settings.distributed``, with a schedule of ``steps`` training steps of
    ``updates_per_step`` updates each."""
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
            _make_torch_adam_resumable(inner)
    model.config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        # The first update of a warm-up already moves: Megatron would start it from a rate of zero.
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
