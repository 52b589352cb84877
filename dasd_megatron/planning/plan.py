"""The configuration that is planned, and the memory that it needs on each GPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dasd_megatron.algorithms.methods import METHODS
from dasd_megatron.backend.blocks import kept_logits_bytes, loss_block_tokens
from dasd_megatron.config import Config, ModelConfig, load_config
from dasd_megatron.models.hf_config import hf_folder, read_hf_config
from dasd_megatron.models.sizes import ModelSizes, read_sizes
from dasd_megatron.planning.assumptions import DEVICES
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
    training_state,
)
from dasd_megatron.planning.layout import longest_teacher_prompt
from dasd_megatron.planning.phases import Phases, StepBytes, step_phases

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
# Without a word on rollouts they come from servers of their own, on other GPUs.
_SERVERS = ("rollout=external", "rollout.servers=[http://127.0.0.1:30000]")
_SERVER_FIELDS = ("rollout=", "rollout.engine=", "rollout.servers=", "rollout.nodes=", "rollout.router=")
GPU_BYTES = DEVICES["h100"].gpu_memory
"""Memory of a GPU where nothing else is said."""
OVERHEAD_BYTES = 4e9
"""Reserve on a GPU for what is not estimated: the CUDA context, NCCL's buffers and the allocator's slack."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one GPU of a pipeline stage. ``copies``: of the weights, a part of ``snapshots``. ``total``: the most at
    once, the peak of ``phases``. These include the reserve."""

    stage: int
    state: State
    copies: float
    snapshots: float
    activations: float
    loss: float
    phases: Phases

    @property
    def total(self) -> float:
        """The most that the trainer needs at once."""
        return self.phases.peak


@dataclass(frozen=True)
class Plan:
    """Bytes on the GPUs of each stage and of the fullest one, and the bytes that a rank sends in a step, all with
    sequences of the greatest length; see :mod:`dasd_megatron.planning.estimate`."""

    stages: list[StageMemory]
    fullest: StageMemory
    loss_materialised: float
    loss_fused: float
    micro_batches: int
    rows: int
    bubble: float
    traffic: Communication


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
    named = any(override.lstrip("+").startswith(_SERVER_FIELDS) for override in overrides)
    return load_config([*_DEFAULTS, *(() if named else _SERVERS), *overrides], config_dir)


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


def make_plan(config: Config, arch: Architecture, *, transformer_engine: bool, gpu_bytes: float = GPU_BYTES) -> Plan:
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
        kept_logits_bytes(config.backend.kind, gpu_bytes) if config.loss.keep_logits else 0.0,
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
        stages.append(
            _stage_memory(config, arch, stage, batches, kept, scoring, loss if stage == pipeline - 1 else 0.0)
        )
    fullest = max(stages, key=lambda memory: memory.total)
    bubble = bubble_fraction(config.parallel, batches.micro_batches)
    traffic = communication(
        arch,
        config,
        batches.sequences * batches.length,
        batches.sequences * batches.teacher_length,
        fullest.state.gradients,
        fullest.state.weights,
    )
    return Plan(stages, fullest, materialised, fused, batches.micro_batches, batches.rows, bubble, traffic)


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


def overhead_bytes(config: Config) -> float:
    """Return the reserve on a device of the trainer."""
    return OVERHEAD_BYTES if config.backend.kind == "cuda" else 0.0


def beside_servers(config: Config, memory: StageMemory) -> float:
    """Return the bytes that the trainer keeps of a GPU while servers on it sample."""
    return memory.total if config.backend.offload == "none" else memory.phases.sampling


def _stage_memory(
    config: Config, arch: Architecture, stage: int, batches: _Batches, update: float, scoring: float, loss: float
) -> StageMemory:
    """Return the memory of a stage whose activations take ``update`` bytes in an update and ``scoring`` in a pass."""
    parallel = config.parallel
    teacher = config.teacher.weights if METHODS[config.algorithm.name].needs_teacher else "live"
    state = training_state(arch, parallel, config.precision, config.optimizer, stage)
    width = DTYPE_BYTES[config.precision.params_dtype]
    # There may be copies of the weights: the starting model, and the teacher's own, an average of them in float32.
    copies = width * (config.loss.kl_coef > 0 or teacher in ("frozen", "trust_region"))
    copies += {"ema": 4, "snapshot": width}.get(teacher, 0)
    snapshots = copies_bytes = float(state.parameters * copies)
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
    needs = StepBytes(state, copies_bytes, snapshots - copies_bytes, scoring, update, loss, overhead_bytes(config))
    return StageMemory(
        stage, state, copies_bytes, snapshots, max(update, scoring), loss, phases=step_phases(config, needs)
    )
