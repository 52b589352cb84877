"""The model of rollout servers: against a simulation token by token, and in the direction that it has to go."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from dasd_megatron.config import Config
from dasd_megatron.planning.assumptions import Assumptions, assume
from dasd_megatron.planning.estimate import Architecture
from dasd_megatron.planning.lengths import Lengths, typical_lengths
from dasd_megatron.planning.plan import model_sizes, plan_config
from dasd_megatron.planning.rollouts import (
    Decoding,
    RolloutTime,
    Servers,
    decode_all,
    fewest_server_gpus,
    kv_room,
    rollout_time,
    served_weight_bytes,
)

H100 = assume("h100", [])
JOB = ["model=llama3_8b", "batch.groups=64", "batch.samples_per_group=8", "rollout.max_in_flight=64"]


def decode_by_token(
    responses: list[int], samples: int, prompt: int, most: int, room: float, rates: Decoding
) -> list[float]:
    """Decode token by token; the seconds at which each sequence was done."""
    clock, waiting, running = 0.0, list(range(len(responses))), {}
    ends = [0.0] * len(responses)
    while waiting or running:
        while waiting and len(running) < most:
            held = sum(prompt + responses[number] for number in running)
            if held + prompt + responses[waiting[0]] > room:
                break
            number = waiting.pop(0)
            clock += rates.prompt if number % samples == 0 else 0.0
            running[number] = 0
        tokens = sum(prompt + decoded for decoded in running.values())
        clock += max(rates.weights, len(running) * rates.sequence) + rates.fixed + rates.context * tokens
        running = {number: decoded + 1 for number, decoded in running.items()}
        for number in [number for number, decoded in running.items() if decoded == responses[number]]:
            ends[number] = clock
            del running[number]
    return ends


def test_batches_are_those_of_a_simulation_by_token() -> None:
    draw = random.Random(0)
    for _ in range(30):
        responses = [draw.randint(1, 40) for _ in range(draw.randint(1, 8) * 2)]
        prompt, most = draw.randint(1, 10), draw.randint(1, 6)
        room = prompt + max(responses) + draw.randint(0, 100)
        rates = Decoding(*(draw.uniform(0.1, 1.0) for _ in range(5)))
        found = decode_all(responses, 2, prompt, most, room, rates)
        assert found is not None
        assert found.ends == pytest.approx(decode_by_token(responses, 2, prompt, most, room, rates))
        assert found.at_once <= most and found.thinned <= max(found.ends)
    assert decode_all([5, 50], 2, 10, 2, 59, rates) is None


def test_figures_by_hand() -> None:
    config = plan_config(JOB)
    arch = Architecture.of(model_sizes(config.model))
    assert served_weight_bytes(arch, config) == 16_060_522_496
    for quantised in ("rollout.sglang.quantization=fp8", "rollout.weight_format=fp8_blockwise"):
        assert served_weight_bytes(arch, plan_config([*JOB, quantised])) == 8_030_261_248
    # Of 80 GB nine tenths, without the weights, at 32 layers x 2 x 1024 x 2 bytes a token; on two GPUs half of both.
    assert kv_room(config, arch, 1, H100, 0.0) == (72e9 - 16_060_522_496) / 131_072
    assert kv_room(config, arch, 2, H100, 10e9) == pytest.approx((62e9 - 8_030_261_248) / 65_536)
    limited = plan_config([*JOB, "rollout.sglang.max_total_tokens=5000"])
    assert kv_room(limited, arch, 1, H100, 0.0) == 5000
    assert [fewest_server_gpus(arch, config, memory * 1e9, 8) for memory in (80, 20, 1)] == [1, 2, 8]


def test_two_sequences_of_a_prompt_by_hand() -> None:
    config = plan_config(["model=llama3_8b", "batch.groups=1", "batch.samples_per_group=2"])
    found = time_of(config, Servers(1, 1, 1, math.inf), Lengths(1000, 1000, (100,)))
    prefill = (32 * 2 * 218_103_808 * 1000 + 32 * 2 * 4096 * 1000**2) / (0.45 * 989e12)
    # A step reads all weights, and of both sequences the keys and values of 1000 to 1099 tokens.
    reading = (100 * 16_060_522_496 + 2 * sum(range(1000, 1100)) * 131_072) / (0.7 * 3.35e12)
    assert found.seconds == pytest.approx(prefill + reading + 100 * 2e-3)
    assert (found.tokens, found.at_once) == (200, 2)


def time_of(
    config: Config, servers: Servers, lengths: Lengths | None = None, assumed: Assumptions = H100
) -> RolloutTime:
    arch = Architecture.of(model_sizes(config.model))
    return rollout_time(config, arch, servers, lengths or typical_lengths(config, assumed), assumed)


def test_more_servers_room_and_bandwidth_are_never_slower() -> None:
    config = plan_config(JOB)
    base = time_of(config, Servers(4, 1, 1, 200_000))
    assert base.tokens == pytest.approx(512 * typical_lengths(config, H100).response)
    by_count = [time_of(config, Servers(count, 1, 1, 200_000)).seconds for count in (1, 2, 4, 8, 16, 64)]
    assert by_count == sorted(by_count, reverse=True) and by_count[0] > 2 * by_count[-1]
    by_room = [time_of(config, Servers(4, 1, 1, room)).seconds for room in (9216, 20_000, 100_000, 1e9)]
    assert by_room == sorted(by_room, reverse=True) and by_room[0] > 4 * by_room[-1]
    by_size = [time_of(config, Servers(4, gpus, 1, 200_000)).seconds for gpus in (1, 2, 4, 8)]
    assert by_size == sorted(by_size, reverse=True)
    faster = dataclasses.replace(H100, memory_bandwidth=2 * H100.memory_bandwidth)
    assert time_of(config, Servers(4, 1, 1, 200_000), assumed=faster).seconds < base.seconds
    longer = dataclasses.replace(H100, median_share=0.5)
    assert time_of(config, Servers(4, 1, 1, 200_000), assumed=longer).seconds > base.seconds
    # The longest response alone is a bound that no number of servers takes away.
    assert by_count[-1] > 8192 * 16_060_522_496 / (0.7 * 3.35e12)
    assert 0 < base.tail < base.seconds
    assert math.isinf(time_of(config, Servers(4, 1, 1, 5000)).seconds)


def test_a_step_of_any_size_is_planned_at_once() -> None:
    servers = Servers(2, 1, 1, 1e9)
    by_groups = [
        time_of(plan_config(["model=llama3_8b", f"batch.groups={groups}"]), servers).seconds
        for groups in (4096, 8192, 10**9)
    ]
    # Of the second a half is simulated. With so many sequences the end hardly counts.
    assert by_groups[1] == pytest.approx(2 * by_groups[0], rel=0.02)
    assert by_groups[2] == pytest.approx(10**9 / 8192 * by_groups[1], rel=0.02)
    assert math.isfinite(
        time_of(plan_config(["model=llama3_8b", "batch.samples_per_group=1000000000"]), servers).seconds
    )


def test_limits_and_surplus_of_the_configuration() -> None:
    servers = Servers(4, 1, 1, 1e9)
    base = time_of(plan_config(JOB), servers)
    assert base.at_once == 128
    narrow = time_of(plan_config([*JOB, "rollout.max_batch_size=32"]), servers)
    few = time_of(plan_config([*JOB, "rollout.groups_per_request=1", "rollout.max_in_flight=16"]), servers)
    assert narrow.at_once == few.at_once == 32 and narrow.seconds == few.seconds > base.seconds
    # A surplus that is waited for costs time; one that is broken off spares the last ones.
    surplus = [*JOB, "rollout.over_sampling=1.5", "rollout.max_batch_size=1000"]
    waited = time_of(plan_config([*surplus, "rollout.filter=dasd_megatron.rollout.filters:rewards_differ"]), servers)
    broken_off = time_of(plan_config([*surplus, "rollout.unfinished=abort", "rollout.groups_per_request=1"]), servers)
    assert waited.tokens == 1.5 * base.tokens and waited.seconds > broken_off.seconds
