"""Answers of rollout servers: exactly what is sound is accepted."""

from __future__ import annotations

import math
from random import Random

import orjson
import pytest

from dasd_megatron.rollout.answers import (
    Answer,
    FailedTryError,
    OtherVersionError,
    check_completions,
    check_success,
    error_message,
    read_checksums,
    read_json_object,
    read_prompt_log_probs,
)

VERSION = "7"


def row(ids, version=VERSION, **meta):
    """A sound row of an answer."""
    return {
        "text": "t",
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": "stop"},
            "weight_version": version,
            "output_token_logprobs": [[-0.5 * (i + 1), token, None] for i, token in enumerate(ids)],
            **meta,
        },
    }


def answer(content, status=200):
    return Answer("/path", status, content if isinstance(content, bytes) else orjson.dumps(content))


def sound_by_the_definition(answer_row, limit, vocab_size):
    """Decide whether tokens and log-probs are sound, value by value."""
    ids, triples = answer_row["output_ids"], answer_row["meta_info"]["output_token_logprobs"]
    return (
        isinstance(ids, list)
        and all(type(token) is int and 0 <= token < vocab_size for token in ids)
        and 1 <= len(ids) <= limit
        and isinstance(triples, list)
        and len(triples) == len(ids)
        and all(isinstance(triple, list) and len(triple) >= 2 for triple in triples)
        and all(type(value) in (int, float) and math.isfinite(value) and value <= 1e-3 for value, *_ in triples)
        and all(triple[1] == token for triple, token in zip(triples, ids, strict=True))
    )


def test_random_answers_are_accepted_exactly_by_the_definition():
    random = Random(0)
    odd = [
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        9,
        10,
        2**40,
        0.0,
        -0.5,
        1.0,
        1e-3,
        0.002,
        -math.inf,
        math.inf,
        math.nan,
        "1",
        "ab",
        [],
        [0, 1],
        {},
    ]
    accepted = 0
    for _ in range(5000):
        ids = [random.randrange(10) for _ in range(random.randint(1, 4))]
        found = row([*ids])
        ids, triples = found["output_ids"], found["meta_info"]["output_token_logprobs"]
        for _ in range(random.randrange(3)):
            match random.randrange(6):
                case 0:
                    position = random.randrange(len(ids))
                    ids[position] = random.choice(odd)
                    if len(triples) == len(ids) and isinstance(triples[position], list) and len(triples[position]) > 1:
                        triples[position][1] = ids[position]
                case 1 | 2 if triples:
                    triple = random.choice(triples)
                    if isinstance(triple, list) and triple:
                        triple[random.randrange(len(triple))] = random.choice(odd)
                case 3 if triples:
                    triples[random.randrange(len(triples))] = random.choice(odd)
                case 4 if triples:
                    del triples[random.randrange(len(triples))]
                case 5 if triples and isinstance(triples[-1], list):
                    del triples[-1][random.randrange(3) :]
        expected = sound_by_the_definition(found, 3, 10)
        accepted += expected
        if expected:
            [completion] = check_completions([found], [{"max_new_tokens": 3}], VERSION, 10)
            assert (completion.output_ids, completion.log_probs) == (ids, [triple[0] for triple in triples])
            assert all(type(value) is float for value in completion.log_probs)
        else:
            with pytest.raises(FailedTryError, match="row 0") as caught:
                check_completions([found], [{"max_new_tokens": 3}], VERSION, 10)
            assert type(caught.value) is FailedTryError
    assert 1000 < accepted < 4000


def span(version, start, end):
    return {"version": version, "start": start, "end": end}


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        (None, [("7", 3)]),
        ([], [("7", 3)]),
        ([span("6", 0, 1), span("7", 1, 3)], [("6", 1), ("7", 2)]),
        ([span("6", 0, 0), span("7", 0, 3)], [("7", 3)]),
    ],
)
def test_versions_of_a_response(spans, expected):
    (completion,) = check_completions([row([1, 2, 3], weight_versions=spans)], [{}], None)
    assert completion.weight_versions == expected


