"""The embedded server under hostile requests: each is answered, and none touches another request or ends the server."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from starlette.testclient import TestClient

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.embedded import app as app_module
from dasd_megatron.rollout.embedded import bodies, weight_receiver
from dasd_megatron.rollout.embedded import engine as engine_module
from dasd_megatron.rollout.embedded import requests as requests_module
from dasd_megatron.rollout.embedded.app import build_app
from dasd_megatron.rollout.embedded.decoder import Decoder
from dasd_megatron.rollout.embedded.engine import MAX_UPDATES, Engine
from dasd_megatron.rollout.embedded.requests import ROW_TOKENS, InvalidRequestError
from dasd_megatron.rollout.embedded.schema import SAMPLING_FIELDS
from tests.support.hostile_json import HOSTILE_TEXTS, body_text, hostile_values
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


def make_engine(model_path, cache_bytes=1 << 28):
    return Engine(
        model_path,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_batch_size=128,
        weight_version="1",
        deterministic=False,
        cache_bytes=cache_bytes,
    )


@pytest.fixture
def engine(model_path, monkeypatch):
    monkeypatch.delenv("DASD_API_KEY", raising=False)
    made = make_engine(model_path)
    yield made
    made.close()
    made._thread.join(20)
    assert not made._thread.is_alive()


@pytest.fixture
def client(engine):
    with TestClient(build_app(engine, {"tokenizer_path": "there"}), raise_server_exceptions=False) as made:
        yield made


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def watch_steps(engine, work):
    """Let the engine's thread call ``work`` with the number of a decoding step and its batch, before the step."""
    decode, steps = engine._decoder.decode, itertools.count(1)

    def watched(batch):
        work(next(steps), batch)
        return decode(batch)

    engine._decoder.decode = watched


def pause_after(engine, count):
    """Let the engine pause itself in a decoding step, so that a request is under way however slow this thread is."""
    watch_steps(engine, lambda step, batch: engine.pause("in_place") if step == count else None)


