"""The HTTP side of the embedded server, without a socket and without a model: how errors become statuses."""

from __future__ import annotations

import json
from concurrent.futures import Future

import pytest
import torch
from starlette.testclient import TestClient

from dasd_megatron.rollout.embedded.app import build_app
from dasd_megatron.rollout.embedded.engine import EngineClosedError, UpdateResult
from dasd_megatron.rollout.embedded.requests import InvalidRequestError, build_job

KEY = "0123456789abcdef"
CLOSING = {
    "object": "error",
    "message": "The server is shutting down.",
    "type": "503",
    "param": None,
    "code": 503,
}
FAILED = {"type": "abort", "message": "no room", "status_code": 500, "err_type": "InternalServerError"}
DONE = {"type": "length", "length": 1}
SUCCEEDED = UpdateResult(True, "Succeeded.")


class LettersTokenizer:
    def decode(self, ids, skip_special_tokens):
        return "".join(chr(ord("a") + i) for i in ids)


class FakeEngine:
    """Stands for an engine: jobs end with ``reason`` at once, updates with ``result``, and ``error`` is raised."""

    def __init__(self, reason=DONE, result=SUCCEEDED, error=None):
        self.reason, self.result, self.error = reason, result, error
        self.alive, self.missing_memory, self.running, self.waiting, self.steps = True, None, 0, 0, 0
        self.paused, self.weight_version, self.tokenizer = None, "v1", LettersTokenizer()
        self.model, self.shapes = torch.nn.Linear(1, 1), {}
        self.aborted = []

    def _raise(self):
        if self.error is not None:
            raise self.error

    def parse_request(self, body):
        return build_job(body, tokenizer=None, vocab_size=10, context_length=20, eos_ids=frozenset())

    def submit(self, job):
        self._raise()
        for row in job.rows:
            row.finish_reason, row.output_ids, row.started = self.reason, [3], True
        self.steps += 1
        job.done.set_result(None)

    def update_from_disk(self, path, version):
        self._raise()
        done = Future()
        done.set_result(self.result)
        return done

    def replace_model(self, model):
        raise AssertionError("a model was handed over")

    def abort(self, **request):
        self.aborted.append(request)

    def name_weights(self, version):
        self.weight_version = version

    def release_memory(self, tags):
        self._raise()

    resume_memory = release_memory

    def checksums(self, skip):
        return {"b": "2", "a": "1"}


def client_of(engine):
    return TestClient(build_app(engine, {"tokenizer_path": "there", "context_length": 20}))


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("DASD_API_KEY", raising=False)


GENERATE = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}


def test_a_request_is_answered():
    answer = client_of(FakeEngine()).post("/generate", json=GENERATE)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json()["text"] == "d" and answer.json()["meta_info"]["finish_reason"] == DONE


@pytest.mark.parametrize(
    ("engine", "body", "status", "expected"),
    [
        (FakeEngine(error=EngineClosedError(CLOSING["message"])), GENERATE, 503, CLOSING),
        (
            FakeEngine(reason=FAILED),
            GENERATE,
            500,
            {"object": "error", "message": "no room", "type": "500", "param": None, "code": 500},
        ),
        (
            FakeEngine(error=InvalidRequestError("Duplicate request ID detected: x")),
            GENERATE,
            400,
            {"error": {"message": "Duplicate request ID detected: x"}},
        ),
        # What a tokenizer refuses.
        (FakeEngine(error=ValueError("no text")), GENERATE, 400, {"error": {"message": "no text"}}),
        (
            FakeEngine(),
            {**GENERATE, "sampling_params": {"temperature": "hot"}},
            400,
            {"error": 'invalid type: string "hot", expected f64'},
        ),
        (
            FakeEngine(),
            {"input_ids": [10]},
            400,
            {"error": {"message": "input_ids contains out-of-vocabulary token id 10; valid range is [0, 10)."}},
        ),
    ],
    ids=["closing", "model failed", "refused", "other ValueError", "schema", "out of range"],
)
def test_the_engines_errors_become_statuses(engine, body, status, expected):
    answer = client_of(engine).post("/generate", json=body)
    assert (answer.status_code, answer.json()) == (status, expected)


@pytest.mark.parametrize("content", [b"{not json", json.dumps({"input_ids": ["a"]}).encode(), b"[]"])
def test_a_body_of_wrong_types_is_a_validation_error(content):
    answer = client_of(FakeEngine()).post("/generate", content=content)
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("1 validation error: body") and "\n" not in answer.json()["message"]
    assert {**answer.json(), "message": ""} == {
        "object": "error",
        "message": "",
        "type": "Bad Request",
        "param": None,
        "code": 400,
    }


