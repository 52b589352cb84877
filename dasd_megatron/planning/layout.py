"""Division of a model and of ranks by a parallel layout, and the lengths of sequences, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dasd_megatron.algorithms.methods import METHODS
from dasd_megatron.config import Config, ModelConfig, ParallelConfig, RolloutConfig, stage_layers
from dasd_megatron.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dasd_megatron.models.sizes import ModelSizes


@dataclass(frozen=True)
class Place:
    """The place of a rank in each direction of the layout."""

    tensor: int
    context: int
    data: int
    pipeline: int


def place_of(parallel: ParallelConfig, rank: int) -> Place:
    """Return the place of a rank in Megatron-Core's order: tensor-parallel ranks are neighbours, then come context,
    data and pipeline-parallel ones."""
    rank, tensor = divmod(rank, parallel.tensor_model_parallel_size)
    rank, context = divmod(rank, parallel.context_parallel_size)
    pipeline, data = divmod(rank, parallel.data_parallel_size)
    return Place(tensor, context, data, pipeline)


def check_layout(
    model: ModelConfig, parallel: ParallelConfig, rollout: RolloutConfig, sizes: ModelSizes | PretrainedConfig
) -> None:
    """Refuse (ConfigError) a parallel layout that does not divide the architecture, and sequences longer than its
    positions."""
    where = f"config.json of model.path={model.path}" if model.path is not None else "model.tiny"
    if model.path is None and model.architecture:
        where = "model.architecture"
    tensor = parallel.tensor_model_parallel_size
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size"):
        if getattr(sizes, name) % tensor:
            raise ConfigError(
                f"parallel.tensor_model_parallel_size={tensor} does not divide {name}={getattr(sizes, name)} "
                f"({where}): write a divisor of it"
            )
    if sizes.num_attention_heads % sizes.num_key_value_heads:
        raise ConfigError(
            f"num_key_value_heads={sizes.num_key_value_heads} does not divide "
            f"num_attention_heads={sizes.num_attention_heads} ({where}): write a divisor of it"
        )
    layers = "num_layers" if where == "model.tiny" else "num_hidden_layers"
    stage_layers(parallel, sizes.num_hidden_layers, f"{layers}={sizes.num_hidden_layers} ({where})")
    if rollout.weight_format == "fp8_blockwise":
        _check_blocks(rollout, sizes, where)
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if longest > sizes.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} exceed max_position_embeddings="
            f"{sizes.max_position_embeddings} ({where}): lower them"
        )


def _check_blocks(rollout: RolloutConfig, sizes: ModelSizes | PretrainedConfig, where: str) -> None:
    """Refuse layers that a server could not share among its processes, or stack, in whole blocks of 128 rows."""
    processes = rollout.sglang.tensor_parallel_size if rollout.engine == "sglang" else 1
    head_dim = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    parts = {
        "num_attention_heads x head_dim": sizes.num_attention_heads * head_dim,
        # A server with more processes than key-value heads has each of these heads several times.
        "num_key_value_heads x head_dim": max(sizes.num_key_value_heads, processes) * head_dim,
        "intermediate_size": sizes.intermediate_size,
    }
    for name, rows in parts.items():
        if rows % (128 * processes):
            raise ConfigError(
                f"rollout.weight_format=fp8_blockwise needs whole blocks of 128 on each of a server's {processes} "
                f"processes, and {name} is {rows} ({where}): write rollout.weight_format=plain"
            )


def longest_run_text(config: Config) -> int:
    """Return the tokens of the longest privileged text that arises in the run; 0 where none does.

    A peer is a response, and so no longer than one.
    """
    teacher = config.teacher
    if not METHODS[config.algorithm.name].needs_teacher or not teacher.has_arising_texts:
        return 0
    if "feedback" in teacher.privileged:
        return teacher.max_privileged_tokens
    return min(teacher.max_privileged_tokens, config.rollout.max_new_tokens)


def longest_teacher_prompt(config: Config) -> int:
    """Return the tokens of the teacher's longest prompt. ``rollout.max_prompt_tokens`` bounds what is known before the
    run; a text that arises in it comes on top."""
    return config.rollout.max_prompt_tokens + longest_run_text(config)


def check_teacher_lengths(config: Config, sizes: ModelSizes | PretrainedConfig) -> None:
    """Refuse (ConfigError) texts that arise in the run and would not fit into the model's positions together with the
    problem and the response. :func:`check_layout` comes first."""
    limit, added = sizes.max_position_embeddings, longest_run_text(config)
    room = limit - config.rollout.max_prompt_tokens - config.rollout.max_new_tokens
    if not added or added <= room:
        return
    advice = f"write at most {room}" if room > 0 else "lower rollout.max_prompt_tokens or rollout.max_new_tokens"
    raise ConfigError(
        f"teacher.max_privileged_tokens={config.teacher.max_privileged_tokens}: the teacher reads up to {added} tokens "
        f"of a privileged text with rollout.max_prompt_tokens={config.rollout.max_prompt_tokens} and "
        f"rollout.max_new_tokens={config.rollout.max_new_tokens}, over max_position_embeddings={limit} of the model: "
        f"{advice}"
    )


def warmup_passes(parallel: ParallelConfig, micro_batches: int) -> list[int]:
    """Return, for each pipeline stage, the forward passes before its first backward pass in Megatron's schedule of one
    minibatch: 1F1B, interleaved where there are virtual stages."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    total = micro_batches * chunks
    if chunks == 1:
        return [min(stages - stage - 1, total) for stage in range(stages)]
    return [min(2 * (stages - stage - 1) + (chunks - 1) * stages, total) for stage in range(stages)]
