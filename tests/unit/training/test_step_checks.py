"""Numbers that are not finite are found, and described once."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dasd_megatron.samples import Sample
from dasd_megatron.training.passes import UpdateResult
from dasd_megatron.training.scores import ScoredRollouts, TokenScores
from dasd_megatron.training.step_checks import non_finite_tokens, report_not_applied, scores_are_finite
from tests.support.thread_ranks import ThreadRanks

MASKS: list[list[int] | None] = [None, [1, 0, 1]]
SAMPLES = [
    Sample(
        group=0,
        sample=index,
        position=0,
        problem_id=f"p{index}",
        problem="",
        expected_answer="",
        reference_solution="",
        prompt_ids=[1],
        response_ids=[5, 6, 7],
        rollout_log_probs=[-1.0] * 3,
        text="",
        finish_reason="stop",
        weight_versions=[["v", 3]],
        reward=1.0,
        predicted_answer=None,
        timed_out=False,
        response_mask=mask,
    )
    for index, mask in enumerate(MASKS)
]
TOKENS = 5


def scored(**places: tuple[int, float]) -> ScoredRollouts:
    """Scores of the five sampled tokens, with a value at a place of each named statistic."""
    values = {
        name: torch.full((TOKENS,), -1.0) for name in ("log_prob", "entropy", "teacher", "teacher_entropy", "start")
    }
    for name, (place, value) in places.items():
        values[name][place] = value
    return ScoredRollouts(
        student=TokenScores(values["log_prob"], values["entropy"]),
        teacher_log_prob=values["teacher"],
        teacher_entropy=values["teacher_entropy"],
        has_teacher=torch.ones(len(SAMPLES), dtype=torch.bool),
        start_log_prob=values["start"] if "start" in places else None,
        rollout_log_prob=torch.full((TOKENS,), -1.0),
        lengths=torch.tensor([len(sample.sampled) for sample in SAMPLES]),
        teacher_ran=True,
    )


def trainer_with(weight: float, warnings: list[str]) -> Any:
    return SimpleNamespace(
        state=SimpleNamespace(step=7),
        learner=SimpleNamespace(
            model=SimpleNamespace(
                named_parameters=lambda: iter([("fine", torch.ones(2)), ("head", torch.tensor(weight))])
            )
        ),
        display=SimpleNamespace(warning=warnings.append),
        reported_non_finite=False,
    )


@pytest.mark.parametrize(
    ("scores", "bad"),
    [
        (scored(), []),
        (scored(log_prob=(1, math.nan)), [1]),
        (scored(log_prob=(1, -math.inf), entropy=(4, math.inf)), [1, 4]),
        # A teacher may rule a token out, and may say nothing else that is not finite.
        (scored(teacher=(2, -math.inf)), []),
        (scored(teacher=(2, math.inf)), [2]),
        (scored(teacher=(2, math.nan)), [2]),
        (scored(teacher_entropy=(0, math.nan)), [0]),
        (scored(start=(3, math.nan)), [3]),
    ],
)
def test_which_tokens_are_not_finite(scores: ScoredRollouts, bad: list[int]) -> None:
    assert non_finite_tokens(scores).nonzero().flatten().tolist() == bad


def test_the_first_broken_token_is_named_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ThreadRanks(1, monkeypatch)
    warnings: list[str] = []
    trainer = trainer_with(math.nan, warnings)
    # The fifth token is the second that was sampled of the second response, whose third it is.
    scores = scored(entropy=(4, math.nan))
    assert scores_are_finite(trainer, SAMPLES, scored())
    assert not scores_are_finite(trainer, SAMPLES, scores) and not scores_are_finite(trainer, SAMPLES, scores)
    assert warnings == [
        "step 7 is skipped, its logits are not finite (rank 0: 1 of 5 tokens, first response token 2 of problem p1, "
        "sample 1; parameter head is not finite here); further skipped steps are counted in update/skipped and not "
        "described"
    ]


def test_a_step_is_skipped_on_all_ranks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    trainers = [trainer_with(1.0, warnings if rank == 0 else []) for rank in range(2)]
    scores = [scored(), scored(log_prob=(0, math.nan))]
    outcomes = ThreadRanks(2, monkeypatch).run(lambda rank: scores_are_finite(trainers[rank], SAMPLES, scores[rank]))
    assert outcomes == [False, False]
    assert "rank 1: 1 of 5 tokens, first response token 0 of problem p0" in warnings[0]
    assert "the parameters here are finite" in warnings[0]


def test_updates_that_are_not_applied_are_described_once() -> None:
    warnings: list[str] = []
    trainer = trainer_with(1.0, warnings)
    applied, broken = UpdateResult({}, 1.0, 0.1, True), UpdateResult({}, math.inf, 0.1, False)
    report_not_applied(trainer, [applied])
    assert not warnings
    report_not_applied(trainer, [applied, broken])
    report_not_applied(trainer, [broken])
    assert len(warnings) == 1 and "1 of 2 updates are skipped, their gradient norm is inf" in warnings[0]
