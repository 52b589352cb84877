"""What a rollout server owes the trainer, over HTTP: endpoints, answer shapes, error bodies, log-probs, versions,
aborts, pauses, updates.

Tests that take the fixture ``target`` run against the embedded server and against real SGLang; those that take
``embedded_target`` or start their own process are about the embedded server alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from dasd_megatron.config import RolloutConfig, SGLangConfig, TinyModelConfig
from dasd_megatron.models.tiny import character_tokenizer, make_tiny_model
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.rollout.local_server import LocalServer, PortInUseError, ServerStartError
from dasd_megatron.rollout.transport import RequestRefusedError
from dasd_megatron.rollout.weight_group import join_weight_group
from dasd_megatron.rollout.weight_payload import SharedBuffer, pack
from tests.support.servers import sglang_python

pytestmark = pytest.mark.integration

TINY = TinyModelConfig(
    hidden_size=64, num_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128
)
CONTEXT = TINY.max_position_embeddings
PROMPTS = [[4, 40, 41, 42], [10, 20, 30, 40, 50, 60, 70, 80, 90, 11, 21], [33], [7, 8, 9, 10, 11, 12, 13]]
END = 1


@dataclass
class Target:
    kind: str
    url: str
    model_path: str

    def request(self, method, path, body=None, timeout=60.0):
        return httpx.request(method, self.url + path, json=body, timeout=timeout, trust_env=False)

    def post(self, path, body=None, timeout=60.0):
        return self.request("POST", path, body, timeout)

    def generate(self, **body):
        response = self.post("/generate", body)
        assert response.status_code == 200, response.text
        return response.json()

    def load(self, name):
        return self.request("GET", "/v1/loads").json()["loads"][0][name]

    def decoding_steps(self):
        return self.request("GET", "/server_info").json()["internal_states"][0]["decoding_steps"]

    def wait_for(self, name, count):
        deadline = time.monotonic() + 20
        while self.load(name) < count:
            assert time.monotonic() < deadline, f"{name} never reached {count}"
            time.sleep(0.01)

    def wait_busy(self):
        self.wait_for("num_running_reqs", 1)


def rollout(**changes):
    options = {"threads": 1, "startup_timeout_seconds": 60.0, "max_new_tokens": 8, "max_prompt_tokens": 64}
    return RolloutConfig(**{**options, **changes})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of two tiny models of one shape, and of models that do not fit them."""
    root = tmp_path_factory.mktemp("models")
    paths = {name: str(make_tiny_model(root / name, TINY, seed)) for name, seed in (("a", 0), ("b", 1))}
    wider = TinyModelConfig(**{**vars(TINY), "intermediate_size": 192})
    deeper = TinyModelConfig(**{**vars(TINY), "num_layers": 3})
    paths |= {
        "wider": str(make_tiny_model(root / "wider", wider, 0)),
        "deeper": str(make_tiny_model(root / "deeper", deeper, 0)),
    }
    for name in ("no_config_wider", "no_config_deeper"):  # only the tensors can tell
        paths[name] = str(make_tiny_model(root / name, wider if "wider" in name else deeper, 0))
        (root / name / "config.json").unlink()
    rope = Path(make_tiny_model(root / "rope", TINY, 0))  # same tensors, another function
    config = json.loads((rope / "config.json").read_text())
    (rope / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))
    torn = Path(make_tiny_model(root / "torn", TINY, 0))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:5000])
    (root / "empty").mkdir()
    return paths | {"rope": str(rope), "torn": str(torn), "empty": str(root / "empty"), "absent": str(root / "absent")}


@pytest.fixture(scope="module")
def serve(models, tmp_path_factory):
    """Gives the server of a kind, started when it is first asked for."""
    found = {}
    with ExitStack() as stack:

        def of(kind):
            if kind not in found:
                changes = {}
                if kind == "sglang":
                    sglang = SGLangConfig(backend="cpu", python=sglang_python(), max_total_tokens=65536)
                    changes = {"engine": "sglang", "sglang": sglang, "startup_timeout_seconds": 240.0}
                log = tmp_path_factory.mktemp("log") / "server.log"
                server = stack.enter_context(LocalServer(models["a"], "v1", rollout(max_batch_size=64, **changes), log))
                found[kind] = Target(kind, server.url, models["a"])
            return found[kind]

        yield of


@pytest.fixture(scope="module", params=["embedded", "sglang"])
def target(request, serve):
    return serve(request.param)


@pytest.fixture(scope="module")
def embedded_target(serve):
    return serve("embedded")


def put_back(target):
    target.post("/continue_generation", {})
    body = {"model_path": target.model_path, "weight_version": "v1", "abort_all_requests": True}
    assert target.post("/update_weights_from_disk", body).status_code == 200


@pytest.fixture
def changing(target):
    """The server for tests that change its weights; they are changed back."""
    yield target
    put_back(target)


@pytest.fixture
def embedded(embedded_target):
    yield embedded_target
    put_back(embedded_target)


