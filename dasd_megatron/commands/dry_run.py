"""``dasd train --dry-run``: what a run on a whole cluster would be, worked out on one machine, without data, GPUs or
servers.

The configuration is checked as for a run. Megatron-Core builds the model of some ranks on the meta device, in a fake
process group of the full world, so the layout printed is its own; rollouts of made-up lengths are cut into
micro-batches by the functions that train.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import random
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dasd_megatron import backend
from dasd_megatron.arguments import Parser
from dasd_megatron.commands.plan_text import gigabytes
from dasd_megatron.commands.start_commands import Cluster, start_commands
from dasd_megatron.config import BackendConfig, Config, ParallelConfig, load_config
from dasd_megatron.data.prompt_checks import check_prompts
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.templates import is_function, make_renderer
from dasd_megatron.errors import ConfigError
from dasd_megatron.models.hf_config import hf_folder, load_tokenizer, stored_vocab_size
from dasd_megatron.observability.progress import format_duration
from dasd_megatron.planning.assumptions import LENGTH_SIGMA, MEDIAN_SHARE, PROMPT_SHARE
from dasd_megatron.planning.estimate import Architecture, bubble_fraction, chunk_parameters, total_parameters
from dasd_megatron.planning.layout import (
    check_layout,
    check_teacher_lengths,
    longest_teacher_prompt,
    place_of,
    warmup_passes,
)
from dasd_megatron.planning.plan import GPU_BYTES, Plan, make_plan, model_config, model_sizes
from dasd_megatron.planning.storage import evaluations_of
from dasd_megatron.run.checks import check_end_tokens, needs_teacher, teacher_of_rollouts
from dasd_megatron.run.dates import choose_date

if TYPE_CHECKING:
    from dasd_megatron.training.rehearsal import RankModel


def _parser() -> Parser:
    parser = Parser(
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
    parser.add_argument(
        "--tokens-per-second",
        type=float,
        default=5000.0,
        metavar="N",
        help="of all rollout servers together, for the time of an evaluation (default: 5000)",
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
    for name in ("nodes", "gpus_per_node", "gpu_memory", "server_tp", "tokens_per_second"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: must be above 0")
    config = load_config(options.overrides, options.config_dir, needs_files=False)
    lengths = _response_lengths(config, options.response_tokens)
    described = _choose_preset(config)
    sizes = model_sizes(described.model)
    check_layout(config.model, config.parallel, config.rollout, sizes)
    check_teacher_lengths(config, sizes)
    hosts = _hosts(config.parallel, options)
    arch = Architecture.of(sizes)
    on_gpu = config.backend.kind == "cuda"
    transformer_engine = on_gpu and config.backend.transformer_impl != "local"
    gpu_bytes = 1e9 * options.gpu_memory if options.gpu_memory else GPU_BYTES
    plan = make_plan(config, arch, transformer_engine=transformer_engine, gpu_bytes=gpu_bytes)
    limit = gpu_bytes if on_gpu or options.gpu_memory else math.inf
    _check_memory(plan, limit)
    cluster = Cluster(hosts, options.gpus_per_node, limit, options.server_tp)
    commands = start_commands(config, cluster, arch, options.overrides, options.config_dir)
    prompt_lines = _prompt_lines(config)
    # The CPU's backend serves for a GPU run too: on the meta device there is nothing to compute. Megatron-Core is
    # imported after this.
    backend.select(BackendConfig(kind="cpu"))
    warnings.filterwarnings("ignore", module="megatron")
    from dasd_megatron.training.rehearsal import build_rank

    print("dry run: nothing is started, and neither data nor GPUs nor servers are asked for")
    _print_section("run", _settings_lines(config, arch))
    if prompt_lines:
        _print_section("prompts", prompt_lines)
    _print_section("evaluation", _evaluation_lines(config, options.tokens_per_second))
    _print_section("layout", _layout_lines(config.parallel, hosts, options.gpus_per_node))
    _print_section("memory of one rank, as dasd plan estimates it", _memory_lines(plan, limit))
    hf_config, world = model_config(described.model), config.parallel.world_size
    ranks = {rank: build_rank(config, hf_config, rank) for rank in sorted({0, world // 2, world - 1})}
    _print_section(
        "Megatron-Core's model of some ranks, on the meta device",
        [_rank_line(config, arch, rank, model) for rank, model in ranks.items()],
    )
    _print_section(
        "micro-batches of one step, and their schedule",
        _step_lines(config, lengths, given=options.response_tokens is not None),
    )
    for title, lines in commands.items():
        _print_section(title, lines)


def _print_section(title: str, lines: Sequence[str]) -> None:
    print(f"\n{title}")
    for line in lines:
        print(f"  {line}")


def _choose_preset(config: Config) -> Config:
    """Return the configuration with the preset in place of a ``model.path`` that is not on this machine."""
    path = config.model.path
    if path is None or Path(path).exists():
        return config
    if not config.model.architecture:
        raise ConfigError(
            f"model.path={path} is not on this machine: choose the preset of that model too, like model=qwen2.5_7b"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=None))


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
    """Return the tokens of each response of one step: those in ``text`` in turn, or made-up ones."""
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
    return [
        max(1, min(longest, round(MEDIAN_SHARE * longest * draw.lognormvariate(0, LENGTH_SIGMA)))) for _ in range(count)
    ]


def _check_memory(plan: Plan, limit: float) -> None:
    full = plan.fullest
    if full.total > limit:
        raise ConfigError(
            f"pipeline stage {full.stage} needs {gigabytes(full.total)} of each GPU and there are {gigabytes(limit)}: "
            "raise the parallel sizes, write precision.recompute=full, or shorten the sequences (dasd plan --search "
            "lists layouts that fit)"
        )


def _settings_lines(config: Config, arch: Architecture) -> list[str]:
    batch, rollout, precision = config.batch, config.rollout, config.precision
    return [
        f"{config.run.name}: {config.run.steps} steps of {batch.groups} prompts x {batch.samples_per_group} "
        f"rollouts, {batch.minibatches} minibatches x {batch.epochs} epochs",
        f"{config.algorithm.name}, {config.algorithm.objective} objective, {_teacher_text(config)}",
        f"{total_parameters(arch):,} parameters in {arch.layers} layers, {precision.params_dtype}, recompute "
        f"{precision.recompute}, {config.backend.kind}",
        f"prompts up to {rollout.max_prompt_tokens:,} and responses up to {rollout.max_new_tokens:,} tokens; "
        f"rollouts from rollout.engine={rollout.engine}, weights by {rollout.weight_sync}, at most "
        f"{rollout.max_staleness} steps old",
    ]


def _teacher_text(config: Config) -> str:
    if not needs_teacher(config.algorithm):
        return "no teacher"
    shown = f"teacher {config.teacher.weights}, sees {', '.join(config.teacher.privileged)}"
    longest = longest_teacher_prompt(config)
    if longest == config.rollout.max_prompt_tokens:
        return shown
    return f"{shown} (its prompts up to {longest:,} tokens)"


def _evaluation_lines(config: Config, tokens_per_second: float) -> list[str]:
    """Say how many evaluations there will be, and how much each of them samples."""
    settings, rollout = config.evaluation, config.rollout
    count = evaluations_of(config)
    if not count:
        return ["none"]
    # A file is not read here: without a size, all problems of it count.
    size = config.data.heldout.size
    problems, of = (1, "each held-out problem") if size is None else (size, f"{size:,} held-out problems")
    samples = problems * settings.samples
    typical, most = (samples * round(share * rollout.max_new_tokens) for share in (MEDIAN_SHARE, 1.0))
    times = [format_duration(tokens / tokens_per_second) for tokens in (typical, most)]
    return [
        f"{count} evaluations of {settings.samples} samples of {of}: {samples:,} samples, about {typical:,} tokens and "
        f"at most {most:,}",
        f"each takes about {times[0]} and at most {times[1]} at {tokens_per_second:g} tokens a second of all servers "
        f"together (--tokens-per-second); it ends early only where no request is answered for "
        f"rollout.step_timeout_seconds={rollout.step_timeout_seconds:g}",
    ]


def _prompt_lines(config: Config) -> list[str]:
    """Check the templates and the tokenizer of a ``model.path`` that is on this machine by a made-up problem of one
    character, and describe its prompts."""
    path = config.model.path
    # A function of the user's may not take a problem that is made up.
    if (
        path is None
        or not Path(path).exists()
        or any(map(is_function, (config.data.template, config.teacher.template)))
    ):
        return []
    folder = hf_folder(path)
    tokenizer, vocab_size = load_tokenizer(folder), stored_vocab_size(folder)
    check_end_tokens(folder, tokenizer, vocab_size)
    config = choose_date(config, tokenizer)
    renderer = make_renderer(config.data, config.teacher, tokenizer)
    problem = Problem("made up", "1", "1", "1")
    others = [problem, Problem("another", "2", "2", "2")]
    teacher = teacher_of_rollouts(config, renderer, others, vocab_size)
    check_prompts([problem], renderer, config.rollout.max_prompt_tokens, vocab_size=vocab_size, teacher=teacher)
    prompts = {"student": renderer.student(problem)}
    if teacher is not None:
        texts = teacher.texts_to_try(problem)
        prompts |= {f"teacher, {shown.source}": renderer.teacher(problem, shown) for shown in texts}
    return [f"{kind}: {len(ids)} tokens of the templates and of a problem of one" for kind, ids in prompts.items()]


def _ranges(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)}-{max(numbers)}"


def _layout_lines(parallel: ParallelConfig, hosts: Sequence[str], gpus_per_node: int) -> list[str]:
    each = parallel.world_size // len(hosts)
    lines = [
        f"TP {parallel.tensor_model_parallel_size}, CP {parallel.context_parallel_size}, PP "
        f"{parallel.pipeline_model_parallel_size}, VPP {parallel.virtual_pipeline_model_parallel_size or 1}, DP "
        f"{parallel.data_parallel_size}: {parallel.world_size} processes on {len(hosts)} nodes, {each} each"
    ]
    width = max(map(len, hosts))
    for index, host in enumerate(hosts):
        ranks = range(index * each, (index + 1) * each)
        # Ranks that differ in their place among tensor-parallel ones alone share a line.
        for _, group in itertools.groupby(
            ranks, key=lambda rank: dataclasses.replace(place_of(parallel, rank), tensor=0)
        ):
            members = list(group)
            places = [place_of(parallel, rank) for rank in members]
            first = places[0]
            lines.append(
                f"{host:<{width}}  rank {_ranges(members):<9} PP {first.pipeline}  DP {first.data}  CP "
                f"{first.context}  TP {_ranges([place.tensor for place in places])}"
            )
    if len(hosts) > 1 and each < gpus_per_node:
        lines.append(
            f"note: {gpus_per_node - each} of {gpus_per_node} GPUs of each node are idle: raise "
            "parallel.data_parallel_size, or take fewer nodes"
        )
    return lines


def _memory_lines(plan: Plan, limit: float) -> list[str]:
    columns = ("weights", "gradients", "optimizer", "copies", "activations", "loss", "total")
    lines = ["stage" + "".join(f"{name:>13}" for name in columns)]
    for memory in plan.stages:
        state = memory.state
        parts = (
            state.weights,
            state.gradients,
            state.optimizer,
            memory.snapshots,
            memory.activations,
            memory.loss,
            memory.total,
        )
        lines.append(f"{memory.stage:<5}" + "".join(f"{gigabytes(part):>13}" for part in parts))
    room = f" of {gigabytes(limit)}" if math.isfinite(limit) else ""
    return [
        *lines,
        f"stage {plan.fullest.stage} is the fullest, {gigabytes(plan.fullest.total)}{room} with sequences of the "
        "greatest length",
    ]


def _rank_line(config: Config, arch: Architecture, rank: int, model: RankModel) -> str:
    """Compare Megatron's model of a rank with the plan, and describe it."""
    place, sizes = model.place, model.sizes
    planned = [[size for size, _ in chunk] for chunk in chunk_parameters(arch, config.parallel, place.pipeline)]
    # Both are this package's or Megatron's to get right, not the user's.
    assert place == place_of(config.parallel, rank), (place, rank)
    assert sizes == planned, f"rank {rank}: the plan has other parameters than Megatron's model"
    layers = " and ".join(_ranges(chunk) for chunk in model.layers)
    ends = (", embedding" if model.has_embedding else "") + (", head" if model.has_head else "")
    return (
        f"rank {rank:<4} PP {place.pipeline}  DP {place.data}  CP {place.context}  TP {place.tensor}: layers "
        f"{layers}{ends}; {sum(map(sum, sizes)):,} parameters in {sum(map(len, sizes))} tensors, as planned"
    )


