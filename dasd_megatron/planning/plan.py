"""The memory that a configuration needs on each GPU, the time that a step of it takes, and the layouts that fit."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dasd_megatron.algorithms.methods import METHODS
from dasd_megatron.backend.blocks import loss_block_tokens
from dasd_megatron.config import Config, ModelConfig, PrecisionConfig, load_config, stage_layers, validate
from dasd_megatron.errors import ConfigError
from dasd_megatron.models.hf_config import hf_folder, read_hf_config
from dasd_megatron.models.sizes import ModelSizes, read_sizes
from dasd_megatron.planning.estimate import (
    DTYPE_BYTES,
    Architecture,
    Communication,
    State,
    activation_bytes,
    bubble_fraction,
    communication,
    loss_bytes,
    scoring_bytes,
    teacher_share,
    total_parameters,
    training_state,
)
from dasd_megatron.planning.layout import check_layout, longest_teacher_prompt

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The configuration requires some of these fields, which a plan does not read. The others are a GPU job's choices where
# no override says more.
_DEFAULTS = (
    "run.name=plan",
    "run.steps=1",
    "optimizer.lr=1e-6",
    "data.train.generator=chain_sum",
    "data.heldout.generator=chain_sum",
    "data.train.size=1",
    "data.heldout.size=1",
    "evaluation=none",
    "rollout.max_prompt_tokens=1024",
    "rollout.max_new_tokens=8192",
    "model.tiny.max_position_embeddings=9216",
    "backend.kind=cuda",
    "precision=bf16",
    "batch.micro_batch_size=1",
)
GPU_BYTES = 80e9
"""Memory of a GPU where nothing else is said."""
OVERHEAD_BYTES = 4e9
"""Reserve on a GPU for what is not estimated: the CUDA context, NCCL's buffers and the allocator's slack."""
# These only decide the order of layouts: an H100's dense bf16 peak and the share of it that a large model reaches, and
# bytes per second of NVLink and of one network card at the shares that collectives reach.
_FLOPS = 989e12 * 0.45
_NVLINK, _NETWORK = 450e9 * 0.7, 50e9 * 0.7


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one GPU of a pipeline stage. ``total`` includes the reserve."""

    stage: int
    state: State
    snapshots: float
    activations: float
    loss: float
    total: float


@dataclass(frozen=True)
class Plan:
    """Bytes on the GPUs of each stage and of the fullest one, and the cost of a step; see
    :mod:`dasd_megatron.planning.estimate`."""

    stages: list[StageMemory]
    fullest: StageMemory
    loss_materialised: float
    loss_fused: float
    micro_batches: int
    rows: int
    bubble: float
    traffic: Communication
    seconds: float


class _Batches(NamedTuple):
    """Sequences of a replica in a step, tokens of the longest one, and the division into micro-batches. The teacher has
    its own, since its prompts may be longer."""

    sequences: int
    length: int
    rows: int
    micro_batches: int
    teacher_length: int
    teacher_rows: int


def plan_config(overrides: Sequence[str], config_dir: str | None = None) -> Config:
    """Return the configuration that ``overrides`` describe. If no experiment is among them, a GPU job's defaults stand
    for what they leave open."""
    if any(override.startswith("experiment=") for override in overrides):
        return load_config(list(overrides), config_dir, needs_files=False)
    return load_config([*_DEFAULTS, *overrides], config_dir)


def model_config(model: ModelConfig) -> PretrainedConfig:
    """Return the Hugging Face config of ``model.path``, of the preset, or of the tiny model."""
    if model.path is not None:
        return read_hf_config(hf_folder(model.path))
    from transformers import AutoConfig, Qwen3Config

    if model.architecture:
        return AutoConfig.for_model(**model.architecture)
    tiny = dataclasses.asdict(model.tiny)
    return Qwen3Config(num_hidden_layers=tiny.pop("num_layers"), vocab_size=100, tie_word_embeddings=True, **tiny)


def model_sizes(model: ModelConfig) -> ModelSizes | PretrainedConfig:
    """Return the sizes of :func:`model_config`. Those of a preset and of the tiny model are read without
    transformers."""
    sizes = None
    if model.path is None and model.architecture:
        sizes = read_sizes(model.architecture)
    elif model.path is None:
        tiny = dataclasses.asdict(model.tiny)
        tiny |= {"model_type": "qwen3", "num_hidden_layers": tiny.pop("num_layers")}
        sizes = read_sizes({**tiny, "vocab_size": 100, "tie_word_embeddings": True})
    return sizes if sizes is not None else model_config(model)


