"""The teacher: its passes over a step's rollouts, and the course of its weights."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dasd_megatron.algorithms import METHODS
from dasd_megatron.config import Config, TeacherConfig
from dasd_megatron.losses import TopK
from dasd_megatron.models.gpt import ShardedModel
from dasd_megatron.samples import Sample
from dasd_megatron.training.batching import BatchLayout, MicroBatch, make_micro_batches
from dasd_megatron.training.decisions import is_multiple
from dasd_megatron.training.parallel import largest_of_replicas
from dasd_megatron.training.passes import hidden_states, response_tokens, score, score_states
from dasd_megatron.training.scores import TeacherEntries, TeacherScores, TeacherStates, TokenScores
from dasd_megatron.training.snapshots import WeightSnapshot
from dasd_megatron.training.trainer import Learner, Trainer

_FILLING = [0]
"""The prompt and the response of a sequence that nothing is read from."""


def without_teacher(samples: Sequence[Sample], device: torch.device) -> TeacherScores:
    """Return the scores of a step in which no sample has a teacher."""
    nothing = torch.zeros(sum(len(sample.sampled) for sample in samples), device=device)
    return TeacherScores(nothing, nothing, torch.zeros(len(samples), dtype=torch.bool, device=device), ran=False)


def score_teacher(
    trainer: Trainer, samples: Sequence[Sample], layout: BatchLayout, entries: TopK | None = None
) -> TeacherScores:
    """Score the responses behind the privileged prompts, of those samples that have one and that the method's teacher
    acts on.

    Every replica passes as many sequences as the replica with the most samples that have a teacher, since some
    collectives of a forward pass are over replicas. What it lacks are sequences of one token.

    ``entries``: the student's most probable entries of the vocabulary, [N, k] on the last pipeline stage, where the
    divergence compares these.

    Collective over all ranks: one all-reduce over replicas, and those of
    :func:`~dasd_megatron.training.passes.score`.
    """
    acts = [_acts_on(trainer.config, sample) for sample in samples]
    batches = _teacher_batches(list(itertools.compress(samples, acts)), layout)
    scored = without_teacher(samples, layout.device)
    if not batches:
        return scored
    has_teacher = torch.tensor(acts, device=layout.device)
    lengths = torch.tensor([len(sample.sampled) for sample in samples], device=layout.device)
    places = has_teacher.repeat_interleave(lengths).nonzero()[:, 0]
    scores, distribution = _score_batches(trainer.config, trainer.learner, batches, _entries(entries, places, batches))
    log_prob, entropy = scored.log_prob.clone(), scored.entropy.clone()
    log_prob[places], entropy[places] = scores.log_prob[: len(places)], scores.entropy[: len(places)]
    if distribution is not None:
        rows = torch.full_like(log_prob, -1, dtype=torch.int64)
        rows[places] = torch.arange(len(places), device=rows.device)
        distribution = distribution.at(rows)
    return TeacherScores(log_prob, entropy, has_teacher, ran=True, distribution=distribution)


def move_weights(learner: Learner, settings: TeacherConfig, step: int) -> None:
    """Let the teacher's own weights, where it has some, follow the live ones after training step ``step``."""
    if learner.teacher is None:
        return
    if settings.weights == "ema":
        learner.teacher.average_in(learner.model, settings.ema_decay)
    elif is_multiple(step, settings.snapshot_every):
        learner.teacher.copy(learner.model)


def _acts_on(config: Config, sample: Sample) -> bool:
    """Return whether the method reads what the teacher says of a sample, and there is a teacher."""
    acts_on: bool = METHODS[config.algorithm.name].acts_on(config.teacher.is_right(sample.reward))
    return sample.teacher_prompt_ids is not None and acts_on