@pytest.fixture(scope="module")
def reference(models):
    model = AutoModelForCausalLM.from_pretrained(models["a"], dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(models["a"])


def forward_log_probs(model, ids, temperature=1.0):
    """[len(ids) - 1] log-probs of ids[1:] by one unpadded forward pass."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double() / temperature
    return torch.log_softmax(logits, -1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def output_log_probs(answer):
    return [triple[0] for triple in answer["meta_info"]["output_token_logprobs"]]


def outcome(answer):
    meta = answer["meta_info"]
    return (
        answer["text"],
        answer["output_ids"],
        meta["output_token_logprobs"],
        meta["finish_reason"],
        meta["weight_version"],
    )


def seeded(count, **params):
    return [{"sampling_seed": 1000 + i, **params} for i in range(count)]


# ---- Endpoints and shapes ----


@pytest.mark.parametrize("path", ["/health", "/health_generate"])
def test_health(target, path):
    assert target.request("GET", path).status_code == 200


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(target, path):
    info = target.request("GET", path).json()
    assert info["model_path"] == target.model_path
    assert info["weight_version"] == "v1"
    assert info["is_generation"] is True
    assert info["model_type"] == "qwen3"


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info(target, path):
    info = target.request("GET", path).json()
    assert info["model_path"] == target.model_path
    assert isinstance(info["internal_states"], list)


def test_a_single_request_is_answered_by_an_object(target):
    answer = target.generate(
        input_ids=PROMPTS[0], sampling_params={"max_new_tokens": 5, "temperature": 0}, return_logprob=True, rid="mine"
    )
    assert set(answer) >= {"text", "output_ids", "meta_info"}
    meta = answer["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (4, 5, 0)
    assert meta["weight_version"] == "v1"
    assert meta["e2e_latency"] > 0
    assert [triple[1:] for triple in meta["output_token_logprobs"]] == [[token, None] for token in answer["output_ids"]]
    assert meta["output_token_logprobs_length"] == 5
    assert meta["input_token_logprobs"] == []


def test_log_probs_come_only_when_asked_for(target):
    assert (
        "output_token_logprobs"
        not in target.generate(input_ids=[5], sampling_params={"max_new_tokens": 1})["meta_info"]
    )


def test_a_batch_is_answered_by_a_list_even_of_one(target):
    params = {"max_new_tokens": 3, "temperature": 0}
    assert len(target.generate(input_ids=[PROMPTS[0]], sampling_params=params)) == 1
    answers = target.generate(input_ids=PROMPTS, sampling_params=params, rid=["a", "b", "c", "d"])
    assert [a["meta_info"]["id"] for a in answers] == ["a", "b", "c", "d"]
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [len(p) for p in PROMPTS]
    assert [a["meta_info"]["id"] for a in target.generate(input_ids=PROMPTS[:2], sampling_params=params, rid="r")] == [
        "r_0",
        "r_1",
    ]


def test_text_prompts_are_tokenized(target, reference):
    text = "12+7="
    params = {"max_new_tokens": 6, "temperature": 0}
    by_text = target.generate(text=text, sampling_params=params)
    by_ids = target.generate(input_ids=reference[1](text)["input_ids"], sampling_params=params)
    assert by_text["output_ids"] == by_ids["output_ids"]
    assert by_text["text"] == reference[1].decode(by_text["output_ids"], skip_special_tokens=True)
    assert len(target.generate(text=[text, text], sampling_params=params)) == 2


def test_defaults_without_sampling_params(target):
    meta = target.generate(input_ids=PROMPTS[0])["meta_info"]
    assert meta["completion_tokens"] == 128 or meta["finish_reason"]["type"] == "stop"


def test_n_gives_a_prompt_major_flat_list(target):
    answers = target.generate(input_ids=PROMPTS[:2], sampling_params={"n": 3, "max_new_tokens": 8})
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [4, 4, 4, 11, 11, 11]
    if target.kind == "embedded":  # deterministic SGLang takes 42 where no seed is given
        assert len({tuple(a["output_ids"]) for a in answers[:3]}) > 1, "parallel samples without a seed must differ"
    assert len({a["meta_info"]["id"] for a in answers}) == 6
    assert len(target.generate(input_ids=PROMPTS[0], sampling_params={"n": 2, "max_new_tokens": 2})) == 2


def test_unknown_top_level_fields_are_ignored(target):
    target.generate(input_ids=[5], sampling_params={"max_new_tokens": 1}, some_field_of_tomorrow=1)


# ---- Log-probs and sampling ----


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.7}, {"top_k": 5}, {"top_k": 20, "top_p": 0.9}])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_output_log_probs_are_the_models_after_temperature_before_the_cuts(target, reference, temperature, cut):
    params = seeded(len(PROMPTS), max_new_tokens=24, temperature=temperature, **cut)
    for prompt, answer in zip(
        PROMPTS, target.generate(input_ids=PROMPTS, sampling_params=params, return_logprob=True), strict=True
    ):
        expected = forward_log_probs(reference[0], prompt + answer["output_ids"], temperature)[len(prompt) - 1 :]
        torch.testing.assert_close(
            torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
        )


def test_greedy_is_the_argmax_of_a_ragged_batch(target, reference):
    answers = target.generate(
        input_ids=PROMPTS, sampling_params={"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
    )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.inference_mode():
            logits = reference[0](torch.tensor([prompt + answer["output_ids"]])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer["output_ids"]


def test_prompt_log_probs_are_raw(target, reference):
    body = {"input_ids": PROMPTS, "sampling_params": {"max_new_tokens": 1, "temperature": 0.5}, "return_logprob": True}
    for prompt, answer in zip(PROMPTS, target.generate(**body, logprob_start_len=0), strict=True):
        triples = answer["meta_info"]["input_token_logprobs"]
        assert [t[1] for t in triples] == prompt
        assert triples[0][0] is None
        torch.testing.assert_close(
            torch.tensor([t[0] for t in triples[1:]], dtype=torch.float64),
            forward_log_probs(reference[0], prompt),
            atol=1e-4,
            rtol=0,
        )
    late = target.generate(**{**body, "input_ids": PROMPTS[1]}, logprob_start_len=8)["meta_info"][
        "input_token_logprobs"
    ]
    assert [t[1] for t in late] == PROMPTS[1][8:] and late[0][0] is None


def test_top_log_probs_and_texts(target, reference):
    answer = target.generate(
        input_ids=PROMPTS[0],
        sampling_params={"max_new_tokens": 3, "temperature": 0},
        return_logprob=True,
        top_logprobs_num=4,
        return_text_in_logprobs=True,
    )
    tops = answer["meta_info"]["output_top_logprobs"]
    assert [len(top) for top in tops] == [4, 4, 4]
    for top, chosen in zip(tops, answer["meta_info"]["output_token_logprobs"], strict=True):
        assert top[0] == chosen
        assert [t[0] for t in top] == sorted((t[0] for t in top), reverse=True)
        assert [t[2] for t in top] == [reference[1].decode([t[1]]) for t in top]


def test_left_padding_changes_nothing(target):
    params = seeded(len(PROMPTS), max_new_tokens=20)
    together = target.generate(input_ids=PROMPTS, sampling_params=params, return_logprob=True)
    for prompt, one, batched in zip(PROMPTS, params, together, strict=True):
        alone = target.generate(input_ids=prompt, sampling_params=one, return_logprob=True)
        assert alone["output_ids"] == batched["output_ids"]
        torch.testing.assert_close(output_log_probs(alone), output_log_probs(batched), atol=1e-4, rtol=0)


def test_rows_of_unequal_length_do_not_disturb_each_other(target, reference):
    """Rows leave the batch one after another; those that stay must go on as if nothing had happened."""
    params = [{"max_new_tokens": 2 + 3 * i, "sampling_seed": i, "ignore_eos": True} for i in range(20)]
    prompts = [PROMPTS[i % 4] for i in range(20)]
    for prompt, one, answer in zip(
        prompts, params, target.generate(input_ids=prompts, sampling_params=params, return_logprob=True), strict=True
    ):
        assert len(answer["output_ids"]) == one["max_new_tokens"]
        expected = forward_log_probs(reference[0], prompt + answer["output_ids"])[len(prompt) - 1 :]
        torch.testing.assert_close(
            torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
        )


def test_the_same_request_gives_the_same_bits(target):
    body = {"input_ids": PROMPTS * 4, "sampling_params": seeded(16, max_new_tokens=30), "return_logprob": True}
    first, second = target.generate(**body), target.generate(**body)
    assert list(map(outcome, first)) == list(map(outcome, second))
    assert len({tuple(a["output_ids"]) for a in first[::4]}) == 4, "seeds must matter"


def test_requests_without_a_seed_differ(embedded_target):
    params = {"max_new_tokens": 16, "ignore_eos": True}
    assert (
        len({tuple(embedded_target.generate(input_ids=[5, 6], sampling_params=params)["output_ids"]) for _ in range(3)})
        == 3
    )


def test_first_tokens_follow_the_models_distribution(target, reference):
    with torch.inference_mode():
        probs = torch.softmax(reference[0](torch.tensor([PROMPTS[0]])).logits[0, -1].double(), -1)
    answers = target.generate(input_ids=[PROMPTS[0]] * 5000, sampling_params=seeded(5000, max_new_tokens=1))
    counts = torch.bincount(torch.tensor([a["output_ids"][0] for a in answers]), minlength=len(probs)).double()
    statistic = float(((counts - 5000 * probs) ** 2 / (5000 * probs)).sum())
    assert statistic < 162  # 99.99% quantile of chi-square with 99 degrees of freedom


# ---- Stopping ----


@pytest.fixture(scope="module")
def greedy(target):
    """A greedy continuation of 24 tokens, to choose stops from."""
    answer = target.generate(
        input_ids=PROMPTS[1], sampling_params={"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    )
    return answer["output_ids"], answer["text"]


def stopped(target, **params):
    answer = target.generate(
        input_ids=PROMPTS[1], sampling_params={"temperature": 0, "max_new_tokens": 24, **params}, return_logprob=True
    )
    assert (
        len(answer["meta_info"]["output_token_logprobs"])
        == len(answer["output_ids"])
        == answer["meta_info"]["completion_tokens"]
    )
    return answer


def test_stop_token_ids(target, greedy, reference):
    ids, _ = greedy
    token = ids[5]
    first = ids.index(token)
    answer = stopped(target, stop_token_ids=[token, 98])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert answer["output_ids"] == ids[: first + 1]
    assert answer["text"] == reference[1].decode(ids[:first])
    assert stopped(target, stop_token_ids=[token], no_stop_trim=True)["text"] == reference[1].decode(ids[: first + 1])
    assert stopped(target, stop_token_ids=[token], ignore_eos=True)["meta_info"]["finish_reason"]["type"] == "length"


def test_stop_strings(target, greedy):
    ids, text = greedy
    stop = text[6:8]
    end = text.index(stop) + 2
    answer = stopped(target, stop=["never this", stop])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["text"] == text[: end - 2]
    assert answer["output_ids"] == ids[:end]
    assert stopped(target, stop=stop, no_stop_trim=True)["text"] == text[:end]


def test_min_new_tokens_bars_the_stops(target, greedy):
    ids, _ = greedy
    token = ids[0]
    assert len(stopped(target, stop_token_ids=[token])["output_ids"]) == 1
    answer = stopped(target, stop_token_ids=[token], min_new_tokens=6)
    assert len(answer["output_ids"]) > 6
    assert token not in answer["output_ids"][:6]


def test_no_tokens_asked_for(target):
    answer = stopped(target, max_new_tokens=0)
    assert answer["output_ids"] == [] and answer["text"] == ""
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def test_end_of_sequence_token(target):
    """Some of many samples end by themselves; their last token is the end token, and its log-prob is there."""
    body = {"input_ids": [PROMPTS[0]] * 200, "sampling_params": seeded(200, max_new_tokens=40), "return_logprob": True}
    answers = target.generate(**body)
    ended = [a for a in answers if a["meta_info"]["finish_reason"]["type"] == "stop"]
    assert ended, "of 8000 random tokens about 80 should be the end token"
    for answer in answers:
        by_itself = answer in ended
        assert (END in answer["output_ids"]) == by_itself
        if by_itself:
            assert answer["output_ids"].index(END) == len(answer["output_ids"]) - 1
            assert answer["meta_info"]["finish_reason"]["matched"] == END
            assert "<|end|>" not in answer["text"]


def test_special_tokens_in_the_text(target):
    params = {"max_new_tokens": 40, "ignore_eos": True}
    seeds = seeded(60, **params)
    plain = target.generate(input_ids=[[5]] * 60, sampling_params=seeds)
    shown = target.generate(input_ids=[[5]] * 60, sampling_params=[{**s, "skip_special_tokens": False} for s in seeds])
    assert [a["output_ids"] for a in plain] == [a["output_ids"] for a in shown]
    assert not any("<|end|>" in a["text"] for a in plain)
    assert any("<|end|>" in a["text"] for a in shown)


# ---- Refusals ----

ERROR_MESSAGE = "message in an error object"
ERROR_STRING = "error string"
VALIDATION = "validation error"

REFUSED = {
    "no prompt": ({}, ERROR_MESSAGE, "Either text, input_ids or input_embeds should be provided."),
    "empty input_ids": ({"input_ids": []}, ERROR_MESSAGE, "input_ids cannot be empty."),
    "prompt as long as the context": (
        {"input_ids": [5] * CONTEXT},
        ERROR_MESSAGE,
        f"The input ({CONTEXT} tokens) is longer than the model's context length ({CONTEXT} tokens).",
    ),
    "prompt and response too long": (
        {"input_ids": [5] * 200, "sampling_params": {"max_new_tokens": 100}},
        ERROR_MESSAGE,
        f"Requested token count exceeds the model's maximum context length of {CONTEXT} tokens. You requested a total "
        "of 300 tokens",
    ),
    "logprob_start_len": (
        {"return_logprob": True, "logprob_start_len": 5},
        ERROR_MESSAGE,
        "is higher than the number of input tokens",
    ),
    "negative temperature": (
        {"sampling_params": {"temperature": -1}},
        ERROR_MESSAGE,
        "temperature must be a non-negative finite number",
    ),
    "top_p 0": ({"sampling_params": {"top_p": 0.0}}, ERROR_MESSAGE, "top_p must be in (0, 1], got 0.0."),
    "top_p above 1": ({"sampling_params": {"top_p": 1.5}}, ERROR_MESSAGE, "top_p must be in (0, 1], got 1.5."),
    "top_k 0": ({"sampling_params": {"top_k": 0}}, ERROR_MESSAGE, "top_k must be -1 (disable) or at least 1, got 0."),
    "top_k -2": (
        {"sampling_params": {"top_k": -2}},
        ERROR_MESSAGE,
        "top_k must be -1 (disable) or at least 1, got -2.",
    ),
    "negative max_new_tokens": ({"sampling_params": {"max_new_tokens": -1}}, ERROR_MESSAGE, "max_new_tokens"),
    "min over max": (
        {"sampling_params": {"min_new_tokens": 9, "max_new_tokens": 5}},
        ERROR_MESSAGE,
        "[0, max_new_tokens(5)], got 9.",
    ),
    "seed out of range": (
        {"sampling_params": {"sampling_seed": 2**63}},
        ERROR_MESSAGE,
        "sampling_seed must be in [-2**63, 2**63 - 1]",
    ),
    "too many stops": (
        {"sampling_params": {"stop": ["x"] * 33}},
        ERROR_MESSAGE,
        "at most 32 stop strings are allowed, got 33",
    ),
    "unequal n": (
        {"input_ids": [[5], [6]], "sampling_params": [{"n": 1}, {"n": 2}]},
        ERROR_MESSAGE,
        "parallel_sample_num should be the same",
    ),
    "list with n": (
        {"input_ids": [[5], [6]], "sampling_params": {"n": 2}, "return_logprob": [True, True]},
        ERROR_MESSAGE,
        "Cannot use list return_logprob with parallel_sample_num > 1",
    ),
    "rids of another length": ({"input_ids": [[5], [6]], "rid": ["a"]}, ERROR_MESSAGE, "rids length mismatch"),
    "equal rids": ({"input_ids": [[5], [6]], "rid": ["a", "a"]}, ERROR_MESSAGE, "Duplicate request IDs"),
    "unknown sampling parameter": (
        {"sampling_params": {"seed": 1}},
        ERROR_STRING,
        "unknown field `seed`, expected one of `max_new_tokens`",
    ),
    "temperature as text": (
        {"sampling_params": {"temperature": "hot"}},
        ERROR_STRING,
        'invalid type: string "hot", expected f64',
    ),
    "float max_new_tokens": (
        {"sampling_params": {"max_new_tokens": 1.5}},
        ERROR_STRING,
        "invalid type: floating point `1.5`, expected i64",
    ),
    "text is a number": ({"text": 5}, VALIDATION, "text"),
    "input_ids of text": ({"input_ids": ["a"]}, VALIDATION, "elements must be int or list; got str"),
    "input_ids of floats": ({"input_ids": [1, 2.5]}, VALIDATION, "contains non-int64 element"),
    "sampling_params is text": ({"sampling_params": "hot"}, VALIDATION, "sampling_params"),
}
# What the embedded server refuses though SGLang lets it pass or falls over.
EMBEDDED_REFUSED = {
    "empty prompt in a batch": ({"input_ids": [[5], []]}, ERROR_MESSAGE, "The prompt is empty"),
    "empty text": ({"input_ids": None, "text": ""}, ERROR_MESSAGE, "The prompt is empty"),
    "token past the vocabulary": (
        {"input_ids": [5, 100]},
        ERROR_MESSAGE,
        "out-of-vocabulary token id 100; valid range is [0, 100)",
    ),
    "negative token": ({"input_ids": [-1]}, ERROR_MESSAGE, "out-of-vocabulary token id -1"),
    "n 0": ({"sampling_params": {"n": 0}}, ERROR_MESSAGE, "n must be at least 1"),
    "sampling_params of another length": (
        {"input_ids": [[5], [6]], "sampling_params": [{}]},
        ERROR_MESSAGE,
        "length of sampling_params",
    ),
    "an unsupported field": ({"stream": True}, ERROR_MESSAGE, "stream is not supported"),
    "an unsupported parameter": ({"sampling_params": {"min_p": 0.1}}, ERROR_MESSAGE, "min_p=0.1 is not supported"),
}


def check_refusal(target, change, shape, message):
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1}, **change}
    if not change:
        del body["input_ids"]
    response = target.post("/generate", {k: v for k, v in body.items() if v is not None})
    assert response.status_code == 400, response.text
    answer = response.json()
    if shape is ERROR_MESSAGE:
        assert set(answer) == {"error"} and set(answer["error"]) == {"message"}
        assert message in answer["error"]["message"]
    elif shape is ERROR_STRING:
        assert set(answer) == {"error"} and message in answer["error"]
    else:
        assert message in answer.pop("message")
        assert answer == {"object": "error", "type": "Bad Request", "param": None, "code": 400}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_in_the_servers_words(target, case):
    check_refusal(target, *case)


@pytest.mark.parametrize("case", EMBEDDED_REFUSED.values(), ids=EMBEDDED_REFUSED.keys())
def test_the_embedded_server_refuses_what_it_cannot_do(embedded_target, case):
    check_refusal(embedded_target, *case)


def test_neutral_values_of_unsupported_parameters_pass(embedded_target):
    neutral = {
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0,
        "regex": None,
        "stop_regex": None,
        "beam_width": 1,
        "top_k": -1,
    }
    embedded_target.generate(input_ids=[5], sampling_params={"max_new_tokens": 1, **neutral})


@pytest.mark.parametrize("path", ["/generate", "/update_weights_from_disk", "/pause_generation", "/abort_request"])
def test_a_body_that_is_not_json_is_refused(target, path):
    response = httpx.post(
        target.url + path,
        content=b"{not json",
        headers={"content-type": "application/json"},
        timeout=10,
        trust_env=False,
    )
    assert response.status_code == 400
    assert response.json()["type"] == "Bad Request"


def test_required_fields_and_choices_of_control_calls(target):
    assert target.post("/update_weights_from_disk", {}).status_code == 400
    assert target.post("/pause_generation", {"mode": "sleep"}).status_code == 400


def test_parallel_samples_of_one_seed_are_identical(target):
    """As in SGLang under --enable-deterministic-inference: the n copies share the seed."""
    params = {"n": 3, "sampling_seed": 5, "max_new_tokens": 10}
    answers = target.generate(input_ids=PROMPTS[0], sampling_params=params)
    assert len({tuple(a["output_ids"]) for a in answers}) == 1


# ---- Abort, pause, flush ----

LONG = {"max_new_tokens": 240, "ignore_eos": True}


class Background:
    """A request in a thread of its own."""

    def __init__(self, target, **body):
        self.pool = ThreadPoolExecutor(1)
        self.future = self.pool.submit(target.post, "/generate", body)

    def answer(self, timeout=60):
        response = self.future.result(timeout)
        self.pool.shutdown()
        assert response.status_code == 200, response.text
        return response.json()


def long_request(target, rows=64, **changes):
    body = {
        "input_ids": [[5, 6]] * rows,
        "sampling_params": [{**LONG, "sampling_seed": i} for i in range(rows)],
        "return_logprob": True,
    }
    return Background(target, **{**body, **changes})


def busy_request(target, **kwargs):
    """A long request that is being worked on. On a machine that has much else to do one may be through before that is
    seen."""
    for _ in range(5):
        running = long_request(target, **kwargs)
        while not running.future.done():
            if target.load("num_running_reqs") > 0:
                return running
            time.sleep(0.01)
        running.answer()
    raise AssertionError("no request was seen running")


def request_behind(target, rows):
    """A long request that is being worked on, and one of so many rows that waits for it."""
    for _ in range(5):
        running = busy_request(target)
        waiting = long_request(target, rows=rows)
        while not running.future.done():
            if target.load("num_waiting_reqs") == rows:
                return running, waiting
            time.sleep(0.01)
        running.answer(), waiting.answer()
    raise AssertionError("no request was seen waiting")


def test_abort_by_id(target):
    # SGLang aborts every request whose id begins so.
    running = busy_request(target, rid=[f"row-{i:02}" for i in range(64)])
    assert target.post("/abort_request", {"rid": "row-03"}).status_code == 200
    answers = running.answer()
    reason = answers[3]["meta_info"]["finish_reason"]
    assert (reason["type"], reason["message"]) == ("abort", "Aborted")
    assert len(answers[3]["output_ids"]) < 240
    assert {len(a["output_ids"]) for a in answers[:3] + answers[4:]} == {240}


def test_abort_all_ends_what_runs_and_what_waits(target):
    running, waiting = request_behind(target, 3)
    target.post("/abort_request", {"abort_all": True})
    for answer in running.answer() + waiting.answer():
        meta = answer["meta_info"]
        assert meta["finish_reason"]["type"] == "abort"
        assert len(answer["output_ids"]) == meta["completion_tokens"] == len(meta["output_token_logprobs"]) < 240
        assert meta["weight_version"] == "v1"
    assert target.generate(input_ids=[5], sampling_params={"max_new_tokens": 1})["output_ids"], "the server must go on"


def test_abort_of_an_unknown_id_is_fine(target):
    assert target.post("/abort_request", {"rid": "nobody"}).status_code == 200
    assert target.post("/abort_request", {}).status_code == 200


def test_pause_aborts_and_holds_new_requests(target):
    running = busy_request(target)
    assert target.post("/pause_generation", {"mode": "abort"}).json() == {
        "message": "Generation paused successfully.",
        "status": "ok",
    }
    assert {a["meta_info"]["finish_reason"]["type"] for a in running.answer()} == {"abort"}
    held = long_request(target, rows=2)
    time.sleep(0.5)
    assert not held.future.done()
    assert target.post("/continue_generation", {}).json() == {
        "message": "Generation continued successfully.",
        "status": "ok",
    }
    assert {len(a["output_ids"]) for a in held.answer()} == {240}


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_suspended_request_goes_on_where_it_was(target, reference, mode):
    undisturbed = long_request(target).answer()
    running = busy_request(target)
    target.post("/pause_generation", {"mode": mode})
    time.sleep(0.3)
    assert not running.future.done()
    target.post("/continue_generation", {})
    answers = running.answer()
    if target.kind == "sglang" and mode == "retract":
        # What was retracted is read again in other batches, whose last bits can tip a draw.
        same = [a["output_ids"] == b["output_ids"] for a, b in zip(answers, undisturbed, strict=True)]
        assert sum(same) > len(same) / 2
        for answer in answers:
            expected = forward_log_probs(reference[0], [5, 6, *answer["output_ids"]])[1:]
            torch.testing.assert_close(
                torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
            )
    else:
        assert list(map(outcome, answers)) == list(map(outcome, undisturbed))


def test_an_abort_reaches_suspended_requests(target):
    running = busy_request(target)
    target.post("/pause_generation", {"mode": "in_place"})
    target.post("/abort_request", {"abort_all": True})
    if target.kind == "sglang":  # which ends them when it goes on
        target.post("/continue_generation", {})
    assert {a["meta_info"]["finish_reason"]["type"] for a in running.answer(10)} == {"abort"}
    target.post("/continue_generation", {})


def test_flush_cache_only_when_idle(target):
    assert target.post("/flush_cache").status_code == 200
    running = busy_request(target)
    assert target.post("/flush_cache").status_code == 400
    assert target.request("GET", "/flush_cache?timeout=30").status_code == 200
    running.answer()


def test_health_answers_during_generation(embedded_target):
    running = busy_request(embedded_target)
    slowest = 0.0
    for _ in range(10):
        start = time.monotonic()
        assert embedded_target.request("GET", "/health").status_code == 200
        slowest = max(slowest, time.monotonic() - start)
    assert not running.future.done()
    assert embedded_target.request("GET", "/health_generate").status_code == 200
    running.answer()
    assert slowest < 1.0


def test_a_client_that_hangs_up_frees_the_server(embedded_target):
    body = {"input_ids": [[5, 6]] * 64 * 40, "sampling_params": LONG}  # 40 batches: about half a minute
    with pytest.raises(httpx.ReadTimeout):
        embedded_target.post("/generate", body, timeout=1.0)
    deadline = time.monotonic() + 5
    while embedded_target.load("num_running_reqs"):
        assert time.monotonic() < deadline, "the request of a gone client is still running"
        time.sleep(0.05)


def test_ids_in_use_are_refused(embedded_target):
    running = busy_request(embedded_target, rows=1, rid=["twice"])
    response = embedded_target.post("/generate", {"input_ids": [5], "rid": "twice"})
    assert (response.status_code, response.json()) == (
        400,
        {"error": {"message": "Duplicate request ID detected: twice"}},
    )
    running.answer()


# ---- Weight updates ----


def test_update_changes_weights_and_version(changing, models):
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=20), "return_logprob": True}
    before = changing.generate(**body)
    response = changing.post("/update_weights_from_disk", {"model_path": models["b"], "weight_version": "v2"})
    assert response.status_code == 200
    assert response.json() == {
        "success": True,
        "message": "Succeeded to update model weights. Weight version updated to v2.",
        "num_paused_requests": 0,
    }
    info = changing.request("GET", "/model_info").json()
    assert (info["weight_version"], info["model_path"]) == ("v2", models["b"])
    model = AutoModelForCausalLM.from_pretrained(models["b"], dtype=torch.float32).eval()
    after = changing.generate(**body)
    assert [a["output_ids"] for a in after] != [a["output_ids"] for a in before]
    for prompt, answer in zip(PROMPTS, after, strict=True):
        assert answer["meta_info"]["weight_version"] == "v2"
        expected = forward_log_probs(model, prompt + answer["output_ids"])[len(prompt) - 1 :]
        torch.testing.assert_close(
            torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
        )
    # Without a version the old one stays, as in SGLang; back on the first weights, the first answers come back to the
    # bit.
    assert (
        changing.post("/update_weights_from_disk", {"model_path": models["a"]}).json()["message"]
        == "Succeeded to update model weights."
    )
    again = changing.generate(**body)
    assert {a["meta_info"]["weight_version"] for a in again} == {"v2"}
    assert [outcome(a)[:4] for a in again] == [outcome(a)[:4] for a in before]


@pytest.mark.parametrize(
    "name", ["wider", "deeper", "no_config_wider", "no_config_deeper", "rope", "torn", "empty", "absent"]
)
def test_a_refused_update_leaves_the_served_weights_alone(embedded_target, models, name):
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=12), "return_logprob": True}
    before = embedded_target.generate(**body)
    response = embedded_target.post("/update_weights_from_disk", {"model_path": models[name], "weight_version": "bad"})
    assert response.status_code == 400
    answer = response.json()
    assert answer["success"] is False and answer["num_paused_requests"] == 0
    assert models[name] in answer["message"] and "\n" not in answer["message"]
    assert list(map(outcome, embedded_target.generate(**body))) == list(map(outcome, before))
    assert embedded_target.request("GET", "/model_info").json()["weight_version"] == "v1"


def test_an_update_waits_for_running_requests_and_passes_no_one(embedded, models):
    running, queued = request_behind(embedded, 2)
    assert (
        embedded.post("/update_weights_from_disk", {"model_path": models["b"], "weight_version": "v2"}).status_code
        == 200
    )
    assert running.future.done()
    assert {a["meta_info"]["weight_version"] for a in running.answer() + queued.answer()} == {"v1"}
    assert {len(a["output_ids"]) for a in running.answer()} == {240}
    assert (
        embedded.generate(input_ids=[5], sampling_params={"max_new_tokens": 1})["meta_info"]["weight_version"] == "v2"
    )


def test_an_update_can_abort_what_runs(embedded, models):
    running = busy_request(embedded)
    body = {"model_path": models["b"], "weight_version": "v2", "abort_all_requests": True}
    assert embedded.post("/update_weights_from_disk", body).status_code == 200
    assert {(a["meta_info"]["finish_reason"]["type"], a["meta_info"]["weight_version"]) for a in running.answer()} == {
        ("abort", "v1")
    }


def test_an_update_during_a_pause_serves_held_requests_under_the_new_version(embedded, models):
    embedded.post("/pause_generation", {})
    held = long_request(embedded, rows=2)
    embedded.wait_for("num_waiting_reqs", 2)
    assert (
        embedded.post("/update_weights_from_disk", {"model_path": models["b"], "weight_version": "v2"}).status_code
        == 200
    )
    assert not held.future.done()
    embedded.post("/continue_generation", {})
    assert {a["meta_info"]["weight_version"] for a in held.answer()} == {"v2"}


def group_of(target, name):
    """This process as the trainer: rank 0 of a weight group with the server; the client that asked it to join, and the
    group."""
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    options = {"rank": 0, "world_size": 2, "name": name, "backend": "gloo", "timeout_seconds": 30.0, "store": store}
    common = {"world_size": 2, "group_name": name, "backend": "gloo"}
    body = {"master_address": "127.0.0.1", "master_port": store.port, "rank_offset": 1, **common}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(target.post, "/init_weights_update_group", body)
        group = join_weight_group("127.0.0.1", store.port, **options)
        assert asked.result().json()["success"] is True
    return group


def send(target, group, name, tensors):
    """One bucket; the answer to its announcement."""
    flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors.values()])
    body = {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": name,
        "load_format": "flattened_bucket",
    }
    with ThreadPoolExecutor(1) as pool:
        announced = pool.submit(target.post, "/update_weights_from_distributed", body)
        dist.broadcast(flat, 0, group)
        return announced.result()


def test_an_update_over_a_process_group(changing, models):
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=20), "return_logprob": True}
    name = f"of-{changing.kind}"
    group = group_of(changing, name)
    tensors = load_file(Path(models["b"]) / "model.safetensors")
    names = sorted(tensors)
    assert changing.post("/begin_weight_update", {}).json()["success"] is True
    for part in (names[:5], names[5:]):
        answer = send(changing, group, name, {key: tensors[key] for key in part})
        assert answer.status_code == 200 and answer.json()["success"] is True, answer.text
        # Not before all of it is there.
        assert changing.request("GET", "/model_info").json()["weight_version"] == "v1"
    assert changing.post("/end_weight_update", {}).json()["success"] is True
    assert changing.request("GET", "/model_info").json()["weight_version"] == "v1"
    named = changing.post("/update_weight_version", {"new_version": "v2", "abort_all_requests": False})
    assert named.json() == {"success": True, "message": "Weight version updated to v2", "new_version": "v2"}
    assert changing.request("GET", "/model_info").json()["weight_version"] == "v2"
    model = AutoModelForCausalLM.from_pretrained(models["b"], dtype=torch.float32).eval()
    for prompt, answer in zip(PROMPTS, changing.generate(**body), strict=True):
        assert answer["meta_info"]["weight_version"] == "v2"
        expected = forward_log_probs(model, prompt + answer["output_ids"])[len(prompt) - 1 :]
        torch.testing.assert_close(
            torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
        )
    assert changing.post("/destroy_weights_update_group", {"group_name": name}).json()["success"] is True
    assert changing.post("/destroy_weights_update_group", {"group_name": name}).status_code == 400


@pytest.mark.parametrize("way", ["disk", "process group"])
def test_retracted_sequences_go_on_under_the_new_weights(changing, models, reference, way):
    undisturbed = changing.generate(
        input_ids=[[5, 6]] * 8, sampling_params=[{**LONG, "sampling_seed": i} for i in range(8)]
    )
    running = busy_request(changing, rows=8)
    time.sleep(0.3)
    changing.post("/pause_generation", {"mode": "retract"})
    if way == "disk":
        body = {"model_path": models["b"], "weight_version": "v2"}
        assert changing.post("/update_weights_from_disk", body, timeout=20).status_code == 200
    else:
        name = f"suspended-{changing.kind}"
        group = group_of(changing, name)
        assert changing.post("/begin_weight_update", {}, timeout=20).json()["success"] is True
        assert send(changing, group, name, load_file(Path(models["b"]) / "model.safetensors")).status_code == 200
        assert changing.post("/end_weight_update", {}).json()["success"] is True
        changing.post("/update_weight_version", {"new_version": "v2", "abort_all_requests": False})
        changing.post("/destroy_weights_update_group", {"group_name": name})
    assert not running.future.done()
    changing.post("/continue_generation", {})
    new = AutoModelForCausalLM.from_pretrained(models["b"], dtype=torch.float32).eval()
    for before, answer in zip(undisturbed, running.answer(), strict=True):
        meta, ids = answer["meta_info"], answer["output_ids"]
        assert meta["finish_reason"]["type"] == "length" and len(ids) == 240 and meta["weight_version"] == "v2"
        first, second = meta["weight_versions"]
        split = first["end"]
        assert 0 < split < 240
        assert first == {"version": "v1", "start": 0, "end": split} and second == {
            "version": "v2",
            "start": split,
            "end": 240,
        }
        assert ids[:split] == before["output_ids"][:split] and ids != before["output_ids"]
        found = torch.tensor(output_log_probs(answer), dtype=torch.float64)
        for model, tokens in ((reference[0], slice(0, split)), (new, slice(split, 240))):
            # Every token after the update sees all before it through the new weights.
            expected = forward_log_probs(model, [5, 6, *ids])[1:]
            torch.testing.assert_close(found[tokens], expected[tokens], atol=1e-4, rtol=0)


def test_an_update_out_of_turn_is_refused(target):
    bucket = {
        "names": ["x"],
        "dtypes": ["float32"],
        "shapes": [[1]],
        "group_name": "nobody",
        "load_format": "flattened_bucket",
    }
    for path, body in (("/update_weights_from_distributed", bucket), ("/end_weight_update", {})):
        answer = target.post(path, body)
        assert answer.status_code == 400 and answer.json()["success"] is False, answer.text
        assert answer.json()["message"]


def test_an_update_is_open_once(changing):
    assert changing.post("/begin_weight_update", {}).status_code == 200
    again = changing.post("/begin_weight_update", {})
    assert again.status_code == 400 and "already open" in again.json()["message"]
    changing.post("/end_weight_update", {})
    assert changing.post("/begin_weight_update", {}).status_code == 200
    changing.post("/end_weight_update", {})


async def test_the_client_closes_an_update_that_was_left_open(changing):
    options = {"connect_timeout": 2.0, "request_timeout": 60.0, "max_retries": 0, "backoff": 0.05, "max_in_flight": 8}
    changing.post("/begin_weight_update", {})
    async with RolloutClient([changing.url], **options) as client:
        await client.begin_weight_update()
    changing.post("/end_weight_update", {})


def test_an_incomplete_or_foreign_update_leaves_the_served_weights_alone(embedded, models):
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=12), "return_logprob": True}
    before = embedded.generate(**body)
    group = group_of(embedded, "short")
    tensors = load_file(Path(models["b"]) / "model.safetensors")
    name = "model.norm.weight"
    embedded.post("/begin_weight_update", {})
    assert send(embedded, group, "short", {name: tensors[name]}).status_code == 200
    refused = embedded.post("/end_weight_update", {})
    assert refused.status_code == 400 and "were not sent" in refused.json()["message"]
    embedded.post("/begin_weight_update", {})
    refused = send(embedded, group, "short", {name: torch.zeros(3)})
    assert refused.status_code == 400 and name in refused.json()["message"]
    # A trainer that is gone in the middle of a broadcast.
    embedded.post("/begin_weight_update", {})
    with ThreadPoolExecutor(1) as pool:
        bucket = {
            "names": [name],
            "dtypes": ["float32"],
            "shapes": [[64]],
            "group_name": "short",
            "load_format": "flattened_bucket",
        }
        announced = pool.submit(embedded.post, "/update_weights_from_distributed", bucket)
        time.sleep(0.5)
        dist.destroy_process_group(group)
        del group
        refused = announced.result()
    assert refused.status_code == 400 and "broadcast failed" in refused.json()["message"]
    assert list(map(outcome, embedded.generate(**body))) == list(map(outcome, before))
    embedded.post("/destroy_weights_update_group", {"group_name": "short"})


# ---- Weights out of shared memory, checksums, memory ----


def by_tensor(target, tensors):
    """One bucket in shared memory; the server's answer."""
    flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors.values()])
    buffer = SharedBuffer(flat.numel())
    buffer.bytes.copy_(flat)
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    try:
        return target.post(
            "/update_weights_from_tensor",
            {"serialized_named_tensors": [pack(buffer.bytes, entries)], "load_format": "flattened_bucket"},
        )
    finally:
        buffer.close()
        assert not buffer.path.exists()