def make_plan(
    config: Config,
    arch: Architecture,
    *,
    gpus_per_node: int,
    transformer_engine: bool,
    gpu_bytes: float = GPU_BYTES,
) -> Plan:
    """Return the plan of a step with sequences of the greatest length, on GPUs of ``gpu_bytes``, by which the trainer
    chooses the blocks of its loss."""
    batches = _divide_batch(config)
    pipeline = config.parallel.pipeline_model_parallel_size
    share = batches.rows / config.parallel.context_parallel_size
    materialised, fused = loss_bytes(
        arch,
        config.parallel,
        config.precision,
        config.loss,
        share * batches.length,
        share * config.rollout.max_new_tokens,
        config.loss.block_tokens or loss_block_tokens(config.backend.kind, gpu_bytes, config.loss.block_columns),
    )
    loss = fused if config.loss.fused_linear else materialised
    stages = []
    for stage in range(pipeline):
        kept = activation_bytes(
            arch,
            config.parallel,
            config.precision,
            batches.rows * batches.length,
            stage,
            micro_batches=batches.micro_batches,
            transformer_engine=transformer_engine,
        )
        # A forward pass of the teacher alone may need more than an update, where its prompts are much longer.
        scoring = scoring_bytes(
            arch,
            config.parallel,
            config.precision,
            batches.teacher_rows * batches.teacher_length,
            transformer_engine=transformer_engine,
        )
        kept = max(kept, scoring)
        stages.append(_stage_memory(config, arch, stage, batches, kept, loss if stage == pipeline - 1 else 0.0))
    fullest = max(stages, key=lambda memory: memory.total)
    bubble = bubble_fraction(config.parallel, batches.micro_batches)
    traffic = communication(arch, config, batches.sequences * batches.length, fullest.state)
    seconds = _step_seconds(config, arch, batches, bubble, traffic, gpus_per_node)
    return Plan(stages, fullest, materialised, fused, batches.micro_batches, batches.rows, bubble, traffic, seconds)


