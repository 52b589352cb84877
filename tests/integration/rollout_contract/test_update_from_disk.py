"""Contract of /update_weights_from_disk."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.rollout_contract import (
    PROMPTS,
    busy_request,
    forward_log_probs,
    long_request,
    outcome,
    output_log_probs,
    request_behind,
    seeded,
)

pytestmark = pytest.mark.integration


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
    waiting = long_request(embedded, rows=2)
    embedded.wait_for("num_waiting_reqs", 2)
    assert (
        embedded.post("/update_weights_from_disk", {"model_path": models["b"], "weight_version": "v2"}).status_code
        == 200
    )
    assert not waiting.future.done()
    embedded.post("/continue_generation", {})
    assert {a["meta_info"]["weight_version"] for a in waiting.answer()} == {"v2"}
