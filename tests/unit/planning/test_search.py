"""The search over training and servers together, and the nearest layout that fits."""

from __future__ import annotations

import dataclasses

import pytest

from dasd_megatron.planning.assumptions import assume
from dasd_megatron.planning.estimate import Architecture
from dasd_megatron.planning.lengths import typical_lengths
from dasd_megatron.planning.plan import make_plan, model_sizes, plan_config
from dasd_megatron.planning.rollouts import Servers, kv_room
from dasd_megatron.planning.search import (
    Candidate,
    Machines,
    Search,
    changed_fields,
    nearest_layout,
    search_layouts,
    server_choices,
)
from dasd_megatron.planning.step_time import StepTime, server_time, step_time
from dasd_megatron.planning.training_time import training_time

H100 = assume("h100", [])
TP = "parallel.tensor_model_parallel_size="
PRESETS = {"dasd_7b": (1, 1, 4), "dasd_32b": (4, 3, 8), "dasd_70b": (8, 4, 8)}
"""Training nodes, rollout nodes and GPUs of a server, as the scripts in slurm/ have them."""


def search(gpu_memory: float, *overrides: str, machines: Machines) -> Search:
    config = plan_config(
        ["model=qwen3_8b", "batch.groups=8", "loss.block_tokens=1024", "loss.keep_logits=false", *overrides]
    )
    assumed = dataclasses.replace(H100, gpu_memory=gpu_memory)
    return search_layouts(
        config, model_sizes(config.model), machines, assumed, recomputes=["none", "full"], transformer_engine=True
    )


