"""Answers to /generate: what a finished row becomes."""

from __future__ import annotations

import json
import math
import random
import tracemalloc

import pytest

from dasd_megatron.rollout.embedded.replies import DecodingError, _version_spans, build_reply, write_reply
from dasd_megatron.rollout.embedded.requests import GenerateJob, Row, parse_sampling_params, row_tokens

LENGTH = {"type": "length", "length": 3}


class LettersTokenizer:
    """Stands for a tokenizer: 0 is a, 1 is b and so on; 9 is special."""

    def decode(self, ids, skip_special_tokens):
        return "".join("<end>" if i == 9 else chr(ord("a") + i) for i in ids if i != 9 or not skip_special_tokens)

    def batch_decode(self, rows):
        return [self.decode(row, skip_special_tokens=False) for row in rows]


def make_row(job=None, reason=LENGTH, output=(3, 4, 5), **changes):
    params = parse_sampling_params(changes.pop("params", {}), prompt_length=2, context_length=50, eos_ids=frozenset())
    values = {"output_ids": list(output), "log_probs": [-0.5] * len(output), "started": True, "weight_version": "v1"}
    row = Row(job or GenerateJob(), "r", [0, 1], params, True, 2, 0)
    for name, value in {**values, "finish_reason": reason, **changes}.items():
        setattr(row, name, value)
    row.request.rows.append(row)
    return row


def test_a_single_request_is_an_object_and_a_batch_a_list():
    job = make_row().request
    assert [answer["text"] for answer in build_reply(job, LettersTokenizer())] == ["def"]
    job.single = True
    answer = build_reply(job, LettersTokenizer())
    assert answer["text"] == "def" and answer["output_ids"] == [3, 4, 5]
    meta = answer["meta_info"]
    assert meta["finish_reason"] == LENGTH and meta["completion_tokens"] == 3 and meta["prompt_tokens"] == 2
    assert meta["output_token_logprobs"] == [(-0.5, 3, None), (-0.5, 4, None), (-0.5, 5, None)]
    assert meta["input_token_logprobs"] == [] and "output_top_logprobs" not in meta


def test_texts_of_tokens_come_when_asked_for():
    job = make_row(top_logprobs=1, top=[[(-0.5, 3)], [(-0.5, 4)], [(-0.5, 5)]]).request
    job.text_in_logprobs = True
    meta = build_reply(job, LettersTokenizer())[0]["meta_info"]
    assert [triple[2] for triple in meta["output_token_logprobs"]] == ["d", "e", "f"]
    assert meta["output_top_logprobs"] == [[(-0.5, 3, "d")], [(-0.5, 4, "e")], [(-0.5, 5, "f")]]


@pytest.mark.parametrize(
    ("reason", "params", "text"),
    [
        ({"type": "stop", "matched": 5}, {}, "de"),
        ({"type": "stop", "matched": 5}, {"no_stop_trim": True}, "def"),
        ({"type": "stop", "matched": "e"}, {}, "d"),
        ({"type": "stop", "matched": "e"}, {"no_stop_trim": True}, "de"),
    ],
)
def test_what_matched_a_stop_is_trimmed(reason, params, text):
    job = make_row(reason=reason, params=params).request
    assert build_reply(job, LettersTokenizer())[0]["text"] == text


def test_a_row_that_never_started_has_no_counts_of_tokens_read():
    reason = {"type": "abort", "message": "Abort in waiting queue"}
    meta = build_reply(make_row(reason=reason, output=(), started=False).request, LettersTokenizer())[0]["meta_info"]
    assert meta["finish_reason"] == reason and meta["completion_tokens"] == 0
    assert "prompt_tokens" not in meta and "weight_versions" not in meta


def test_a_row_that_the_model_failed_on_is_an_error_of_the_whole_answer():
    job = GenerateJob()
    make_row(job)
    make_row(job, reason={"type": "abort", "message": "no room", "status_code": 500, "err_type": "InternalServerError"})
    with pytest.raises(DecodingError, match=r"^no room$"):
        build_reply(job, LettersTokenizer())


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([("v1", 3)], [("v1", 0, 3)]),
        ([("v1", 2), ("v2", 3)], [("v1", 0, 2), ("v2", 2, 3)]),
        ([("v1", 2), ("v2", 2), ("v3", 5)], [("v1", 0, 2), ("v3", 2, 5)]),
        ([("v1", 0)], [("v1", 0, 0)]),
    ],
)
def test_spans_of_versions(ends, expected):
    assert [tuple(span.values()) for span in _version_spans(ends)] == expected


@pytest.mark.parametrize(("top", "tokens"), [(0, 4000), (20, 200)])
def test_the_memory_of_an_answer_is_bounded_by_its_tokens(top, tokens):
    """A counted token takes at most 150 bytes in its row, and 600 while the answer is written."""
    counted = row_tokens(2, tokens, 0, top)
    generator = random.Random(0)
    tracemalloc.start()
    try:
        job = make_row(output=[generator.randrange(300, 1000) for _ in range(tokens)], top_logprobs=top).request
        job.text_in_logprobs = True
        job.rows[0].log_probs = [-generator.random() for _ in range(tokens)]
        job.rows[0].top = [
            [(-generator.random(), generator.randrange(300, 1000)) for _ in range(top)] for _ in range(tokens)
        ]
        held = tracemalloc.get_traced_memory()[0]
        content = write_reply(job, LettersTokenizer())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(content) > 20 * counted
    assert held < 150 * counted and peak < 600 * counted


def test_an_infinite_log_prob_is_null():
    row = make_row(top_logprobs=2, top=[[(-0.5, 3), (-math.inf, 1)]] * 3)
    meta = json.loads(write_reply(row.request, LettersTokenizer()))[0]["meta_info"]
    assert meta["output_top_logprobs"][0] == [[-0.5, 3, None], [None, 1, None]]