def checksums(target, **body):
    answer = target.post("/weights_checker", {"action": "checksum", **body})
    assert answer.status_code == 200, answer.text
    assert answer.json()["success"] is True
    (rank,) = answer.json()["ranks"]
    assert rank["parallelism_info"][0]["tp_size"] == 1
    return rank["checksums"]


def test_an_update_out_of_shared_memory(changing, models):
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=20), "return_logprob": True}
    tensors = load_file(Path(models["b"]) / "model.safetensors")
    names = sorted(tensors)
    before = checksums(changing)
    assert changing.post("/begin_weight_update", {}).json() == {"success": True, "message": "Success"}
    for part in (names[:5], names[5:]):
        answer = by_tensor(changing, {key: tensors[key] for key in part})
        assert answer.status_code == 200 and answer.json() == {"success": True, "message": "Success"}, answer.text
    assert changing.post("/end_weight_update", {}).json()["success"] is True
    named = changing.post("/update_weight_version", {"new_version": "v2", "abort_all_requests": False})
    assert named.status_code == 200
    model = AutoModelForCausalLM.from_pretrained(models["b"], dtype=torch.float32).eval()
    for prompt, answer in zip(PROMPTS, changing.generate(**body), strict=True):
        assert answer["meta_info"]["weight_version"] == "v2"
        expected = forward_log_probs(model, prompt + answer["output_ids"])[len(prompt) - 1 :]
        torch.testing.assert_close(
            torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
        )
    after = checksums(changing)
    assert before.keys() == after.keys()
    # Norms of fresh models are all ones.
    assert {name for name in after if before[name] == after[name]} == {name for name in after if "norm" in name}


