"""Contract of /release_memory_occupation and /resume_memory_occupation."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.rollout_contract import (
    PROMPTS,
    Background,
    by_tensor,
    outcome,
    seeded,
)

pytestmark = pytest.mark.integration


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

    def refused(fault):
        answer = embedded.post("/generate", body)
        assert answer.status_code == 400 and fault in answer.json()["error"]["message"], answer.text

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
