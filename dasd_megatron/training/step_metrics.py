"""The metrics of one training step, reduced over data-parallel replicas."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import torch
import torch.distributed as dist

from dasd_megatron import backend
from dasd_megatron.algorithms import METHODS, CreditStatistics, EntropySwitch, credit_metrics, credit_statistics
from dasd_megatron.config import AlgorithmConfig, HealthConfig
from dasd_megatron.evaluation.health import health_metrics, join, measure
from dasd_megatron.losses import count_trained
from dasd_megatron.samples import Sample
from dasd_megatron.training.batching import ReplicaShare
from dasd_megatron.training.parallel import gather_replicas, is_replica_source, reduce_over_replicas
from dasd_megatron.training.passes import UpdateResult
from dasd_megatron.training.scores import Routing, ScoredRollouts
from dasd_megatron.verify.steps import STEP_CHECKERS

_SCHEDULED = {
    "beta": "schedule/beta",
    "rho": "schedule/rho",
    "divergence_weight": "schedule/divergence_weight",
    "rlsd_lambda": "schedule/rlsd_lambda",
}
_SOURCE_METRICS = {
    "solution": "teacher/solution_share",
    "hint": "teacher/hint_share",
    "answer": "teacher/answer_share",
    "peer": "teacher/peer_share",
    "feedback": "teacher/feedback_share",
    "unpaired": "teacher/unpaired_share",
}


def step_metrics(
    share: ReplicaShare,
    scores: ScoredRollouts,
    routing: Routing,
    updates: Sequence[UpdateResult],
    seconds: dict[str, float],
    samples_per_group: int,
) -> dict[str, float]:
    """Return means over all replicas of what one step saw, by the names of ``metrics.jsonl``. Collective: four
    all-reduces over replicas.

    ``rollout/kl`` is the k3 estimate of KL(rollout policy || trainer's student), nats per token. Updates are averaged
    over the step's optimizer steps that were applied, seconds are this rank's. ``update/skipped`` counts the others,
    whose gradients were not finite.
    """
    log_ratio = (scores.student.log_prob - scores.rollout_log_prob).double()
    pushed = (routing.credit.omega < 0).double()
    has_teacher = scores.teacher_tokens
    own_sums = {
        "tokens": torch.ones_like(log_ratio).sum(),
        "kl": (log_ratio.exp() - 1.0 - log_ratio).sum(),
        "difference": log_ratio.abs().sum(),
        "pushed": pushed.sum(),
        "pushed_log_prob": (scores.student.log_prob.double() * pushed).sum(),
        "teacher_tokens": has_teacher.double().sum(),
        "teacher_entropy": (scores.teacher_entropy.double() * has_teacher).sum(),
    }
    if routing.importance is not None:
        own_sums["importance"] = routing.importance.weights.double().sum()
        own_sums["importance_cut"] = routing.importance.cut.double().sum()
    if routing.rejected is not None:
        trained, _ = count_trained(scores.lengths, routing.rejected.kept)
        own_sums["kept"] = routing.rejected.kept.double().sum()
        own_sums["left_out"] = (trained == 0).double().sum()
        own_sums["vetoed"] = routing.rejected.vetoed.double().sum()
    routed = credit_statistics(
        routing.credit, scores.student.entropy, scores.delta, routing.advantage, taught=has_teacher
    )
    reduced = reduce_over_replicas(torch.cat([torch.stack([*own_sums.values()]), routed.sums]))
    maxima = reduce_over_replicas(torch.cat([log_ratio.abs().max()[None], routed.maxima]), dist.ReduceOp.MAX)
    sums = dict(zip(own_sums, reduced.tolist(), strict=False))
    metrics = {
        **reward_metrics(share, seconds, samples_per_group),
        **credit_metrics(CreditStatistics(reduced[len(own_sums) :], maxima[1:])),
        "rollout/kl": sums["kl"] / sums["tokens"],
        "rollout/log_prob_diff_mean": sums["difference"] / sums["tokens"],
        "rollout/log_prob_diff_max": maxima[0].item(),
    }
    if sums["pushed"]:
        metrics["credit/pushed_log_prob_mean"] = sums["pushed_log_prob"] / sums["pushed"]
    if sums["teacher_tokens"]:
        metrics["teacher/entropy_mean"] = sums["teacher_entropy"] / sums["teacher_tokens"]
    if routing.importance is not None:
        metrics["rollout/importance_mean"] = sums["importance"] / sums["tokens"]
        metrics["rollout/importance_cut_share"] = sums["importance_cut"] / sums["tokens"]
    if routing.rejected is not None:
        responses = len(share.rewards)
        metrics["rollout/rejected_share"] = 1.0 - sums["kept"] / sums["tokens"]
        metrics["rollout/rejected_response_share"] = sums["left_out"] / responses
        metrics["rollout/vetoed_share"] = sums["vetoed"] / responses
    return metrics | update_metrics(updates)


def schedule_metrics(algorithm: AlgorithmConfig) -> dict[str, float]:
    """Return the scheduled settings' values at this step, by the names of ``metrics.jsonl``; ``algorithm`` is the
    section at this step."""
    return {_SCHEDULED[name]: getattr(algorithm, name) for name in algorithm.schedules}


def switch_metrics(algorithm: AlgorithmConfig, switch: EntropySwitch) -> dict[str, float]:
    """Return whether the teacher's switch is on at this step, by the name of ``metrics.jsonl``, for a method that has
    one."""
    return {"teacher/switch_on": float(switch.is_on)} if METHODS[algorithm.name].has_entropy_switch else {}


def update_metrics(updates: Sequence[UpdateResult]) -> dict[str, float]:
    """Average a step's updates that were applied, by the names of ``metrics.jsonl``. A mean that a loss reports as
    ``name`` is ``update/name``."""
    applied = [update for update in updates if update.applied]
    metrics: dict[str, float] = {"update/skipped": len(updates) - len(applied)}
    if applied:
        for name in {name: None for update in applied for name in update.means}:
            # No token of a minibatch may have a teacher, and then its update reports no divergence.
            metrics[f"update/{name}"] = _mean([update.means[name] for update in applied if name in update.means])
        metrics["update/grad_norm"] = _mean([update.grad_norm for update in applied])
        metrics["update/lr"] = applied[-1].lr
    return metrics


def reward_metrics(share: ReplicaShare, seconds: dict[str, float], samples_per_group: int) -> dict[str, float]:
    """Return the metrics of the rollouts alone, by the names of ``metrics.jsonl``, over all replicas. Collective: two
    all-reduces over replicas."""
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


def teacher_metrics(samples: Sequence[Sample], sources: Sequence[str]) -> dict[str, float]:
    """Return the share of a step's samples whose teacher is shown a text of each of ``sources``, and of those without a
    teacher, by the names of ``metrics.jsonl``. ``samples``: all of the step. No collectives."""
    counts = collections.Counter(sample.privileged_source for sample in samples)
    shares = {_SOURCE_METRICS[source]: counts[source] / len(samples) for source in sources}
    return {**shares, "teacher/absent_share": counts[None] / len(samples)}


def step_health(
    samples: Sequence[Sample], scores: ScoredRollouts, settings: HealthConfig, generator: str | None
) -> dict[str, float]:
    """Return the reasoning health of a step's rollouts on the ranks that got them for their replica, rank 0 among
    these, and nothing on the others, which would compute the same.

    ``generator``: what made the problems, whose steps some checker may know. Collective over replicas: one gather of a
    few numbers a rollout.
    """
    if not is_replica_source():
        return {}
    table = measure(
        samples,
        settings,
        entropy=scores.student.entropy.cpu().numpy(),
        log_prob=scores.student.log_prob.cpu().numpy(),
        checker=None if generator is None else STEP_CHECKERS.get(generator),
    )
    return health_metrics(join(gather_replicas(table)), settings)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
