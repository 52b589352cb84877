"""The seconds in which rollout servers sample a step, by a model of continuous batching.

A decoding step of a server reads its share of the weights and the keys and values of all sequences that it holds, or
computes their products where these take longer. Sequences wait until there is room for them, and the last ones decode
nearly alone: the long tail of a step.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from dasd_megatron.config import Config
from dasd_megatron.planning.assumptions import Assumptions
from dasd_megatron.planning.estimate import (
    DTYPE_BYTES,
    Architecture,
    head_operations,
    kv_bytes_per_token,
    layer_operations,
    total_parameters,
)
from dasd_megatron.planning.lengths import Lengths

_MOST_SEQUENCES = 32768
SERVER_WEIGHTS_SHARE = 0.6
"""A server's weights get at most this share of a GPU's memory where its GPUs are to be chosen; the rest is for keys and
values, activations and graphs."""


@dataclass(frozen=True)
class Servers:
    """Rollout servers that are alike. ``gpus``: of one of them. ``kv_tokens``: its room for keys and values.
    ``shared``: they are on the trainer's GPUs and take turns with it."""

    count: int
    gpus: int
    nodes: int
    kv_tokens: float
    shared: bool = False


@dataclass(frozen=True)
class RolloutTime:
    """The sampling of one step."""

    seconds: float
    tokens: float
    """Tokens that all servers sample."""
    at_once: int
    """Most sequences that one server decodes at once."""
    tail: float
    """Seconds at the end in which a server decodes fewer than a quarter of these."""


def served_weight_bytes(arch: Architecture, config: Config) -> float:
    """Return the bytes of the weights of one replica on the servers."""
    rollout = config.rollout
    quantised = rollout.sglang.quantization == "fp8" or rollout.weight_format == "fp8_blockwise"
    width = 1 if quantised else DTYPE_BYTES[config.precision.params_dtype]
    return float(total_parameters(arch) * width)


def fewest_server_gpus(arch: Architecture, config: Config, gpu_memory: float, gpus_per_node: int) -> int:
    """Return the GPUs of one server, the configured number times a power of two, whose weights leave room."""
    gpus, weights = config.rollout.sglang.tensor_parallel_size, served_weight_bytes(arch, config)
    while weights / gpus > SERVER_WEIGHTS_SHARE * gpu_memory and gpus < gpus_per_node:
        gpus *= 2
    return gpus


def kv_room(config: Config, arch: Architecture, gpus: int, assumed: Assumptions, resident: float) -> float:
    """Return the tokens of keys and values that a server of ``gpus`` GPUs has room for, 0 or less where its weights do
    not fit. ``resident``: bytes that something else holds on each GPU."""
    weights = served_weight_bytes(arch, config) / gpus
    room = (assumed.server_memory * assumed.gpu_memory - resident - weights) / kv_bytes_per_token(arch, gpus)
    limit = config.rollout.sglang.max_total_tokens
    return room if limit is None else min(room, limit)


@dataclass(frozen=True)
class Decoding:
    """Seconds of a decoding step: ``weights`` or ``sequence`` times the sequences, whichever is more, ``fixed``, and
    ``context`` times the tokens that the sequences have. ``prompt``: seconds of prefilling one prompt."""

    weights: float
    sequence: float
    fixed: float
    context: float
    prompt: float

    def seconds(self, steps: int, sequences: int, tokens: float) -> float:
        """Return the seconds of ``steps`` steps of so many sequences, which have ``tokens`` together at first."""
        reading = steps * tokens + sequences * steps * (steps - 1) / 2
        return steps * (max(self.weights, sequences * self.sequence) + self.fixed) + reading * self.context


def decoding_of(config: Config, arch: Architecture, gpus: int, prompt: float, assumed: Assumptions) -> Decoding:
    bandwidth, rate = assumed.memory_bandwidth * assumed.memory_share, assumed.peak_flops * assumed.mfu
    token = arch.layers * layer_operations(arch, 1, 0) + head_operations(arch, 1)
    prefill = arch.layers * layer_operations(arch, prompt, prompt**2)
    return Decoding(
        weights=served_weight_bytes(arch, config) / gpus / bandwidth,
        sequence=token / gpus / rate,
        fixed=assumed.decoding_seconds + 2 * arch.layers * assumed.collective_seconds * (gpus > 1),
        context=kv_bytes_per_token(arch, gpus) / bandwidth,
        prompt=prefill / gpus / rate,
    )


