"""The served model at work: prompts in parts, top log-probs, and tokenizers that fail."""

from __future__ import annotations

import math

import pytest
import torch

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.embedded import decoder as decoder_module
from dasd_megatron.rollout.embedded.decoder import Decoder
from dasd_megatron.rollout.embedded.loading import load_model, load_tokenizer
from dasd_megatron.rollout.embedded.requests import build_job

CPU = torch.device("cpu")
TINY = TinyModelConfig(
    hidden_size=32, num_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64
)
PROMPTS = [list(range(5, 25)), [7, 8, 9], list(range(30, 39))]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    path = str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", TINY, 0))
    return Decoder(load_model(path, torch.float32, CPU), load_tokenizer(path), context_length=256, model_path=path)


def rows_of(**body):
    body = {"input_ids": PROMPTS, **body}
    return build_job(body, tokenizer=None, vocab_size=100, context_length=256, eos_ids=frozenset({1})).rows


def sample(decoder, tokens=6, **body):
    rows = rows_of(sampling_params={"max_new_tokens": tokens, "sampling_seed": 3, "ignore_eos": True}, **body)
    with torch.inference_mode():
        batch, endings = decoder.read_prompts(rows)
        for _ in range(tokens - 1):
            assert not endings
            endings = decoder.decode(batch)
    assert {row.rid for row, _ in endings} == {row.rid for row in rows}
    return rows


@pytest.mark.parametrize("start", [-1, 0, 2])
@pytest.mark.parametrize("limit", ["PREFILL_TOKENS", "MAX_PROMPT_LOGITS"])
def test_prompts_read_in_parts_are_those_read_at_once(decoder, monkeypatch, limit, start):
    asked = {"return_logprob": True, "logprob_start_len": start, "top_logprobs_num": 3}
    whole = sample(decoder, **asked)
    # Only whole prompts are grouped, so the bound of groups stays as it is.
    monkeypatch.setattr(decoder_module, limit, 6 if limit == "PREFILL_TOKENS" else 6 * 100)
    parts = sample(decoder, **asked)
    for a, b in zip(whole, parts, strict=True):
        assert a.output_ids == b.output_ids
        assert [top is None for top in a.input_top] == [top is None for top in b.input_top]
        for x, y in zip(a.input_log_probs + a.log_probs, b.input_log_probs + b.log_probs, strict=True):
            assert (x is None and y is None) or math.isclose(x, y, abs_tol=1e-5)
        if start >= 0:
            assert len(b.input_log_probs) == len(b.prompt) - start and b.input_log_probs[0] is None
            assert [[i for _, i in top] for top in a.input_top[1:]] == [[i for _, i in top] for top in b.input_top[1:]]


def test_everything_is_on_the_device_of_the_model(decoder):
    """A tensor that is made on no device in particular cannot be used here: it would be on the meta device."""
    options = {
        "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2,
        "sampling_params": [
            {"max_new_tokens": 6, "sampling_seed": 3, "top_k": top_k, "min_new_tokens": least, "ignore_eos": True}
            for top_k, least in ((-1, 0), (5, 0), (1, 4))
        ],
    }  # fmt: skip
    expected, found = rows_of(**options), rows_of(**options)
    for rows, device in ((expected, "cpu"), (found, "meta")):
        with torch.inference_mode(), torch.device(device):
            batch, _ = decoder.read_prompts(rows)
            decoder.decode(batch)
            other, _ = decoder.read_prompts(rows_of())
            batch.join(other)
            decoder.decode(batch)
            decoder.recompute_cache(batch)
            batch.rows[0].finish_reason = {"type": "length"}
            assert batch.compact() and len(batch.rows) == 5
            decoder.decode(batch)
    assert [row.output_ids for row in found] == [row.output_ids for row in expected]
    assert [row.log_probs for row in found] == [row.log_probs for row in expected]


def test_half_precision_is_that_of_the_weights(decoder, tmp_path):
    path = str(make_tiny_model(tmp_path / "tiny", TINY, 0))
    half = Decoder(load_model(path, torch.bfloat16, CPU), load_tokenizer(path), context_length=256, model_path=path)
    assert half.cache_token_bytes * 2 == decoder.cache_token_bytes
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    asked = {"return_logprob": True, "logprob_start_len": 0}
    for exact, rounded in zip(sample(decoder, 1, **asked), sample(half, 1, **asked), strict=True):
        for x, y in zip(exact.input_log_probs[1:], rounded.input_log_probs[1:], strict=True):
            assert 0 < abs(x - y) < 0.05


def test_top_log_probs_of_one_row_cost_the_others_nothing(decoder):
    plain = sample(decoder, return_logprob=True)
    mixed = sample(decoder, return_logprob=True, top_logprobs_num=[0, 2**62, 2])
    assert [row.top for row in mixed[:1]] == [[]]
    assert {len(top) for top in mixed[1].top} == {100} and {len(top) for top in mixed[2].top} == {2}
    assert [row.log_probs for row in plain] == [row.log_probs for row in mixed]
    for top, log_prob, token in zip(mixed[1].top, mixed[1].log_probs, mixed[1].output_ids, strict=True):
        assert dict((i, value) for value, i in top)[token] == log_prob
        assert [value for value, _ in top] == sorted((value for value, _ in top), reverse=True)


def test_a_tokenizer_that_fails_on_one_row_ends_that_row(decoder, monkeypatch):
    # The token that ends a sequence would end a row for another reason, once in a hundred rows.
    asked = {"max_new_tokens": 4, "ignore_eos": True}
    rows = rows_of(sampling_params=[asked, {**asked, "stop": "x"}, asked])
    monkeypatch.setattr(decoder, "tokenizer", None)
    with torch.inference_mode():
        batch, endings = decoder.read_prompts(rows)
    assert [(row.rid, reason["status_code"]) for row, reason in endings] == [(rows[1].rid, 500)]
    assert len(batch.rows) == 3 and all(row.output_ids for row in rows)


def test_prompts_that_cannot_be_read_end_their_own_request(decoder, monkeypatch):
    read_group = Decoder._read_group

    def fail_on(token):
        def read(self, rows):
            if any(row.prompt[0] == token for row in rows):
                raise MemoryError("no room")
            return read_group(self, rows)

        monkeypatch.setattr(Decoder, "_read_group", read)

    fail_on(77)
    good, bad, other = rows_of(), rows_of(input_ids=[[77, 5]]), rows_of(input_ids=[[9]])
    with torch.inference_mode():
        batch, endings = decoder.read_prompts([*good, *bad, *other])
    assert [row for row, _ in endings] == bad and "no room" in endings[0][1]["message"]
    assert batch.rows == [*good, *other] and all(len(row.output_ids) == 1 for row in batch.rows)
    fail_on(5)
    with torch.inference_mode():
        batch, endings = decoder.read_prompts(rows_of())
    assert batch is None and len(endings) == 3
