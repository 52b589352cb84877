"""Concurrent requests to the embedded server, merged and not merged."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dasd_megatron.rollout.local_server import LocalServer
from tests.support.rollout_contract import (
    PROMPTS,
    Target,
    forward_log_probs,
    long_request,
    outcome,
    output_log_probs,
    rollout,
    seeded,
)

pytestmark = pytest.mark.integration


def test_concurrent_requests_are_decoded_together_without_deterministic(models, reference, tmp_path):
    with LocalServer(models["a"], "v1", rollout(deterministic=False, max_batch_size=32), tmp_path / "log") as server:
        target = Target("embedded", server.url, models["a"])
        params = [{"max_new_tokens": 100 + i, "sampling_seed": i, "ignore_eos": True} for i in range(48)]
        prompts = [PROMPTS[i % 4] for i in range(48)]
        steps = target.decoding_steps()

        def generate(i):
            time.sleep(0.01 * i)
            return target.generate(input_ids=prompts[i], sampling_params=params[i], return_logprob=True)

        with ThreadPoolExecutor(48) as pool:
            answers = list(pool.map(generate, range(48)))
        steps = target.decoding_steps() - steps
        assert steps < 1000, "48 requests of over 100 tokens one by one would take about 6000 steps"
        for prompt, row_params, answer in zip(prompts, params, answers, strict=True):
            assert len(answer["output_ids"]) == row_params["max_new_tokens"]
            expected = forward_log_probs(reference[0], prompt + answer["output_ids"])[len(prompt) - 1 :]
            torch.testing.assert_close(
                torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
            )


def test_deterministic_requests_are_not_merged(embedded_target):
    """Concurrent company must not change an answer's bits."""
    body = {"input_ids": PROMPTS, "sampling_params": seeded(4, max_new_tokens=40), "return_logprob": True}
    alone = embedded_target.generate(**body)
    company = long_request(embedded_target, rows=5)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: embedded_target.generate(**body), range(6)))
    company.answer()
    for answer in answers:
        assert list(map(outcome, answer)) == list(map(outcome, alone))
