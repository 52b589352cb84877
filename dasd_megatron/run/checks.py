"""Checks of a run against its model and its data that need neither weights in memory nor servers that hold them."""

from __future__ import annotations

import dataclasses

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dasd_megatron.access import AccessError, api_key
from dasd_megatron.algorithms.methods import METHODS
from dasd_megatron.config import Config, stage_layers
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.templates import PromptRenderer, check_lengths
from dasd_megatron.errors import ConfigError
from dasd_megatron.models.hf_config import (
    is_megatron_checkpoint,
)
from dasd_megatron.rollout.discovery import check_access


def needs_teacher(config: Config) -> bool:
    """Return whether the teacher scores the rollouts of this run."""
    return METHODS[config.algorithm.name].needs_teacher


def check_key(config: Config) -> None:
    """Refuse (AccessError) an API key that cannot be one, that stands in the configuration, or that external servers do
    not take."""
    key = api_key()
    if key is not None and any(key in str(value) for value in flatten(dataclasses.asdict(config)).values()):
        raise AccessError(
            "the API key in DASD_API_KEY stands in the configuration too, which is written into run.dir: leave it out"
        )
    if config.rollout.engine == "external" and config.rollout.replay is None:
        check_access(config.rollout)


def require_hf_directory(config: Config) -> None:
    """Refuse (ConfigError) a ``model.path`` that a rollout server cannot be started from."""
    if config.model.path is not None and is_megatron_checkpoint(config.model.path):
        raise ConfigError(
            f"model.path={config.model.path} is a Megatron checkpoint: make a directory of it with dasd convert "
            "megatron-to-hf"
        )


def check_layout(config: Config, hf_config: PretrainedConfig) -> None:
    """Refuse a parallel layout that does not divide the architecture, and sequences longer than its positions."""
    parallel, rollout = config.parallel, config.rollout
    where = f"config.json of model.path={config.model.path}" if config.model.path is not None else "model.tiny"
    if config.model.path is None and config.model.architecture:
        where = "model.architecture"
    tensor = parallel.tensor_model_parallel_size
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size"):
        if getattr(hf_config, name) % tensor:
            raise ConfigError(
                f"parallel.tensor_model_parallel_size={tensor} does not divide {name}={getattr(hf_config, name)} "
                f"({where}): write a divisor of it"
            )
    if hf_config.num_attention_heads % hf_config.num_key_value_heads:
        raise ConfigError(
            f"num_key_value_heads={hf_config.num_key_value_heads} does not divide "
            f"num_attention_heads={hf_config.num_attention_heads} ({where}): write a divisor of it"
        )
    layers = "num_layers" if where == "model.tiny" else "num_hidden_layers"
    stage_layers(parallel, hf_config.num_hidden_layers, f"{layers}={hf_config.num_hidden_layers} ({where})")
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if longest > hf_config.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} exceed max_position_embeddings="
            f"{hf_config.max_position_embeddings} ({where}): lower them"
        )


def check_warm_start_lengths(
    config: Config,
    hf_config: PretrainedConfig,
    renderer: PromptRenderer,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
) -> None:
    """Refuse problems whose prompt, reference solution and end-of-sequence token do not fit into the model's
    positions."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"warm_start.steps={config.warm_start.steps} needs a tokenizer with an end-of-sequence token: "
            f"set eos_token in tokenizer_config.json of model.path={config.model.path}, or write warm_start.steps=0"
        )
    limit = hf_config.max_position_embeddings
    for problem in problems:
        prompt = max(len(renderer.teacher(problem)), len(renderer.student(problem)))
        solution = len(tokenizer.encode(problem.reference_solution, add_special_tokens=False))
        if prompt + solution + 1 > limit:
            where = "model.tiny" if config.model.path is None else f"config.json of model.path={config.model.path}"
            raise ConfigError(
                f"warm_start.steps={config.warm_start.steps}: problem {problem.id!r} has a prompt of {prompt} and a "
                f"solution of {solution} tokens, with its end over max_position_embeddings={limit} ({where}): remove "
                "it from data.train, or write 0"
            )


def check_prompt_lengths(
    config: Config, renderer: PromptRenderer, train: list[Problem], heldout: list[Problem]
) -> None:
    """Refuse problems whose prompt, and for training ones the privileged prompt, exceed
    ``rollout.max_prompt_tokens``."""
    check_lengths(
        train, renderer, config.rollout.max_prompt_tokens, teacher=needs_teacher(config) or config.warm_start.steps > 0
    )
    check_lengths(heldout, renderer, config.rollout.max_prompt_tokens, teacher=False)


def flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
