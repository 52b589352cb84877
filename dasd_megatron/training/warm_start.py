"""Supervised fine-tuning, so that reinforcement starts from a policy that can be right: on the examples of
``warm_start.path``, or on the training problems' reference solutions.

Of the training problems a share shows the solution in the prompt, through the teacher's template, since the
self-teacher has to be able to use it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from transformers import PreTrainedTokenizerBase

from dasd_megatron.config import Config, OptimizerConfig
from dasd_megatron.data.examples import Example, read_examples
from dasd_megatron.data.order import DataOrder
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.teacher_prompts import TeacherPrompts
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.models.gpt import build_model
from dasd_megatron.run.checks import make_teacher
from dasd_megatron.run.paths import RunPaths, start_hf_files, start_path
from dasd_megatron.samples import sampling_seed
from dasd_megatron.training.batching import BatchLayout, make_micro_batches
from dasd_megatron.training.export import export_model
from dasd_megatron.training.optimizer import build_optimizer
from dasd_megatron.training.parallel import stop_if_requested
from dasd_megatron.training.passes import supervised_update

SOLUTION_PROMPTS = 0.5
"""Share of the training problems whose prompt shows the solution, where ``warm_start.privileged_share`` is null."""


class _Batch(NamedTuple):
    """This replica's examples of a step. ``weights``: float32, one for each response token, for
    :func:`~dasd_megatron.training.passes.supervised_update`; None where all count alike."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    weights: torch.Tensor | None


def warm_start(
    config: Config,
    paths: RunPaths,
    problems: list[Problem],
    renderer: PromptRenderer,
    tokenizer: PreTrainedTokenizerBase,
    report: Callable[[dict[str, float]], None],
) -> None:
    """Fine-tune from the starting model and export the result to ``paths.warm_started_model``. Collective over all
    ranks.

    Args:
        report: called after every step with step, loss (nats per response token), lr and grad_norm.
    """
    settings = config.warm_start
    model = build_model(config, start_path(config.model, paths), hidden_dropout=settings.hidden_dropout)
    optimizer = build_optimizer(
        OptimizerConfig(
            lr=settings.lr,
            min_lr=settings.lr / 10,
            warmup_steps=settings.warmup_steps,
            decay_style=settings.decay_style,
            weight_decay=0.01,
            clip_grad=config.optimizer.clip_grad,
            distributed=config.optimizer.distributed,
        ),
        model,
        steps=settings.steps,
        updates_per_step=1,
    )
    layout = dataclasses.replace(
        BatchLayout.of_this_rank(config.batch, config.parallel, config.precision),
        micro_batch_size=settings.micro_batch_size or config.batch.micro_batch_size,
    )
    examples = None if settings.path is None else read_examples(paths.examples)
    order = DataOrder(len(problems if examples is None else examples), seed=config.run.seed, shuffle=True)
    teacher = make_teacher(config, renderer, problems)
    share = settings.batch_size // parallel_state.get_data_parallel_world_size()
    first = parallel_state.get_data_parallel_rank() * share
    for step in range(settings.steps):
        position = step * settings.batch_size
        indices = order.indices(position, settings.batch_size)
        if examples is None:
            own = [problems[index] for index in indices[first : first + share]]
            batch = _solve(config, own, position + first, teacher, tokenizer)
        else:
            batch = _weigh([examples[index] for index in indices], slice(first, first + share), layout.device)
        micro_batches = make_micro_batches(batch.prompts, batch.responses, layout)
        result = supervised_update(model, optimizer, micro_batches, config.loss, token_weights=batch.weights)
        stop_if_requested()
        report({"step": step + 1, **result.means, "lr": result.lr, "grad_norm": result.grad_norm})
    model.gather_parameters()
    export_model(model, paths.warm_started_model, template_dir=start_hf_files(config.model, paths))


def _solve(
    config: Config,
    problems: Sequence[Problem],
    position: int,
    teacher: TeacherPrompts,
    tokenizer: PreTrainedTokenizerBase,
) -> _Batch:
    """Return the solutions of problems, the first of which is at ``position`` in the order of all."""
    share = config.warm_start.privileged_share
    prompts, responses = [], []
    for offset, problem in enumerate(problems):
        # A draw for each example, and no alternation, lets a problem be seen both ways in different epochs.
        draw = sampling_seed(config.run.seed, "warm start", position + offset) / 2**31
        is_shown = draw < (SOLUTION_PROMPTS if share is None else share)
        prompts.append(teacher.example(problem) if is_shown else teacher.renderer.student(problem))
        solution = tokenizer.encode(problem.reference_solution, add_special_tokens=False)
        responses.append([*solution, tokenizer.eos_token_id])
    return _Batch(prompts, responses, None)


def _weigh(examples: Sequence[Example], own: slice, device: torch.device) -> _Batch:
    """Return the replica's ``own`` among the examples of a step.

    The weights are scaled so that their sum over the tokens of all replicas is the number of these tokens: a loss that
    is divided by that number is then the weighted mean, however replicas and micro-batches share the step.
    """
    lengths = [len(example.response) for example in examples]
    weighted = math.fsum(example.weight * length for example, length in zip(examples, lengths, strict=True))
    scale = sum(lengths) / weighted
    weights = torch.tensor([example.weight * scale for example in examples[own]], dtype=torch.float32)
    return _Batch(
        prompts=[example.prompt for example in examples[own]],
        responses=[example.response for example in examples[own]],
        weights=weights.repeat_interleave(torch.tensor(lengths[own])).to(device),
    )
