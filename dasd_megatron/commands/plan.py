"""``dasd plan``: the memory and traffic of a configuration on each GPU, and the layouts that fit."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from dasd_megatron.arguments import Parser, at_least
from dasd_megatron.config import Config, stage_layers
from dasd_megatron.errors import ConfigError
from dasd_megatron.planning.estimate import Architecture, kv_bytes_per_token, total_parameters
from dasd_megatron.planning.layout import check_layout, check_teacher_lengths, longest_teacher_prompt
from dasd_megatron.planning.plan import GPU_BYTES, Plan, make_plan, model_sizes, plan_config, search_layouts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dasd_megatron.models.sizes import ModelSizes

# A rollout engine may take this part of a GPU's memory.
_ROLLOUT_SHARE = 0.9
# The search tries every way to divide them, one by one.
_MAX_GPUS = 131072


def _parser() -> Parser:
    parser = Parser(prog="dasd plan", description="Memory, traffic and idle time of a configuration, without a GPU.")
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=GPU_BYTES / 1e9,
        metavar="GB",
        help="of one GPU, 10^9 bytes (default: 80)",
    )
    parser.add_argument(
        "--gpus-per-node",
        type=at_least(1, _MAX_GPUS),
        default=8,
        metavar="N",
        help="GPUs that NVLink connects (default: 8)",
    )
    parser.add_argument(
        "--search", action="store_true", help="list the layouts for --gpus that fit, the fastest by estimate first"
    )
    parser.add_argument(
        "--gpus", type=at_least(1, _MAX_GPUS), metavar="N", help="GPUs of the training job, for --search"
    )
    parser.add_argument(
        "--local-layers", action="store_true", help="Megatron's local layers and not Transformer Engine's"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="a directory of your own groups, as for dasd train")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="as for dasd train: model=qwen3_8b batch.groups=64 ..."
    )
    return parser


def plan(arguments: list[str]) -> None:
    """Run ``dasd plan``.

    Raises:
        ConfigError: the configuration cannot be read, or no layout fits.
    """
    options = _parser().parse_intermixed_args(arguments)
    if not 0 < options.gpu_memory < math.inf:
        raise ConfigError(f"--gpu-memory={options.gpu_memory}: must be a number of gigabytes above 0")
    if options.gpus is not None and not options.search:
        raise ConfigError("--gpus belongs to --search; without it the parallel sizes say how many GPUs there are")
    config = plan_config(options.overrides, options.config_dir)
    sizes = model_sizes(config.model)
    transformer_engine = (
        config.backend.kind == "cuda" and config.backend.transformer_impl != "local" and not options.local_layers
    )
    if options.search:
        if options.gpus is None:
            raise ConfigError("--search needs --gpus N, the number of GPUs of the job")
        _print_search(config, sizes, options, transformer_engine)
        return
    check_layout(config.model, config.parallel, config.rollout, sizes)
    check_teacher_lengths(config, sizes)
    arch = Architecture.of(sizes)
    found = make_plan(
        config,
        arch,
        gpus_per_node=options.gpus_per_node,
        transformer_engine=transformer_engine,
        gpu_bytes=1e9 * options.gpu_memory,
    )
    _print_plan(config, arch, found, options)


def gigabytes(value: float) -> str:
    """Return bytes as text in units of 10^9."""
    return f"{value / 1e9:,.2f} GB"


def _warnings(config: Config, gpus_per_node: int) -> list[str]:
    parallel = config.parallel
    found = []
    if parallel.tensor_model_parallel_size > gpus_per_node:
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


def _print_plan(config: Config, arch: Architecture, found: Plan, options: argparse.Namespace) -> None:
    parallel, full = config.parallel, found.fullest
    print(
        f"TP {parallel.tensor_model_parallel_size}, CP {parallel.context_parallel_size}, PP "
        f"{parallel.pipeline_model_parallel_size}, VPP {parallel.virtual_pipeline_model_parallel_size or 1}, DP "
        f"{parallel.data_parallel_size}: {parallel.world_size} GPUs; the fullest is pipeline stage {full.stage}, of "
        f"{stage_layers(parallel, arch.layers)[full.stage]} layers"
    )
    rows = _plan_rows(config, arch, found, options.gpu_memory * 1e9, options.gpus_per_node)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")
    for warning in _warnings(config, options.gpus_per_node):
        print(f"  note: {warning}")


def _plan_rows(
    config: Config, arch: Architecture, found: Plan, limit: float, gpus_per_node: int
) -> list[tuple[str, str]]:
    full, state = found.fullest, found.fullest.state
    chosen, other = ("fused", "materialised") if config.loss.fused_linear else ("materialised", "fused")
    loss = {"fused": found.loss_fused, "materialised": found.loss_materialised}
    optimizer = gigabytes(state.optimizer) + (" sharded over replicas" if config.optimizer.distributed else "")
    verdict = "fits" if full.total <= limit else "DOES NOT FIT"
    traffic = found.traffic
    # A rollout engine on the same GPUs keeps its weights there, and keys and values in what is left.
    tensor = min(config.parallel.tensor_model_parallel_size, gpus_per_node)
    free = _ROLLOUT_SHARE * limit
    weights = total_parameters(arch) * 2 / tensor
    per_token = kv_bytes_per_token(arch, tensor)
    resident = max(0.0, free - full.total - weights) / per_token
    offloaded = max(0.0, free - weights) / per_token
    return [
        ("parameters", f"{total_parameters(arch):,} in all, {state.parameters:,} on this rank"),
        ("weights", f"{gigabytes(state.weights)} {config.precision.params_dtype}"),
        ("gradients", f"{gigabytes(state.gradients)} fp32"),
        ("optimizer state", optimizer),
        ("copies of weights, teacher states", gigabytes(full.snapshots)),
        (
            "activations",
            f"{gigabytes(full.activations)}, recompute {config.precision.recompute}, {found.rows} sequences a "
            "micro-batch",
        ),
        ("longest sequences", _length_text(config)),
        ("logits and loss on the last stage", f"{gigabytes(loss[chosen])} {chosen} ({gigabytes(loss[other])} {other})"),
        ("total, with reserve", f"{gigabytes(full.total)} of {gigabytes(limit)}: {verdict}"),
        ("bubble", f"{found.bubble:.1%} of a stage's time, {found.micro_batches} micro-batches a minibatch"),
        (
            "sent by a rank in a step",
            f"TP {gigabytes(traffic.tensor)}, CP {gigabytes(traffic.context)}, PP "
            f"{gigabytes(traffic.pipeline)}, DP {gigabytes(traffic.data)}",
        ),
        ("weight sync", f"{gigabytes(traffic.weight_sync)} a step"),
        (
            "rollouts on the same GPUs",
            f"{resident:,.0f} tokens of KV beside the training state, {offloaded:,.0f} with it offloaded",
        ),
    ]


def _length_text(config: Config) -> str:
    response, prompt = config.rollout.max_new_tokens, config.rollout.max_prompt_tokens
    text = f"{prompt + response:,} tokens"
    longest = longest_teacher_prompt(config)
    return text if longest == prompt else f"{text}, {longest + response:,} behind the teacher's prompt"


def _print_search(
    config: Config, sizes: ModelSizes | PretrainedConfig, options: argparse.Namespace, transformer_engine: bool
) -> None:
    limit = options.gpu_memory * 1e9
    # An override of recompute fixes it; otherwise every way is tried.
    fixed = any(
        override.lstrip("+").startswith(("precision.recompute=", "precision=")) for override in options.overrides
    )
    search = search_layouts(
        config,
        sizes,
        gpus=options.gpus,
        gpus_per_node=options.gpus_per_node,
        gpu_bytes=limit,
        recomputes=[config.precision.recompute] if fixed else ["none", "selective", "full"],
        transformer_engine=transformer_engine,
    )
    if not search.fitting:
        why = (
            f"the smallest of {search.tried} needs {gigabytes(search.least_bytes)}"
            if search.tried
            else f"all were refused, for {', '.join(search.refused_fields) or 'the number of GPUs'}"
        )
        raise ConfigError(
            f"no layout for {options.gpus} GPUs of {gigabytes(limit)} works: {why}; add GPUs, or shorten the sequences"
        )
    print(
        f"{len(search.fitting)} of {search.tried} layouts fit; by estimated time, which is an order and not a promise:"
    )
    print(f"  {'TP':>3} {'PP':>3} {'VPP':>3} {'DP':>4}  {'recompute':<9}  {'memory':>9}  {'bubble':>6}  relative time")
    fastest = search.fitting[0].plan.seconds
    for changed, found in search.fitting[:10]:
        parallel = changed.parallel
        print(
            f"  {parallel.tensor_model_parallel_size:>3} {parallel.pipeline_model_parallel_size:>3} "
            f"{parallel.virtual_pipeline_model_parallel_size or 1:>3} {parallel.data_parallel_size:>4}  "
            f"{changed.precision.recompute:<9}  {gigabytes(found.fullest.total):>9}  {found.bubble:>6.1%}  "
            f"{found.seconds / fastest:.2f}"
        )
