"""Contract of /generate: bad requests are refused in SGLang's words."""

from __future__ import annotations

import pytest

from tests.support.rollout_contract import (
    CONTEXT,
)

pytestmark = pytest.mark.integration


ERROR_MESSAGE = "message in an error object"
ERROR_STRING = "error string"
VALIDATION = "validation error"
REFUSED = {
    "no prompt": ({}, ERROR_MESSAGE, "Either text, input_ids or input_embeds should be provided."),
    "empty input_ids": ({"input_ids": []}, ERROR_MESSAGE, "input_ids cannot be empty."),
    "prompt as long as the context": (
        {"input_ids": [5] * CONTEXT},
        ERROR_MESSAGE,
        f"The input ({CONTEXT} tokens) is longer than the model's context length ({CONTEXT} tokens).",
    ),
    "prompt and response too long": (
        {"input_ids": [5] * 200, "sampling_params": {"max_new_tokens": 100}},
        ERROR_MESSAGE,
        f"Requested token count exceeds the model's maximum context length of {CONTEXT} tokens. You requested a total "
        "of 300 tokens",
    ),
    "logprob_start_len": (
        {"return_logprob": True, "logprob_start_len": 5},
        ERROR_MESSAGE,
        "is higher than the number of input tokens",
    ),
    "negative temperature": (
        {"sampling_params": {"temperature": -1}},
        ERROR_MESSAGE,
        "temperature must be a non-negative finite number",
    ),
    "top_p 0": ({"sampling_params": {"top_p": 0.0}}, ERROR_MESSAGE, "top_p must be in (0, 1], got 0.0."),
    "top_p above 1": ({"sampling_params": {"top_p": 1.5}}, ERROR_MESSAGE, "top_p must be in (0, 1], got 1.5."),
    "top_k 0": ({"sampling_params": {"top_k": 0}}, ERROR_MESSAGE, "top_k must be -1 (disable) or at least 1, got 0."),
    "top_k -2": (
        {"sampling_params": {"top_k": -2}},
        ERROR_MESSAGE,
        "top_k must be -1 (disable) or at least 1, got -2.",
    ),
    "negative max_new_tokens": ({"sampling_params": {"max_new_tokens": -1}}, ERROR_MESSAGE, "max_new_tokens"),
    "min over max": (
        {"sampling_params": {"min_new_tokens": 9, "max_new_tokens": 5}},
        ERROR_MESSAGE,
        "[0, max_new_tokens(5)], got 9.",
    ),
    "seed out of range": (
        {"sampling_params": {"sampling_seed": 2**63}},
        ERROR_MESSAGE,
        "sampling_seed must be in [-2**63, 2**63 - 1]",
    ),
    "too many stops": (
        {"sampling_params": {"stop": ["x"] * 33}},
        ERROR_MESSAGE,
        "at most 32 stop strings are allowed, got 33",
    ),
    "unequal n": (
        {"input_ids": [[5], [6]], "sampling_params": [{"n": 1}, {"n": 2}]},
        ERROR_MESSAGE,
        "parallel_sample_num should be the same",
    ),
    "list with n": (
        {"input_ids": [[5], [6]], "sampling_params": {"n": 2}, "return_logprob": [True, True]},
        ERROR_MESSAGE,
        "Cannot use list return_logprob with parallel_sample_num > 1",
    ),
    "rids of another length": ({"input_ids": [[5], [6]], "rid": ["a"]}, ERROR_MESSAGE, "rids length mismatch"),
    "equal rids": ({"input_ids": [[5], [6]], "rid": ["a", "a"]}, ERROR_MESSAGE, "Duplicate request IDs"),
    "unknown sampling parameter": (
        {"sampling_params": {"seed": 1}},
        ERROR_STRING,
        "unknown field `seed`, expected one of `max_new_tokens`",
    ),
    "temperature as text": (
        {"sampling_params": {"temperature": "hot"}},
        ERROR_STRING,
        'invalid type: string "hot", expected f64',
    ),
    "float max_new_tokens": (
        {"sampling_params": {"max_new_tokens": 1.5}},
        ERROR_STRING,
        "invalid type: floating point `1.5`, expected i64",
    ),
    "text is a number": ({"text": 5}, VALIDATION, "text"),
    "input_ids of text": ({"input_ids": ["a"]}, VALIDATION, "elements must be int or list; got str"),
    "input_ids of floats": ({"input_ids": [1, 2.5]}, VALIDATION, "contains non-int64 element"),
    "sampling_params is text": ({"sampling_params": "hot"}, VALIDATION, "sampling_params"),
}
# What the embedded server refuses though SGLang lets it pass or falls over.
EMBEDDED_REFUSED = {
    "empty prompt in a batch": ({"input_ids": [[5], []]}, ERROR_MESSAGE, "The prompt is empty"),
    "empty text": ({"input_ids": None, "text": ""}, ERROR_MESSAGE, "The prompt is empty"),
    "token past the vocabulary": (
        {"input_ids": [5, 100]},
        ERROR_MESSAGE,
        "out-of-vocabulary token id 100; valid range is [0, 100)",
    ),
    "negative token": ({"input_ids": [-1]}, ERROR_MESSAGE, "out-of-vocabulary token id -1"),
    "n 0": ({"sampling_params": {"n": 0}}, ERROR_MESSAGE, "n must be at least 1"),
    "sampling_params of another length": (
        {"input_ids": [[5], [6]], "sampling_params": [{}]},
        ERROR_MESSAGE,
        "length of sampling_params",
    ),
    "an unsupported field": ({"stream": True}, ERROR_MESSAGE, "stream is not supported"),
    "an unsupported parameter": ({"sampling_params": {"min_p": 0.1}}, ERROR_MESSAGE, "min_p=0.1 is not supported"),
}


def check_refusal(target, change, shape, message):
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1}, **change}
    if not change:
        del body["input_ids"]
    response = target.post("/generate", {k: v for k, v in body.items() if v is not None})
    assert response.status_code == 400, response.text
    answer = response.json()
    if shape is ERROR_MESSAGE:
        assert set(answer) == {"error"} and set(answer["error"]) == {"message"}
        assert message in answer["error"]["message"]
    elif shape is ERROR_STRING:
        assert set(answer) == {"error"} and message in answer["error"]
    else:
        assert message in answer.pop("message")
        assert answer == {"object": "error", "type": "Bad Request", "param": None, "code": 400}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_in_the_servers_words(target, case):
    check_refusal(target, *case)


@pytest.mark.parametrize("case", EMBEDDED_REFUSED.values(), ids=EMBEDDED_REFUSED.keys())
def test_the_embedded_server_refuses_what_it_cannot_do(embedded_target, case):
    check_refusal(embedded_target, *case)


def test_neutral_values_of_unsupported_parameters_pass(embedded_target):
    neutral = {
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0,
        "regex": None,
        "stop_regex": None,
        "beam_width": 1,
        "top_k": -1,
    }
    embedded_target.generate(input_ids=[5], sampling_params={"max_new_tokens": 1, **neutral})
