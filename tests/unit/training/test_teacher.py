"""The teacher's passes are as long on every replica, whichever samples have a teacher; and its weights follow."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dasd_megatron.config import AlgorithmConfig, TeacherConfig
from dasd_megatron.samples import Sample
from dasd_megatron.training import teacher
from dasd_megatron.training.batching import BatchLayout
from dasd_megatron.training.scores import TeacherStates, TokenScores

LAYOUT = BatchLayout(micro_batch_size=2)


def sample_of(length: int, *, prompt: list[int] | None, reward: float = 0.0) -> Sample:
    return Sample(
        0, 0, 0, "", "", "", "", [1], [7] * length, [0.0] * length, "", "stop", [], reward, None, False,
        teacher_prompt_ids=prompt,
    )  # fmt: skip


def score_with(
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    *,
    most: int,
    layout: BatchLayout = LAYOUT,
    algorithm: str = "dasd",
) -> tuple[Any, list[int]]:
    """Return the scores of a replica whose model gives token i of the passes the log-prob -i and the entropy i, and the
    sequences in each micro-batch that it has passed. ``most``: samples with a teacher on the replica with most."""
    passed: list[int] = []

    def score(model: Any, batches: Any, *_: Any, **__: Any) -> TokenScores:
        passed.extend(len(batch.tokens) for batch in batches)
        tokens = torch.arange(sum(len(batch.packed_index) for batch in batches)).float()
        return TokenScores(-tokens, tokens)

    monkeypatch.setattr(teacher, "score", score)
    monkeypatch.setattr(teacher, "largest_of_replicas", lambda own: max(own, most))
    config = SimpleNamespace(
        algorithm=AlgorithmConfig(name=algorithm),
        teacher=TeacherConfig(),
        rollout=SimpleNamespace(temperature=1.0),
        loss=None,
    )
    trainer: Any = SimpleNamespace(config=config, learner=SimpleNamespace(model=None, start=None, teacher=None))
    return teacher.score_teacher(trainer, samples, layout), passed


def test_tokens_without_a_teacher_have_no_statistics_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample_of(2, prompt=None), sample_of(3, prompt=[1, 2]), sample_of(1, prompt=None)]
    found, passed = score_with(samples, monkeypatch, most=1)
    assert found.ran and found.has_teacher.tolist() == [False, True, False] and passed == [1]
    assert found.log_prob.tolist() == [0.0, 0.0, 0.0, -1.0, -2.0, 0.0]
    assert found.entropy.tolist() == [0.0, 0.0, 0.0, 1.0, 2.0, 0.0]


@pytest.mark.parametrize(("own", "most", "multiple"), [(0, 5, 1), (3, 5, 1), (5, 5, 1), (0, 1, 4), (3, 5, 4)])
def test_every_replica_passes_as_many_sequences(
    own: int, most: int, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = dataclasses.replace(LAYOUT, count_multiple=multiple)
    samples = [sample_of(2, prompt=[1] if index < own else None) for index in range(6)]
    found, passed = score_with(samples, monkeypatch, most=most, layout=layout)
    _, expected = score_with([sample_of(2, prompt=[1])] * most, monkeypatch, most=most, layout=layout)
    assert len(passed) == len(expected) and len(passed) % multiple == 0 and max(passed) <= 2
    assert sum(passed) == sum(expected) >= most
    assert found.ran and int(found.has_teacher.sum()) == own
    assert found.log_prob[: 2 * own].tolist() == [-float(token) for token in range(2 * own)]
    assert found.log_prob[2 * own :].tolist() == [0.0] * (12 - 2 * own)


def test_no_pass_where_no_replica_has_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    found, passed = score_with([sample_of(2, prompt=None)], monkeypatch, most=0)
    assert not found.ran and not passed and found.log_prob.tolist() == [0.0, 0.0]
    assert found.has_teacher.tolist() == [False] and found.distribution is None


@pytest.mark.parametrize(
    ("algorithm", "taught"), [("sdpo", [True, True]), ("srpo", [False, True]), ("rlrt", [True, False])]
)
def test_only_responses_that_the_method_teaches_are_passed(
    algorithm: str, taught: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [sample_of(1, prompt=[1], reward=reward) for reward in (0.5, 0.4)]
    found, passed = score_with(samples, monkeypatch, most=0, algorithm=algorithm)
    assert found.has_teacher.tolist() == taught and sum(passed) == sum(taught)


def test_states_of_tokens_without_a_teacher_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dasd_megatron.training.scores.gather_from_tensor_model_parallel_region", lambda states: states)
    frozen, live = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    states = TeacherStates((frozen, live), torch.empty(5, 2), torch.tensor([-1, 1, 0]))
    assert states.of(torch.tensor([0, 1, 2])).tolist() == [[0.0, 0.0], [2.0, 4.0], [1.0, 3.0]]
    assert states.at(states.rows[1:]).of(torch.tensor([1])).tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize(
    ("weights", "moves"), [("ema", ["average"] * 5), ("snapshot", [None, "copy", None, "copy", None])]
)
def test_the_weights_follow_every_step_or_every_interval(weights: str, moves: list[str | None]) -> None:
    done: list[str] = []
    copy = SimpleNamespace(average_in=lambda *_: done.append("average"), copy=lambda _: done.append("copy"))
    learner: Any = SimpleNamespace(teacher=copy, model=None)
    found = []
    for step in range(1, 6):
        done.clear()
        teacher.move_weights(learner, TeacherConfig(weights=weights, snapshot_every=2), step)
        found.append(done[0] if done else None)
    assert found == moves