def test_checksums_are_those_of_the_bytes(target, models):
    tensors = load_file(Path(models["a"]) / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    expected = hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()[:16]
    assert checksums(target)[name] == expected
    left = checksums(target, skip_tensor_list=["layers.0.", "embed"])
    assert left[name] == expected
    assert not [key for key in left if "layers.0." in key or "embed" in key]
    refused = target.post("/weights_checker", {"action": "guess"})
    assert refused.status_code == 400 and refused.json()["success"] is False


def test_shared_memory_out_of_turn_or_unreadable_is_refused(target):
    text = base64.b64encode(pickle.dumps(1)).decode()
    answer = target.post(
        "/update_weights_from_tensor", {"serialized_named_tensors": [text], "load_format": "flattened_bucket"}
    )
    message = "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
    assert (answer.status_code, answer.json()) == (400, {"success": False, "message": message})
    answer = target.post("/update_weights_from_tensor", {"serialized_named_tensors": ["no base64!"]})
    assert answer.status_code == 400 and "Expected base64-encoded bytes" in answer.json()["message"], answer.text


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_payload_is_refused_and_changes_nothing(embedded, tmp_path):
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=12), "return_logprob": True}
    before = embedded.generate(**body)
    embedded.post("/begin_weight_update", {})
    for content in (Touch(tmp_path / "made"), {"flattened_tensor": Touch(tmp_path / "made"), "metadata": []}):
        text = base64.b64encode(pickle.dumps(content)).decode()
        answer = embedded.post(
            "/update_weights_from_tensor", {"serialized_named_tensors": [text], "load_format": "flattened_bucket"}
        )
        assert answer.status_code == 400 and answer.json()["success"] is False
        assert "Blocked unsafe global" in answer.json()["message"]
    assert by_tensor(embedded, {"model.norm.weight": torch.zeros(3)}).status_code == 400
    assert embedded.post("/end_weight_update", {}).status_code == 400
    assert not (tmp_path / "made").exists()
    assert list(map(outcome, embedded.generate(**body))) == list(map(outcome, before))


