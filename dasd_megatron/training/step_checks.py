"""Checks of a step's numbers: the servers' log-probs against the trainer's, FP8 against bf16, and what is not
finite."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from dasd_megatron.config import RolloutConfig
from dasd_megatron.samples import Sample
from dasd_megatron.training.batching import BatchLayout, batch_samples
from dasd_megatron.training.parallel import gather_world, reduce_over_replicas
from dasd_megatron.training.passes import UpdateResult, score
from dasd_megatron.training.rollout_plane import RolloutsUnavailableError
from dasd_megatron.training.scores import ScoredRollouts
from dasd_megatron.training.trainer import Trainer

_PLACES_SHOWN = 8


def check_agreement(settings: RolloutConfig, scores: ScoredRollouts) -> None:
    """Refuse (RolloutsUnavailableError) rollouts whose log-probs are not those of the trainer's weights. Collective
    over replicas."""
    limit = settings.max_log_prob_diff
    if limit is None or settings.replay is not None:
        return
    mean = _mean_over_replicas((scores.student.log_prob - scores.rollout_log_prob).abs())
    # A mean that is not a number is not above the limit: logits that are not finite are another matter.
    if mean > limit:
        raise RolloutsUnavailableError(
            f"the servers' log-probs differ from the trainer's by {mean:.3g} nats a token, over "
            f"rollout.max_log_prob_diff={limit:g}: they serve another model or other weights; check what they were "
            "started with, or raise the limit"
        )


def score_in_bf16(trainer: Trainer, samples: Sequence[Sample], step: int) -> torch.Tensor | None:
    """Score a few rollouts in bf16, for :func:`compare_fp8`, at the first step and then as often as configured; None
    without FP8 and at other steps. To be called while the weights are those that score all of them. Collective over
    all ranks."""
    config = trainer.config
    every = config.precision.fp8_check_every
    if config.precision.fp8 == "none" or not every or (step != 1 and step % every):
        return None
    # Interleaved schedules need a sequence for each stage.
    chosen = samples[: max(config.batch.samples_per_group, config.parallel.pipeline_model_parallel_size)]
    layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
    batches = batch_samples(chosen, [sample.prompt_ids for sample in chosen], layout)
    model = trainer.learner.model
    with model.without_fp8():
        return score(model, batches, config.loss, temperature=config.rollout.temperature).log_prob


def compare_fp8(trainer: Trainer, scores: ScoredRollouts, bf16: torch.Tensor | None) -> dict[str, float]:
    """Measure what FP8 does to the log-probs of the rollouts that :func:`score_in_bf16` has scored; nothing where it
    has scored none. Collective over replicas."""
    if bf16 is None:
        return {}
    config, step = trainer.config, trainer.state.step
    gap = (scores.student.log_prob[: len(bf16)] - bf16).abs()
    mean = _mean_over_replicas(gap)
    largest = reduce_over_replicas(gap.max(), dist.ReduceOp.MAX).item()
    if mean > config.precision.fp8_max_diff:
        trainer.display.warning(
            f"step {step}: log-probs under precision.fp8={config.precision.fp8} differ from those of bf16 by "
            f"{mean:.3g} nats a token, over precision.fp8_max_diff={config.precision.fp8_max_diff:g}: leave the outer "
            "layers in bf16 (precision.bf16_first_layers, precision.bf16_last_layers), or choose another recipe"
        )
    return {"precision/fp8_log_prob_diff_mean": mean, "precision/fp8_log_prob_diff_max": largest}


def scores_are_finite(trainer: Trainer, samples: Sequence[Sample], scores: ScoredRollouts) -> bool:
    """Return whether all tokens' statistics are finite on all ranks; the first time in a run that they are not, a
    warning says where. Collective over all ranks."""
    bad = non_finite_tokens(scores)
    place = None
    if bool(bad.any()):
        named = trainer.learner.model.named_parameters()
        broken = next((name for name, values in named if not bool(torch.isfinite(values).all())), None)
        place = f"rank {dist.get_rank()}: {_describe_place(bad, scores.lengths, samples)}; " + (
            f"parameter {broken} is not finite here" if broken else "the parameters here are finite"
        )
    places = [text for text in gather_world(place) if text]
    if places and not trainer.reported_non_finite:
        trainer.reported_non_finite = True
        trainer.display.warning(
            f"step {trainer.state.step} is skipped, its logits are not finite ({' | '.join(places[:_PLACES_SHOWN])}); "
            "further skipped steps are counted in update/skipped and not described"
        )
    return not places


def non_finite_tokens(scores: ScoredRollouts) -> torch.Tensor:
    """Return which packed tokens have a statistic that is not finite, bool [N]. A teacher's log-prob may be -inf: that
    is what it says of a token that it rules out, and routing can take it. Its entropy may not."""
    bad = torch.isnan(scores.teacher_log_prob) | (scores.teacher_log_prob == math.inf)
    student, start_log_prob = scores.student, scores.start_log_prob
    for values in (student.log_prob, student.entropy, scores.teacher_entropy, start_log_prob):
        if values is not None:
            bad |= ~torch.isfinite(values)
    return bad


def _describe_place(bad: torch.Tensor, lengths: torch.Tensor, samples: Sequence[Sample]) -> str:
    token = int(bad.nonzero()[0])
    ends = lengths.cumsum(0).tolist()
    index = bisect.bisect_right(ends, token)
    sample = samples[index]
    # Places are counted back from the end of the response, so that the lengths before it need not be subtracted.
    position = int(sample.sampled[token - ends[index]])
    return (
        f"{int(bad.sum())} of {bad.numel()} tokens, first response token {position} of problem {sample.problem_id}, "
        f"sample {sample.sample}"
    )


def report_not_applied(trainer: Trainer, results: Sequence[UpdateResult]) -> None:
    """Warn the first time in a run that an update was not applied for its gradient."""
    norms = [result.grad_norm for result in results if not result.applied]
    if norms and not trainer.reported_non_finite:
        trainer.reported_non_finite = True
        trainer.display.warning(
            f"step {trainer.state.step}: {len(norms)} of {len(results)} updates are skipped, their gradient norm is "
            f"{norms[0]}; further ones are counted in update/skipped and not described"
        )


def _mean_over_replicas(values: torch.Tensor) -> float:
    """Return the mean of the elements on all replicas; collective over them."""
    values = values.double()
    total, count = reduce_over_replicas(torch.stack([values.sum(), torch.ones_like(values).sum()])).tolist()
    return total / count
