"""Comparison of checksums: of fused and padded tensors, and what is said where they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from dasd_megatron.config import RolloutConfig
from dasd_megatron.models.weight_formats import WEIGHT_FORMATS
from dasd_megatron.rollout.pool import ServerPool
from dasd_megatron.rollout.weight_checksum import cpu_checksum, gpu_checksum
from dasd_megatron.training.weight_sync.base import WeightSyncError
from dasd_megatron.training.weight_sync.verify import _choose, verify_weights
from tests.support.fake_servers import FakeModel, FakeServer, FakeServers
from tests.support.thread_ranks import ThreadRanks

A = "http://a:1"
CONFIG = RolloutConfig(engine="external", dtype="float32", max_retries=0, verify_weights=99)
GENERATOR = torch.Generator().manual_seed(1)
Q, K, V, NORM, EMBEDDING, DOWN = (
    torch.randn(shape, generator=GENERATOR) for shape in [(4, 8), (2, 8), (2, 8), (8,), (70, 8), (8, 40)]
)
TENSORS = [
    ("model.embed_tokens.weight", EMBEDDING),
    ("layers.0.self_attn.q_proj.weight", Q),
    ("layers.0.self_attn.k_proj.weight", K),
    ("layers.0.self_attn.v_proj.weight", V),
    ("layers.0.mlp.down_proj.weight", DOWN),
    ("norm.weight", NORM),
]
Checksum = Callable[[Sequence[torch.Tensor]], str]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    ThreadRanks(1, monkeypatch)


def served(checksum: Checksum, *, fused: bool = False, padded: bool = False) -> dict[str, str]:
    """The checksums of a server that holds the policy's weights."""
    parts = {name: [tensor] for name, tensor in TENSORS}
    if fused:
        for name in ("q_proj", "k_proj", "v_proj"):
            del parts[f"layers.0.self_attn.{name}.weight"]
        parts["layers.0.self_attn.qkv_proj.weight"] = [Q, K, V]
    if padded:
        parts["model.embed_tokens.weight"] = [F.pad(EMBEDDING, [0, 0, 0, 58])]
        parts["layers.0.mlp.down_proj.weight"] = [F.pad(DOWN, [0, 24])]
    return {name: checksum(tensors) for name, tensors in parts.items()}


def compare(
    *checksums: dict[str, str], urls: Sequence[str] = (A,), down: bool = False, config: RolloutConfig = CONFIG
) -> WeightSyncError | None:
    servers = FakeServers(a=FakeServer())
    servers.by_url[A].checksums, servers.by_url[A].down = list(checksums), down
    return verify_weights(FakeModel(*TENSORS), config, urls, ServerPool([A]), "v1", servers.make_client)


@pytest.mark.parametrize("checksum", [cpu_checksum, gpu_checksum])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equal_weights_agree_in_every_form_that_servers_keep_them_in(
    checksum: Checksum, fused: bool, padded: bool
) -> None:
    assert compare(served(checksum, fused=fused, padded=padded)) is None


@pytest.mark.parametrize(("fused", "name"), [(False, "k_proj"), (True, "qkv_proj")])
def test_another_value_is_found(fused: bool, name: str) -> None:
    wrong = f"layers.0.self_attn.{name}.weight"
    difference = compare(served(cpu_checksum, fused=fused) | {wrong: cpu_checksum([Q, K + 1e-6, V])})
    assert str(difference) == f"weight sync: {A} serves other weights than the trainer's v1: {wrong} differs"
    assert difference is not None and difference.url == A


def test_of_quantised_weights_the_bytes_and_the_scales_are_compared() -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16", weight_format="fp8_blockwise")
    quantised = {
        part: value for name, tensor in TENSORS for part, value in WEIGHT_FORMATS["fp8_blockwise"].convert(name, tensor)
    }
    fused = {}
    for kind in ("weight", "weight_scale_inv"):
        parts = [quantised.pop(f"layers.0.self_attn.{name}_proj.{kind}") for name in "qkv"]
        fused[f"layers.0.self_attn.qkv_proj.{kind}"] = parts
        down = f"layers.0.mlp.down_proj.{kind}"
        fused[down] = [quantised.pop(down)]
    assert fused[down][0].dtype == torch.float32
    # What is not quantised is held in the server's dtype.
    held = fused | {name: [tensor.to(torch.bfloat16)] for name, tensor in quantised.items()}
    checksums = {name: cpu_checksum(tensors) for name, tensors in held.items()}
    assert compare(checksums, config=config) is None
    for wrong in fused:
        changed = [fused[wrong][0].clone(), *fused[wrong][1:]]
        changed[0].view(torch.uint8)[0, 0] ^= 1
        difference = compare(checksums | {wrong: cpu_checksum(changed)}, config=config)
        assert f"{wrong} differs" in str(difference)


def test_what_cannot_be_compared_is_told() -> None:
    lacking = served(cpu_checksum)
    del lacking["norm.weight"]
    assert f"{A} has no tensor norm.weight to compare with the trainer's v1" in str(compare(lacking))
    whole = served(cpu_checksum)
    assert "shares its weights among 2 processes: write rollout.verify_weights=0" in str(compare(whole, whole))
    assert "no server serves the weights" in str(compare(whole, urls=()))
    assert "could not be compared: http://a:1" in str(compare(whole, down=True))


@pytest.mark.parametrize(("names", "count"), [(7, 2), (7, 7), (7, 9), (1, 1)])
def test_every_name_has_its_turn(names: int, count: int) -> None:
    everything = [f"t{index}" for index in range(names)]
    choices = [_choose(everything, count, f"step_{step:06d}") for step in range(60)]
    assert all(len(set(choice)) == len(choice) == min(count, names) for choice in choices)
    assert {name for choice in choices for name in choice} == set(everything)