def rollout_time(
    config: Config, arch: Architecture, servers: Servers, lengths: Lengths, assumed: Assumptions
) -> RolloutTime:
    """Return the time in which ``servers`` sample one step; infinite where not even one sequence has room.

    Where rollouts in flight are not waited for (``rollout.unfinished``), the step is complete with the first
    ``batch.groups`` groups of those that ``rollout.over_sampling`` started. What a filter may refuse is waited for.
    """
    batch, rollout = config.batch, config.rollout
    waits = rollout.unfinished == "finish"
    # Without a filter, a surplus that is waited for serves the next step, which starts fewer.
    surplus = rollout.over_sampling if rollout.filter is not None or not waits else 1.0
    started = math.ceil(batch.groups * surplus)
    needed = started if waits else batch.groups
    return _sampling_time(config, arch, servers, lengths, assumed, (started, batch.samples_per_group, needed))


def evaluation_time(
    config: Config, arch: Architecture, servers: Servers, lengths: Lengths, assumed: Assumptions
) -> float:
    """Return the seconds in which ``servers`` sample one evaluation within training."""
    problems = math.ceil(config.data.heldout.size or assumed.heldout_problems)
    work = (problems, config.evaluation.samples, problems)
    return _sampling_time(config, arch, servers, lengths, assumed, work).seconds


def _sampling_time(
    config: Config,
    arch: Architecture,
    servers: Servers,
    lengths: Lengths,
    assumed: Assumptions,
    work: tuple[int, int, int],
) -> RolloutTime:
    """Return the time of ``work``: groups, samples of each, and groups that are waited for. They are dealt evenly."""
    started, samples, needed = work
    dealt = math.ceil(started / servers.count)
    # Of more sequences than this the rest takes as long for each: a plan is to be there in seconds.
    simulated = min(samples, _MOST_SEQUENCES)
    groups = min(dealt, max(1, _MOST_SEQUENCES // simulated))
    scale = dealt * samples / (groups * simulated)
    drawn = lengths.drawn(groups * simulated)
    # The same order each time, so that plans differ by what was changed alone.
    random.Random(0).shuffle(drawn)
    in_flight = math.ceil(config.rollout.max_in_flight * config.rollout.groups_per_request * samples / servers.count)
    most = max(1, min(config.rollout.max_batch_size, in_flight))
    decoding = decoding_of(config, arch, servers.gpus, lengths.prompt, assumed)
    sampled = decode_all(drawn, simulated, math.ceil(lengths.prompt), most, servers.kv_tokens, decoding)
    if sampled is None:
        return RolloutTime(math.inf, 0.0, 0, 0.0)
    done = sorted(max(sampled.ends[first : first + simulated]) for first in range(0, len(drawn), simulated))
    seconds = done[math.ceil(needed / started * groups) - 1]
    tokens = started * samples * lengths.response
    return RolloutTime(seconds * scale, tokens, sampled.at_once, max(0.0, seconds - sampled.thinned))


@dataclass(frozen=True)
class Decoded:
    """Seconds at which each sequence of a server was done, and at which fewer than a quarter of the most were left."""

    ends: list[float]
    at_once: int
    thinned: float


def decode_all(
    responses: Sequence[int], samples: int, prompt: int, most: int, room: float, decoding: Decoding
) -> Decoded | None:
    """Let one server decode ``responses``, of which ``samples`` in a row share a prompt; None where one has no room.

    A sequence is begun when the room for all of it is free, so none is broken off for want of room.
    """
    if prompt + max(responses) > room:
        return None
    ends = [0.0] * len(responses)
    # Of each sequence that is decoded: the decoding step that ends it, and its number.
    running: list[tuple[int, int]] = []
    clock, step, begun, tokens, reserved, at_once, thinned = 0.0, 0, 0, 0.0, 0.0, 0, 0.0
    while begun < len(responses) or running:
        while begun < len(responses) and len(running) < most and reserved + prompt + responses[begun] <= room:
            clock += decoding.prompt * (begun % samples == 0)
            heapq.heappush(running, (step + responses[begun], begun))
            tokens, reserved = tokens + prompt, reserved + prompt + responses[begun]
            begun += 1
        at_once = max(at_once, len(running))
        steps = running[0][0] - step
        clock += decoding.seconds(steps, len(running), tokens)
        step, tokens = step + steps, tokens + steps * len(running)
        while running and running[0][0] == step:
            _, number = heapq.heappop(running)
            ends[number] = clock
            tokens, reserved = tokens - prompt - responses[number], reserved - prompt - responses[number]
        if begun < len(responses) or 4 * len(running) >= at_once:
            thinned = clock
    return Decoded(ends, at_once, thinned)
