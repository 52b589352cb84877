"""Routing of a replica's share of a step: groups are whole for the advantage, wherever their samples are."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from dasd_megatron.algorithms import EntropySwitch
from dasd_megatron.config import AlgorithmConfig, PolicyLossConfig, ScheduleConfig, TeacherConfig, load_config
from dasd_megatron.training import step
from dasd_megatron.training.batching import ReplicaShare
from dasd_megatron.training.checkpoint_search import TrainerState
from dasd_megatron.training.offload import COPIES, WEIGHTS, DeviceMemoryError
from dasd_megatron.training.scores import Routing, ScoredRollouts, TokenScores
from dasd_megatron.training.step import Timers, route, set_teacher_switch, train_step
from dasd_megatron.training.step_metrics import schedule_metrics, switch_metrics

REWARDS = [1.0, 0.0, 0.0, 1.0]
GRPO = AlgorithmConfig(name="grpo", normalize_std=False, beta=1.0, scale_floor=0.0)


def routed(places: list[int], loss: PolicyLossConfig, settings: AlgorithmConfig = GRPO) -> Routing:
    """Routing of the rollouts at ``places``, of which each has two tokens of other log-probs at the servers."""
    share = ReplicaShare([], places, REWARDS)
    return route(settings, loss, share, scored(places), samples_per_group=2, teacher=TeacherConfig())


def scored(places: list[int]) -> ScoredRollouts:
    """Scores of rollouts of two tokens each."""
    count = 2 * len(places)
    return ScoredRollouts(
        student=TokenScores(torch.zeros(count), torch.ones(count)),
        teacher_log_prob=torch.zeros(count),
        teacher_entropy=torch.ones(count),
        has_teacher=torch.ones(len(places), dtype=torch.bool),
        start_log_prob=None,
        rollout_log_prob=torch.tensor([-1.0, 0.0] * len(places)),
        lengths=torch.full((len(places),), 2),
        teacher_ran=True,
    )


@pytest.mark.parametrize("is_finite", [True, False])
def test_the_teachers_weights_follow_a_step_that_is_skipped_too(
    is_finite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    monkeypatch.setattr(step, "move_weights", lambda learner, teacher, number: moved.append(number))
    # The rest of a step that is not skipped, of which only the update moves the teacher.
    monkeypatch.setattr(step, "_learn", lambda *_, **__: moved.append(0) or {})
    monkeypatch.setattr(step, "scores_are_finite", lambda *_: is_finite)
    for name in ("score_rollouts", "check_agreement", "reward_metrics"):
        monkeypatch.setattr(step, name, lambda *_: {})
    sample = SimpleNamespace(weight_version="step_000003")
    rollouts = SimpleNamespace(share=ReplicaShare([sample], [0], [0.0]), grading_seconds=0.0, metrics={})
    trainer: Any = SimpleNamespace(
        config=load_config(["experiment=quickstart"]),
        learner=None,
        logger=None,
        state=TrainerState(step=3),
        plane=SimpleNamespace(rollouts=lambda *_: rollouts),
        memory=SimpleNamespace(restore=lambda *_: None),
    )
    assert train_step(trainer)["step"] == 4
    assert moved == [0 if is_finite else 4]


def test_a_step_without_memory_for_its_update_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DeviceMemoryError("0.00 GB of the device are free")

    monkeypatch.setattr(step, "_learn", fail)
    monkeypatch.setattr(step, "scores_are_finite", lambda *_: True)
    for name in ("score_rollouts", "check_agreement"):
        monkeypatch.setattr(step, name, lambda *_: {})
    restored: list[str] = []
    rollouts = SimpleNamespace(share=ReplicaShare([], [], []), grading_seconds=0.0, metrics={})
    trainer: Any = SimpleNamespace(
        config=load_config(["experiment=quickstart", "logging.save_rollouts_every=0"]),
        logger=None,
        state=TrainerState(step=3),
        plane=SimpleNamespace(rollouts=lambda *_: rollouts),
        memory=SimpleNamespace(restore=lambda *parts: restored.extend(parts)),
    )
    with pytest.raises(DeviceMemoryError):
        train_step(trainer)
    assert trainer.state.step == 3
    # Scoring needs no more than these.
    assert restored == [WEIGHTS, COPIES]


def test_advantages_are_relative_to_groups_that_two_replicas_share() -> None:
    whole = routed([0, 1, 2, 3], PolicyLossConfig())
    assert whole.verifier_advantage.tolist() == [0.5, -0.5, -0.5, 0.5]
    for places in ([0, 3], [1, 2]):
        part = routed(places, PolicyLossConfig())
        assert part.verifier_advantage.tolist() == whole.verifier_advantage[places].tolist()
        assert part.advantage.tolist() == part.verifier_advantage.repeat_interleave(2).tolist()


def test_importance_weights_act_on_the_advantage_that_is_trained_on() -> None:
    plain = routed([0, 1], PolicyLossConfig())
    assert plain.importance is None and plain.weighted_advantage is plain.advantage
    weighted = routed([0, 1], PolicyLossConfig(importance_sampling="token", importance_cap=2.0))
    assert weighted.importance is not None
    assert weighted.importance.weights.tolist() == [2.0, 1.0, 2.0, 1.0]
    assert weighted.importance.cut.tolist() == [True, False, True, False]
    assert weighted.advantage.tolist() == plain.advantage.tolist()
    assert weighted.weighted_advantage.tolist() == [1.0, 0.5, -1.0, -0.5]


def test_rejection_compares_the_trainer_with_the_servers() -> None:
    """Of each rollout, the first token is e times as likely to the trainer, and the second equally so."""
    for loss, kept in (
        (PolicyLossConfig(), None),
        (PolicyLossConfig(rejection="token"), [True, True, True, True]),
        (PolicyLossConfig(rejection="token", rejection_high=2.0), [False, True, False, True]),
        (PolicyLossConfig(rejection="geometric", rejection_high=1.5), [False, False, False, False]),
        (PolicyLossConfig(rejection="geometric", rejection_high=1.7), [True, True, True, True]),
        (PolicyLossConfig(rejection_veto=0.5), [True, True, True, True]),
    ):
        rejected = routed([0, 1], loss).rejected
        assert (None if rejected is None else rejected.kept.tolist()) == kept


def test_seconds_of_grading_are_taken_from_those_of_the_rollout() -> None:
    timers = Timers()
    with timers("rollout"):
        pass
    timers.seconds["rollout"] = 3.0
    timers.move("rollout", "verify", 1.0)
    assert timers.seconds == {"rollout": 2.0, "verify": 1.0}
    assert timers.finish()["total"] == pytest.approx(0.0, abs=5.0)


def test_scheduled_values_of_a_step_are_metrics() -> None:
    course = ScheduleConfig("linear", final=0.1, steps=2)
    settings = AlgorithmConfig(beta=0.3, scale_floor=1.0, beta_schedule=course, rlsd_lambda_schedule=course)
    later = settings.at(2, 50)
    assert schedule_metrics(later) == {"schedule/beta": later.beta, "schedule/rlsd_lambda": later.rlsd_lambda}
    assert later.beta == pytest.approx(0.2) and later.rlsd_lambda == pytest.approx(0.3)
    assert schedule_metrics(GRPO) == {}


def test_the_switch_follows_the_median_entropy_of_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = AlgorithmConfig(name="antisd", beta=0.5, divergence_weight=0.2, scale_floor=1.0, antisd_warmup_steps=1)
    state = TrainerState()
    others = numpy.array([3.0, 3.0, 9.0])
    monkeypatch.setattr(step, "median_of_replicas", lambda own: float(numpy.median([*own.tolist(), *others])))
    scores = dataclasses.replace(
        scored([0, 1]), teacher_entropy=torch.tensor([1.0, 2.0, 0.0, 0.0]), has_teacher=torch.tensor([True, False])
    )
    # The entropies of the rollout without a teacher are not read: the median is 3, and not 2.
    off = set_teacher_switch(state, settings, scores)
    assert state.teacher_switch == EntropySwitch((3.0,)) and (off.beta, off.divergence_weight) == (0.0, 0.0)
    assert switch_metrics(off, state.teacher_switch) == {"teacher/switch_on": 0.0}
    on = set_teacher_switch(state, settings, scores)
    assert on is settings and switch_metrics(on, state.teacher_switch) == {"teacher/switch_on": 1.0}
    others[:] = 1.0
    assert set_teacher_switch(state, settings, scores).beta == 0.0 and not state.teacher_switch.is_on

    kept = TrainerState()
    assert set_teacher_switch(kept, GRPO, scores) is GRPO and kept.teacher_switch == EntropySwitch()
    assert switch_metrics(GRPO, kept.teacher_switch) == {}
