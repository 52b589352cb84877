"""The embedded server's engine without HTTP: what it does when the model or a directory fails."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.embedded.decoder import Decoder
from dasd_megatron.rollout.embedded.engine import Engine, EngineClosedError
from dasd_megatron.rollout.embedded.loading import ModelDirectoryError
from dasd_megatron.rollout.embedded.replies import DecodingError, build_reply
from dasd_megatron.rollout.embedded.requests import InvalidRequestError

TINY = TinyModelConfig(
    hidden_size=32, num_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", TINY, 0))


def make_engine(model_path, **changes):
    options = {"max_batch_size": 8, "weight_version": "1", "deterministic": False, "cache_bytes": 1 << 28}
    return Engine(model_path, device=torch.device("cpu"), dtype=torch.float32, **{**options, **changes})


@pytest.fixture
def engine(model_path):
    made = make_engine(model_path)
    yield made
    made.close()
    made._thread.join(10)
    assert not made.alive


def job(engine, count, tokens, **body):
    body = {
        "input_ids": [[5 + i, 9] for i in range(count)],
        "sampling_params": [{"max_new_tokens": tokens, "sampling_seed": i, "ignore_eos": True} for i in range(count)],
        **body,
    }
    return engine.parse_request(body)


def run(engine, made):
    engine.submit(made)
    made.done.result(30)
    return build_reply(made, engine.tokenizer)


def test_nan_logits_are_a_server_error_and_the_engine_goes_on(engine):
    weight = engine.model.model.norm.weight
    saved = weight.clone()
    weight.fill_(math.nan)
    with pytest.raises(DecodingError, match="the model returned NaN logits"):
        run(engine, job(engine, 2, 5))
    weight.copy_(saved)
    assert len(run(engine, job(engine, 2, 5))) == 2


def test_a_failing_forward_pass_is_a_server_error_and_the_engine_goes_on(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine._decoder, "_forward", lambda *a, **k: 1 / 0)
        with pytest.raises(DecodingError, match="decoding failed: ZeroDivisionError"):
            run(engine, job(engine, 2, 5))
    assert len(run(engine, job(engine, 2, 5))) == 2


def fail_on(token, monkeypatch):
    """Let the model run out of memory where it reads a prompt that begins with ``token``."""
    read_group = Decoder._read_group

    def read_or_fail(self, rows):
        if any(row.prompt[0] == token for row in rows):
            raise MemoryError("no room")
        return read_group(self, rows)

    monkeypatch.setattr(Decoder, "_read_group", read_or_fail)


def test_prompts_that_fail_do_not_take_running_rows_with_them(engine, monkeypatch):
    fail_on(77, monkeypatch)
    running = job(engine, 2, 200)
    engine.submit(running)
    while not engine.running:  # else both would be read in one pass
        time.sleep(0.001)
    with pytest.raises(DecodingError, match="no room"):
        run(engine, job(engine, 1, 5, input_ids=[[77]]))
    running.done.result(30)
    assert [len(answer["output_ids"]) for answer in build_reply(running, engine.tokenizer)] == [200, 200]


def test_more_rows_than_the_batch_holds_are_all_answered(engine):
    answers = run(engine, job(engine, 20, 6))
    assert [len(answer["output_ids"]) for answer in answers] == [6] * 20
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [2] * 20


def test_rows_that_join_late_are_padded_to_the_running_batch(engine):
    """Batches of unequal age, decoded apart and together, draw the same tokens."""
    apart = [run(engine, job(engine, 1, 30, input_ids=[prompt])) for prompt in ([5, 6, 7], [8] * 20)]
    old, young = (job(engine, 1, 30, input_ids=[prompt]) for prompt in ([5, 6, 7], [8] * 20))
    with torch.inference_mode():
        batch = engine._decoder.read_prompts(old.rows).batch
        batch.join(engine._decoder.read_prompts(young.rows).batch)
        assert batch.mask.shape == (2, 20) and batch.mask.sum(-1).tolist() == [3, 20]
        for _ in range(29):
            engine._decoder.decode(batch)
    assert [made.rows[0].output_ids for made in (old, young)] == [answers[0]["output_ids"] for answers in apart]


def test_an_engine_that_closes_answers_and_refuses(model_path):
    engine = make_engine(model_path, max_batch_size=2, deterministic=True)
    made = job(engine, 6, 200)
    engine.submit(made)
    update = engine.update_from_disk(model_path, "2")
    engine.close()
    assert update.result(10) == (False, "The server is shutting down.")
    made.done.result(10)
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in build_reply(made, engine.tokenizer)} == {"abort"}
    with pytest.raises(EngineClosedError, match="shutting down"):
        engine.submit(job(engine, 1, 1))
    with pytest.raises(EngineClosedError, match="shutting down"):
        engine.update_from_disk(model_path, "2")


def test_ids_in_use_and_released_memory_are_refused_by_the_engine_itself(engine):
    engine.pause("in_place")
    engine.submit(job(engine, 1, 5, rid=["mine"]))
    with pytest.raises(InvalidRequestError, match="Duplicate request ID detected: mine"):
        engine.submit(job(engine, 1, 5, rid=["mine"]))
    engine.abort(rid="mine")
    with pytest.raises(InvalidRequestError, match="unknown memory tag 'disk'"):
        engine.release_memory(["disk"])
    with pytest.raises(InvalidRequestError, match="kv_cache: not released"):
        engine.resume_memory(["kv_cache"])
    engine.release_memory(["kv_cache"])
    with pytest.raises(InvalidRequestError, match=r"memory is released \(kv_cache\): call /resume_memory_occupation"):
        engine.submit(job(engine, 1, 5))
    engine.resume_memory(["kv_cache"])
    engine.resume()
    assert len(run(engine, job(engine, 1, 5))) == 1


def test_memory_is_not_released_while_rows_wait(engine, monkeypatch):
    made = job(engine, 1, 5)
    monkeypatch.setattr(Engine, "_next_work", lambda self: None)
    engine.submit(made)
    with pytest.raises(InvalidRequestError, match="only when server is idle"):
        engine.release_memory(["kv_cache"])
    monkeypatch.undo()
    engine.abort(job=made)
    assert build_reply(made, engine.tokenizer)[0]["meta_info"]["finish_reason"]["message"] == "Abort in waiting queue"


@pytest.mark.parametrize(
    "damage", ["absent", "no config", "no weights", "torn weights", "missing tensor", "no tokenizer"]
)
def test_a_bad_directory_is_named_in_one_line(tmp_path, damage):
    path = tmp_path / "model"
    if damage != "absent":
        make_tiny_model(path, TINY, 0)
    if damage == "no config":
        (path / "config.json").unlink()
    if damage == "no weights":
        (path / "model.safetensors").unlink()
    if damage == "torn weights":
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:3000])
    if damage == "missing tensor":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(
            json.dumps({**config, "num_hidden_layers": 3, "layer_types": None, "max_window_layers": 3})
        )
    if damage == "no tokenizer":
        for file in path.glob("*token*"):
            file.unlink()
    with pytest.raises(ModelDirectoryError) as caught:
        make_engine(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
