"""Answers of rollout servers: exactly what is sound is accepted."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dasd_megatron.rollout.answers import (
    Answer,
    Completion,
    FailedTryError,
    OtherVersionError,
    check_completions,
    check_success,
    completions_bytes,
    error_message,
    prompt_bytes,
    read_checksums,
    read_completions,
    read_json_object,
    read_prompt_log_probs,
    read_version,
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
        and all(
            type(value) in (int, float) and math.isfinite(value) and -3.5e38 < value <= 1e-3 for value, *_ in triples
        )
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
        -1e39,
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
            assert (completion.output_ids.dtype, completion.output_ids.tolist()) == (np.int32, ids)
            assert completion.log_probs.dtype == np.float32
            assert completion.log_probs.tolist() == [np.float32(triple[0]) for triple in triples]
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


def test_there_is_room_for_the_longest_answer_that_was_asked_for():
    """The worst token is 256 spaces; a server may name a version for each token."""
    tokens = 2000
    ids = [200_000] * tokens
    versions = [{"version": "step_1234567", "start": i, "end": i + 1} for i in range(tokens)]
    log_probs = [[-12.345678901234567, token, None] for token in ids]
    longest = row(ids, output_token_logprobs=log_probs, weight_versions=versions) | {"text": " " * 256 * tokens}
    params = [{"max_new_tokens": tokens}] * 3
    assert 3 * len(orjson.dumps(longest)) < completions_bytes(params) - completions_bytes([])
    # What was asked for sets the bound, and a request without a limit has one too.
    assert completions_bytes(params) - completions_bytes([]) == 3 * (tokens * 2**10 + 2**16)
    assert completions_bytes([{}]) < 2**27 and prompt_bytes(ids) - prompt_bytes([]) == tokens * 2**10


@pytest.mark.parametrize("version", [None, 7, ["7"], {}, "7" * 1000])
def test_a_weight_version_is_a_short_text(version):
    with pytest.raises(FailedTryError, match="^/path names no weight version, but"):
        read_version(answer({"weight_version": version}))
    with pytest.raises(FailedTryError, match="garbage in row 0: weight_version is"):
        check_completions([row([1], version)], [{}], None)
    assert read_version(answer({"weight_version": "7"})) == "7"


@pytest.mark.parametrize("name", ["output_ids", "meta_info", "output_token_logprobs", "finish_reason"])
def test_a_name_that_stands_twice_in_a_row_is_refused(name):
    content = orjson.dumps([row([1])])
    assert read_completions(answer(content), [{}], VERSION)
    twice = content.replace(f'"{name}":'.encode(), f'"{name}" : [2],"{name}":'.encode())
    with pytest.raises(FailedTryError, match=f"{name} stands more than once in a row"):
        read_completions(answer(twice), [{}], VERSION)
    # A text may hold any of it.
    text = f'"{name}": "{name}" : \\"{name}":'
    assert read_completions(answer([row([1]) | {"text": text}]), [{}], VERSION)


HOSTILE_WORDS = "\x1b[2J\x9b31m\r\n\u202eevil\u2028" + "x" * 5000


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize(
    "body", [HOSTILE_WORDS, {"error": {"message": HOSTILE_WORDS}}, {"detail": [HOSTILE_WORDS] * 99}, [HOSTILE_WORDS]]
)
def test_a_servers_words_are_printable_and_short(body, status):
    words = error_message(answer(body, status))
    assert words.isprintable() and len(words) < 1010 and "evil" in words
    with pytest.raises(FailedTryError) as error:
        check_success(answer({"success": False, "message": body}))
    assert str(error.value).isprintable() and len(str(error.value)) < 1100


def nested(depth):
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize("content", [nested(1000), nested(100_000), b'{"a":' * 1000 + b"1" + b"}" * 1000])
def test_deep_json_is_no_recursion(content):
    assert len(error_message(answer(content, 500))) < 400
    for read in (check_success, read_version, read_checksums, lambda found: read_completions(found, [{}], VERSION)):
        with pytest.raises(FailedTryError):
            read(answer(content))
    inside = orjson.dumps(row([1])).replace(b'"stop"', content)
    with pytest.raises(FailedTryError):
        read_completions(answer(b"[" + inside + b"]"), [{}], VERSION)


NUMBERS = [
    b"1e400",
    b"-1e400",
    b"1" + b"0" * 400,
    b"NaN",
    b"Infinity",
    b"-0",
    b"1e-400",
    b"18446744073709551616",
    b"true",
]
PIECES = [
    b'"output_ids"',
    b'"meta_info"',
    b'"finish_reason"',
    b'"output_token_logprobs"',
    b'"input_token_logprobs"',
    b'"weight_version"',
    b'"weight_versions"',
    b'"success"',
    b'"ranks"',
    b'"checksums"',
    b'"parallelism_info"',
    b'"\\ud800"',
    b'"\xff"',
    b"null",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    nested(1500),
    *NUMBERS,
]
SOUND = [
    orjson.dumps([row([1, 2])]),
    orjson.dumps([{"meta_info": {"input_token_logprobs": [[None, 5, None], [-1.0, 6, None]]}}]),
    orjson.dumps({"success": True, "ranks": [{"checksums": {"w": "0"}, "parallelism_info": [{"tp_rank": 0}]}]}),
    orjson.dumps({"weight_version": VERSION, "error": {"message": "m"}}),
]


@st.composite
def damaged(draw):
    """A sound answer in which a stretch of bytes is replaced, some times."""
    content = draw(st.sampled_from(SOUND))
    for _ in range(draw(st.integers(1, 3))):
        start, length = draw(st.integers(0, len(content))), draw(st.integers(0, 12))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=4) | st.just(content[start : start + 40]))
        content = content[:start] + piece + content[start + length :]
    return content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([piece[1:-1].decode() for piece in PIECES[:11]]), inner, max_size=4)
    ),
    max_leaves=12,
)
BODIES = damaged() | st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join) | JSON.map(orjson.dumps)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(BODIES)
def test_any_bytes_are_read_or_refused_in_one_clear_line(content):
    """Nothing else is raised, and what is read is sound."""
    found = answer(content)
    assert error_message(found).isprintable()
    readers = {
        "completions": lambda: read_completions(found, [{"max_new_tokens": 4}], VERSION, 10),
        "prompt": lambda: read_prompt_log_probs(found, [5, 6]),
        "checksums": lambda: read_checksums(found),
        "version": lambda: read_version(found),
        "success": lambda: check_success(found),
    }
    for name, reader in readers.items():
        try:
            result = reader()
        except FailedTryError as error:
            assert str(error).isprintable() and len(str(error)) < 1500
            continue
        if name == "completions":
            assert [type(completion) for completion in result] == [Completion]
            [completion] = result
            assert sound_by_the_definition(orjson.loads(content)[0], 4, 10)
            assert {version for version, _ in completion.weight_versions} == {VERSION}
        elif name == "prompt":
            assert all(math.isfinite(value) and value <= 1e-3 for value in result) and len(result) == 1
        elif name == "checksums":
            assert all(type(value) is str for rank in result for value in rank.values())
