"""Checks of the policy loss that every process of a group makes; run through ``gloo_pool``."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dasd_megatron.config import PolicyLossConfig
from dasd_megatron.losses import TokenStats
from dasd_megatron.training.batching import sequence_parts
from dasd_megatron.training.policy_loss import PolicyTargets, policy_loss


def check_shared_responses(rank: int, world_size: int, case: dict, message: str) -> None:
    """GSPO's loss and gradient of responses whose tokens are spread over the ranks, as context parallelism does, are
    those of whole responses, also where a rank has none of a micro-batch."""
    generator = torch.Generator().manual_seed(case["seed"])
    lengths = torch.randint(1, 30, (5,), generator=generator)
    lengths[0] = 1
    total, bounds = int(lengths.sum()), [0, *lengths.cumsum(0).tolist()]
    noise = torch.randn(3, total, generator=generator, dtype=torch.float64)
    old, advantage = -noise[0].abs(), noise[1]
    targets = PolicyTargets(old, advantage, torch.rand(total, generator=generator), lengths)
    settings = PolicyLossConfig(surrogate="gspo", clip_low=0.05, clip_high=0.05)

    def gradient(parts: list[torch.Tensor], group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
        log_prob = (old + 0.3 * noise[2]).requires_grad_()
        loss = sum(
            policy_loss(targets, settings, group=group)(TokenStats(log_prob[part], log_prob[part], None, None), part)[0]
            for part in parts
        )
        loss.backward()
        return loss.detach(), log_prob.grad

    whole, width = [], 2 * world_size
    own = []
    for first, last in ((0, 1), (1, 3), (3, 5)):
        places = torch.arange(bounds[first], bounds[last])
        padded = -(-len(places) // width) * width
        mine = torch.from_numpy(sequence_parts([padded], rank, world_size)) if world_size > 1 else torch.arange(padded)
        whole.append(places)
        own.append(places[mine[mine < len(places)]])
    expected = gradient(whole, None)
    found = gradient(own, dist.group.WORLD)
    for tensor in found:
        dist.all_reduce(tensor)
    torch.testing.assert_close(found, expected, msg=lambda text: f"{message}: {text}")