def _divide_batch(config: Config) -> _Batches:
    batch, rollout = config.batch, config.rollout
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    teacher_length = longest_teacher_prompt(config) + rollout.max_new_tokens
    sequences = batch.groups * batch.samples_per_group // config.parallel.data_parallel_size

    def rows_of(length: int) -> int:
        rows = batch.micro_batch_size
        if batch.micro_batch_tokens is not None:
            rows = max(1, min(rows, batch.micro_batch_tokens // length))
        return min(rows, sequences // batch.minibatches)

    rows = rows_of(length)
    micro_batches = math.ceil(sequences // batch.minibatches / rows)
    return _Batches(sequences, length, rows, micro_batches, teacher_length, rows_of(teacher_length))


def _stage_memory(
    config: Config, arch: Architecture, stage: int, batches: _Batches, activations: float, loss: float
) -> StageMemory:
    parallel = config.parallel
    teacher = config.teacher.weights if METHODS[config.algorithm.name].needs_teacher else "live"
    state = training_state(arch, parallel, config.precision, config.optimizer, stage)
    width = DTYPE_BYTES[config.precision.params_dtype]
    # There may be copies of the weights: the starting model, and the teacher's own, an average of them in float32.
    copies = width * (config.loss.kl_coef > 0 or teacher in ("frozen", "trust_region"))
    copies += {"ema": 4, "snapshot": width}.get(teacher, 0)
    snapshots = float(state.parameters * copies)
    # A mixture of two models has the states and the head of both; of a live teacher later updates need the former head.
    models, tokens = 2 if teacher == "trust_region" else 1, batches.sequences * config.rollout.max_new_tokens
    is_last, top_k = stage == parallel.pipeline_model_parallel_size - 1, config.algorithm.divergence_top_k
    if is_last and (models > 1 or (config.algorithm.is_distributional and top_k is None)):
        changes = teacher == "live" and config.batch.minibatches * config.batch.epochs > 1
        heads = arch.padded_vocab(parallel.tensor_model_parallel_size) * (models if models > 1 else changes)
        snapshots += (models * tokens + heads) * arch.hidden / parallel.tensor_model_parallel_size * width
    if is_last and top_k is not None:
        # Of each entry an id and a log-prob, whole on every rank; while the teacher scores the student's entries, both.
        owners = 2 if config.algorithm.divergence_top_k_of == "student" else 1
        snapshots += owners * tokens * min(top_k, arch.vocab) * 8
    total = state.weights + state.gradients + state.optimizer + snapshots + activations + loss
    total += OVERHEAD_BYTES if config.backend.kind == "cuda" else 0.0
    return StageMemory(stage, state, snapshots, activations, loss, total)


def _step_seconds(
    config: Config, arch: Architecture, batches: _Batches, bubble: float, traffic: Communication, gpus_per_node: int
) -> float:
    """Return the estimated time of a step, which is good for comparing layouts and for nothing else."""
    parallel, epochs = config.parallel, config.batch.epochs
    # Forward passes count two operations a parameter and token, backward passes four.
    forwards = 1 + teacher_share(config) + epochs * (1 + _recomputed_share(config.precision, arch))
    operations = batches.sequences * batches.length * total_parameters(arch) * 2 * (forwards + 2 * epochs)
    # The stage with the most layers sets the pace.
    slowest = max(stage_layers(parallel, arch.layers)) * parallel.pipeline_model_parallel_size / arch.layers
    compute = operations * slowest / parallel.replica_size / _FLOPS
    inside = parallel.tensor_model_parallel_size <= gpus_per_node
    seconds = compute / (1 - bubble) + traffic.tensor / (_NVLINK if inside else _NETWORK)
    tensor_context = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    seconds += traffic.context / (_NVLINK if tensor_context <= gpus_per_node else _NETWORK)
    seconds += traffic.pipeline / _NETWORK
    replicas_inside = tensor_context * parallel.data_parallel_size <= gpus_per_node
    return seconds + traffic.data / (_NVLINK if replicas_inside else _NETWORK)


def _recomputed_share(precision: PrecisionConfig, arch: Architecture) -> float:
    """Return the share of a forward pass that the backward pass does again."""
    if precision.recompute == "full":
        return 1.0
    if precision.recompute == "none" or "mlp" not in precision.recompute_modules:
        return 0.0
    return arch.layers * 3 * arch.hidden * arch.ffn / total_parameters(arch)


class Candidate(NamedTuple):
    """A configuration in a layout that fits, and its plan."""

    config: Config
    plan: Plan


class Search(NamedTuple):
    """The layouts that fit, the fastest by estimate first, and how many were planned."""

    fitting: list[Candidate]
    tried: int
    least_bytes: float
    """Bytes of the fullest GPU in the layout that needs the fewest; infinite if none was planned."""
    refused_fields: list[str]
    """The fields for which layouts were refused, each once."""


def search_layouts(
    config: Config,
    sizes: ModelSizes | PretrainedConfig,
    *,
    gpus: int,
    gpus_per_node: int,
    gpu_bytes: float,
    recomputes: Sequence[str],
    transformer_engine: bool,
) -> Search:
    """Plan ``config`` in every layout of ``gpus`` GPUs with tensor parallelism inside a node and each way to recompute.

    Context parallelism and the layers of the first and last stage stay as they are.
    """
    arch = Architecture.of(sizes)
    fitting, refused_fields = [], []
    tried, least = 0, math.inf
    for changed in _layouts(config, arch, gpus, gpus_per_node, recomputes):
        try:
            validate(changed)
            check_layout(changed.model, changed.parallel, changed.rollout, sizes)
        except ConfigError as error:
            refused_fields.append(str(error).split("=")[0].split(" ")[0])
            continue
        tried += 1
        plan = make_plan(
            changed,
            arch,
            gpus_per_node=gpus_per_node,
            transformer_engine=transformer_engine,
            gpu_bytes=gpu_bytes,
        )
        least = min(least, plan.fullest.total)
        if plan.fullest.total <= gpu_bytes:
            fitting.append(Candidate(changed, plan))
    fitting.sort(key=lambda candidate: candidate.plan.seconds)
    return Search(fitting, tried, least, list(dict.fromkeys(refused_fields)))


def _layouts(
    config: Config, arch: Architecture, gpus: int, gpus_per_node: int, recomputes: Sequence[str]
) -> Iterator[Config]:
    for tensor in _divisors(gpus):
        if tensor > gpus_per_node or arch.kv_heads % tensor or arch.heads % tensor:
            continue
        for pipeline in _divisors(gpus // tensor):
            ranks = tensor * pipeline * config.parallel.context_parallel_size
            if gpus % ranks:
                continue
            yield from _variants(config, tensor, pipeline, gpus // ranks, recomputes)


def _variants(config: Config, tensor: int, pipeline: int, replicas: int, recomputes: Sequence[str]) -> Iterator[Config]:
    """Yield ``config`` in one layout with every number of virtual stages and every way to recompute."""
    for virtual in (None, 2, 4):
        for recompute in recomputes:
            changed = copy.deepcopy(config)
            changed.parallel = dataclasses.replace(
                config.parallel,
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=virtual,
                data_parallel_size=replicas,
                sequence_parallel=tensor > 1,
            )
            changed.precision.recompute = recompute
            yield changed


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
