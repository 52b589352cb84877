"""Contract of /begin_weight_update, /update_weights_from_distributed and /end_weight_update."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dasd_megatron.rollout.client import RolloutClient
from tests.support.rollout_contract import (
    LONG,
    PROMPTS,
    forward_log_probs,
    group_of,
    outcome,
    output_log_probs,
    seeded,
    send,
    suspended_request,
)

pytestmark = pytest.mark.integration


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
    running = suspended_request(changing, "retract", rows=8)
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


def test_a_group_can_be_left_while_a_broadcast_waits(embedded):
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=12), "return_logprob": True}
    before = embedded.generate(**body)
    group = group_of(embedded, "left")
    bucket = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[64]]}
    options = {"group_name": "left", "load_format": "flattened_bucket"}
    embedded.post("/begin_weight_update", {})
    with ThreadPoolExecutor(1) as pool:
        announced = pool.submit(embedded.post, "/update_weights_from_distributed", bucket | options)
        time.sleep(0.5)
        assert embedded.post("/destroy_weights_update_group", {"group_name": "left"}).status_code == 200
        assert list(map(outcome, embedded.generate(**body))) == list(map(outcome, before))
        dist.destroy_process_group(group)
        del group
        assert announced.result().status_code == 400


def test_groups_that_never_come_hold_nothing_else_back(embedded):
    """Ten requests to join nobody: four wait, the others are refused, and the server goes on with all else."""
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=12), "return_logprob": True}
    before = embedded.generate(**body)
    # A store that nobody else connects to.
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    place = {"master_address": "127.0.0.1", "master_port": store.port, "rank_offset": 1, "world_size": 2}
    with ThreadPoolExecutor(10) as pool:
        joins = [
            pool.submit(
                embedded.post,
                "/init_weights_update_group",
                {**place, "group_name": f"nobody-{i}", "backend": "gloo"},
                timeout=130,
            )
            for i in range(10)
        ]
        deadline = time.monotonic() + 30
        while sum(join.done() for join in joins) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        refused = [join.result() for join in joins if join.done()]
        assert {answer.status_code for answer in refused} == {400}
        assert all("groups wait for their members" in answer.json()["message"] for answer in refused)
        assert list(map(outcome, embedded.generate(**body))) == list(map(outcome, before))
        assert len(embedded.post("/weights_checker", {}).json()["ranks"]) == 1
        assert embedded.post("/begin_weight_update", {}).status_code == 200
        assert embedded.post("/end_weight_update", {}).status_code == 400
        assert embedded.request("GET", "/health_generate").status_code == 200
        # Where the store is gone, a join ends at once.
        del store
