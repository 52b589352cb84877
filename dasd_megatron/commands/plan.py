"""``dasd plan``: what a configuration needs on each GPU, and which layouts fit."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig, Qwen3Config

from dasd_megatron.config import Config, load_config, stage_layers, validate
from dasd_megatron.errors import ConfigError
from dasd_megatron.models.hf_config import hf_folder, read_hf_config
from dasd_megatron.planning.estimate import (
    DTYPE_BYTES,
    Architecture,
    Communication,
    State,
    activation_bytes,
    bubble_fraction,
    communication,
    kv_bytes_per_token,
    loss_bytes,
    total_parameters,
    training_state,
)
from dasd_megatron.run.checks import check_layout, needs_teacher

# What a plan does not read, but the configuration requires; and a GPU job's choices for what an override leaves open.
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
# Not measured here: CUDA context, NCCL's buffers, allocator slack. What a rollout engine may take of a GPU.
OVERHEAD_BYTES = 4e9
_ROLLOUT_SHARE = 0.9
# For the order of layouts alone: an H100's dense bf16 peak and the share of it that a large model reaches; bytes per
# second of NVLink and of one network card, at the shares that collectives reach.
_FLOPS = 989e12 * 0.45
_NVLINK, _NETWORK = 450e9 * 0.7, 50e9 * 0.7


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one GPU of a pipeline stage; ``total`` has the reserve too."""

    stage: int
    state: State
    snapshots: float
    activations: float
    loss: float
    total: float