def test_memory_of_the_cache_comes_back(changing):
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=12), "return_logprob": True}
    before = changing.generate(**body)
    for path in ("/release_memory_occupation", "/resume_memory_occupation"):
        answer = changing.post(path, {"tags": ["kv_cache"]})
        assert (answer.status_code, answer.json()) == (200, None)
    assert [answer["output_ids"] for answer in changing.generate(**body)] == [answer["output_ids"] for answer in before]


def test_released_weights_have_to_be_sent_again(embedded, models):
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=12), "return_logprob": True}
    before = embedded.generate(**body)

    def refused(what):
        answer = embedded.post("/generate", body)
        assert answer.status_code == 400 and what in answer.json()["error"]["message"], answer.text

    assert embedded.post("/release_memory_occupation", {}).status_code == 200
    refused("resume_memory_occupation")
    assert embedded.post("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]}).status_code == 200
    again = embedded.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    assert again.status_code == 400 and "not released" in again.json()["error"]["message"]
    refused("weights")
    assert embedded.post("/resume_memory_occupation", {"tags": ["weights"]}).status_code == 200
    refused("send them again")
    assert [embedded.request("GET", path).status_code for path in ("/health", "/health_generate")] == [200, 503]
    tensors = load_file(Path(models["a"]) / "model.safetensors")
    embedded.post("/begin_weight_update", {})
    assert by_tensor(embedded, tensors).status_code == 200
    assert embedded.post("/end_weight_update", {}).status_code == 200
    assert list(map(outcome, embedded.generate(**body))) == list(map(outcome, before))
    assert (
        "unknown memory tag 'disk'"
        in embedded.post("/release_memory_occupation", {"tags": ["disk"]}).json()["error"]["message"]
    )


def test_memory_is_not_released_under_running_requests(embedded):
    running = Background(embedded, input_ids=[5], sampling_params={"max_new_tokens": 200, "ignore_eos": True})
    embedded.wait_busy()
    answer = embedded.post("/release_memory_occupation", {"tags": ["kv_cache"]})
    assert answer.status_code == 400
    assert answer.json() == {
        "error": {"message": "release_memory_occupation should be called only when server is idle."}
    }
    embedded.post("/abort_request", {"abort_all": True})
    running.answer()


async def test_the_client_reads_checksums_and_moves_memory(changing):
    options = {"connect_timeout": 2.0, "request_timeout": 60.0, "max_retries": 0, "backoff": 0.05, "max_in_flight": 8}
    async with RolloutClient([changing.url], **options) as client:
        assert await client.weight_checksums() == [[checksums(changing)]]
        await client.release_memory_occupation(["kv_cache"])
        await client.resume_memory_occupation(["kv_cache"])
        with pytest.raises(RequestRefusedError, match="must run between"):
            await client.update_weights_from_tensor([[base64.b64encode(b"x").decode()]])


# ---- The client against the server ----


async def test_the_client_samples_updates_and_waits(changing, models):
    options = {"connect_timeout": 2.0, "request_timeout": 60.0, "max_retries": 1, "backoff": 0.05, "max_in_flight": 8}
    async with RolloutClient([changing.url], **options) as client:
        await client.wait_until_healthy(10)
        prompts = PROMPTS * 5
        completions = await client.generate(
            prompts, seeded(20, max_new_tokens=12), weight_version="v1", rows_per_request=6
        )
        direct = changing.generate(
            input_ids=prompts[:6], sampling_params=seeded(6, max_new_tokens=12), return_logprob=True
        )
        assert [c.output_ids for c in completions[:6]] == [a["output_ids"] for a in direct]
        # What SGLang decodes together, and with it the last bits, depends on when requests come.
        near = (lambda values: pytest.approx(values, abs=1e-5)) if changing.kind == "sglang" else list
        assert [c.log_probs for c in completions[:6]] == [near(output_log_probs(a)) for a in direct]
        assert {c.finish_reason for c in completions} <= {"stop", "length"}
        await client.pause_generation()
        await client.update_weights_from_disk(models["b"], "v2")
        await client.continue_generation()
        await client.flush_cache()
        completions = await client.generate(
            prompts, seeded(20, max_new_tokens=12), weight_version="v2", rows_per_request=20
        )
        assert {c.weight_version for c in completions} == {"v2"}
        assert (await client.model_info())[0]["weight_version"] == "v2"
        info = (await client.server_info())[0]
        assert info["model_path"] == changing.model_path
        if changing.kind == "embedded":  # SGLang gives the argument, which was left out
            assert info["context_length"] == CONTEXT


# ---- Batching of concurrent requests ----


def test_concurrent_requests_are_decoded_together_without_deterministic(models, reference, tmp_path):
    with LocalServer(models["a"], "v1", rollout(deterministic=False, max_batch_size=32), tmp_path / "log") as server:
        target = Target("embedded", server.url, models["a"])
        params = [{"max_new_tokens": 100 + i, "sampling_seed": i, "ignore_eos": True} for i in range(48)]
        prompts = [PROMPTS[i % 4] for i in range(48)]
        steps = target.decoding_steps()

        def one(i):
            time.sleep(0.01 * i)
            return target.generate(input_ids=prompts[i], sampling_params=params[i], return_logprob=True)

        with ThreadPoolExecutor(48) as pool:
            answers = list(pool.map(one, range(48)))
        steps = target.decoding_steps() - steps
        assert steps < 1000, "48 requests of over 100 tokens one by one would take about 6000 steps"
        for prompt, one_params, answer in zip(prompts, params, answers, strict=True):
            assert len(answer["output_ids"]) == one_params["max_new_tokens"]
            expected = forward_log_probs(reference[0], prompt + answer["output_ids"])[len(prompt) - 1 :]
            torch.testing.assert_close(
                torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
            )


def test_deterministic_requests_are_not_merged(embedded_target):
    """Concurrent company must not change an answer's bits."""
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=40), "return_logprob": True}
    alone = embedded_target.generate(**body)
    company = long_request(embedded_target, rows=5)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: embedded_target.generate(**body), range(6)))
    company.answer()
    for answer in answers:
        assert list(map(outcome, answer)) == list(map(outcome, alone))


