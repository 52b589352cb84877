"""The seconds of a step's scoring and update, by a model: operations and bytes over the rates that are assumed."""

from __future__ import annotations

from dataclasses import dataclass

from dasd_megatron.config import Config, stage_layers
from dasd_megatron.planning.assumptions import Assumptions
from dasd_megatron.planning.estimate import (
    Architecture,
    Communication,
    communication,
    head_operations,
    layer_operations,
    passes_of,
)
from dasd_megatron.planning.lengths import Lengths
from dasd_megatron.planning.plan import Plan


@dataclass(frozen=True)
class TrainingTime:
    """Seconds of the parts of a step's training, one after the other: nothing is taken to overlap."""

    scoring: float
    """Matrix products of the passes that score."""
    update: float
    """Matrix products of the passes of the update, forward and backward."""
    bubble: float
    """A pipeline stage's wait for the others."""
    tensor: float
    context: float
    pipeline: float
    data: float

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return float(sum(vars(self).values()))


def training_time(
    config: Config, arch: Architecture, plan: Plan, lengths: Lengths, assumed: Assumptions, *, gpus_per_node: int
) -> TrainingTime:
    """Return the time of one step on sequences of these lengths, in the layout of ``plan``, which is that of
    ``config``."""
    passes, parallel = passes_of(config, arch), config.parallel
    sequences = config.batch.groups * config.batch.samples_per_group / parallel.data_parallel_size
    student = _forward_operations(config, arch, lengths, lengths.prompt)
    teacher = _forward_operations(config, arch, lengths, lengths.teacher_prompt)
    # A backward pass has two products for each of the forward pass.
    update = student.all * 3 * passes.update + student.layers * passes.recomputed_layers
    scoring = student.all * passes.scoring + teacher.all * passes.teacher
    # A stage's ranks share its work, and the slowest stage sets the pace.
    sharing = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    seconds = sequences / sharing / (assumed.peak_flops * assumed.mfu)
    products = seconds * (scoring + update)
    traffic = communication(
        arch,
        config,
        sequences * (lengths.prompt + lengths.response),
        sequences * (lengths.teacher_prompt + lengths.response),
        plan.fullest.state.gradients,
        plan.fullest.state.weights,
    )
    times = _traffic_seconds(config, traffic, assumed, gpus_per_node)
    waiting = products * plan.bubble / (1 - plan.bubble)
    return TrainingTime(seconds * scoring, seconds * update, waiting, *times)


@dataclass(frozen=True)
class _Operations:
    """Operations of a forward pass of one sequence through the slowest pipeline stage."""

    layers: float
    all: float


def _forward_operations(config: Config, arch: Architecture, lengths: Lengths, prompt: float) -> _Operations:
    layer = layer_operations(arch, prompt + lengths.response, lengths.squares(prompt))
    # The fused loss projects the response alone.
    projected = lengths.response + (0.0 if config.loss.fused_linear else prompt)
    head = head_operations(arch, projected)
    stages = stage_layers(config.parallel, arch.layers)
    slowest = max(layers * layer + head * (stage == len(stages) - 1) for stage, layers in enumerate(stages))
    return _Operations(max(stages) * layer, slowest)


def _traffic_seconds(
    config: Config, traffic: Communication, assumed: Assumptions, gpus_per_node: int
) -> tuple[float, float, float, float]:
    """Return the seconds of tensor-, context-, pipeline- and data-parallel traffic. Ranks are neighbours in this order
    but for the last two, so a group is inside a node where all ranks up to its own direction are."""
    parallel = config.parallel
    tensor = parallel.tensor_model_parallel_size
    context = tensor * parallel.context_parallel_size
    data = context * parallel.data_parallel_size

    def seconds(sent: float, ranks: int) -> float:
        return sent / (assumed.link_share * (assumed.nvlink if ranks <= gpus_per_node else assumed.network))

    return (
        seconds(traffic.tensor, tensor),
        seconds(traffic.context, context),
        seconds(traffic.pipeline, parallel.world_size),
        seconds(traffic.data, data),
    )
