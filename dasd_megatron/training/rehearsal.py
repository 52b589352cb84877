"""Single ranks of a whole cluster in this process: Megatron-Core's model on the meta device, in a fake process group of
the full world, and the division of a step into micro-batches by the functions that train."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from dasd_megatron.config import Config, ParallelConfig
from dasd_megatron.models.convert import meta_chunks
from dasd_megatron.models.gpt import DTYPES
from dasd_megatron.planning.layout import Place
from dasd_megatron.training.batching import BatchLayout, balanced_shares, make_micro_batches

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@contextlib.contextmanager
def as_rank(parallel: ParallelConfig, rank: int) -> Iterator[None]:
    """Set up Megatron's parallel state of ``rank`` in the whole world, in this process alone. Nothing can be sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class RankModel(NamedTuple):
    """Megatron-Core's model of a rank, by model chunk."""

    place: Place
    sizes: list[list[int]]
    """Elements of each parameter."""
    layers: list[list[int]]
    """Numbers of the layers, from 0."""
    has_embedding: bool
    has_head: bool


def build_rank(config: Config, hf_config: PretrainedConfig, rank: int) -> RankModel:
    """Build the model of a rank on the meta device and return what it holds."""
    parallel = config.parallel
    with as_rank(parallel, rank):
        place = Place(
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        _, chunks = meta_chunks(
            hf_config,
            DTYPES[config.precision.params_dtype],
            sequence_parallel=parallel.sequence_parallel,
            # The weights do not depend on it, and local layers refuse it.
            context_parallel_size=1,
            num_layers_in_first_pipeline_stage=parallel.first_pipeline_num_layers,
            num_layers_in_last_pipeline_stage=parallel.last_pipeline_num_layers,
        )
    return RankModel(
        place,
        [[parameter.numel() for parameter in chunk.parameters()] for chunk in chunks],
        [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in chunks],
        bool(chunks[0].pre_process),
        bool(chunks[-1].post_process),
    )


class StepDivision(NamedTuple):
    """The micro-batches of one step."""

    counts: list[int]
    """Micro-batches of each replica, by minibatch."""
    padded: list[int]
    """Tokens of each micro-batch on a rank, padding included."""
    per_replica: list[int]
    """Tokens of each replica in each minibatch, without padding."""


def divide_step(config: Config, prompt: int, lengths: Sequence[int]) -> StepDivision:
    """Cut rollouts with prompts of ``prompt`` tokens and responses of ``lengths`` tokens into the micro-batches of one
    step."""
    share = len(lengths) // config.batch.minibatches
    division = StepDivision([], [], [])
    with as_rank(config.parallel, 0):
        layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
        for start in range(0, len(lengths), share):
            minibatch = lengths[start : start + share]
            shares = balanced_shares([prompt + length for length in minibatch], config.parallel.data_parallel_size)
            responses = [[minibatch[index] for index in members] for members in shares]
            # Every replica takes as many as the one that needs most, which the replicas of a run ask each other.
            count = max(len(_cut(layout, prompt, of_replica, lambda own: own)) for of_replica in responses)
            division.counts.append(count)
            for of_replica in responses:
                division.padded.extend(_cut(layout, prompt, of_replica, _always(count)))
                division.per_replica.append(sum(prompt + length for length in of_replica))
    return division


def _always(count: int) -> Callable[[int], int]:
    """Return the answer of replicas that have agreed on ``count`` micro-batches."""
    return lambda _: count


def _cut(layout: BatchLayout, prompt: int, responses: Sequence[int], same_count: Callable[[int], int]) -> list[int]:
    """Return the tokens of each micro-batch of a replica on a rank."""
    micro_batches = make_micro_batches(
        [[0] * prompt] * len(responses),
        [[0] * length for length in responses],
        dataclasses.replace(layout, same_count=same_count),
    )
    return [micro_batch.tokens.numel() for micro_batch in micro_batches]
