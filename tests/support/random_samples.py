"""Rollouts with every kind of value that a field may have, drawn from a seed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from dasd_megatron.samples import Sample

WORDS = ["", "#### 2", "7 × 6\u2028", 'a\nb\\c"', "\U0001f600 wait", "\x00\x1c"]


def random_group(draw: random.Random, group: int, size: int, *, with_teacher: bool = True) -> list[Sample]:
    """Return the samples of one prompt."""
    prompt = np.array([draw.randrange(2**31) for _ in range(draw.randint(1, 9))], np.int32)
    shared = {"problem_id": f"p{group}", "problem": draw.choice(WORDS), "expected_answer": "2"}
    return [_random_sample(draw, group, number, prompt, shared, with_teacher) for number in range(size)]


def _random_sample(
    draw: random.Random, group: int, number: int, prompt: np.ndarray, shared: dict[str, str], with_teacher: bool
) -> Sample:
    length = draw.randint(1, 12)
    mask = [draw.random() < 0.6 for _ in range(length - 1)] + [True] if draw.random() < 0.4 else None
    log_probs = np.array([-draw.expovariate(1.0) for _ in range(length)], np.float32)
    cut = draw.randint(0, length)
    optional: Any = [None, *WORDS]
    shown = [draw.randrange(2**31) for _ in range(draw.randint(1, 5))]
    return Sample(
        group=group,
        sample=number,
        position=2**62 + group,
        **shared,
        reference_solution=draw.choice(WORDS),
        prompt_ids=prompt,
        response_ids=np.array([draw.randrange(2**31) for _ in range(length)], np.int32),
        rollout_log_probs=log_probs if mask is None else np.where(mask, log_probs, np.float32(0)),
        text=draw.choice(WORDS) + str(number),
        finish_reason=draw.choice(["stop", "length"]),
        weight_versions=[["step_000000", cut], ["step_000001", length - cut]] if cut else [["step_000001", length]],
        reward=draw.choice([0.0, 1.0, -1e15, 0.1]),
        predicted_answer=draw.choice(optional),
        timed_out=draw.random() < 0.5,
        response_mask=None if mask is None else np.array(mask),
        feedback=draw.choice(optional),
        privileged_source=draw.choice(optional),
        privileged=draw.choice(WORDS),
        teacher_prompt_ids=np.array(shown, np.int32) if with_teacher and draw.random() < 0.7 else None,
        measures=draw.choice([None, {}, {"thinks": 1.0, "steps": -0.25}, {"steps": 1e-300}]),
    )