def _teacher_batches(chosen: Sequence[Sample], layout: BatchLayout) -> list[MicroBatch]:
    """Cut the responses behind the teacher's prompts into micro-batches, none if no replica has any. The response
    tokens of sequences that only fill up come last."""
    # An interleaved schedule needs as many micro-batches as there are stages, or a multiple.
    sequences = -(-largest_of_replicas(len(chosen)) // layout.count_multiple) * layout.count_multiple
    if sequences == 0:
        return []
    filling = [_FILLING] * (sequences - len(chosen))
    return make_micro_batches(
        [*(sample.teacher_prompt_ids for sample in chosen if sample.teacher_prompt_ids is not None), *filling],
        [*(sample.response_ids for sample in chosen), *filling],
        layout,
        response_mask=[*(sample.response_mask for sample in chosen), *[None] * len(filling)],
    )


def _entries(entries: TopK | None, places: torch.Tensor, batches: list[MicroBatch]) -> torch.Tensor | None:
    """Return the ids of the student's entries for the tokens that the teacher scores ``[M, k]``, no entry where a
    sequence only fills up; None where the student has no entries."""
    if entries is None:
        return None
    ids = entries.ids.new_full((response_tokens(batches), entries.ids.shape[1]), -1)
    ids[: len(places)] = entries.ids[places]
    return ids


class _Part(NamedTuple):
    """A model whose logits are a part of the teacher's: its weights, None for the live ones, and its share."""

    weights: WeightSnapshot | None
    share: float = 1.0


def _teacher_parts(settings: TeacherConfig, learner: Learner) -> list[_Part]:
    if settings.weights == "trust_region":
        mix = settings.trust_region_mix
        return [_Part(learner.start, 1.0 - mix), _Part(None, mix)]
    return [_Part(learner.start if settings.weights == "frozen" else learner.teacher)]


def _score_batches(
    config: Config, learner: Learner, batches: list[MicroBatch], entry_ids: torch.Tensor | None
) -> tuple[TokenScores, TeacherStates | TeacherEntries | None]:
    """Return the teacher's statistics of the response tokens and, for the distributional objective and on the last
    pipeline stage, its states, or its probabilities of the most probable entries alone. ``entry_ids``: [M, k] entries
    that the student has chosen, on that stage."""
    model, algorithm = learner.model, config.algorithm
    parts = _teacher_parts(config.teacher, learner)
    needs_states = algorithm.is_distributional and algorithm.divergence_top_k is None
    options: dict[str, Any] = dict(
        temperature=config.rollout.temperature, top_k=algorithm.top_k_of("teacher"), entry_ids=entry_ids
    )
    if len(parts) == 1 and not needs_states:
        with _applied(parts[0], model):
            return _with_entries(score(model, batches, config.loss, **options))
    hidden, heads = [], []
    for part in parts:
        with _applied(part, model):
            of_part = hidden_states(model, batches)
            if of_part is not None:
                hidden.append(of_part)
                heads.append(model.head_weight().detach())
    states = None
    if hidden:
        if len(parts) > 1:
            # Scaled in place: the heads may be the largest tensors of this stage.
            head = torch.cat(heads, dim=1)
            for part, columns in zip(parts, head.chunk(len(parts), dim=1), strict=True):
                columns.mul_(part.share)
        else:
            # The first update changes the live head, which the divergence needs as it was.
            changes = parts[0].weights is None and config.batch.minibatches * config.batch.epochs > 1
            head = heads[0].clone() if changes else heads[0]
        states = TeacherStates(tuple(hidden), head, torch.arange(len(hidden[0]), device=head.device))
    scores = score_states(model, batches, config.loss, states, **options)
    return (scores, states) if needs_states else _with_entries(scores)


def _with_entries(scores: TokenScores) -> tuple[TokenScores, TeacherEntries | None]:
    """Return the scores without their entries, and the entries."""
    if scores.top is None:
        return scores, None
    rows = torch.arange(len(scores.top.ids), device=scores.top.ids.device)
    return scores._replace(top=None), TeacherEntries(scores.top, rows)


def _applied(part: _Part, model: ShardedModel) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if part.weights is None else part.weights.applied(model)
