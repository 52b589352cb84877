"""Contract of /abort_request, /pause_generation, /continue_generation and /flush_cache."""

from __future__ import annotations

import time

import httpx
import pytest
import torch

from tests.support.rollout_contract import (
    LONG,
    busy_request,
    forward_log_probs,
    long_request,
    outcome,
    output_log_probs,
    request_behind,
    suspended_request,
)

pytestmark = pytest.mark.integration


def test_abort_by_id(target):
    # SGLang aborts every request whose id begins so.
    running = busy_request(target, rid=[f"row-{i:02}" for i in range(64)])
    assert target.post("/abort_request", {"rid": "row-03"}).status_code == 200
    answers = running.answer()
    reason = answers[3]["meta_info"]["finish_reason"]
    assert (reason["type"], reason["message"]) == ("abort", "Aborted")
    assert len(answers[3]["output_ids"]) < 240
    assert {len(a["output_ids"]) for a in answers[:3] + answers[4:]} == {240}


def test_abort_all_ends_what_runs_and_what_waits(target):
    running, waiting = request_behind(target, 3)
    target.post("/abort_request", {"abort_all": True})
    for answer in running.answer() + waiting.answer():
        meta = answer["meta_info"]
        assert meta["finish_reason"]["type"] == "abort"
        assert len(answer["output_ids"]) == meta["completion_tokens"] == len(meta["output_token_logprobs"]) < 240
        assert meta["weight_version"] == "v1"
    assert target.generate(input_ids=[5], sampling_params={"max_new_tokens": 1})["output_ids"], "the server must go on"


def test_abort_of_an_unknown_id_is_fine(target):
    assert target.post("/abort_request", {"rid": "nobody"}).status_code == 200
    assert target.post("/abort_request", {}).status_code == 200


def test_pause_aborts_and_holds_new_requests(target):
    running = busy_request(target)
    assert target.post("/pause_generation", {"mode": "abort"}).json() == {
        "message": "Generation paused successfully.",
        "status": "ok",
    }
    assert {a["meta_info"]["finish_reason"]["type"] for a in running.answer()} == {"abort"}
    waiting = long_request(target, rows=2)
    time.sleep(0.5)
    assert not waiting.future.done()
    assert target.post("/continue_generation", {}).json() == {
        "message": "Generation continued successfully.",
        "status": "ok",
    }
    assert {len(a["output_ids"]) for a in waiting.answer()} == {240}


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_suspended_request_goes_on_where_it_was(target, reference, mode):
    undisturbed = long_request(target).answer()
    running = suspended_request(target, mode)
    assert not running.future.done()
    target.post("/continue_generation", {})
    answers = running.answer()
    if target.kind == "sglang" and mode == "retract":
        # What was retracted is read again in other batches, whose last bits can tip a draw.
        same = [a["output_ids"] == b["output_ids"] for a, b in zip(answers, undisturbed, strict=True)]
        assert sum(same) > len(same) / 2
        for answer in answers:
            expected = forward_log_probs(reference[0], [5, 6, *answer["output_ids"]])[1:]
            torch.testing.assert_close(
                torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
            )
    else:
        assert list(map(outcome, answers)) == list(map(outcome, undisturbed))


def test_an_abort_reaches_suspended_requests(target):
    running = suspended_request(target, "in_place")
    target.post("/abort_request", {"abort_all": True})
    if target.kind == "sglang":  # which ends them when it goes on
        target.post("/continue_generation", {})
    assert {a["meta_info"]["finish_reason"]["type"] for a in running.answer(10)} == {"abort"}
    target.post("/continue_generation", {})


def test_flush_cache_only_when_idle(target):
    assert target.post("/flush_cache").status_code == 200
    running = busy_request(target)
    assert target.post("/flush_cache").status_code == 400
    assert target.request("GET", "/flush_cache?timeout=30").status_code == 200
    running.answer()


def test_a_client_that_hangs_up_frees_the_server(embedded_target):
    body = {"input_ids": [[5, 6]] * 64 * 40, "sampling_params": LONG}  # 40 batches: about half a minute
    with pytest.raises(httpx.ReadTimeout):
        embedded_target.post("/generate", body, timeout=1.0)
    deadline = time.monotonic() + 5
    while embedded_target.load("num_running_reqs"):
        assert time.monotonic() < deadline, "the request of a gone client is still running"
        time.sleep(0.05)
