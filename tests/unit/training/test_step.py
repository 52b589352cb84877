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
from dasd_megatron.training import routing, step
from dasd_megatron.training.batching import ReplicaShare
from dasd_megatron.training.checkpoint_search import TrainerState
from dasd_megatron.training.offload import COPIES, GRADIENTS, WEIGHTS, DeviceMemoryError
from dasd_megatron.training.passes import SharedPass, UpdateResult
from dasd_megatron.training.rollout_plane import RolloutsUnavailableError
from dasd_megatron.training.routing import Switched, judge, route, turn_switch
from dasd_megatron.training.scores import References, Routing, ScoredRollouts, TokenScores
from dasd_megatron.training.step import Timers, train_step
from dasd_megatron.training.step_metrics import schedule_metrics, switch_metrics

REWARDS = [1.0, 0.0, 0.0, 1.0]
GRPO = AlgorithmConfig(name="grpo", normalize_std=False, beta=1.0, scale_floor=0.0)


def routed(places: list[int], loss: PolicyLossConfig, settings: AlgorithmConfig = GRPO) -> Routing:
    """Routing of the rollouts at ``places``, of which each has two tokens of other log-probs at the servers."""
    share = ReplicaShare([], places, REWARDS)
    verdicts = judge(settings, share, TeacherConfig(), samples_per_group=2, device=torch.device("cpu"))
    return route(settings, loss, verdicts, scored(places))


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


def references(places: list[int]) -> References:
    """What is known of the same rollouts before the policy scores them."""
    scores = scored(places)
    names = [field.name for field in dataclasses.fields(References)]
    return References(**{name: getattr(scores, name) for name in names})


