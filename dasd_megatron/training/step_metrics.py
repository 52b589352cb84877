"""The metrics of one training step, reduced over data-parallel replicas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from dasd_megatron import backend
from dasd_megatron.algorithms import Credit, CreditStatistics, credit_metrics, credit_statistics
from dasd_megatron.config import Config
from dasd_megatron.evaluation.health import health_metrics, join, measure
from dasd_megatron.samples import Sample
from dasd_megatron.training.batching import ReplicaShare
from dasd_megatron.training.parallel import gather_replicas, is_replica_source, reduce_over_replicas
from dasd_megatron.training.passes import UpdateResult
from dasd_megatron.training.scores import Importance, ScoredRollouts
from dasd_megatron.verify.steps import STEP_CHECKERS


def step_metrics(
    share: ReplicaShare,
    scores: ScoredRollouts,
    advantage: torch.Tensor,
    credit: Credit,
    importance: Importance | None,
    updates: Sequence[UpdateResult],
    seconds: dict[str, float],
    config: Config,
) -> dict[str, float]:
    """Means over all replicas of what one step saw, by the names of ``metrics.jsonl``. Collective: four all-reduces
    over replicas.

    ``rollout/kl`` is the k3 estimate of KL(rollout policy || trainer's student), nats per token; updates are averaged
    over the step's optimizer steps that were applied, seconds are this rank's. ``update/skipped`` counts the others,
    whose gradients were not finite.
    """
    log_ratio = (scores.student.log_prob - scores.rollout_log_prob).double()
    pushed = (credit.omega < 0).double()
    own_sums = torch.stack(
        [
            torch.ones_like(log_ratio).sum(),
            (log_ratio.exp() - 1.0 - log_ratio).sum(),
            log_ratio.abs().sum(),
            torch.zeros_like(log_ratio).sum() if importance is None else importance.weights.double().sum(),
            torch.zeros_like(log_ratio).sum() if importance is None else importance.cut.double().sum(),
            pushed.sum(),
            (scores.student.log_prob.double() * pushed).sum(),
        ]
    )
    routed = credit_statistics(credit, scores.student.entropy, scores.delta, advantage)
    sums = reduce_over_replicas(torch.cat([own_sums, routed.sums]))
    maxima = reduce_over_replicas(torch.cat([log_ratio.abs().max()[None], routed.maxima]), dist.ReduceOp.MAX)
    tokens, kl, difference, importance_sum, cut, num_pushed, pushed_log_prob = sums[: len(own_sums)].tolist()
    applied = [one for one in updates if one.applied]
    metrics = {
        **reward_metrics(share, seconds, config.batch.samples_per_group),
        **credit_metrics(CreditStatistics(sums[len(own_sums) :], maxima[1:])),
        "rollout/kl": kl / tokens,
        "rollout/log_prob_diff_mean": difference / tokens,
        "rollout/log_prob_diff_max": maxima[0].item(),
        "update/skipped": len(updates) - len(applied),
    }
    if num_pushed:
        metrics["credit/pushed_log_prob_mean"] = pushed_log_prob / num_pushed
    if importance is not None:
        metrics |= {"rollout/importance_mean": importance_sum / tokens, "rollout/importance_cut_share": cut / tokens}
    if applied:
        metrics |= {
            "update/loss": _mean([one.loss for one in applied]),
            "update/clip_share": _mean([one.clip_share for one in applied]),
            "update/grad_norm": _mean([one.grad_norm for one in applied]),
            "update/lr": applied[-1].lr,
        }
        if scores.start_log_prob is not None:
            metrics["update/kl_to_start"] = _mean([one.kl_to_start for one in applied])
        if config.algorithm.objective == "distributional":
            metrics["update/divergence"] = _mean([one.divergence for one in applied])
            metrics["update/capped_share"] = _mean([one.capped_share for one in applied])
    return metrics


def reward_metrics(share: ReplicaShare, seconds: dict[str, float], samples_per_group: int) -> dict[str, float]:
    """What the rollouts alone say, by the names of ``metrics.jsonl``, over all replicas. Collective: two all-reduces
    over replicas."""
    samples = share.samples
    rewards = torch.tensor(share.rewards, dtype=torch.float64).view(-1, samples_per_group)
    correct = rewards > 0
    lengths = [len(sample.sampled) for sample in samples]
    device = backend.current().device()
    own_sums = torch.tensor(
        [
            sum(lengths),
            sum(sample.finish_reason == "length" for sample in samples),
            sum(sample.timed_out for sample in samples),
            sum(len(sample.prompt_ids) + len(sample.response_ids) for sample in samples),
        ],
        dtype=torch.float64,
        device=device,
    )
    longest = reduce_over_replicas(torch.tensor(max(lengths), device=device), dist.ReduceOp.MAX).item()
    tokens, truncated, timeouts, all_tokens = reduce_over_replicas(own_sums).tolist()
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(correction=0).item(),
        "reward/accuracy": correct.double().mean().item(),
        "reward/groups_all_correct": correct.all(dim=1).double().mean().item(),
        "reward/groups_all_wrong": (~correct).all(dim=1).double().mean().item(),
        "response/length_mean": tokens / rewards.numel(),
        "response/length_max": longest,
        "response/truncated_share": truncated / rewards.numel(),
        "verify/timeouts": timeouts,
        "throughput/tokens_per_second": all_tokens / seconds["total"],
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
    }


def step_health(samples: Sequence[Sample], scores: ScoredRollouts, config: Config) -> dict[str, float]:
    """Reasoning health of a step's rollouts on the ranks that have got them for their replica, rank 0 among these;
    nothing on the others, which would compute the same. Collective over replicas: one gather of a few numbers a
    rollout."""
    if not is_replica_source():
        return {}
    table = measure(
        samples,
        config.health,
        entropy=scores.student.entropy.cpu().numpy(),
        log_prob=scores.student.log_prob.cpu().numpy(),
        checker=STEP_CHECKERS.get(config.data.train.generator),
    )
    return health_metrics(join(gather_replicas(table)), config.health)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
