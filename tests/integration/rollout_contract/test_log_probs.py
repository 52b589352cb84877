"""Contract of /generate: what is sampled, and its log-probs."""

from __future__ import annotations

import pytest
import torch

from tests.support.rollout_contract import (
    PROMPTS,
    forward_log_probs,
    outcome,
    output_log_probs,
    seeded,
)

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.7}, {"top_k": 5}, {"top_k": 20, "top_p": 0.9}])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_output_log_probs_are_the_models_after_temperature_before_the_cuts(target, reference, temperature, cut):
    params = seeded(len(PROMPTS), max_new_tokens=24, temperature=temperature, **cut)
    for prompt, answer in zip(
        PROMPTS, target.generate(input_ids=PROMPTS, sampling_params=params, return_logprob=True), strict=True
    ):
        expected = forward_log_probs(reference[0], prompt + answer["output_ids"], temperature)[len(prompt) - 1 :]
        torch.testing.assert_close(
            torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
        )


def test_greedy_is_the_argmax_of_a_ragged_batch(target, reference):
    answers = target.generate(
        input_ids=PROMPTS, sampling_params={"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
    )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.inference_mode():
            logits = reference[0](torch.tensor([prompt + answer["output_ids"]])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer["output_ids"]


def test_prompt_log_probs_are_raw(target, reference):
    body = {"input_ids": PROMPTS, "sampling_params": {"max_new_tokens": 1, "temperature": 0.5}, "return_logprob": True}
    for prompt, answer in zip(PROMPTS, target.generate(**body, logprob_start_len=0), strict=True):
        triples = answer["meta_info"]["input_token_logprobs"]
        assert [t[1] for t in triples] == prompt
        assert triples[0][0] is None
        torch.testing.assert_close(
            torch.tensor([t[0] for t in triples[1:]], dtype=torch.float64),
            forward_log_probs(reference[0], prompt),
            atol=1e-4,
            rtol=0,
        )
    late = target.generate(**{**body, "input_ids": PROMPTS[1]}, logprob_start_len=8)["meta_info"][
        "input_token_logprobs"
    ]
    assert [t[1] for t in late] == PROMPTS[1][8:] and late[0][0] is None


def test_top_log_probs_and_texts(target, reference):
    answer = target.generate(
        input_ids=PROMPTS[0],
        sampling_params={"max_new_tokens": 3, "temperature": 0},
        return_logprob=True,
        top_logprobs_num=4,
        return_text_in_logprobs=True,
    )
    tops = answer["meta_info"]["output_top_logprobs"]
    assert [len(top) for top in tops] == [4, 4, 4]
    for top, chosen in zip(tops, answer["meta_info"]["output_token_logprobs"], strict=True):
        assert top[0] == chosen
        assert [t[0] for t in top] == sorted((t[0] for t in top), reverse=True)
        assert [t[2] for t in top] == [reference[1].decode([t[1]]) for t in top]


def test_left_padding_changes_nothing(target):
    params = seeded(len(PROMPTS), max_new_tokens=20)
    together = target.generate(input_ids=PROMPTS, sampling_params=params, return_logprob=True)
    for prompt, row_params, batched in zip(PROMPTS, params, together, strict=True):
        alone = target.generate(input_ids=prompt, sampling_params=row_params, return_logprob=True)
        assert alone["output_ids"] == batched["output_ids"]
        torch.testing.assert_close(output_log_probs(alone), output_log_probs(batched), atol=1e-4, rtol=0)


def test_rows_of_unequal_length_do_not_disturb_each_other(target, reference):
    """Rows leave the batch one after another; those that stay must go on as if nothing had happened."""
    params = [{"max_new_tokens": 2 + 3 * i, "sampling_seed": i, "ignore_eos": True} for i in range(20)]
    prompts = [PROMPTS[i % 4] for i in range(20)]
    for prompt, row_params, answer in zip(
        prompts, params, target.generate(input_ids=prompts, sampling_params=params, return_logprob=True), strict=True
    ):
        assert len(answer["output_ids"]) == row_params["max_new_tokens"]
        expected = forward_log_probs(reference[0], prompt + answer["output_ids"])[len(prompt) - 1 :]
        torch.testing.assert_close(
            torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
        )


def test_the_same_request_gives_the_same_bits(target):
    body = {"input_ids": PROMPTS * 4, "sampling_params": seeded(16, max_new_tokens=30), "return_logprob": True}
    first, second = target.generate(**body), target.generate(**body)
    assert list(map(outcome, first)) == list(map(outcome, second))
    assert len({tuple(a["output_ids"]) for a in first[::4]}) == 4, "seeds must matter"


def test_requests_without_a_seed_differ(embedded_target):
    params = {"max_new_tokens": 16, "ignore_eos": True}
    assert (
        len({tuple(embedded_target.generate(input_ids=[5, 6], sampling_params=params)["output_ids"]) for _ in range(3)})
        == 3
    )


def test_first_tokens_follow_the_models_distribution(target, reference):
    with torch.inference_mode():
        probs = torch.softmax(reference[0](torch.tensor([PROMPTS[0]])).logits[0, -1].double(), -1)
    answers = target.generate(input_ids=[PROMPTS[0]] * 5000, sampling_params=seeded(5000, max_new_tokens=1))
    counts = torch.bincount(torch.tensor([a["output_ids"][0] for a in answers]), minlength=len(probs)).double()
    statistic = float(((counts - 5000 * probs) ** 2 / (5000 * probs)).sum())
    assert statistic < 162  # 99.99% quantile of chi-square with 99 degrees of freedom


def test_parallel_samples_of_one_seed_are_identical(target):
    """As in SGLang under --enable-deterministic-inference: the n copies share the seed."""
    params = {"n": 3, "sampling_seed": 5, "max_new_tokens": 10}
    answers = target.generate(input_ids=PROMPTS[0], sampling_params=params)
    assert len({tuple(a["output_ids"]) for a in answers}) == 1
