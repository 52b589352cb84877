"""The files that people look into: token statistics of the first rollouts of a step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dasd_megatron.algorithms import Credit
from dasd_megatron.run.paths import RunPaths
from dasd_megatron.samples import Sample
from dasd_megatron.training.inspection import save_inspection
from dasd_megatron.training.scores import Routing, ScoredRollouts, TokenScores

STEP = 3


def rollout(group: int, sample: int, mask: list[int] | None = None) -> Sample:
    return Sample(
        group=group,
        sample=sample,
        position=group,
        problem_id=f"p{group}",
        problem="1 + 1",
        expected_answer="2",
        reference_solution="",
        prompt_ids=[1],
        response_ids=[5, 6, 7],
        rollout_log_probs=[-1.0] * 3,
        text="2",
        finish_reason="stop",
        weight_versions=[["step_000002", 3]],
        reward=1.0,
        predicted_answer="2",
        timed_out=False,
        response_mask=mask,
    )


def trainer_at(root: Path, inspected: int) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(logging=SimpleNamespace(inspect_rollouts=inspected)),
        paths=RunPaths(root),
        state=SimpleNamespace(step=STEP),
        tokenizer=SimpleNamespace(decode=lambda ids: f"<{ids[0]}>"),
    )


def test_statistics_stand_beside_the_tokens_that_were_sampled(tmp_path: Path) -> None:
    samples = [rollout(0, 0, mask=[1, 0, 1]), rollout(0, 1), rollout(1, 0)]
    tokens = torch.arange(8.0)
    scores = ScoredRollouts(
        student=TokenScores(-tokens, tokens),
        teacher_log_prob=-2 * tokens,
        teacher_entropy=tokens,
        has_teacher=torch.tensor([True, True, True]),
        start_log_prob=None,
        rollout_log_prob=-tokens,
        lengths=torch.tensor([2, 3, 3]),
        teacher_ran=True,
    )
    credit = Credit(tokens / 10, tokens, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]), tokens)
    routing = Routing(torch.tensor([0.5, -0.5, 1.0]), 10 * tokens, credit, None)
    save_inspection(trainer_at(tmp_path, 2), samples, scores, routing)
    first, second = json.loads((tmp_path / "inspect" / "step_000003.json").read_text())
    assert first["tokens"] == ["<5>", "<7>"] and first["entropy"] == [0.0, 1.0] and first["advantage"] == 0.5
    assert second["tokens"] == ["<5>", "<6>", "<7>"] and second["token_advantage"] == [20.0, 30.0, 40.0]
    assert second["delta"] == [-2.0, -3.0, -4.0] and second["tau"] == pytest.approx(0.2) and second["sigma"] == 2.0