def _step_lines(config: Config, lengths: Sequence[int], *, given: bool) -> list[str]:
    from dasd_megatron.training.rehearsal import divide_step

    minibatches, replicas = config.batch.minibatches, config.parallel.data_parallel_size
    prompt = max(1, round(PROMPT_SHARE * config.rollout.max_prompt_tokens))
    counts, padded, per_replica = divide_step(config, prompt, lengths)
    # A rank holds its part of each sequence; the last token of a sequence predicts nothing and is no input.
    inputs = (sum(lengths) + len(lengths) * (prompt - 1)) / config.parallel.context_parallel_size
    least = min(counts)
    return [
        f"{len(lengths)} rollouts, prompts of {prompt:,} tokens, responses of {min(lengths):,} to {max(lengths):,}, "
        f"median {statistics.median(lengths):,.0f}: {'as given' if given else 'made up'}",
        f"{_ranges(counts)} micro-batches for each of {replicas} replicas in each of {minibatches} minibatches, "
        f"of {min(padded):,} to {max(padded):,} tokens on a rank; {1 - inputs / sum(padded):.1%} are padding",
        f"tokens of a replica's minibatch: {min(per_replica):,} to {max(per_replica):,}",
        _schedule_line(config.parallel, least),
        f"a pipeline stage waits {bubble_fraction(config.parallel, least):.1%} of its time",
    ]


def _schedule_line(parallel: ParallelConfig, micro_batches: int) -> str:
    """Describe Megatron's schedule of one minibatch: forward passes before the first backward pass, by stage."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if stages == 1:
        return "one stage: forward and backward pass of each micro-batch in turn"
    name = "1F1B" if chunks == 1 else f"interleaved 1F1B over {chunks} chunks"
    warmup = ", ".join(f"stage {stage} {first}" for stage, first in enumerate(warmup_passes(parallel, micro_batches)))
    return (
        f"{name}, {micro_batches * chunks} forward and backward passes of a chunk on each stage; forward passes "
        f"before the first backward: {warmup}"
    )
