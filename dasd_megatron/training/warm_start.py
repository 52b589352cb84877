"""Supervised fine-tuning on the training problems' reference solutions, so that reinforcement starts from a policy that
can be right.

A share of the examples shows the solution in the prompt, through the teacher's template, since the self-teacher has to
be able to use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron.core import parallel_state
from transformers import PreTrainedTokenizerBase

from dasd_megatron.config import Config, OptimizerConfig
from dasd_megatron.data.order import DataOrder
from dasd_megatron.data.prompts import Problem
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
    order = DataOrder(len(problems), seed=config.run.seed, shuffle=True)
    teacher = make_teacher(config, renderer, problems)
    share = settings.batch_size // parallel_state.get_data_parallel_world_size()
    first = parallel_state.get_data_parallel_rank() * share
    for step in range(settings.steps):
        position = step * settings.batch_size
        indices = order.indices(position, settings.batch_size)[first : first + share]
        prompts, responses = [], []
        for offset, index in enumerate(indices):
            # A draw for each example, and no alternation, lets a problem be seen both ways in different epochs.
            draw = sampling_seed(config.run.seed, "warm start", position + first + offset) / 2**31
            prompts.append(
                teacher.example(problems[index])
                if draw < settings.privileged_share
                else renderer.student(problems[index])
            )
            responses.append(
                tokenizer.encode(problems[index].reference_solution, add_special_tokens=False)
                + [tokenizer.eos_token_id]
            )
        micro_batches = make_micro_batches(prompts, responses, layout)
        result = supervised_update(model, optimizer, micro_batches, config.loss)
        stop_if_requested()
        report({"step": step + 1, **result.means, "lr": result.lr, "grad_norm": result.grad_norm})
    model.gather_parameters()
    export_model(model, paths.warm_started_model, template_dir=start_hf_files(config.model, paths))
