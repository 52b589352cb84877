"""Contract of /generate: where a response ends."""

from __future__ import annotations

import pytest

from tests.support.rollout_contract import (
    END,
    PROMPTS,
    seeded,
)

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def greedy(target):
    """A greedy continuation of 24 tokens, to choose stops from."""
    answer = target.generate(
        input_ids=PROMPTS[1], sampling_params={"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    )
    return answer["output_ids"], answer["text"]


def stopped(target, **params):
    answer = target.generate(
        input_ids=PROMPTS[1], sampling_params={"temperature": 0, "max_new_tokens": 24, **params}, return_logprob=True
    )
    assert (
        len(answer["meta_info"]["output_token_logprobs"])
        == len(answer["output_ids"])
        == answer["meta_info"]["completion_tokens"]
    )
    return answer


def test_stop_token_ids(target, greedy, reference):
    ids, _ = greedy
    token = ids[5]
    first = ids.index(token)
    answer = stopped(target, stop_token_ids=[token, 98])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert answer["output_ids"] == ids[: first + 1]
    assert answer["text"] == reference[1].decode(ids[:first])
    assert stopped(target, stop_token_ids=[token], no_stop_trim=True)["text"] == reference[1].decode(ids[: first + 1])
    assert stopped(target, stop_token_ids=[token], ignore_eos=True)["meta_info"]["finish_reason"]["type"] == "length"


def test_stop_strings(target, greedy):
    ids, text = greedy
    stop = text[6:8]
    end = text.index(stop) + 2
    answer = stopped(target, stop=["never this", stop])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["text"] == text[: end - 2]
    assert answer["output_ids"] == ids[:end]
    assert stopped(target, stop=stop, no_stop_trim=True)["text"] == text[:end]


def test_min_new_tokens_bars_the_stops(target, greedy):
    ids, _ = greedy
    token = ids[0]
    assert len(stopped(target, stop_token_ids=[token])["output_ids"]) == 1
    answer = stopped(target, stop_token_ids=[token], min_new_tokens=6)
    assert len(answer["output_ids"]) > 6
    assert token not in answer["output_ids"][:6]


def test_no_tokens_asked_for(target):
    answer = stopped(target, max_new_tokens=0)
    assert answer["output_ids"] == [] and answer["text"] == ""
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def test_end_of_sequence_token(target):
    """Some of many samples end by themselves; their last token is the end token, and its log-prob is there."""
    body = {"input_ids": [PROMPTS[0]] * 200, "sampling_params": seeded(200, max_new_tokens=40), "return_logprob": True}
    answers = target.generate(**body)
    ended = [a for a in answers if a["meta_info"]["finish_reason"]["type"] == "stop"]
    assert ended, "of 8000 random tokens about 80 should be the end token"
    for answer in answers:
        by_itself = answer in ended
        assert (END in answer["output_ids"]) == by_itself
        if by_itself:
            assert answer["output_ids"].index(END) == len(answer["output_ids"]) - 1
            assert answer["meta_info"]["finish_reason"]["matched"] == END
            assert "<|end|>" not in answer["text"]


def test_special_tokens_in_the_text(target):
    params = {"max_new_tokens": 40, "ignore_eos": True}
    seeds = seeded(60, **params)
    plain = target.generate(input_ids=[[5]] * 60, sampling_params=seeds)
    shown = target.generate(input_ids=[[5]] * 60, sampling_params=[{**s, "skip_special_tokens": False} for s in seeds])
    assert [a["output_ids"] for a in plain] == [a["output_ids"] for a in shown]
    assert not any("<|end|>" in a["text"] for a in plain)
    assert any("<|end|>" in a["text"] for a in shown)
