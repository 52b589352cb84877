"""Checks of the embedded server's engine that are the same on every device; tests on the CPU and on GPUs call them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.embedded.engine import Engine
from dasd_megatron.rollout.embedded.requests import InvalidRequestError, Row
from dasd_megatron.rollout.weight_checksum import cpu_checksum

TINY = TinyModelConfig(
    hidden_size=64, num_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96
)
PROMPTS = [list(range(5, 25)), [7, 8, 9], list(range(30, 39)), [11]]
TOKENS = 12
# Nats, beside a float32 model: rounding of each kind of weights, with room.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def make_models(folder: Path) -> tuple[str, str]:
    """Write two models of one shape and other weights."""
    first, second = (str(make_tiny_model(folder / name, TINY, seed)) for seed, name in enumerate("ab"))
    return first, second


@contextlib.contextmanager
def serving(path: str, device: torch.device, dtype: torch.dtype) -> Iterator[Engine]:
    """An engine, whose thread has ended afterwards."""
    made = Engine(
        path,
        device=device,
        dtype=dtype,
        max_batch_size=8,
        weight_version="1",
        deterministic=False,
        cache_bytes=1 << 28,
    )
    try:
        yield made
    finally:
        made.close()
        made._thread.join(10)
        assert not made._thread.is_alive()


def complete(engine: Engine, **sampling: Any) -> list[Row]:
    """Let the engine go on from all prompts at once, greedily unless told otherwise."""
    params = {"max_new_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True, **sampling}
    job = engine.parse_request({"input_ids": PROMPTS, "sampling_params": params, "return_logprob": True})
    engine.submit(job)
    job.done.result(120)
    return job.rows


def reference(path: str, device: torch.device) -> PreTrainedModel:
    """transformers' model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()


@torch.no_grad()
def expected_log_probs(model: PreTrainedModel, row: Row) -> list[float]:
    """Score the tokens that a row has drawn, without a cache and without padding."""
    ids = torch.tensor([[*row.prompt, *row.output_ids]], device=model.device)
    log_probs = torch.log_softmax(model(ids).logits[0, len(row.prompt) - 1 : -1].double(), dim=-1)
    return log_probs[torch.arange(len(row.output_ids)), row.output_ids].tolist()


def check_generation(path: str, device: torch.device, dtype: torch.dtype) -> None:
    """Greedy tokens are transformers' own of each prompt alone (float32), and log-probs those of a float32 model."""
    model = reference(path, device)
    with serving(path, device, dtype) as engine:
        assert {(p.device.type, p.dtype) for p in engine.model.parameters()} == {(device.type, dtype)}
        greedy = complete(engine)
        sampled = complete(engine, temperature=1.0, sampling_seed=3, top_p=0.9)
        assert [row.output_ids for row in complete(engine)] == [row.output_ids for row in greedy]
    for row in [*greedy, *sampled]:
        assert len(row.output_ids) == TOKENS
        assert row.log_probs == pytest.approx(expected_log_probs(model, row), abs=TOLERANCE[dtype])
    if dtype is torch.float32:
        for row in greedy:
            ids = torch.tensor([row.prompt], device=device)
            # No token ends the sequence, as the engine was told.
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=0, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip
            assert row.output_ids == found[0, len(row.prompt) :].tolist()


def check_weight_update(first: str, second: str, device: torch.device, dtype: torch.dtype) -> None:
    """Weights from disk land on the device, whole; released memory is given back and comes again with them."""
    on_gpu = device.type == "cuda"
    with serving(second, device, dtype) as engine:
        expected = [row.output_ids for row in complete(engine)]
        checksums = engine.checksums([])
    held = {name: p.to(dtype) for name, p in reference(second, torch.device("cpu")).named_parameters()}
    assert checksums == {name: cpu_checksum([tensor]) for name, tensor in held.items()}
    with serving(first, device, dtype) as engine:
        assert [row.output_ids for row in complete(engine)] != expected
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        engine.release_memory(None)
        assert sum(p.numel() for p in engine.model.parameters()) == 0
        if on_gpu:
            assert torch.cuda.memory_allocated(device) <= before - engine.weight_bytes
        with pytest.raises(InvalidRequestError, match="memory is released"):
            complete(engine)
        engine.resume_memory(None)
        with pytest.raises(InvalidRequestError, match="send them again"):
            complete(engine)
        success, message = engine.update_from_disk(second, "2").result(60)
        assert success, message
        assert {(p.device.type, p.dtype) for p in engine.model.parameters()} == {(device.type, dtype)}
        assert engine.weight_version == "2" and engine.checksums([]) == checksums
        assert [row.output_ids for row in complete(engine)] == expected