@pytest.mark.parametrize(
    "spans",
    [
        [span("7", 0, 2)],
        [span("7", 0, 4)],
        [span("7", 1, 3)],
        [span("6", 0, 2), span("7", 1, 3)],
        [span("7", 0, 3.0)],
        [span("7", 0, 3), None],
        "7",
        {"version": "7"},
    ],
)
def test_spans_that_do_not_cover_a_response_are_refused(spans):
    with pytest.raises(FailedTryError, match="row 0: weight_versions .* are not spans of 3 tokens"):
        check_completions([row([1, 2, 3], weight_versions=spans)], [{}], None)


def test_another_version_is_named_and_any_of_several_is_accepted():
    rows = [row([1, 2]), row([1, 2], weight_versions=[span("6", 0, 1), span("7", 1, 2)])]
    assert len(check_completions(rows, [{}, {}], {"6", "7"})) == 2
    with pytest.raises(
        OtherVersionError, match="expected weight version '7', but row 1 was sampled under '6' and '7'"
    ) as c:
        check_completions(rows, [{}, {}], "7")
    assert c.value.version == "7"


def prompt_answer(triples):
    return answer([{"meta_info": {"input_token_logprobs": triples}}])


def test_log_probs_of_a_prompt_are_those_of_its_tokens():
    assert read_prompt_log_probs(prompt_answer([[None, 5, None], [-1, 6, None], [-0.5, 7, None]]), [5, 6, 7]) == [
        -1.0,
        -0.5,
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "a list instead of a list of one row"),
        ({}, "a dict instead"),
        ([{}], "input_token_logprobs is missing"),
        ([{"meta_info": {"input_token_logprobs": [[None]]}}], "input_token_logprobs is missing"),
        ([{"meta_info": {"input_token_logprobs": [[None, 5], [-1, 9]]}}], "are not those of the prompt"),
        ([{"meta_info": {"input_token_logprobs": [[None, 5], [0.5, 6]]}}], "log-prob 0.5 of a prompt token"),
        ([{"meta_info": {"input_token_logprobs": [[None, 5], [None, 6]]}}], "log-prob None of a prompt token"),
    ],
)
def test_unsound_log_probs_of_a_prompt_are_refused(content, message):
    with pytest.raises(FailedTryError, match=f"^/generate answered garbage: .*{message}"):
        read_prompt_log_probs(answer(content), [5, 6])


def test_checksums_come_in_the_order_of_ranks():
    ranks = [{"checksums": {"w": str(rank)}, "parallelism_info": [{"tp_rank": rank}]} for rank in (1, 0)]
    assert read_checksums(answer({"success": True, "ranks": ranks})) == [{"w": "0"}, {"w": "1"}]


@pytest.mark.parametrize("ranks", [None, [{}], [{"checksums": {}}], [{"checksums": {}, "parallelism_info": []}], 3])
def test_unsound_checksums_are_refused(ranks):
    with pytest.raises(FailedTryError, match="^/path answered no checksums"):
        read_checksums(answer({"success": True, "ranks": ranks}))
    with pytest.raises(FailedTryError, match="^/path failed: 'why'"):
        read_checksums(answer({"success": False, "message": "why", "ranks": ranks}))


def test_success_has_to_be_true():
    check_success(answer({"success": True}))
    for content in ({}, {"success": 1}, {"success": "true"}):
        with pytest.raises(FailedTryError, match="^/path failed: None"):
            check_success(answer(content))
    with pytest.raises(FailedTryError, match="^/path answered a list instead of an object"):
        read_json_object(answer([]))
    with pytest.raises(FailedTryError, match="^/path answered what is not JSON"):
        read_json_object(answer(b"<html>"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>" + b"x" * 1000, "<html>" + "x" * 294),
        ({"error": {"message": "a"}}, "a"),
        ({"error": "b"}, "b"),
        ({"message": "c"}, "c"),
        ({"detail": "d"}, "d"),
        ({"other": 1}, "{'other': 1}"),
        ([1], "[1]"),
    ],
)
def test_the_servers_words_are_found_in_every_error_body(content, message):
    assert error_message(answer(content, 500)) == message