def test_the_search_keeps_what_fits() -> None:
    machines = Machines(6, 2, rollout_gpus=2)
    everything = search(1e12, machines=machines)
    assert len(everything.fitting) == everything.tried > 4
    totals = [found.plan.fullest.total for found in everything.fitting]
    assert everything.least_bytes == min(totals)
    for found in everything.fitting:
        assert found.config.parallel.world_size == 4
        # Tensor parallelism and a server stay inside a node.
        assert found.config.parallel.tensor_model_parallel_size <= 2
        assert found.servers.count * found.servers.gpus == 2 and found.servers.nodes == 1
    limit = sorted(totals)[len(totals) // 2]
    some = search(limit, machines=machines)
    assert sorted(found.plan.fullest.total for found in some.fitting) == sorted(
        total for total in totals if total <= limit
    )
    nothing = search(1e9, machines=machines)
    assert (nothing.fitting, nothing.tried, nothing.least_bytes) == ([], everything.tried, everything.least_bytes)


def test_the_fastest_come_first() -> None:
    found = search(80e9, machines=Machines(16, 8)).fitting
    seconds = [candidate.time.seconds for candidate in found]
    assert all(later >= earlier * 0.99 for earlier, later in zip(seconds, seconds[1:], strict=False))
    assert seconds[0] <= min(seconds) * 1.01


def test_nodes_are_divided_between_training_and_servers() -> None:
    found = search(80e9, machines=Machines(48, 8)).fitting
    splits = {(candidate.config.parallel.world_size, candidate.servers.nodes) for candidate in found}
    assert splits == {(8, 5), (16, 4), (24, 3), (32, 2)}
    for candidate in found:
        assert candidate.config.parallel.world_size + candidate.servers.count * candidate.servers.gpus == 48
    # Of a single node the GPUs are divided.
    small = search(80e9, machines=Machines(8, 8)).fitting
    worlds = {candidate.config.parallel.world_size for candidate in small}
    assert 4 in worlds and worlds <= set(range(1, 8))
    for candidate in small:
        assert candidate.config.parallel.world_size + candidate.servers.count * candidate.servers.gpus <= 8


def test_more_gpus_are_never_slower() -> None:
    best = [search(80e9, machines=Machines(gpus, 8)).fitting[0].time.seconds for gpus in (8, 16, 32)]
    assert all(more <= fewer * 1.01 for fewer, more in zip(best, best[1:], strict=False))


def test_servers_on_the_trainers_gpus_have_what_it_leaves() -> None:
    config = plan_config(["model=qwen3_8b", "batch.groups=8", "parallel.data_parallel_size=8"])
    arch = Architecture.of(model_sizes(config.model))
    plan = make_plan(config, arch, transformer_engine=True)
    (shared,) = server_choices(config, arch, plan, Machines(8, 8, 0, 4), H100)
    (apart,) = server_choices(config, arch, plan, Machines(16, 8, 8, 4), H100)
    assert shared == Servers(2, 4, 1, kv_room(config, arch, 4, H100, plan.fullest.total), shared=True)
    assert apart == Servers(2, 4, 1, kv_room(config, arch, 4, H100, 0.0))
    for candidate in search(80e9, "rollout.max_staleness=1", machines=Machines(8, 8, 0)).fitting:
        assert candidate.servers.shared and not candidate.time.ahead
        assert candidate.time.seconds >= candidate.time.training.total + candidate.time.served.rollouts.seconds


def test_rollouts_ahead_run_beside_training() -> None:
    machines = Machines(16, 8, 8, 1)
    ahead, in_turn = (
        search(80e9, f"rollout.max_staleness={stale}", machines=machines).fitting[0].time for stale in (1, 0)
    )
    for time in (ahead, in_turn):
        parts = time.parts
        rest = parts["weight sync"] + parts["saving"] + parts["evaluation"]
        both = max(parts["training"], parts["rollouts"]) if time is ahead else parts["training"] + parts["rollouts"]
        assert time.seconds == pytest.approx(both + rest)
        assert parts[time.bound] == max(parts.values())
    assert ahead.seconds < in_turn.seconds


def preset_time(name: str) -> StepTime:
    """The time of a step of a preset with its own servers, worked out without the search."""
    config = plan_config([f"experiment={name}"])
    _, nodes, size = PRESETS[name]
    arch, lengths = Architecture.of(model_sizes(config.model)), typical_lengths(config, H100)
    plan = make_plan(config, arch, transformer_engine=True)
    servers = Servers(nodes * 8 // size, size, nodes, kv_room(config, arch, size, H100, 0.0))
    training = training_time(config, arch, plan, lengths, H100, gpus_per_node=8)
    return step_time(config, arch, training, server_time(config, arch, servers, lengths, H100), H100)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_planners_choice(name: str) -> None:
    config = plan_config([f"experiment={name}"])
    training, nodes, size = PRESETS[name]
    found = search_layouts(
        config, model_sizes(config.model), Machines(8 * (training + nodes), 8), H100, transformer_engine=True
    )
    best: Candidate = found.fitting[0]
    assert changed_fields(config, best.config) == []
    assert (best.servers.nodes, best.servers.gpus) == (nodes, size)
    assert best.time.seconds == pytest.approx(preset_time(name).seconds)
    # Another step is not shorter by more than the third digit.
    assert min(candidate.time.seconds for candidate in found.fitting) > 0.99 * best.time.seconds
    assert config.precision.recompute == "none" and config.parallel.world_size == 8 * training


def test_the_search_says_why_it_found_nothing() -> None:
    config = plan_config(["model=qwen3_8b", "batch.groups=8"])
    sizes = dataclasses.replace(model_sizes(config.model), num_hidden_layers=37)
    refused = search_layouts(config, sizes, Machines(5, 4, 1), H100, transformer_engine=True)
    assert not any(c.config.parallel.pipeline_model_parallel_size > 1 for c in refused.fitting)
    assert set(refused.refused_fields) == {
        "parallel.pipeline_model_parallel_size",
        "parallel.virtual_pipeline_model_parallel_size",
    }


def test_the_nearest_layout_changes_least() -> None:
    def nearest(gpu_memory: float) -> tuple[list[str], float]:
        assumed = dataclasses.replace(H100, gpu_memory=gpu_memory)
        found = nearest_layout(config, model_sizes(config.model), assumed, gpus_per_node=8, transformer_engine=True)
        assert found is not None
        return changed_fields(config, found[0]), found[1].fullest.total

    config = plan_config(["experiment=dasd_32b"])
    assert nearest(80e9)[0] == []
    changes, total = nearest(60e9)
    assert changes == ["precision.recompute=selective"] and total <= 60e9
    # On these GPUs nothing fits, and on twice as many neither.
    config = plan_config(["model=qwen3_8b", "batch.groups=8", TP + "2", "parallel.sequence_parallel=true"])
    changes, total = nearest(25e9)
    assert changes == [TP + "8", "precision.recompute=full"] and total <= 25e9
    small = plan_config(["model=qwen3_8b", "batch.groups=2"])
    tiny = dataclasses.replace(H100, gpu_memory=1e9)
    assert nearest_layout(small, model_sizes(small.model), tiny, gpus_per_node=1, transformer_engine=True) is None
