"""``dasd train --dry-run``: what a run on a whole cluster would be, worked out on one machine, without data, GPUs or
servers.

The configuration is checked as for a run. Megatron-Core builds the model of some ranks on the meta device, in a fake
process group of the full world, so the layout printed is its own; rollouts of made-up lengths are cut into
micro-batches by the functions that train.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import random
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dasd_megatron import backend
from dasd_megatron.access import VARIABLE
from dasd_megatron.commands.plan import gigabytes
from dasd_megatron.config import BackendConfig, Config, ParallelConfig, is_loopback, load_config
from dasd_megatron.errors import ConfigError
from dasd_megatron.planning.estimate import (
    DTYPE_BYTES,
    Architecture,
    bubble_fraction,
    chunk_parameters,
    total_parameters,
)
from dasd_megatron.planning.layout import Place, check_layout, place_of, warmup_passes
from dasd_megatron.planning.plan import Plan, make_plan, model_config
from dasd_megatron.rollout.discovery import DiscoveryError, expand_host_list, node_servers
from dasd_megatron.rollout.local_server import sglang_command
from dasd_megatron.rollout.sglang_router import router_command

if TYPE_CHECKING:
    from transformers import PretrainedConfig

RENDEZVOUS_PORT = 29500
# Of made-up rollouts: prompts of so much of the longest; responses with a median of so much of the longest, and a
# log-normal's spread.
PROMPT_SHARE, MEDIAN_SHARE, SIGMA = 1 / 4, 1 / 4, 0.8
# Of a GPU's memory, for a server's weights; the rest is for keys and values, activations and graphs.
SERVER_WEIGHTS_SHARE = 0.6


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dasd train --dry-run",
        description="Check a run and print its layout, schedule, memory and commands; nothing is started.",
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="nodes that train (default: as few as the processes need)"
    )
    parser.add_argument("--hosts", metavar="A,B,...", help="their names (default: node0,node1,...)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="GPUs, or processes, on each node (default: 8)"
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GB",
        help="of one GPU, 10^9 bytes (default: 80; backend.kind=cpu: no limit)",
    )
    parser.add_argument(
        "--server-tp",
        type=int,
        metavar="N",
        help="GPUs of one SGLang server (default: as few as hold the weights well)",
    )
    parser.add_argument(
        "--response-tokens",
        metavar="N,N,...",
        help=f"lengths of responses, in turn (default: log-normal, the median {MEDIAN_SHARE:g} of "
        "rollout.max_new_tokens)",
    )
    parser.add_argument("--config-dir", metavar="DIR", help="a directory of your own groups, as for dasd train")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="as for dasd train")
    return parser


def dry_run(arguments: list[str]) -> None:
    """Run ``dasd train --dry-run``.

    Raises:
        ConfigError: the run could not be started, its layout does not fit the nodes, or its memory does not fit a GPU.
    """
    options = _parser().parse_intermixed_args(arguments)
    for name in ("nodes", "gpus_per_node", "gpu_memory", "server_tp"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: must be above 0")
    config = load_config(options.overrides, options.config_dir, needs_files=False)
    lengths = _response_lengths(config, options.response_tokens)
    hf_config = _model(config)
    check_layout(config, hf_config)
    hosts = _hosts(config.parallel, options)
    arch = Architecture.of(hf_config)
    on_gpu = config.backend.kind == "cuda"
    transformer_engine = on_gpu and config.backend.transformer_impl != "local"
    plan = make_plan(config, arch, gpus_per_node=options.gpus_per_node, transformer_engine=transformer_engine)
    limit = 1e9 * (options.gpu_memory or (80.0 if on_gpu else math.inf))
    _check_memory(plan, limit)
    commands = _commands(config, options, hosts, arch, limit)
    # For a GPU run too: on the meta device there is nothing to compute. Megatron-Core is imported after this.
    backend.select(BackendConfig(kind="cpu"))
    warnings.filterwarnings("ignore", module="megatron")
    print("dry run: nothing is started, and neither data nor GPUs nor servers are asked for")
    _print_settings(config, arch)
    _print_layout(config.parallel, hosts, options.gpus_per_node)
    _print_memory(config, plan, limit)
    _print_ranks(config, hf_config, arch)
    _print_micro_batches(config, lengths, given=options.response_tokens is not None)
    for title, lines in commands.items():
        _section(title, lines)


def _section(title: str, lines: Sequence[str]) -> None:
    print(f"\n{title}")
    for line in lines:
        print(f"  {line}")


# ---- Checks
# -------------------------------------------------------------------------------------------------------------------


def _model(config: Config) -> PretrainedConfig:
    path = config.model.path
    if path is None or Path(path).exists():
        return model_config(config)
    if not config.model.architecture:
        raise ConfigError(
            f"model.path={path} is not on this machine: choose the preset of that model too, like model=qwen2.5_7b"
        )
    return model_config(dataclasses.replace(config, model=dataclasses.replace(config.model, path=None)))


def _hosts(parallel: ParallelConfig, options: argparse.Namespace) -> list[str]:
    world = parallel.world_size
    nodes = options.nodes or (
        len(options.hosts.split(",")) if options.hosts else math.ceil(world / options.gpus_per_node)
    )
    if nodes * options.gpus_per_node < world:
        raise ConfigError(
            f"parallel: TP x CP x PP x DP = {world} processes, and {nodes} nodes of {options.gpus_per_node} hold "
            f"{nodes * options.gpus_per_node}: lower the parallel sizes, or give more nodes"
        )
    if world % nodes:
        raise ConfigError(
            f"parallel: TP x CP x PP x DP = {world} processes do not divide into {nodes} nodes: choose another number"
        )
    hosts = options.hosts.split(",") if options.hosts else [f"node{index}" for index in range(nodes)]
    if len(hosts) != nodes or len(set(hosts)) != nodes:
        raise ConfigError(f"--hosts names {len(set(hosts))} nodes, and {nodes} train: name each once")
    return hosts


def _response_lengths(config: Config, text: str | None) -> list[int]:
    """Tokens of each response of one step."""
    count, longest = config.batch.groups * config.batch.samples_per_group, config.rollout.max_new_tokens
    if text is not None:
        try:
            given = [int(part) for part in text.split(",")]
        except ValueError as error:
            raise ConfigError(f"--response-tokens {text}: write numbers like 800,1500,4000") from error
        if not all(0 < length <= longest for length in given):
            raise ConfigError(f"--response-tokens {text}: each must be between 1 and rollout.max_new_tokens={longest}")
        return list(itertools.islice(itertools.cycle(given), count))
    draw = random.Random(config.run.seed)
    return [max(1, min(longest, round(MEDIAN_SHARE * longest * draw.lognormvariate(0, SIGMA)))) for _ in range(count)]


def _check_memory(plan: Plan, limit: float) -> None:
    full = plan.fullest
    if full.total > limit:
        raise ConfigError(
            f"pipeline stage {full.stage} needs {gigabytes(full.total)} of each GPU and there are {gigabytes(limit)}: "
            "raise the parallel sizes, write precision.recompute=full, or shorten the sequences (dasd plan --search "
            "lists layouts that fit)"
        )


# ---- What the run is
# ----------------------------------------------------------------------------------------------------------


def _print_settings(config: Config, arch: Architecture) -> None:
    batch, rollout, precision = config.batch, config.rollout, config.precision
    _section(
        "run",
        [
            f"{config.run.name}: {config.run.steps} steps of {batch.groups} prompts x {batch.samples_per_group} "
            f"rollouts, {batch.minibatches} minibatches x {batch.epochs} epochs",
            f"{config.algorithm.name}, {config.algorithm.objective} objective, teacher {config.teacher.weights}",
            f"{total_parameters(arch):,} parameters in {arch.layers} layers, {precision.params_dtype}, recompute "
            f"{precision.recompute}, {config.backend.kind}",
            f"prompts up to {rollout.max_prompt_tokens:,} and responses up to {rollout.max_new_tokens:,} tokens; "
            f"rollouts from rollout.engine={rollout.engine}, weights by {rollout.weight_sync}, at most "
            f"{rollout.max_staleness} steps old",
        ],
    )


def _ranges(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)}-{max(numbers)}"


def _print_layout(parallel: ParallelConfig, hosts: list[str], gpus_per_node: int) -> None:
    each = parallel.world_size // len(hosts)
    lines = [
        f"TP {parallel.tensor_model_parallel_size}, CP {parallel.context_parallel_size}, PP "
        f"{parallel.pipeline_model_parallel_size}, VPP {parallel.virtual_pipeline_model_parallel_size or 1}, DP "
        f"{parallel.data_parallel_size}: {parallel.world_size} processes on {len(hosts)} nodes, {each} each"
    ]
    width = max(map(len, hosts))
    for index, host in enumerate(hosts):
        ranks = range(index * each, (index + 1) * each)
        # Ranks that differ in their place among tensor-parallel ones alone are told together.
        for _, group in itertools.groupby(
            ranks, key=lambda rank: dataclasses.replace(place_of(parallel, rank), tensor=0)
        ):
            members = list(group)
            places = [place_of(parallel, rank) for rank in members]
            first = places[0]
            lines.append(
                f"{host:<{width}}  rank {_ranges(members):<9} PP {first.pipeline}  DP {first.data}  CP "
                f"{first.context}  TP {_ranges([one.tensor for one in places])}"
            )
    if len(hosts) > 1 and each < gpus_per_node:
        lines.append(
            f"note: {gpus_per_node - each} of {gpus_per_node} GPUs of each node are idle: raise "
            "parallel.data_parallel_size, or take fewer nodes"
        )
    _section("layout", lines)


def _print_memory(config: Config, plan: Plan, limit: float) -> None:
    columns = ("weights", "gradients", "optimizer", "copies", "activations", "loss", "total")
    lines = ["stage" + "".join(f"{name:>13}" for name in columns)]
    for one in plan.stages:
        parts = (
            one.state.weights,
            one.state.gradients,
            one.state.optimizer,
            one.snapshots,
            one.activations,
            one.loss,
            one.total,
        )
        lines.append(f"{one.stage:<5}" + "".join(f"{gigabytes(part):>13}" for part in parts))
    room = f" of {gigabytes(limit)}" if math.isfinite(limit) else ""
    lines.append(
        f"stage {plan.fullest.stage} is the fullest, {gigabytes(plan.fullest.total)}{room} with sequences of the "
        "greatest length"
    )
    _section("memory of one rank, as dasd plan estimates it", lines)


# ---- In a fake process group of the full world
# -------------------------------------------------------------------------------


@contextlib.contextmanager
def as_rank(config: Config, rank: int) -> Iterator[None]:
    """Megatron's parallel state of ``rank`` in the whole world, in this process alone; nothing can be sent."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parallel = config.parallel
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