@dataclass(frozen=True)
class Plan:
    """Bytes on the GPUs of each stage, and of the fullest one, and what a step costs; see
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


def plan_config(overrides: list[str], config_dir: str | None = None) -> Config:
    """The configuration that ``overrides`` describe. With no experiment among them, a GPU job's defaults stand for what
    they leave open."""
    if any(override.startswith("experiment=") for override in overrides):
        return load_config(overrides, config_dir, needs_files=False)
    return load_config([*_DEFAULTS, *overrides], config_dir)


def model_of(config: Config) -> PretrainedConfig:
    """The Hugging Face config of ``model.path``, of the preset, or of the tiny model."""
    if config.model.path is not None:
        return read_hf_config(hf_folder(config.model.path))
    if config.model.architecture:
        return AutoConfig.for_model(**config.model.architecture)
    tiny = dataclasses.asdict(config.model.tiny)
    return Qwen3Config(num_hidden_layers=tiny.pop("num_layers"), vocab_size=100, tie_word_embeddings=True, **tiny)


def make_plan(config: Config, arch: Architecture, *, gpus_per_node: int, transformer_engine: bool) -> Plan:
    """The plan of the pipeline stage that needs most memory."""
    parallel, batch, rollout = config.parallel, config.batch, config.rollout
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    rows = batch.micro_batch_size
    if batch.micro_batch_tokens is not None:
        rows = max(1, min(rows, batch.micro_batch_tokens // length))
    sequences = batch.groups * batch.samples_per_group // parallel.data_parallel_size
    rows = min(rows, sequences // batch.minibatches)
    micro_batches = math.ceil(sequences // batch.minibatches / rows)
    tokens = rows * length
    pipeline = parallel.pipeline_model_parallel_size
    share = rows / parallel.context_parallel_size
    materialised, fused = loss_bytes(arch, config, share * length, share * rollout.max_new_tokens)
    stages = []
    for stage in range(pipeline):
        state = training_state(arch, config, stage)
        width = DTYPE_BYTES[config.precision.params_dtype]
        # Copies of the weights: the starting model, or the averaged teacher in float32.
        copies = width * (config.loss.kl_coef > 0 or (needs_teacher(config) and config.teacher.weights == "frozen"))
        copies += 4 * (needs_teacher(config) and config.teacher.weights == "ema")
        snapshots = float(state.parameters * copies)
        if config.algorithm.objective == "distributional" and stage == pipeline - 1:
            snapshots += sequences * rollout.max_new_tokens * arch.hidden / parallel.tensor_model_parallel_size * width
        kept = activation_bytes(
            arch, config, tokens, stage, micro_batches=micro_batches, transformer_engine=transformer_engine
        )
        loss = 0.0 if stage < pipeline - 1 else fused if config.loss.fused_linear else materialised
        total = state.weights + state.gradients + state.optimizer + snapshots + kept + loss
        total += OVERHEAD_BYTES if config.backend.kind == "cuda" else 0.0
        stages.append(StageMemory(stage, state, snapshots, kept, loss, total))
    fullest = max(stages, key=lambda one: one.total)
    state = fullest.state
    bubble = bubble_fraction(config, micro_batches)
    traffic = communication(arch, config, sequences * length, state)
    # Forward passes count two operations a parameter and token, backward passes four.
    forwards = 2 + batch.epochs * (1 + _recomputed_share(config, arch))
    operations = sequences * length * total_parameters(arch) * 2 * (forwards + 2 * batch.epochs)
    # The stage with the most layers sets the pace.
    slowest = max(stage_layers(parallel, arch.layers)) * pipeline / arch.layers
    compute = operations * slowest / parallel.replica_size / _FLOPS
    inside = parallel.tensor_model_parallel_size <= gpus_per_node
    seconds = compute / (1 - bubble) + traffic.tensor / (_NVLINK if inside else _NETWORK)
    tensor_context = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    seconds += traffic.context / (_NVLINK if tensor_context <= gpus_per_node else _NETWORK)
    seconds += traffic.pipeline / _NETWORK
    replicas_inside = tensor_context * parallel.data_parallel_size <= gpus_per_node
    seconds += traffic.data / (_NVLINK if replicas_inside else _NETWORK)
    return Plan(stages, fullest, materialised, fused, micro_batches, rows, bubble, traffic, seconds)


def _recomputed_share(config: Config, arch: Architecture) -> float:
    """Share of a forward pass that the backward pass does again."""
    if config.precision.recompute == "full":
        return 1.0
    if config.precision.recompute == "none" or "mlp" not in config.precision.recompute_modules:
        return 0.0
    return arch.layers * 3 * arch.hidden * arch.ffn / total_parameters(arch)


def plan(arguments: list[str]) -> None:
    """Run ``dasd plan``.

    Raises:
        ConfigError: the configuration cannot be read, or no layout fits.
    """
    parser = argparse.ArgumentParser(
        prog="dasd plan", description="Memory, traffic and idle time of a configuration, without a GPU."
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GB", help="of one GPU, 10^9 bytes (default: 80)"
    )
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="GPUs that NVLink connects (default: 8)"
    )
    parser.add_argument(
        "--search", action="store_true", help="list the layouts for --gpus that fit, the fastest by estimate first"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of the training job, for --search")
    parser.add_argument(
        "--local-layers", action="store_true", help="Megatron's local layers and not Transformer Engine's"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="a directory of your own groups, as for dasd train")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="as for dasd train: model=qwen3_8b batch.groups=64 ..."
    )
    options = parser.parse_intermixed_args(arguments)
    if options.gpus_per_node < 1 or not options.gpu_memory > 0:
        raise ConfigError("--gpus-per-node and --gpu-memory must be above 0")
    if options.gpus is not None and not options.search:
        raise ConfigError("--gpus belongs to --search; without it the parallel sizes say how many GPUs there are")
    config = plan_config(options.overrides, options.config_dir)
    hf_config = model_of(config)
    arch = Architecture.of(hf_config)
    transformer_engine = (
        config.backend.kind == "cuda" and config.backend.transformer_impl != "local" and not options.local_layers
    )
    if not options.search:
        check_layout(config, hf_config)
        _print(
            config,
            arch,
            make_plan(config, arch, gpus_per_node=options.gpus_per_node, transformer_engine=transformer_engine),
            options,
        )
        return
    if options.gpus is None or options.gpus < 1:
        raise ConfigError("--search needs --gpus N, the number of GPUs of the job")
    _search(config, hf_config, options, transformer_engine)


def gigabytes(value: float) -> str:
    return f"{value / 1e9:,.2f} GB"


def _warnings(config: Config, options: argparse.Namespace) -> list[str]:
    parallel = config.parallel
    found = []
    if parallel.tensor_model_parallel_size > options.gpus_per_node:
        found.append("tensor parallelism crosses nodes: its all-reduces then go over the network")
    if config.precision.recompute == "selective" and config.precision.recompute_modules == ["core_attn"]:
        found.append("recompute_modules=[core_attn] saves next to nothing, since attention is fused: mlp does")
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        found.append("parallel.sequence_parallel=false keeps norms and residuals whole on every tensor-parallel rank")
    if parallel.pipeline_model_parallel_size == 2 and parallel.virtual_pipeline_model_parallel_size:
        found.append("PP=2 with VPP: batched point-to-point calls would pair up wrongly; the trainer turns them off")
    if config.backend.kind == "cpu":
        found.append("no context parallelism on CPU")
    return found


def _print(config: Config, arch: Architecture, found: Plan, options: argparse.Namespace) -> None:
    parallel, state = config.parallel, found.fullest.state
    limit = options.gpu_memory * 1e9
    free = _ROLLOUT_SHARE * limit
    tensor = min(parallel.tensor_model_parallel_size, options.gpus_per_node)
    weights = total_parameters(arch) * 2 / tensor
    per_token = kv_bytes_per_token(arch, tensor)
    resident = max(0.0, free - found.fullest.total - weights) / per_token
    offloaded = max(0.0, free - weights) / per_token
    full = found.fullest
    chosen, other = ("fused", "materialised") if config.loss.fused_linear else ("materialised", "fused")
    loss = {"fused": found.loss_fused, "materialised": found.loss_materialised}
    rows = [
        ("parameters", f"{total_parameters(arch):,} in all, {state.parameters:,} on this rank"),
        ("weights", f"{gigabytes(state.weights)} {config.precision.params_dtype}"),
        ("gradients", f"{gigabytes(state.gradients)} fp32"),
        (
            "optimizer state",
            gigabytes(state.optimizer) + (" sharded over replicas" if config.optimizer.distributed else ""),
        ),
        ("copies of weights, teacher states", gigabytes(full.snapshots)),
        (
            "activations",
            f"{gigabytes(full.activations)}, recompute {config.precision.recompute}, {found.rows} sequences a "
            "micro-batch",
        ),
        ("logits and loss on the last stage", f"{gigabytes(loss[chosen])} {chosen} ({gigabytes(loss[other])} {other})"),
        (
            "total, with reserve",
            f"{gigabytes(full.total)} of {gigabytes(limit)}: {'fits' if full.total <= limit else 'DOES NOT FIT'}",
        ),
        ("bubble", f"{found.bubble:.1%} of a stage's time, {found.micro_batches} micro-batches a minibatch"),
        (
            "sent by a rank in a step",
            f"TP {gigabytes(found.traffic.tensor)}, CP {gigabytes(found.traffic.context)}, PP "
            f"{gigabytes(found.traffic.pipeline)}, DP {gigabytes(found.traffic.data)}",
        ),
        ("weight sync", f"{gigabytes(found.traffic.weight_sync)} a step"),
        (
            "rollouts on the same GPUs",
            f"{resident:,.0f} tokens of KV beside the training state, {offloaded:,.0f} with it offloaded",
        ),
    ]
    print(
        f"TP {parallel.tensor_model_parallel_size}, CP {parallel.context_parallel_size}, PP "
        f"{parallel.pipeline_model_parallel_size}, VPP {parallel.virtual_pipeline_model_parallel_size or 1}, DP "
        f"{parallel.data_parallel_size}: {parallel.world_size} GPUs; the fullest is pipeline stage {full.stage}, of "
        f"{stage_layers(parallel, arch.layers)[full.stage]} layers"
    )
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")
    for warning in _warnings(config, options):
        print(f"  note: {warning}")


def _search(config: Config, hf_config: PretrainedConfig, options: argparse.Namespace, transformer_engine: bool) -> None:
    arch = Architecture.of(hf_config)
    limit, fitting, tried, least = options.gpu_memory * 1e9, [], 0, math.inf
    reasons: dict[str, int] = {}
    for changed in _layouts(config, arch, options):
        try:
            validate(changed)
            check_layout(changed, hf_config)
        except ConfigError as error:
            field = str(error).split("=")[0].split(" ")[0]
            reasons[field] = reasons.get(field, 0) + 1
            continue
        tried += 1
        found = make_plan(changed, arch, gpus_per_node=options.gpus_per_node, transformer_engine=transformer_engine)
        least = min(least, found.fullest.total)
        if found.fullest.total <= limit:
            fitting.append((found.seconds, changed, found))
    if not fitting:
        why = (
            f"the smallest of {tried} needs {gigabytes(least)}"
            if tried
            else f"all were refused, for {', '.join(reasons) or 'the number of GPUs'}"
        )
        raise ConfigError(
            f"no layout for {options.gpus} GPUs of {gigabytes(limit)} works: {why}; add GPUs, or shorten the sequences"
        )
    fitting.sort(key=lambda entry: entry[0])
    print(f"{len(fitting)} of {tried} layouts fit; by estimated time, which is an order and not a promise:")
    print(f"  {'TP':>3} {'PP':>3} {'VPP':>3} {'DP':>4}  {'recompute':<9}  {'memory':>9}  {'bubble':>6}  relative time")
    for seconds, changed, found in fitting[:10]:
        parallel = changed.parallel
        print(
            f"  {parallel.tensor_model_parallel_size:>3} {parallel.pipeline_model_parallel_size:>3} "
            f"{parallel.virtual_pipeline_model_parallel_size or 1:>3} {parallel.data_parallel_size:>4}  "
            f"{changed.precision.recompute:<9}  {gigabytes(found.fullest.total):>9}  {found.bubble:>6.1%}  "
            f"{seconds / fitting[0][0]:.2f}"
        )


def _layouts(config: Config, arch: Architecture, options: argparse.Namespace) -> Iterator[Config]:
    """``config`` in every layout of ``--gpus`` GPUs with tensor parallelism inside a node; recompute stays if an
    override names it, and context parallelism and the first and last stages' layers as they are given."""
    fixed = any(
        override.lstrip("+").startswith(("precision.recompute=", "precision=")) for override in options.overrides
    )
    recomputes = [config.precision.recompute] if fixed else ["none", "selective", "full"]
    for tensor in _divisors(options.gpus):
        if tensor > options.gpus_per_node or arch.kv_heads % tensor or arch.heads % tensor:
            continue
        for pipeline in _divisors(options.gpus // tensor):
            ranks = tensor * pipeline * config.parallel.context_parallel_size
            if options.gpus % ranks:
                continue
            for virtual in (None, 2, 4):
                for recompute in recomputes:
                    changed = copy.deepcopy(config)
                    changed.parallel = dataclasses.replace(
                        config.parallel,
                        tensor_model_parallel_size=tensor,
                        pipeline_model_parallel_size=pipeline,
                        virtual_pipeline_model_parallel_size=virtual,
                        data_parallel_size=options.gpus // ranks,
                        sequence_parallel=tensor > 1,
                    )
                    changed.precision.recompute = recompute
                    yield changed


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
