"""The client against the servers."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.rollout.transport import RequestRefusedError
from tests.support.rollout_contract import (
    CONTEXT,
    PROMPTS,
    checksums,
    output_log_probs,
    seeded,
)

pytestmark = pytest.mark.integration


async def test_the_client_samples_updates_and_waits(changing, models):
    options = {"connect_timeout": 2.0, "request_timeout": 60.0, "max_retries": 1, "backoff": 0.05, "max_in_flight": 8}
    async with RolloutClient([changing.url], **options) as client:
        await client.wait_until_healthy(10)
        prompts = PROMPTS * 5
        completions = await client.generate(
            prompts, seeded(20, max_new_tokens=12), weight_version="v1", rows_per_request=6
        )
        direct = changing.generate(
            input_ids=prompts[:6], sampling_params=seeded(6, max_new_tokens=12), return_logprob=True
        )
        assert [c.output_ids.tolist() for c in completions[:6]] == [a["output_ids"] for a in direct]
        # What SGLang decodes together, and with it the last bits, depends on when requests come.
        near = (lambda values: pytest.approx(values, abs=1e-5)) if changing.kind == "sglang" else list
        assert [c.log_probs.tolist() for c in completions[:6]] == [
            near(np.array(output_log_probs(a), np.float32).tolist()) for a in direct
        ]
        assert {c.finish_reason for c in completions} <= {"stop", "length"}
        await client.pause_generation()
        await client.update_weights_from_disk(models["b"], "v2")
        await client.continue_generation()
        await client.flush_cache()
        completions = await client.generate(
            prompts, seeded(20, max_new_tokens=12), weight_version="v2", rows_per_request=20
        )
        assert {c.weight_version for c in completions} == {"v2"}
        assert (await client.model_info())[0]["weight_version"] == "v2"
        info = (await client.server_info())[0]
        assert info["model_path"] == changing.model_path
        if changing.kind == "embedded":  # SGLang gives the argument, which was left out
            assert info["context_length"] == CONTEXT


async def test_the_client_reads_checksums_and_moves_memory(changing):
    options = {"connect_timeout": 2.0, "request_timeout": 60.0, "max_retries": 0, "backoff": 0.05, "max_in_flight": 8}
    async with RolloutClient([changing.url], **options) as client:
        assert await client.weight_checksums() == [[checksums(changing)]]
        await client.release_memory_occupation(["kv_cache"])
        await client.resume_memory_occupation(["kv_cache"])
        with pytest.raises(RequestRefusedError, match="must run between"):
            await client.update_weights_from_tensor([[base64.b64encode(b"x").decode()]])