def test_a_defect_of_the_engine_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        client_of(FakeEngine(error=ZeroDivisionError())).post("/generate", json=GENERATE)


@pytest.mark.parametrize("success", [True, False])
def test_the_outcome_of_an_update_decides_the_status(success):
    engine = FakeEngine(result=UpdateResult(success, "the words"))
    answer = client_of(engine).post("/update_weights_from_disk", json={"model_path": "x", "abort_all_requests": True})
    assert answer.status_code == (200 if success else 400)
    assert answer.json() == {"success": success, "message": "the words", "num_paused_requests": 0}
    assert engine.aborted == [{"everything": True}]


def test_an_update_of_a_closing_engine_is_unavailable():
    client = client_of(FakeEngine(error=EngineClosedError(CLOSING["message"])))
    answer = client.post("/update_weights_from_disk", json={"model_path": "x"})
    assert (answer.status_code, answer.json()) == (503, CLOSING)


def test_an_unknown_load_format_never_reaches_the_engine():
    client = client_of(FakeEngine(error=AssertionError("asked")))
    answer = client.post("/update_weights_from_disk", json={"model_path": "x", "load_format": "gguf"})
    message = "load_format='gguf' is not supported by the embedded rollout server; use auto."
    assert answer.status_code == 400
    assert answer.json() == {"success": False, "message": message, "num_paused_requests": 0}


@pytest.mark.parametrize("path", ["/release_memory_occupation", "/resume_memory_occupation"])
def test_memory_is_refused_in_the_engines_words(path):
    client = client_of(FakeEngine(error=InvalidRequestError("kv_cache: not released")))
    answer = client.post(path, json={"tags": ["kv_cache"]})
    assert (answer.status_code, answer.json()) == (400, {"error": {"message": "kv_cache: not released"}})
    answer = client_of(FakeEngine()).post(path, json={})
    assert (answer.status_code, answer.json()) == (200, None)


def test_updates_out_of_turn_are_refused_by_the_receiver():
    client = client_of(FakeEngine())
    for path in ("/end_weight_update", "/destroy_weights_update_group"):
        answer = client.post(path, json={})
        assert answer.status_code == 400 and answer.json()["success"] is False and answer.json()["message"]


def test_health_tells_of_the_engine():
    engine = FakeEngine()
    client = client_of(engine)
    assert [client.get(path).status_code for path in ("/health", "/health_generate")] == [200, 200]
    engine.missing_memory = "memory is released"
    assert [client.get(path).status_code for path in ("/health", "/health_generate")] == [200, 503]
    engine.alive = False
    assert [client.get(path).status_code for path in ("/health", "/health_generate")] == [503, 503]


def test_the_cache_is_flushed_only_while_nothing_runs():
    engine = FakeEngine()
    client = client_of(engine)
    assert client.post("/flush_cache").status_code == 200
    engine.waiting = 1
    assert client.post("/flush_cache").status_code == 400
    engine.paused = "abort"
    assert client.get("/flush_cache").status_code == 200
    engine.running = 1
    assert client.get("/flush_cache?timeout=0.05").status_code == 400


def test_the_version_is_named_and_the_checksums_are_those_of_the_engine():
    engine = FakeEngine()
    client = client_of(engine)
    answer = client.post("/update_weight_version", json={"new_version": "v2", "abort_all_requests": False})
    assert answer.json() == {"success": True, "message": "Weight version updated to v2", "new_version": "v2"}
    assert engine.weight_version == "v2" and engine.aborted == []
    answer = client.post("/weights_checker", json={"action": "checksum"})
    assert answer.json()["ranks"][0]["checksums"] == {"a": "1", "b": "2"}
    assert client.post("/weights_checker", json={"action": "guess"}).status_code == 400


def test_without_the_key_only_health_is_open(monkeypatch):
    monkeypatch.setenv("DASD_API_KEY", KEY)
    client = client_of(FakeEngine())
    assert client.get("/health").status_code == 200
    refused = client.post("/generate", json=GENERATE)
    message = "Unauthorized: this server asks for its API key, as Authorization: Bearer KEY"
    assert (refused.status_code, refused.json()) == (401, {"error": message})
    assert client.post("/generate", json=GENERATE, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