# ---- The process ----


def test_another_architecture_with_learned_positions(tmp_path):
    """GPT-2: position table, layer norms with bias, no rotary embedding, end token named only by the model."""
    config = GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    character_tokenizer().save_pretrained(tmp_path / "gpt2")
    with LocalServer(tmp_path / "gpt2", "1", rollout(), tmp_path / "log") as server:
        target = Target("embedded", server.url, "")
        params = seeded(4, max_new_tokens=50, ignore_eos=True)
        params[2]["max_new_tokens"] = 63  # up to the last position
        answers = target.generate(input_ids=PROMPTS, sampling_params=params, return_logprob=True)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            expected = forward_log_probs(model, prompt + answer["output_ids"])[len(prompt) - 1 :]
            torch.testing.assert_close(
                torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
            )


def test_requests_in_flight_at_shutdown_are_answered(models, tmp_path):
    server = LocalServer(models["a"], "v1", rollout(max_batch_size=64), tmp_path / "log")
    server.start()
    target = Target("embedded", server.url, models["a"])
    running, waiting = request_behind(target, 2)
    process = server._process
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    for answer in running.answer(15) + waiting.answer(15):
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    stopper.join(15)
    assert process.returncode is not None and process.returncode != -signal.SIGKILL, "the server must end by itself"
    assert not server.alive()
    with pytest.raises(httpx.ConnectError):
        target.request("GET", "/health")


