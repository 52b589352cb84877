"""The search for a layout of training and rollout servers over the GPUs that there are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dasd_megatron.config import Config, validate
from dasd_megatron.errors import ConfigError
from dasd_megatron.planning.assumptions import Assumptions
from dasd_megatron.planning.estimate import Architecture
from dasd_megatron.planning.layout import check_layout
from dasd_megatron.planning.lengths import typical_lengths
from dasd_megatron.planning.plan import Plan, beside_servers, make_plan
from dasd_megatron.planning.rollouts import Servers, kv_room
from dasd_megatron.planning.step_time import ServerTime, StepTime, server_time, step_time
from dasd_megatron.planning.training_time import training_time

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dasd_megatron.models.sizes import ModelSizes

RECOMPUTES = ("none", "selective", "full")


@dataclass(frozen=True)
class Machines:
    """The GPUs to divide. ``gpus``: all of them. ``rollout_gpus``: those of the servers, None where the search chooses,
    0 where servers and trainer take turns on the same ones. ``server_gpus``: of one server, None for a choice."""

    gpus: int
    gpus_per_node: int
    rollout_gpus: int | None = None
    server_gpus: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A configuration in a layout that fits, its servers, its plan and the time of its step."""

    config: Config
    servers: Servers
    plan: Plan
    time: StepTime


@dataclass
class Search:
    """The layouts that fit, the fastest by the model first, and how many were planned."""

    fitting: list[Candidate] = field(default_factory=list)
    tried: int = 0
    least_bytes: float = math.inf
    """Bytes of the fullest GPU in the layout that needs the fewest; infinite if none was planned."""
    refused_fields: list[str] = field(default_factory=list)
    """The fields for which layouts were refused, each once."""


def search_layouts(
    config: Config,
    sizes: ModelSizes | PretrainedConfig,
    machines: Machines,
    assumed: Assumptions,
    *,
    recomputes: Sequence[str] = RECOMPUTES,
    transformer_engine: bool,
) -> Search:
    """Plan ``config`` in every layout of training and servers that together take ``machines``, with tensor parallelism
    inside a node and each way to recompute.

    Context parallelism and the layers of the first and last stage stay as they are. Training has whole nodes where
    there are several.
    """
    arch, lengths = Architecture.of(sizes), typical_lengths(config, assumed)
    search, refused = Search(), []
    known: dict[Servers, ServerTime] = {}
    for changed in _layouts(config, arch, machines, recomputes):
        refusal = _refused_field(changed, sizes)
        if refusal is not None:
            refused.append(refusal)
            continue
        search.tried += 1
        plan = make_plan(changed, arch, transformer_engine=transformer_engine, gpu_bytes=assumed.gpu_memory)
        search.least_bytes = min(search.least_bytes, plan.fullest.total)
        if plan.fullest.total > assumed.gpu_memory:
            continue
        training = training_time(changed, arch, plan, lengths, assumed, gpus_per_node=machines.gpus_per_node)
        choices = []
        for servers in server_choices(changed, arch, plan, machines, assumed):
            if servers not in known:
                known[servers] = server_time(changed, arch, servers, lengths, assumed)
            time = step_time(changed, arch, training, known[servers], assumed)
            if math.isfinite(time.seconds):
                choices.append(Candidate(changed, servers, plan, time))
        # Of one layout the best servers alone, so that a list of the fastest shows different layouts.
        if choices:
            search.fitting.append(min(choices, key=_order))
    search.fitting.sort(key=_order)
    search.refused_fields = list(dict.fromkeys(refused))
    return search


def _refused_field(config: Config, sizes: ModelSizes | PretrainedConfig) -> str | None:
    """Return the field for which the layout is refused, None if it is not."""
    try:
        validate(config)
        check_layout(config.model, config.parallel, config.rollout, sizes)
    except ConfigError as error:
        return str(error).split("=")[0].split(" ")[0]
    return None


def _order(candidate: Candidate) -> tuple[float, float, float]:
    # Steps that differ by less than the model can tell count as equal. Where rollouts bound the step, many layouts
    # train in time, and the fastest of them has most to spare.
    return float(f"{candidate.time.seconds:.3g}"), candidate.time.training.total, candidate.time.seconds