def _print_ranks(config: Config, hf_config: PretrainedConfig, arch: Architecture) -> None:
    """Megatron's model of the first, a middle and the last rank, against the plan."""
    from megatron.core import parallel_state

    from dasd_megatron.models.convert import meta_chunks
    from dasd_megatron.models.gpt import DTYPES

    parallel, lines = config.parallel, []
    for rank in sorted({0, parallel.world_size // 2, parallel.world_size - 1}):
        with as_rank(config, rank):
            found = Place(
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
        sizes = [[parameter.numel() for parameter in chunk.parameters()] for chunk in chunks]
        planned = [[size for size, _ in chunk] for chunk in chunk_parameters(arch, config, found.pipeline)]
        # Both are this package's or Megatron's to get right, not the user's.
        assert found == place_of(parallel, rank), (found, rank)
        assert sizes == planned, f"rank {rank}: the plan has other parameters than Megatron's model"
        layers = [_ranges([layer.layer_number - 1 for layer in chunk.decoder.layers]) for chunk in chunks]
        ends = (["embedding"] if chunks[0].pre_process else []) + (["head"] if chunks[-1].post_process else [])
        lines.append(
            f"rank {rank:<4} PP {found.pipeline}  DP {found.data}  CP {found.context}  TP {found.tensor}: layers "
            f"{' and '.join(layers)}{''.join(f', {end}' for end in ends)}; {sum(map(sum, sizes)):,} parameters in "
            f"{sum(map(len, sizes))} tensors, as planned"
        )
    _section("Megatron-Core's model of some ranks, on the meta device", lines)


def _print_micro_batches(config: Config, lengths: list[int], *, given: bool) -> None:
    from dasd_megatron.training.batching import BatchLayout, balanced_shares, make_micro_batches

    batch, replicas = config.batch, config.parallel.data_parallel_size
    prompt = max(1, round(PROMPT_SHARE * config.rollout.max_prompt_tokens))
    share = len(lengths) // batch.minibatches
    counts, padded, per_replica = [], [], []
    with as_rank(config, 0):
        layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
        for start in range(0, len(lengths), share):
            minibatch = lengths[start : start + share]
            shares = balanced_shares([prompt + length for length in minibatch], replicas)

            def cut(members: list[int], same_count: Callable[[int], int], of: list[int] = minibatch) -> list[int]:
                """Tokens of each micro-batch of a replica."""
                responses = [[0] * of[index] for index in members]
                made = make_micro_batches(
                    [[0] * prompt] * len(members), responses, dataclasses.replace(layout, same_count=same_count)
                )
                return [one.tokens.numel() for one in made]

            # Every replica takes as many as the one that needs most, which the replicas of a run ask each other.
            counts.append(max(len(cut(members, lambda count: count)) for members in shares))
            padded += [tokens for members in shares for tokens in cut(members, lambda _: counts[-1])]
            per_replica += [sum(prompt + minibatch[index] for index in members) for members in shares]
    # A rank holds its part of each sequence; the last token of a sequence predicts nothing and is no input.
    inputs = (sum(lengths) + len(lengths) * (prompt - 1)) / config.parallel.context_parallel_size
    least = min(counts)
    lines = [
        f"{len(lengths)} rollouts, prompts of {prompt:,} tokens, responses of {min(lengths):,} to {max(lengths):,}, "
        f"median {statistics.median(lengths):,.0f}: {'as given' if given else 'made up'}",
        f"{_ranges(counts)} micro-batches for each of {replicas} replicas in each of {batch.minibatches} minibatches, "
        f"of {min(padded):,} to {max(padded):,} tokens on a rank; {1 - inputs / sum(padded):.1%} are padding",
        f"tokens of a replica's minibatch: {min(per_replica):,} to {max(per_replica):,}",
        *_schedule(config.parallel, least),
        f"a pipeline stage waits {bubble_fraction(config, least):.1%} of its time",
    ]
    _section("micro-batches of one step, and their schedule", lines)


def _schedule(parallel: ParallelConfig, micro_batches: int) -> list[str]:
    """Megatron's schedule of one minibatch: forward passes before the first backward pass, by stage."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if stages == 1:
        return ["one stage: forward and backward pass of each micro-batch in turn"]
    name = "1F1B" if chunks == 1 else f"interleaved 1F1B over {chunks} chunks"
    warmup = warmup_passes(parallel, micro_batches)
    each = ", ".join(f"stage {stage} {first}" for stage, first in enumerate(warmup))
    return [
        f"{name}, {micro_batches * chunks} forward and backward passes of a chunk on each stage; forward passes before the first "
        f"backward: {each}"
    ]


# ---- Commands
# -----------------------------------------------------------------------------------------------------------------


def _commands(
    config: Config, options: argparse.Namespace, hosts: list[str], arch: Architecture, limit: float
) -> dict[str, list[str]]:
    rollout, model = config.rollout, config.model.path or "MODEL"
    commands: dict[str, list[str]] = {}
    if rollout.replay is not None:
        commands["rollouts"] = [f"from {rollout.replay}"]
    elif rollout.engine == "external":
        tensor = options.server_tp or _server_gpus(config, arch, options, limit)
        servers = _servers(config)
        commands |= _server_commands(config, options, servers, model, tensor)
        if rollout.router:
            commands["router, on its node"] = _router_lines(rollout.router, servers)
    elif rollout.engine == "sglang":
        command = sglang_command(rollout, "RUN/weights/step_000000", rollout.port or 30000)
        commands["rollout server, started by dasd train on the first node"] = [shlex.join(command)]
    else:
        commands["rollout server, started by dasd train"] = ["the embedded one"]
    overrides = list(options.overrides)
    if options.config_dir:
        overrides = ["--config-dir", options.config_dir, *overrides]
    given = {override.lstrip("+").split("=")[0] for override in overrides}
    for name, value in {"model.path": model, "run.dir": f"runs/{config.run.name}/1", "resume": "auto"}.items():
        if name not in given and not (name == "model.path" and not config.model.architecture):
            overrides.append(f"{name}={value}")
    for name in ("train", "heldout"):
        source = getattr(config.data, name)
        if source.path == f"{name}.jsonl" and f"data.{name}.path" not in given:
            overrides.append(f"data.{name}.path={source.path}")
    train, lines = f"dasd train {shlex.join(overrides)}", []
    for index, host in enumerate(hosts):
        variables = [
            f"PET_NNODES={len(hosts)}",
            f"PET_NODE_RANK={index}",
            f"PET_RDZV_ENDPOINT={hosts[0]}:{RENDEZVOUS_PORT}",
        ]
        variables.append(f"PET_RDZV_ID={config.run.name}")
        lines.append(f"{host}: {' '.join(variables)} {train}" if len(hosts) > 1 else train)
    commands[f"training, {config.parallel.world_size // len(hosts)} processes from one command on each node"] = lines
    if rollout.engine == "external":
        commands["key"] = [f"the same {VARIABLE} in the environment of all of these, for servers that others can reach"]
    return commands


def _server_gpus(config: Config, arch: Architecture, options: argparse.Namespace, limit: float) -> int:
    """GPUs of one server, a power of two, whose weights leave room."""
    if not math.isfinite(limit):
        return config.rollout.sglang.tensor_parallel_size
    width = 1 if config.rollout.sglang.quantization == "fp8" else DTYPE_BYTES[config.precision.params_dtype]
    tensor = config.rollout.sglang.tensor_parallel_size
    while total_parameters(arch) * width / tensor > SERVER_WEIGHTS_SHARE * limit and tensor < options.gpus_per_node:
        tensor *= 2
    return tensor


def _servers(config: Config) -> list[str]:
    rollout = config.rollout
    if rollout.nodes:
        try:
            return node_servers(expand_host_list(rollout.nodes), rollout.port, rollout.servers_per_node)
        except DiscoveryError:
            return node_servers([f"each-of-{rollout.nodes}"], rollout.port, rollout.servers_per_node)
    # Of those behind a router, it alone knows.
    return list(rollout.servers) or ["http://ROLLOUT_NODE:30000"]


def _server_commands(
    config: Config, options: argparse.Namespace, servers: list[str], model: str, tensor: int
) -> dict[str, list[str]]:
    rollout, lines = config.rollout, []
    on_gpu = rollout.sglang.backend == "cuda"
    slots: dict[str, int] = {}
    for url in servers:
        address = urlsplit(url)
        slot = slots.get(address.hostname, 0)
        slots[address.hostname] = slot + 1
        if on_gpu and (slot + 1) * tensor > options.gpus_per_node:
            raise ConfigError(
                f"{slot + 1} servers of {tensor} GPUs do not fit on {address.hostname} with --gpus-per-node "
                f"{options.gpus_per_node}: name fewer servers there, or lower --server-tp"
            )
        listen = address.hostname if is_loopback(address.hostname) else "0.0.0.0"
        dtype = "float32" if config.precision.params_dtype == "fp32" else "bfloat16"
        command = [
            "dasd",
            "serve",
            "--engine",
            "sglang",
            "--model-path",
            model,
            "--host",
            listen,
            "--port",
            str(address.port or 80),
        ]
        command += ["--backend", rollout.sglang.backend, "--dtype", dtype, "--tp-size", str(tensor)]
        command += ["--max-running-requests", str(rollout.max_batch_size)]
        devices = (
            f"CUDA_VISIBLE_DEVICES={','.join(map(str, range(slot * tensor, (slot + 1) * tensor)))} " if on_gpu else ""
        )
        lines.append(f"{address.hostname}: {devices}{shlex.join(command)}")
        if slot == 0 and len(slots) == 1:
            settings = dataclasses.replace(rollout.sglang, tensor_parallel_size=tensor)
            same = dataclasses.replace(
                rollout, engine="sglang", host=listen, dtype=dtype, deterministic=False, sglang=settings
            )
            started = shlex.join(sglang_command(same, model, address.port or 80))
    return {"rollout servers": lines, "of which the first starts": [started]}


def _router_lines(router: str, servers: list[str]) -> list[str]:
    address = urlsplit(router)
    listen = address.hostname if is_loopback(address.hostname) else "0.0.0.0"
    port = address.port or 80
    command = ["dasd", "router", "--servers", *servers, "--host", listen, "--port", str(port)]
    return [
        shlex.join(command),
        f"which starts {shlex.join(router_command(sys.executable, servers, host=listen, port=port))}",
    ]
