"""Helpers of the contract suite: a server to ask, requests in the background, and updates as a trainer makes them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import httpx
import torch
import torch.distributed as dist

from dasd_megatron.config import RolloutConfig, TinyModelConfig
from dasd_megatron.models.weight_formats import HfTensor
from dasd_megatron.rollout.weight_group import join_weight_group
from dasd_megatron.rollout.weight_payload import SharedBuffer, pack

TINY = TinyModelConfig(
    hidden_size=64, num_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128
)
CONTEXT = TINY.max_position_embeddings
PROMPTS = [[4, 40, 41, 42], [10, 20, 30, 40, 50, 60, 70, 80, 90, 11, 21], [33], [7, 8, 9, 10, 11, 12, 13]]
END = 1
LONG = {"max_new_tokens": 240, "ignore_eos": True}


@dataclass
class Target:
    """A server to ask; ``kind`` is embedded or sglang."""

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
    """Return the configuration of a server of these tests."""
    options = {"threads": 1, "startup_timeout_seconds": 60.0, "max_new_tokens": 8, "max_prompt_tokens": 64}
    return RolloutConfig(**{**options, **changes})


def put_back(target):
    """Give a server the weights and the version back that it was started with."""
    target.post("/continue_generation", {})
    body = {"model_path": target.model_path, "weight_version": "v1", "abort_all_requests": True}
    assert target.post("/update_weights_from_disk", body).status_code == 200


def forward_log_probs(model, ids, temperature=1.0):
    """Return [len(ids) - 1] log-probs of ids[1:] by one unpadded forward pass."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double() / temperature
    return torch.log_softmax(logits, -1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def output_log_probs(answer):
    return [triple[0] for triple in answer["meta_info"]["output_token_logprobs"]]


def outcome(answer):
    """Return all of an answer that has to be the same for the same request."""
    meta = answer["meta_info"]
    return (
        answer["text"],
        answer["output_ids"],
        meta["output_token_logprobs"],
        meta["finish_reason"],
        meta["weight_version"],
    )


def seeded(count, **params):
    """Return sampling parameters of ``count`` rows, each with a seed of its own."""
    return [{"sampling_seed": 1000 + i, **params} for i in range(count)]


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
    """Start a long request and return it while it is being worked on.

    On a machine that has much else to do a request may be through before that is seen. Then another one is started.
    """
    for _ in range(5):
        running = long_request(target, **kwargs)
        while not running.future.done():
            if target.load("num_running_reqs") > 0:
                return running
            time.sleep(0.01)
        running.answer()
    raise AssertionError("no request was seen running")


def request_behind(target, rows):
    """Return a long request that is being worked on, and one of so many rows that waits for it."""
    for _ in range(5):
        running = busy_request(target)
        waiting = long_request(target, rows=rows)
        while not running.future.done():
            if target.load("num_waiting_reqs") == rows:
                return running, waiting
            time.sleep(0.01)
        running.answer()
        waiting.answer()
    raise AssertionError("no request was seen waiting")


def suspended_request(target, mode, **changes):
    """Return a long request that the pause has suspended after its first tokens and before its last."""
    for _ in range(5):
        running = busy_request(target, **changes)
        time.sleep(0.3 if target.kind == "sglang" else 0.1)
        target.post("/pause_generation", {"mode": mode})
        time.sleep(0.3)
        if not running.future.done():
            return running
        target.post("/continue_generation", {})
        running.answer()
    raise AssertionError("no request was suspended")


def group_of(target, name):
    """Return a weight group with the server, of which this process is rank 0, as the trainer is."""
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
    """Send one bucket over a group; returns the answer to its announcement."""
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


def by_tensor(target, tensors):
    """Send one bucket in shared memory; returns the server's answer."""
    flat = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors.values()])
    buffer = SharedBuffer(flat.numel())
    buffer.bytes.copy_(flat)
    entries = [HfTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    try:
        return target.post(
            "/update_weights_from_tensor",
            {"serialized_named_tensors": [pack(buffer.bytes, entries)], "load_format": "flattened_bucket"},
        )
    finally:
        buffer.close()
        assert not buffer.path.exists()


def checksums(target, **body):
    """Return the checksums of a server's weights by name."""
    answer = target.post("/weights_checker", {"action": "checksum", **body})
    assert answer.status_code == 200, answer.text
    assert answer.json()["success"] is True
    (rank,) = answer.json()["ranks"]
    assert rank["parallelism_info"][0]["tp_size"] == 1
    return rank["checksums"]
