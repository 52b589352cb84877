"""Token statistics of a step's first rollouts, in files that people look into."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from dasd_megatron.files import atomic_file
from dasd_megatron.samples import Sample
from dasd_megatron.training.scores import Routing, ScoredRollouts
from dasd_megatron.training.trainer import Trainer


def save_inspection(trainer: Trainer, samples: list[Sample], scores: ScoredRollouts, routing: Routing) -> None:
    """Write token statistics of this replica's first rollouts, which the report shows."""
    bounds = scores.bounds
    records = [
        inspect_rollout(trainer.tokenizer, sample, index, slice(bounds[index], bounds[index + 1]), scores, routing)
        for index, sample in enumerate(samples[: trainer.config.logging.inspect_rollouts])
    ]
    path = trainer.paths.root / "inspect" / f"step_{trainer.state.step:06d}.json"
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(records))


def inspect_rollout(
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    index: int,
    tokens: slice,
    scores: ScoredRollouts,
    routing: Routing,
) -> dict[str, Any]:
    """Return the record of one rollout, the ``index``-th of its batch, whose packed response tokens are ``tokens``."""
    return {
        "problem_id": sample.problem_id,
        "problem": sample.problem,
        "text": sample.text,
        "reward": sample.reward,
        "advantage": routing.verifier_advantage[index].item(),
        "tokens": [tokenizer.decode([token]) for token in sample.of_sampled(sample.response_ids).tolist()],
        "entropy": scores.student.entropy[tokens].tolist(),
        "delta": scores.delta[tokens].tolist(),
        "omega": routing.credit.omega[tokens].tolist(),
        "token_advantage": routing.advantage[tokens].tolist(),
        "student_log_prob": scores.student.log_prob[tokens].tolist(),
        "teacher_log_prob": scores.teacher_log_prob[tokens].tolist(),
        "tau": routing.credit.tau[index].item(),
        "sigma": routing.credit.sigma[index].item(),
    }
