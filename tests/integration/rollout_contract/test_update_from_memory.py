"""Contract of /update_weights_from_tensor and /weights_checker."""

from __future__ import annotations

import base64
import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.rollout_contract import (
    PROMPTS,
    by_tensor,
    checksums,
    forward_log_probs,
    outcome,
    output_log_probs,
    seeded,
)

pytestmark = pytest.mark.integration


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