def nearest_layout(
    config: Config,
    sizes: ModelSizes | PretrainedConfig,
    assumed: Assumptions,
    *,
    gpus_per_node: int,
    transformer_engine: bool,
) -> tuple[Config, Plan] | None:
    """Return the layout of training that fits and has the fewest other values than ``config``, of several the one that
    trains fastest. It has as many GPUs, or, where nothing fits on these, up to 16 times as many."""
    arch, lengths = Architecture.of(sizes), typical_lengths(config, assumed)
    for factor in (1, 2, 4, 8, 16):
        machines = Machines(factor * config.parallel.world_size, gpus_per_node, rollout_gpus=0)
        found: list[tuple[int, float, Config, Plan]] = []
        for changed in _layouts(config, arch, machines, RECOMPUTES):
            if _refused_field(changed, sizes) is None:
                plan = make_plan(changed, arch, transformer_engine=transformer_engine, gpu_bytes=assumed.gpu_memory)
                if plan.fullest.total <= assumed.gpu_memory:
                    time = training_time(changed, arch, plan, lengths, assumed, gpus_per_node=gpus_per_node)
                    found.append((len(changed_fields(config, changed)), time.total, changed, plan))
        if found:
            *_, nearest, plan = min(found, key=lambda layout: layout[:2])
            return nearest, plan
    return None


def changed_fields(old: Config, new: Config) -> list[str]:
    """Return the overrides that make ``new``'s layout of ``old``'s."""

    def text(value: object) -> str:
        return "null" if value is None else str(value).lower()

    changes = []
    for section in ("parallel", "precision"):
        before, after = getattr(old, section), getattr(new, section)
        for item in dataclasses.fields(before):
            if getattr(before, item.name) != getattr(after, item.name):
                changes.append(f"{section}.{item.name}={text(getattr(after, item.name))}")
    return changes


def server_choices(
    config: Config, arch: Architecture, plan: Plan, machines: Machines, assumed: Assumptions
) -> Iterator[Servers]:
    """Yield servers of every size that the GPUs beside training, or training's own, can be divided into."""
    shared = machines.rollout_gpus == 0
    gpus = machines.gpus - (0 if shared else config.parallel.world_size)
    sizes = [machines.server_gpus] if machines.server_gpus else _divisors(min(machines.gpus_per_node, gpus))
    per_node = min(gpus, machines.gpus_per_node)
    for size in sizes:
        if per_node >= size and not arch.heads % size:
            count = gpus // per_node * (per_node // size)
            resident = beside_servers(config, plan.fullest) if shared else 0.0
            room = kv_room(config, arch, size, assumed, resident)
            yield Servers(count, size, math.ceil(gpus / machines.gpus_per_node), room, shared)


def _layouts(config: Config, arch: Architecture, machines: Machines, recomputes: Sequence[str]) -> Iterator[Config]:
    """Yield ``config`` in every layout of as many GPUs as the servers leave."""
    per_node, context = machines.gpus_per_node, config.parallel.context_parallel_size
    most = machines.gpus - (machines.rollout_gpus if machines.rollout_gpus is not None else 1)
    for tensor in _divisors(per_node):
        if arch.kv_heads % tensor or arch.heads % tensor:
            continue
        for pipeline in range(1, min(arch.layers, most // (tensor * context)) + 1):
            for replicas in _divisors(config.batch.groups, most // (tensor * context * pipeline)):
                if _is_allowed(tensor * context * pipeline * replicas, machines):
                    yield from _variants(config, tensor, pipeline, replicas, recomputes)


def _is_allowed(world: int, machines: Machines) -> bool:
    """Return whether a training job of ``world`` GPUs leaves the servers theirs, in whole nodes."""
    if machines.rollout_gpus is not None:
        return world == machines.gpus - machines.rollout_gpus
    return machines.gpus <= machines.gpus_per_node or world % machines.gpus_per_node == 0


def _variants(config: Config, tensor: int, pipeline: int, replicas: int, recomputes: Sequence[str]) -> Iterator[Config]:
    """Yield ``config`` in one layout with every number of virtual stages and every way to recompute."""
    for virtual in (None, 2, 4):
        for recompute in recomputes:
            parallel = dataclasses.replace(
                config.parallel,
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=virtual,
                data_parallel_size=replicas,
                sequence_parallel=tensor > 1,
            )
            precision = dataclasses.replace(config.precision, recompute=recompute)
            yield dataclasses.replace(config, parallel=parallel, precision=precision)


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [size for size in range(1, min(number, most or number) + 1) if number % size == 0]
