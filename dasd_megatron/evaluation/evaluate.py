"""Evaluation during training: Avg@k, Pass@k and Maj@k of the served policy on the held-out problems."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dasd_megatron.config import Config
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.evaluation.health import health_metrics, health_tables, measure
from dasd_megatron.evaluation.pass_at_k import avg_at_k, maj_at_k, pass_at_k
from dasd_megatron.files import atomic_file, naming_path, replace_file
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.rollout.grading import generate, make_samples
from dasd_megatron.samples import Sample, sampling_seed
from dasd_megatron.verify.grader import Grader
from dasd_megatron.verify.steps import STEP_CHECKERS


def evaluate(
    config: Config,
    client: RolloutClient,
    grader: Grader,
    renderer: PromptRenderer,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    step: int,
    label: str,
    weight_version: str | None,
    samples_path: Path,
) -> dict[str, Any]:
    """Draw ``evaluation.samples`` responses to each problem, grade them, write them to ``samples_path`` and return the
    metrics.

    The seeds depend on ``run.seed``, the problem and the sample alone, so two evaluations differ by the weights only.

    Args:
        step: training step whose weights are served.
        label: before, step or after.
        weight_version: version that the servers must answer with; None: any.
    """
    started = time.perf_counter()
    settings = config.evaluation
    prompts = [renderer.student(problem) for problem in problems]
    repeated = [prompt for prompt in prompts for _ in range(settings.samples)]
    seeds = [
        sampling_seed(config.run.seed, "evaluation", index, sample)
        for index in range(len(problems))
        for sample in range(settings.samples)
    ]
    completions = generate(
        client,
        repeated,
        seeds,
        config.rollout,
        temperature=settings.temperature,
        top_p=settings.top_p,
        weight_version=weight_version,
        rows_per_request=config.rollout.groups_per_request * config.batch.samples_per_group,
        vocab_size=None,
    )
    samples = make_samples(
        problems,
        range(len(problems)),
        prompts,
        completions,
        grader,
        samples_per_group=settings.samples,
        tokenizer=tokenizer,
    )
    _write_samples(samples_path, samples)
    generator = config.data.heldout.generator
    checker = None if generator is None else STEP_CHECKERS.get(generator)
    health = measure(samples, config.health, checker=checker)
    replace_file(samples_path.with_name("health.json"), json.dumps(health_tables(health), indent=2) + "\n")
    by_problem = [samples[start : start + settings.samples] for start in range(0, len(samples), settings.samples)]
    outcomes = [[sample.reward > 0 for sample in group] for group in by_problem]
    answers = [[sample.predicted_answer for sample in group] for group in by_problem]
    num_tokens = sum(len(sample.sampled) for sample in samples)
    return {
        "step": step,
        "label": label,
        "num_problems": len(problems),
        "num_samples": settings.samples,
        f"avg@{settings.samples}": avg_at_k(outcomes),
        **{f"pass@{k}": pass_at_k(outcomes, k) for k in settings.ks},
        f"maj@{settings.samples}": maj_at_k(answers, outcomes, settings.samples),
        "response/length_mean": num_tokens / len(samples),
        "nll_mean": -sum(float(sample.rollout_log_probs.sum(dtype=np.float64)) for sample in samples) / num_tokens,
        "truncated_share": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        "timeouts": sum(sample.timed_out for sample in samples),
        **health_metrics(health, config.health),
        "weight_version": samples[0].weight_version,
        "seconds": time.perf_counter() - started,
    }


def _write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write one sample a line, with NeMo-Skills' field names. The file appears whole or not at all."""
    with naming_path(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(_sample_line(sample) for sample in samples)


def _sample_line(sample: Sample) -> str:
    record = {
        "problem_id": sample.problem_id,
        "sample": sample.sample,
        "problem": sample.problem,
        "expected_answer": sample.expected_answer,
        "generation": sample.text,
        "predicted_answer": sample.predicted_answer,
        "symbolic_correct": sample.reward > 0,
        "finish_reason": sample.finish_reason,
        "num_tokens": len(sample.sampled),
    }
    return json.dumps(record) + "\n"