class Neighbour:
    """A request in flight, which has to get the answer of an undisturbed run.

    The engine pauses itself in its midst, so that the hostile requests come while it is under way.
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
        pause_after(self._engine, 3)
        self._thread = threading.Thread(target=lambda: setattr(self, "_answer", self._ask()))
        self._thread.start()
        wait_until(lambda: self._engine.paused)
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
    shown = [text for text in HOSTILE_TEXTS if len(text) < 5000][::3]
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
    assert statuses[400] > 600 and statuses[200] > 10, statuses
    engine.resume()
    with Neighbour(client, engine):
        pass


SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


class Fuzzed:
    """One server for all examples of a test, and the statuses that it gave."""

    def __init__(self, client, engine):
        self.client, self.engine = client, engine
        self.statuses = Counter()

    def check(self, path, content, headers=JSON):
        answer = self.client.post(path, content=content, headers=headers)
        self.statuses[answer.status_code] += 1
        assert answer.status_code in (200, 400, 413, 415), (path, content[:300], answer.text[:300])
        if answer.status_code != 200 and path != "/flush_cache":
            check_refusal(answer)
        assert self.engine.alive
        # What comes next shall not wait for the end of a pause, or for weights.
        self.engine.resume()
        if self.engine.missing_memory:
            if self.engine._released:
                self.engine.resume_memory(sorted(self.engine._released))
            assert self.engine.update_from_disk(self.engine.model_path, None).result(30).success


def test_fuzzed_requests_are_answered(client, engine, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("nobody is there")

    monkeypatch.setattr(weight_receiver, "join_weight_group", refuse)
    # Otherwise a number of samples that is made up could take the time of all other examples.
    monkeypatch.setattr(requests_module, "MAX_REQUEST_TOKENS", 1 << 14)
    fuzzed = Fuzzed(client, engine)
    paths = ["/generate", *CONTROL]
    generate = {"input_ids": "[5]", "sampling_params": '{"max_new_tokens": 1}'}

    @SETTINGS
    @given(strategies.data())
    def control(data):
        path = data.draw(strategies.sampled_from(paths))
        fields = dict(CONTROL.get(path, generate))
        names = [*(GENERATE_FIELDS if path == "/generate" else fields), "unknown"]
        fields |= data.draw(strategies.dictionaries(strategies.sampled_from(names), hostile_values(), max_size=4))
        fuzzed.check(path, body_text(fields))

    @SETTINGS
    @given(
        strategies.dictionaries(strategies.sampled_from([*SAMPLING_FIELDS, "unknown"]), hostile_values(), max_size=5)
    )
    def sampling(params):
        fuzzed.check(
            "/generate", body_text(generate | {"sampling_params": body_text({"max_new_tokens": "1", **params})})
        )

    @SETTINGS
    @given(strategies.sampled_from(paths), strategies.binary(max_size=100), strategies.sampled_from(CODINGS))
    def bytes_of_any_kind(path, content, headers):
        fuzzed.check(path, content, headers)

    bytes_of_any_kind()
    sampling()
    control()
    assert fuzzed.statuses[200] > 3 and fuzzed.statuses[400] > 60, fuzzed.statuses


CODINGS = (JSON, {}, {**JSON, "content-encoding": "gzip"}, {"content-type": "text/plain"}, {"content-type": "x" * 9000})


def test_a_full_queue_is_said_and_empties_again(client, engine, monkeypatch):
    content = body_text({"input_ids": "[5]", "sampling_params": '{"max_new_tokens": 20, "n": 4}'})
    asked = 4 * (ROW_TOKENS + 1 + 20)
    monkeypatch.setattr(app_module, "MAX_HELD_TOKENS", 2 * asked)
    engine.pause("in_place")
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, client, "/generate", content) for _ in range(2)]
        wait_until(lambda: engine.waiting == 8)
        full = post(client, "/generate", content)
        assert full.status_code == 503 and full.json()["message"] == "The request queue is full."
        engine.resume()
        assert [len(job.result(30).json()) for job in waiting] == [4, 4]
    assert post(client, "/generate", content).status_code == 200
    # A request that is refused or fails gives its room back too.
    for _ in range(3):
        assert post(client, "/generate", body_text({"input_ids": "[5]", "rid": "[]"})).status_code == 400
        with monkeypatch.context() as patch:
            patch.setattr(app_module, "write_reply", None)
            assert post(client, "/generate", content).status_code == 500
    assert post(client, "/generate", content).status_code == 200


def test_a_thread_that_ends_is_no_silent_hang(client, engine, monkeypatch):
    content = body_text({"input_ids": "[[5], [6]]", "sampling_params": '{"max_new_tokens": 100}'})
    engine.pause("in_place")
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(post, client, "/generate", content)
        update = pool.submit(post, client, "/update_weights_from_disk", body_text({"model_path": '"/nowhere"'}))
        assert update.result(30).status_code == 400
        wait_until(lambda: engine.waiting == 2)
        monkeypatch.setattr(engine, "_admit_rows", lambda: 1 / 0)
        engine.resume()
        answer = waiting.result(30)
    assert answer.status_code == 500 and "The decoding thread has ended: ZeroDivisionError" in answer.json()["message"]
    assert [client.get(path).status_code for path in ("/health", "/health_generate")] == [503, 503]
    later = post(client, "/generate", content)
    assert later.status_code == 503 and "has ended" in later.json()["message"]
    assert post(client, "/update_weights_from_disk", body_text({"model_path": '"/nowhere"'})).status_code == 503


def test_any_error_of_an_update_leaves_the_thread_and_the_weights(client, engine, monkeypatch):
    def fail(*_, **__):
        raise AttributeError("'list' object has no attribute 'get'")

    monkeypatch.setattr(engine_module, "load_update", fail)
    with Neighbour(client, engine):
        answer = post(client, "/update_weights_from_disk", body_text({"model_path": '"x"'}))
        assert answer.status_code == 400 and answer.json()["success"] is False
        assert "AttributeError" in answer.json()["message"] and "unchanged" in answer.json()["message"]


def test_suspended_rows_that_cannot_go_on_end_and_the_update_is_complete(client, engine, monkeypatch):
    content = body_text({"input_ids": "[[5], [6]]", "sampling_params": '{"max_new_tokens": 200, "ignore_eos": true}'})
    with ThreadPoolExecutor(1) as pool:
        pause_after(engine, 3)
        running = pool.submit(post, client, "/generate", content)
        wait_until(lambda: engine.paused)
        engine.pause("retract")
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "recompute_cache", lambda self, batch: 1 / 0)
            body = body_text({"model_path": json.dumps(engine.model_path), "weight_version": '"2"'})
            assert post(client, "/update_weights_from_disk", body).status_code == 200
        assert running.result(30).status_code == 500
    engine.resume()
    answer = post(client, "/generate", body_text({"input_ids": "[5]", "sampling_params": '{"max_new_tokens": 1}'}))
    assert answer.json()["meta_info"]["weight_version"] == "2"


def test_updates_that_wait_are_bounded(engine):
    go = threading.Event()
    watch_steps(engine, lambda step, batch: go.wait(60))
    job = engine.parse_request({"input_ids": [5], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}})
    engine.submit(job)
    wait_until(lambda: engine.running)
    outcomes = [engine.update_from_disk("/nowhere", None) for _ in range(3 * MAX_UPDATES)]
    go.set()
    results = [outcome.result(30) for outcome in outcomes]
    assert not any(result.success for result in results)
    assert any("wait for their turn already" in result.message for result in results)
    job.done.result(30)


def test_names_that_come_and_go_leave_nothing_behind(client, engine):
    content = body_text({"input_ids": "[5]", "sampling_params": '{"max_new_tokens": 100, "ignore_eos": true}'})
    with ThreadPoolExecutor(1) as pool:
        pause_after(engine, 3)
        running = pool.submit(post, client, "/generate", content)
        wait_until(lambda: engine.paused)
        for i in range(100):
            answer = post(client, "/update_weight_version", body_text({"new_version": f'"{i}"', **KEEP}))
            assert answer.status_code == 200
        # A step that was under way may have drawn one more token.
        assert len(engine._live_rows()[0].earlier_versions) in (1, 2)
        engine.resume()
        spans = running.result(30).json()["meta_info"]["weight_versions"]
    assert (spans[0]["version"], spans[-1]["version"], spans[-1]["end"]) == ("1", "99", 100) and len(spans) < 4


KEEP = {"abort_all_requests": "false"}


def test_rows_that_do_not_fit_into_the_cache_wait_or_are_refused(model_path):
    engine = make_engine(model_path, cache_bytes=3 * 60 * 2 * 8 * 4)
    try:
        assert (engine.cache_tokens, engine.longest_sequence) == (60, 144)
        body = {"input_ids": [[5]] * 4, "sampling_params": {"max_new_tokens": 19, "ignore_eos": True}}
        job = engine.parse_request(body)
        sizes = []
        watch_steps(engine, lambda step, batch: sizes.append(sum(row.finish_reason is None for row in batch.rows)))
        engine.submit(job)
        job.done.result(30)
        assert max(sizes) == 3, "three rows of 20 tokens fit"
        assert {len(row.output_ids) for row in job.rows} == {19}
        # A sequence alone needs no room for copies.
        alone = engine.parse_request({"input_ids": [5], "sampling_params": {"max_new_tokens": 143}})
        engine.submit(alone)
        alone.done.result(30)
        assert alone.rows[0].finish_reason["type"] in ("length", "stop")
        engine.longest_sequence = 19
        with pytest.raises(
            InvalidRequestError, match=r"20 tokens does not fit into the server's key-value cache of 19"
        ):
            engine.submit(engine.parse_request(body))
    finally:
        engine.close()
