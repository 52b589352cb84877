"""A /generate body becomes rows with their defaults, or is refused."""

from __future__ import annotations

import pytest

from dasd_megatron.rollout.embedded.requests import InvalidRequestError, build_job, parse_sampling_params
from dasd_megatron.rollout.embedded.schema import ContractError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 90, "temperature": 1.0, "top_k": 1 << 30}),
        ({"max_new_tokens": None}, {"max_new_tokens": 90}),
        ({"max_new_tokens": 90}, {"max_new_tokens": 90}),
        ({"temperature": 0}, {"temperature": 1.0, "top_k": 1}),
        ({"temperature": 1e-7, "top_k": 50}, {"temperature": 1.0, "top_k": 1}),
        ({"top_k": -1}, {"top_k": 1 << 30}),
        ({"stop": "ab"}, {"stop": ["ab"]}),
        ({"stop_token_ids": [7, 8]}, {"stop_ids": frozenset({1, 7, 8})}),
    ],
)
def test_defaults_of_sampling_parameters(given, expected):
    params = parse_sampling_params(given, prompt_length=10, context_length=100, eos_ids=frozenset({1}))
    assert {name: getattr(params, name) for name in expected} == expected


class LettersTokenizer:
    """Stands for a tokenizer: a is 0, b is 1 and so on."""

    def __call__(self, texts):
        return {"input_ids": [[ord(letter) - ord("a") for letter in text] for text in texts]}


def make_job(**body):
    return build_job(body, tokenizer=LettersTokenizer(), vocab_size=10, context_length=20, eos_ids=frozenset({1}))


def test_rows_are_prompt_major_and_have_ids_of_their_own():
    job = make_job(input_ids=[[2, 3], [4]], sampling_params={"n": 2, "max_new_tokens": 3}, rid="mine")
    assert [row.prompt for row in job.rows] == [[2, 3], [2, 3], [4], [4]]
    assert len({row.rid for row in job.rows}) == 4 and job.rid == "mine"
    assert job.unfinished == 4 and not job.single and not job.done.done()
    assert {row.params.max_new_tokens for row in job.rows} == {3}
    assert all(row.request is job for row in job.rows)


def test_ids_of_rows_come_from_the_request():
    assert [row.rid for row in make_job(input_ids=[2], rid="mine").rows] == ["mine"]
    assert [row.rid for row in make_job(input_ids=[[2], [3]], rid="mine").rows] == ["mine_0", "mine_1"]
    assert [row.rid for row in make_job(input_ids=[[2], [3]], rid=["x", "y"]).rows] == ["x", "y"]


def test_input_ids_win_over_text():
    assert [row.prompt for row in make_job(text=["abc", "d"]).rows] == [[0, 1, 2], [3]]
    assert make_job(text="abc").single and not make_job(text=["abc"]).single
    assert [row.prompt for row in make_job(text="abc", input_ids=[5]).rows] == [[5]]


@pytest.mark.parametrize(
    ("changes", "start", "top"),
    [
        ({}, 3, 0),
        ({"top_logprobs_num": 2}, 3, 0),
        ({"return_logprob": True}, 3, 0),
        ({"return_logprob": True, "top_logprobs_num": 2}, 3, 2),
        ({"return_logprob": True, "logprob_start_len": 1}, 1, 0),
        ({"logprob_start_len": 1}, 3, 0),
        ({"logprob_start_len": 9}, 3, 0),
    ],
)
def test_prompt_log_probs_are_read_from_the_wanted_position(changes, start, top):
    (row,) = make_job(input_ids=[2, 3, 4], **changes).rows
    assert (row.logprob_start, row.top_logprobs) == (start, top)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ({}, InvalidRequestError, "Either text, input_ids or input_embeds should be provided."),
        ({"input_ids": [10]}, InvalidRequestError, "out-of-vocabulary token id 10; valid range is [0, 10)."),
        ({"input_ids": [[2], []]}, InvalidRequestError, "The prompt is empty: it has no tokens."),
        ({"input_ids": [2] * 20}, InvalidRequestError, "The input (20 tokens) is longer"),
        ({"input_ids": [2], "sampling_params": {"n": 0}}, InvalidRequestError, "n must be at least 1, got 0."),
        ({"input_ids": [2], "rid": ["a"]}, InvalidRequestError, "The rid should be a string for a single request."),
        ({"input_ids": [2], "stream": True}, InvalidRequestError, "stream is not supported by the embedded"),
        (
            {"input_ids": [2], "return_logprob": True, "logprob_start_len": 2},
            InvalidRequestError,
            "req.logprob_start_len=2 is higher than the number of input tokens len(req.origin_input_ids)=1",
        ),
        ({"input_ids": [2], "sampling_params": {"seed": 1}}, ContractError, "unknown field `seed`, expected one of"),
        (
            {"input_ids": [2], "sampling_params": [{"stop": [1]}]},
            ContractError,
            "invalid type: integer `1`, expected a string",
        ),
        ({"input_ids": [2, True]}, ContractError, "invalid type: boolean `true`, expected i64"),
    ],
)
def test_a_refusal_has_the_error_of_its_kind(body, error, message):
    with pytest.raises(error) as caught:
        make_job(**body)
    assert type(caught.value) is error and message in str(caught.value)
