"""The embedded server under hostile requests: each is answered, and none touches another request or ends the server."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter

import pytest
import torch
from starlette.testclient import TestClient

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.embedded import bodies, weight_receiver
from dasd_megatron.rollout.embedded.app import build_app
from dasd_megatron.rollout.embedded.engine import Engine
from dasd_megatron.rollout.embedded.schema import SAMPLING_FIELDS
from tests.support.hostile_json import HOSTILE_TEXTS, body_text
from tests.support.rollout_contract import outcome

TINY = TinyModelConfig(
    hidden_size=16, num_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=16
)
JSON = {"content-type": "application/json"}
GENERATE_FIELDS = (
    "rid",
    "text",
    "input_ids",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_text_in_logprobs",
    "return_prompt_token_ids",
    "stream",
    "lora_path",
    "unknown_field",
)
# Every control route with a body that is right, field by field.
CONTROL = {
    "/pause_generation": {"mode": '"in_place"'},
    "/continue_generation": {"torch_empty_cache": "true"},
    "/abort_request": {"rid": '"nobody"', "abort_all": "false"},
    "/init_weights_update_group": {
        "master_address": '"127.0.0.1"',
        "master_port": "1",
        "rank_offset": "1",
        "world_size": "2",
        "group_name": '"g"',
        "backend": '"gloo"',
    },
    "/destroy_weights_update_group": {"group_name": '"g"'},
    "/update_weights_from_distributed": {
        "names": '["model.norm.weight"]',
        "dtypes": '["float32"]',
        "shapes": "[[16]]",
        "group_name": '"g"',
        "load_format": '"flattened_bucket"',
    },
    "/update_weights_from_tensor": {
        "serialized_named_tensors": '["gARLAS4="]',
        "load_format": '"flattened_bucket"',
    },
    "/begin_weight_update": {},
    "/end_weight_update": {},
    "/update_weights_from_disk": {
        "model_path": '"/nowhere"',
        "load_format": '"auto"',
        "abort_all_requests": "false",
        "weight_version": '"v"',
    },
    "/update_weight_version": {"new_version": '"1"', "abort_all_requests": "false"},
    "/weights_checker": {"action": '"checksum"', "skip_tensor_list": "[]"},
    "/release_memory_occupation": {"tags": '["disk"]'},
    "/resume_memory_occupation": {"tags": '["kv_cache"]'},
    "/flush_cache": {},
}

# These end what runs or let it go on, as they are meant to.
DISTURBING_FIELDS = {"abort_all", "abort_all_requests"}
DISTURBING_PATHS = {"/pause_generation", "/continue_generation"}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", TINY, 0))


@pytest.fixture
def engine(model_path, monkeypatch):
    monkeypatch.delenv("DASD_API_KEY", raising=False)
    made = Engine(
        model_path,
        dtype=torch.float32,
        max_batch_size=128,
        weight_version="1",
        deterministic=False,
        cache_bytes=1 << 28,
    )
    yield made
    made.close()
    made._thread.join(20)
    assert not made._thread.is_alive()


@pytest.fixture
def client(engine):
    with TestClient(build_app(engine, {"tokenizer_path": "there"}), raise_server_exceptions=False) as made:
        yield made


class Neighbour:
    """A request in flight, which has to get the answer of an undisturbed run.

    It is begun in mode in_place of a pause, so that the hostile requests come while it is under way.
    """

    BODY = json.dumps(
        {
            "input_ids": [[5, 6, 7], [8]],
            "sampling_params": [{"max_new_tokens": 40, "sampling_seed": i, "ignore_eos": True} for i in range(2)],
            "return_logprob": True,
        }
    )

    def __init__(self, client, engine):
        self._client, self._engine = client, engine
        expected = self._ask()
        assert expected.status_code == 200, expected.text
        self._expected = list(map(outcome, expected.json()))
        self._answer = None

    def _ask(self):
        return self._client.post("/generate", content=self.BODY, headers=JSON)

    def __enter__(self):
        self._engine.pause("retract")
        before = self._engine.steps
        self._thread = threading.Thread(target=lambda: setattr(self, "_answer", self._ask()))
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._engine.waiting:
            assert time.monotonic() < deadline, "the neighbour never came"
            time.sleep(0.001)
        self._engine.resume()
        while self._engine.steps < before + 2:
            assert time.monotonic() < deadline, "the neighbour never ran"
            time.sleep(0.0005)
        self._engine.pause("in_place")
        return self

    def __exit__(self, *error):
        self._engine.resume()
        self._thread.join(30)
        assert self._answer.status_code == 200, self._answer.text
        assert list(map(outcome, self._answer.json())) == self._expected
        assert self._engine.alive and self._client.get("/health").status_code == 200


def post(client, path, content, headers=JSON):
    return client.post(path, content=content, headers=headers)


def check_refusal(answer):
    """Check that an answer is one of a server that has understood what is wrong, in one short line."""
    assert answer.status_code in (400, 413, 415, 503), (answer.status_code, answer.text[:300])
    body = answer.json()
    message = body.get("message") or body["error"]
    message = message["message"] if isinstance(message, dict) else message
    assert message and len(message) < 5000 and "\n" not in message and 'File "' not in message, message


def hostile_generate_bodies():
    """Yield a body with each hostile value in each field of /generate and of its sampling parameters."""
    for text in HOSTILE_TEXTS:
        yield text
        for name in GENERATE_FIELDS:
            fields = {"input_ids": "[5]", "sampling_params": '{"max_new_tokens": 1}', "return_logprob": "true"}
            if name == "text":
                del fields["input_ids"]
            yield body_text(fields | {name: text})
        for name in (*SAMPLING_FIELDS, "unknown"):
            params = body_text(
                {"max_new_tokens": "1", **({"min_new_tokens": "1"} if name == "stop_token_ids" else {}), name: text}
            )
            yield body_text({"input_ids": "[5]", "sampling_params": params, "return_logprob": "true"})


def test_every_hostile_value_in_every_field_is_taken_or_refused(engine):
    """Requests that are taken run one after another beside each other, and are all answered without a 500."""
    counts, taken = Counter(), []
    for content in hostile_generate_bodies():
        try:
            job = engine.parse_request(bodies.parse_json(content.encode()))
            engine.submit(job)
        except ValueError as error:
            counts[type(error).__name__] += 1
        else:
            taken.append((content, job))
    assert counts.keys() == {"ValueError", "ValidationError", "ContractError", "InvalidRequestError"}
    assert len(taken) > 100 and counts.total() > 1000, (len(taken), counts)
    for content, job in taken:
        job.done.result(30)
        for row in job.rows:
            assert row.finish_reason["type"] in ("length", "stop"), (content[:200], row.finish_reason)


def test_hostile_requests_leave_a_neighbour_as_it_was(client, engine):
    cases = [
        {"top_k": "9223372036854775808"},
        {"top_k": "1" + "0" * 400},
        {"temperature": "1" + "0" * 400},
        {"top_p": "NaN"},
        {"n": "1000000000"},
        {"n": "9223372036854775807"},
        {"stop": '["' + "x" * 2000 + '"]'},
        {"stop_token_ids": "[" + "1," * 4000 + "1]"},
        {"custom_params": "[" * 600 + "]" * 600},
    ]
    whole = [
        body_text({"input_ids": "[5]", "return_logprob": "true", "top_logprobs_num": "-1"}),
        body_text({"input_ids": "[5]", "rid": '"\\ud800"'}),
        body_text({"input_ids": "[5]", "rid": '"' + "x" * 300 + '"'}),
        body_text({"text": '"' + "x" * 100_000 + '"'}),
        "[" * 100_000 + "]" * 100_000,
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"",
        "[" + "[]," * bodies.MAX_CONTAINERS + "[]]",
        body_text({"input_ids": "[" + "[5]," * 70_000 + "[5]]"}),
    ]
    with Neighbour(client, engine):
        for params in cases:
            whole.append(body_text({"input_ids": "[5]", "sampling_params": body_text(params)}))
        for content in whole:
            check_refusal(post(client, "/generate", content))


def sweep(client, path, fields, names, whole):
    """Send each hostile value in each of these fields and as the whole body; return how often each status came."""
    shown = [text for text in HOSTILE_TEXTS if len(text) < 5000][::2]
    sent = [body_text(fields | {name: text}) for name in names for text in shown] + (shown if whole else [])
    statuses = Counter()
    for content in sent:
        answer = post(client, path, content)
        statuses[answer.status_code] += 1
        assert answer.status_code in (200, 400), (path, content[:200], answer.text[:200])
        if answer.status_code == 400 and path != "/flush_cache":
            check_refusal(answer)
    return statuses


def test_hostile_values_in_control_fields_leave_a_neighbour_as_it_was(client, engine, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("nobody is there")

    monkeypatch.setattr(weight_receiver, "join_weight_group", refuse)
    statuses = Counter()
    with Neighbour(client, engine):
        for path, fields in CONTROL.items():
            if path not in DISTURBING_PATHS:
                statuses += sweep(client, path, fields, fields.keys() - DISTURBING_FIELDS, whole=True)
        engine.name_weights("1")
    for path, fields in CONTROL.items():
        names = fields if path in DISTURBING_PATHS else fields.keys() & DISTURBING_FIELDS
        statuses += sweep(client, path, fields, names, whole=path in DISTURBING_PATHS)
    assert statuses[400] > 800 and statuses[200] > 10, statuses
    engine.resume()
    with Neighbour(client, engine):
        pass