class Steps:
    """A trainer whose passes and checks are replaced, and what happened to it in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, share_pass: str, *, is_finite: bool = True) -> None:
        self.events: list[Any] = []
        student = TokenScores(torch.zeros(2), torch.ones(2))

        def seen(name: str, result: Any = None) -> Any:
            return lambda *_, **__: self.events.append(name) or result

        def score_and_update(*_: Any, accept: Any, **__: Any) -> SharedPass:
            self.events.append("gradients")
            return SharedPass(student, seen("applied", UpdateResult({}, 1.0, 0.0, True))() if accept(student) else None)

        monkeypatch.setattr(step, "move_weights", lambda learner, teacher, number: self.events.append(number))
        for name, replacement in {
            "score_rollouts": seen("scored", (scored([0]), references([0]))),
            "score_references": seen("references", references([0])),
            "score_and_update": score_and_update,
            "update_policy": seen("applied", []),
            "check_agreement": seen("agrees"),
            "scores_are_finite": lambda *_: is_finite,
            "_conclude": lambda *_: {},
            "reward_metrics": lambda *_: {},
            "is_replica_source": lambda: True,
            "batch_samples": lambda *_: [],
            "loss_weights": lambda *_: None,
            "turn_switch": lambda switch, algorithm, _: Switched("turned", algorithm),
            "score_in_bf16": lambda *_: None,
            "compare_fp8": lambda *_: {},
            "judge": lambda *_, **__: None,
            "route": lambda *_: None,
        }.items():
            monkeypatch.setattr(step, name, replacement)
        monkeypatch.setattr(step.BatchLayout, "of_this_rank", lambda *_: SimpleNamespace(device=None))
        sample = SimpleNamespace(weight_version="step_000003", prompt_ids=[1])
        rollouts = SimpleNamespace(
            share=ReplicaShare([sample], [0], [0.0]), columns={}, grading_seconds=0.0, metrics={}
        )
        model = SimpleNamespace(gather_parameters=seen("gathered"))
        overrides = [f"loss.share_pass={share_pass}", "logging.save_rollouts_every=4"]
        self.trainer: Any = SimpleNamespace(
            config=load_config(["experiment=quickstart", *overrides]),
            learner=SimpleNamespace(model=model, optimizer=None),
            logger=None,
            rollout_writer=SimpleNamespace(save=seen("saved")),
            state=TrainerState(step=3),
            plane=SimpleNamespace(rollouts=lambda *_: rollouts),
            memory=SimpleNamespace(restore=lambda *parts: self.events.append(parts)),
        )


ORDER = {
    "never": [(WEIGHTS, COPIES), "scored", "agrees", "saved", "applied"],
    "auto": [(WEIGHTS, COPIES), "references", (GRADIENTS,), "gradients", "agrees", "saved", "applied", "gathered", 4],
}


@pytest.mark.parametrize("share_pass", ORDER)
def test_scores_are_checked_before_anything_is_applied(share_pass: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, share_pass)
    assert train_step(steps.trainer)["step"] == 4
    assert steps.events == ORDER[share_pass]
    assert steps.trainer.state.teacher_switch == "turned"


@pytest.mark.parametrize("share_pass", ORDER)
def test_the_teachers_weights_follow_a_step_that_is_skipped_too(
    share_pass: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch, share_pass, is_finite=False)
    metrics = train_step(steps.trainer)
    assert metrics["step"] == 4 and metrics["update/skipped"] == 1
    until = ORDER[share_pass].index("applied")
    assert steps.events == [*ORDER[share_pass][:until], 4]
    # The entropies of such a step are not a measure of anything.
    assert steps.trainer.state.teacher_switch == EntropySwitch()


@pytest.mark.parametrize("share_pass", ORDER)
def test_rollouts_of_other_weights_leave_the_run_as_it_was(share_pass: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, share_pass)

    def disagree(*_: Any) -> None:
        raise RolloutsUnavailableError("others")

    monkeypatch.setattr(step, "check_agreement", disagree)
    with pytest.raises(RolloutsUnavailableError):
        train_step(steps.trainer)
    assert steps.trainer.state == TrainerState(step=3)
    assert not {"saved", "applied", "gathered"} & set(steps.events)


@pytest.mark.parametrize("share_pass", ORDER)
def test_a_step_without_memory_for_its_update_is_not_counted(share_pass: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, share_pass)

    def fail(*_: Any, accept: Any = None, **__: Any) -> None:
        if accept is not None:
            # The optimizer's state comes back when the gradients are accepted.
            accept(TokenScores(torch.zeros(2), torch.ones(2)))
        raise DeviceMemoryError("0.00 GB of the device are free")

    monkeypatch.setattr(step, "score_and_update" if share_pass == "auto" else "update_policy", fail)
    with pytest.raises(DeviceMemoryError):
        train_step(steps.trainer)
    assert steps.trainer.state.step == 3
    # Scoring needs no more than these.
    assert steps.events[0] == (WEIGHTS, COPIES)


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
    others = numpy.array([3.0, 3.0, 9.0])
    monkeypatch.setattr(routing, "median_of_replicas", lambda own: float(numpy.median([*own.tolist(), *others])))
    known = dataclasses.replace(
        references([0, 1]), teacher_entropy=torch.tensor([1.0, 2.0, 0.0, 0.0]), has_teacher=torch.tensor([True, False])
    )
    # The entropies of the rollout without a teacher are not read: the median is 3, and not 2.
    first, off = turn_switch(EntropySwitch(), settings, known)
    assert first == EntropySwitch((3.0,)) and (off.beta, off.divergence_weight) == (0.0, 0.0)
    assert switch_metrics(off, first) == {"teacher/switch_on": 0.0}
    second, on = turn_switch(first, settings, known)
    assert on is settings and switch_metrics(on, second) == {"teacher/switch_on": 1.0}
    others[:] = 1.0
    third, off = turn_switch(second, settings, known)
    assert off.beta == 0.0 and not third.is_on
    assert turn_switch(third, GRPO, known) == (third, GRPO)
    assert switch_metrics(GRPO, third) == {}
