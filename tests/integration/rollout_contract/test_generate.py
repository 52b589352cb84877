"""Contract of /generate: the shapes of its answers."""

from __future__ import annotations

import pytest

from tests.support.rollout_contract import (
    PROMPTS,
    busy_request,
)

pytestmark = pytest.mark.integration


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


def test_ids_in_use_are_refused(embedded_target):
    running = busy_request(embedded_target, rows=1, rid=["twice"])
    response = embedded_target.post("/generate", {"input_ids": [5], "rid": "twice"})
    assert (response.status_code, response.json()) == (
        400,
        {"error": {"message": "Duplicate request ID detected: twice"}},
    )
    running.answer()
