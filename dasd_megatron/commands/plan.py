"""``dasd plan``: the memory of a configuration on each GPU, the time of a step by a model, and the layouts that fit."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dasd_megatron.arguments import Parser, at_least
from dasd_megatron.commands.plan_text import (
    assumption_lines,
    gigabytes,
    memory_rows,
    search_lines,
    storage_rows,
    time_rows,
)
from dasd_megatron.config import Config, stage_layers, why_scored_first
from dasd_megatron.errors import ConfigError
from dasd_megatron.planning.assumptions import DEVICES, FIGURES, Assumptions, assume
from dasd_megatron.planning.estimate import Architecture
from dasd_megatron.planning.layout import check_layout, check_teacher_lengths
from dasd_megatron.planning.lengths import Lengths, longest_lengths, typical_lengths
from dasd_megatron.planning.plan import Plan, make_plan, model_sizes, plan_config
from dasd_megatron.planning.rollouts import Servers, fewest_server_gpus, rollout_time
from dasd_megatron.planning.search import (
    RECOMPUTES,
    Machines,
    changed_fields,
    nearest_layout,
    search_layouts,
    server_choices,
)
from dasd_megatron.planning.step_time import StepTime, server_time, step_time
from dasd_megatron.planning.storage import storage_of
from dasd_megatron.planning.training_time import TrainingTime, training_time

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dasd_megatron.models.sizes import ModelSizes

# The search tries every way to divide them, one by one.
_MAX_GPUS = 131072


def _parser() -> Parser:
    parser = Parser(
        prog="dasd plan",
        description="Memory, traffic and time of a configuration, without a GPU: calculated and not measured.",
    )
    parser.add_argument(
        "--device", choices=tuple(DEVICES), default="h100", help="whose figures are taken (default: h100)"
    )
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"another figure, in bytes and seconds, as often as needed: {', '.join(FIGURES)}",
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="of one GPU, 10^9 bytes (default: that of the device)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=at_least(1, _MAX_GPUS),
        default=8,
        metavar="N",
        help="GPUs that NVLink connects (default: 8)",
    )
    parser.add_argument(
        "--rollout-nodes",
        type=at_least(0, _MAX_GPUS),
        metavar="N",
        help="nodes of rollout servers; 0: servers and trainer take turns on the same GPUs (default: as many as keep "
        "up with training)",
    )
    parser.add_argument(
        "--server-tp",
        type=at_least(1, _MAX_GPUS),
        metavar="N",
        help="GPUs of one rollout server (default: the number with which rollouts are fastest)",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="list the layouts of training and servers on --gpus that fit, the fastest by the model first",
    )
    parser.add_argument(
        "--gpus", type=at_least(1, _MAX_GPUS), metavar="N", help="GPUs of training and servers together, for --search"
    )
    parser.add_argument(
        "--local-layers", action="store_true", help="Megatron's local layers and not Transformer Engine's"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="a directory of your own groups, as for dasd train")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="as for dasd train: model=qwen3_8b batch.groups=64 ..."
    )
    return parser


@dataclass(frozen=True)
class _Job:
    """All that is planned for: a configuration, its model, and figures of the machines."""

    config: Config
    sizes: ModelSizes | PretrainedConfig
    arch: Architecture
    assumed: Assumptions
    gpus_per_node: int
    transformer_engine: bool


def plan(arguments: list[str]) -> None:
    """Run ``dasd plan``.

    Raises:
        ConfigError: the configuration cannot be read, it does not fit, or no layout does.
    """
    options = _parser().parse_intermixed_args(arguments)
    if options.gpu_memory is not None and not 0 < options.gpu_memory < math.inf:
        raise ConfigError(f"--gpu-memory={options.gpu_memory}: must be a number of gigabytes above 0")
    if options.gpus is not None and not options.search:
        raise ConfigError("--gpus belongs to --search; without it the parallel sizes say how many GPUs there are")
    if options.search and options.gpus is None:
        raise ConfigError("--search needs --gpus N, the number of GPUs of the job")
    assumed = assume(options.device, options.assume)
    if options.gpu_memory is not None:
        assumed = dataclasses.replace(assumed, gpu_memory=options.gpu_memory * 1e9)
    config = plan_config(options.overrides, options.config_dir)
    sizes = model_sizes(config.model)
    on_gpu = config.backend.kind == "cuda"
    transformer_engine = on_gpu and config.backend.transformer_impl != "local" and not options.local_layers
    job = _Job(config, sizes, Architecture.of(sizes), assumed, options.gpus_per_node, transformer_engine)
    if options.search:
        _print_search(job, options)
        return
    check_layout(config.model, config.parallel, config.rollout, sizes)
    check_teacher_lengths(config, sizes)
    _print_plan(job, options)


def _warnings(config: Config, gpus_per_node: int) -> list[str]:
    parallel = config.parallel
    found = []
    scored_first = why_scored_first(config)
    if scored_first is not None:
        found.append(f"the policy scores its rollouts in a pass of its own before the update: {scored_first}")
    if parallel.tensor_model_parallel_size > gpus_per_node:
        found.append("tensor parallelism crosses nodes: its all-reduces then go over the network")
    if config.precision.recompute == "selective" and config.precision.recompute_modules == ["core_attn"]:
        found.append("recompute_modules=[core_attn] saves next to nothing, since attention is fused: mlp does")
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        found.append("parallel.sequence_parallel=false keeps norms and residuals whole on every tensor-parallel rank")
    if parallel.pipeline_model_parallel_size == 2 and parallel.virtual_pipeline_model_parallel_size:
        found.append("PP=2 with VPP: batched point-to-point calls would pair up wrongly; the trainer turns them off")
    if config.rollout.filter is not None or config.rollout.function is not None:
        found.append("rollouts that rollout.filter refuses or rollout.function adds are not in the model's time")
    if config.backend.kind == "cpu":
        found.append("no context parallelism on CPU")
    return found


def _print_plan(job: _Job, options: argparse.Namespace) -> None:
    config, parallel = job.config, job.config.parallel
    found = make_plan(config, job.arch, transformer_engine=job.transformer_engine, gpu_bytes=job.assumed.gpu_memory)
    full, limit = found.fullest, job.assumed.gpu_memory
    print(
        f"TP {parallel.tensor_model_parallel_size}, CP {parallel.context_parallel_size}, PP "
        f"{parallel.pipeline_model_parallel_size}, VPP {parallel.virtual_pipeline_model_parallel_size or 1}, DP "
        f"{parallel.data_parallel_size}: {parallel.world_size} GPUs; the fullest is pipeline stage {full.stage}, of "
        f"{stage_layers(parallel, job.arch.layers)[full.stage]} layers"
    )
    sections = {
        "memory of one GPU, calculated and not measured": memory_rows(
            config, job.arch, found, job.assumed, job.gpus_per_node
        ),
        "disk, calculated and not measured": storage_rows(config, storage_of(job.arch, config)),
    }
    # The rates are those of a GPU, and the embedded server is no engine that batches as the model has it.
    time = None
    if config.backend.kind == "cuda" and config.rollout.engine != "embedded" and config.rollout.replay is None:
        time = _step_time(job, found, options)
        longest = _training_time(job, found, longest_lengths(config)).total
        title = f"time, by a model of {job.assumed.device} GPUs and not measured"
        sections[title] = time_rows(config, time, typical_lengths(config, job.assumed), longest, job.assumed)
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    for title, rows in sections.items():
        print(title)
        for name, text in rows:
            print(f"  {name:<{width}}  {text}")
    if time is not None:
        print("\n".join(assumption_lines(job.assumed)))
    for warning in _warnings(config, job.gpus_per_node):
        print(f"  note: {warning}")
    if full.total > limit:
        raise ConfigError(
            f"pipeline stage {full.stage} needs {gigabytes(full.total)} of each GPU and there are "
            f"{gigabytes(limit)}: {_advice(job)}"
        )
    if time is not None and not time.served.rollouts.tokens:
        raise ConfigError(
            "the rollout servers have no room for a sequence of the greatest length: give them more GPUs by "
            "--server-tp, or nodes of their own by --rollout-nodes"
        )


def _advice(job: _Job) -> str:
    """Name the nearest layout that fits."""
    near = nearest_layout(
        job.config,
        job.sizes,
        job.assumed,
        gpus_per_node=job.gpus_per_node,
        transformer_engine=job.transformer_engine,
    )
    if near is None:
        return "no layout of up to 16 times as many GPUs fits: shorten the sequences"
    config, found = near
    return (
        f"the nearest layout that fits has {config.parallel.world_size} GPUs and {gigabytes(found.fullest.total)} on "
        f"each: {' '.join(changed_fields(job.config, config))}"
    )


def _servers_of(job: _Job, found: Plan, training: float, options: argparse.Namespace) -> Servers:
    """Return the servers that the options and the configuration name, or as many as keep up with ``training`` seconds.
    Of several sizes the one with which rollouts are fastest is taken."""
    config, sglang = job.config, job.config.rollout.sglang
    named, size = len(config.rollout.servers), options.server_tp

    def choose(gpus: int, size: int | None) -> Servers:
        return _fastest(job, found, Machines(config.parallel.world_size + gpus, job.gpus_per_node, gpus, size))

    if config.rollout.engine != "external":
        gpus = sglang.tensor_parallel_size * sglang.data_parallel_size
        return _fastest(job, found, Machines(gpus, job.gpus_per_node, 0, sglang.tensor_parallel_size))
    if options.rollout_nodes is not None:
        return choose(options.rollout_nodes * job.gpus_per_node, size)
    if named > 1:
        size = size or fewest_server_gpus(job.arch, config, job.assumed.gpu_memory, job.gpus_per_node)
        return choose(named * size, size)
    like_training = math.ceil(config.parallel.world_size / job.gpus_per_node)
    if config.rollout.max_staleness:
        for nodes in range(1, like_training):
            servers = choose(nodes * job.gpus_per_node, size)
            if _rollout_seconds(job, servers) <= training:
                return servers
    return choose(like_training * job.gpus_per_node, size)


def _fastest(job: _Job, found: Plan, machines: Machines) -> Servers:
    choices = list(server_choices(job.config, job.arch, found, machines, job.assumed))
    if not choices:
        raise ConfigError(
            f"--server-tp {machines.server_gpus}: write a divisor of the model's {job.arch.heads} heads, at most "
            f"--gpus-per-node {machines.gpus_per_node}"
        )
    return min(choices, key=lambda servers: _rollout_seconds(job, servers))


def _rollout_seconds(job: _Job, servers: Servers) -> float:
    return rollout_time(job.config, job.arch, servers, typical_lengths(job.config, job.assumed), job.assumed).seconds


def _training_time(job: _Job, found: Plan, lengths: Lengths) -> TrainingTime:
    return training_time(job.config, job.arch, found, lengths, job.assumed, gpus_per_node=job.gpus_per_node)


def _step_time(job: _Job, found: Plan, options: argparse.Namespace) -> StepTime:
    lengths = typical_lengths(job.config, job.assumed)
    training = _training_time(job, found, lengths)
    servers = _servers_of(job, found, training.total, options)
    served = server_time(job.config, job.arch, servers, lengths, job.assumed)
    return step_time(job.config, job.arch, training, served, job.assumed)


def _print_search(job: _Job, options: argparse.Namespace) -> None:
    config, limit = job.config, job.assumed.gpu_memory
    # An override of recompute fixes it; otherwise every way is tried.
    fixed = any(
        override.lstrip("+").startswith(("precision.recompute=", "precision=")) for override in options.overrides
    )
    nodes = 0 if config.rollout.engine != "external" else options.rollout_nodes
    rollout_gpus = None if nodes is None else nodes * job.gpus_per_node
    if rollout_gpus is not None and rollout_gpus >= options.gpus:
        raise ConfigError(f"--rollout-nodes {nodes} leaves no GPU of --gpus {options.gpus} for training")
    search = search_layouts(
        config,
        job.sizes,
        Machines(options.gpus, job.gpus_per_node, rollout_gpus, options.server_tp),
        job.assumed,
        recomputes=[config.precision.recompute] if fixed else RECOMPUTES,
        transformer_engine=job.transformer_engine,
    )
    if not search.fitting:
        why = (
            f"the smallest of {search.tried} needs {gigabytes(search.least_bytes)} for training"
            if search.tried
            else f"all were refused, for {', '.join(search.refused_fields) or 'the number of GPUs'}"
        )
        raise ConfigError(
            f"no layout for {options.gpus} GPUs of {gigabytes(limit)} works: {why}; add GPUs, or shorten the sequences"
        )
    print("\n".join(search_lines(search, job.assumed)))
