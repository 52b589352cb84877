"""Graded responses without a run."""

from __future__ import annotations

from typing import Any

from dasd_megatron.samples import Sample


def make_sample(group: int, sample: int, tokens: list[int], text: str, **changes: Any) -> Sample:
    """Return a response of the tokens, with these fields changed."""
    values: dict[str, Any] = {
        "group": group,
        "sample": sample,
        "position": group,
        "problem_id": str(group),
        "problem": "4-1-7=",
        "expected_answer": "-4",
        "reference_solution": "",
        "prompt_ids": [0],
        "response_ids": tokens,
        "rollout_log_probs": [-0.5] * len(tokens),
        "text": text,
        "finish_reason": "stop",
        "weight_versions": [["v", len(tokens)]],
        "reward": 0.0,
        "predicted_answer": None,
        "timed_out": False,
    }
    return Sample(**(values | changes))