def test_restart_serves_other_weights_at_the_same_address(models, tmp_path):
    with LocalServer(models["a"], "v1", rollout(), tmp_path / "log") as server:
        url = server.url
        os.kill(server._process.pid, signal.SIGKILL)
        server._process.wait(10)
        assert not server.alive()
        server.restart(models["b"], "v9")
        assert server.url == url
        assert Target("embedded", url, "").request("GET", "/model_info").json()["weight_version"] == "v9"


def test_the_server_ends_with_its_parent(models, tmp_path):
    code = (
        "import sys, time\n"
        "from dasd_megatron.config import RolloutConfig\n"
        "from dasd_megatron.rollout.local_server import LocalServer\n"
        f"server = LocalServer({models['a']!r}, '1', RolloutConfig(threads=1), {str(tmp_path / 'log')!r})\n"
        "server.start()\n"
        "print(server._process.pid, server.url, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        child, url = parent.stdout.readline().split()
    finally:
        parent.kill()
        parent.wait(10)
        parent.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").exists() and "rollout.server" in Path(f"/proc/{child}/cmdline").read_text():
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.1)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", timeout=2, trust_env=False)


def test_a_taken_port_is_named_before_anything_starts(models, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = LocalServer(models["a"], "v1", rollout(port=port), tmp_path / "log")
        with pytest.raises(
            PortInUseError, match=rf"^rollout\.port: cannot listen on 127\.0\.0\.1:{port}: .*rollout\.port=0"
        ):
            server.start()
        assert not (tmp_path / "log").exists() and not server.alive()


def run_server(*arguments):
    command = [sys.executable, "-m", "dasd_megatron.rollout.server", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def test_the_command_names_a_taken_port_in_one_line(models):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_server("--model-path", models["a"], "--port", str(port))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: cannot listen on 127.0.0.1:{port}")
    assert "Traceback" not in result.stderr


def test_the_command_names_a_bad_model_directory_in_one_line(models):
    result = run_server("--model-path", models["torn"], "--port", "0")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: cannot load a causal LM from {models['torn']}")
    assert "Traceback" not in result.stderr


def test_a_start_that_fails_shows_the_log(models, tmp_path):
    server = LocalServer(models["empty"], "v1", rollout(), tmp_path / "log")
    with pytest.raises(ServerStartError, match=r"(?s)ended with status 1\. The end of .*error: cannot load"):
        server.start()
    assert not server.alive()


def test_a_start_that_takes_too_long_is_given_up(models, tmp_path):
    server = LocalServer(models["a"], "v1", rollout(startup_timeout_seconds=0.2), tmp_path / "log")
    with pytest.raises(ServerStartError, match=r"rollout\.startup_timeout_seconds=0\.2"):
        server.start()
    assert not server.alive()
