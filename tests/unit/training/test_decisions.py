"""Decisions of the training loop between two steps, for all that may be known then."""

from __future__ import annotations

import itertools

import pytest

from dasd_megatron.training.decisions import (
    Decision,
    Progress,
    Signals,
    decide,
    is_evaluation_due,
    is_multiple,
)

EVERY, MAX_SKIPPED = 5, 3


def decided(signals: Signals, progress: Progress) -> Decision:
    return decide(signals, progress, checkpoint_every=EVERY, max_skipped_steps=MAX_SKIPPED)


@pytest.mark.parametrize(
    ("signals", "progress", "expected"),
    [
        (Signals(), Progress(3, 10), Decision(False)),
        # Checkpoints: every so many steps, and at the last step.
        (Signals(), Progress(5, 12), Decision(False, save=True)),
        (Signals(), Progress(12, 12), Decision(False, save=True)),
        (Signals(), Progress(10, 10), Decision(False, save=True)),
        # A signal ends the run at any step, and wins over the watch.
        (Signals(stop=True), Progress(3, 10), Decision(False, end="signal")),
        (Signals(stop=True, end=True, pause=True), Progress(5, 10), Decision(False, end="signal")),
        (Signals(stop=True), Progress(10, 10), Decision(False, end="signal")),
        # A disk that takes no rollouts ends it too, and what the signal would have saved is not saved.
        (Signals(disk=True), Progress(5, 10), Decision(False, end="disk")),
        (Signals(disk=True, stop=True), Progress(10, 10), Decision(False, end="disk")),
        # The watch ends or pauses a run that has steps left, and cannot end one that is done.
        (Signals(end=True), Progress(5, 10), Decision(False, end="watch")),
        (Signals(end=True), Progress(10, 10), Decision(False, save=True)),
        (Signals(pause=True), Progress(3, 10), Decision(False, pause=True)),
        (Signals(pause=True), Progress(5, 10), Decision(False, save=True, pause=True)),
        (Signals(pause=True), Progress(10, 10), Decision(False, save=True)),
        # Too many skipped steps: back to a checkpoint, with neither a new one nor a pause, at the last step too.
        (Signals(), Progress(5, 10, skipped=MAX_SKIPPED), Decision(False, save=True)),
        (Signals(), Progress(5, 10, skipped=MAX_SKIPPED + 1), Decision(False, roll_back=True)),
        (Signals(), Progress(10, 10, skipped=MAX_SKIPPED + 1), Decision(False, roll_back=True)),
        (Signals(pause=True), Progress(4, 10, skipped=MAX_SKIPPED + 1), Decision(False, roll_back=True)),
        (Signals(end=True), Progress(4, 10, skipped=MAX_SKIPPED + 1), Decision(False, end="watch")),
        # A checkpoint is finished as soon as no rank writes any more, and only if there is one.
        (Signals(), Progress(3, 10, checkpoint_pending=True), Decision(True)),
        (Signals(writing=True), Progress(3, 10, checkpoint_pending=True), Decision(False)),
        (Signals(stop=True), Progress(3, 10, checkpoint_pending=True), Decision(True, end="signal")),
        (Signals(), Progress(4, 10, skipped=9, checkpoint_pending=True), Decision(True, roll_back=True)),
    ],
)
def test_what_follows_a_step(signals: Signals, progress: Progress, expected: Decision) -> None:
    assert decided(signals, progress) == expected


def test_a_run_never_does_two_things_that_exclude_each_other() -> None:
    flags = itertools.product((False, True), repeat=5)
    for values, step, skipped, pending in itertools.product(flags, (4, 5, 10), (0, 4), (False, True)):
        signals = Signals(*values)
        decision = decided(signals, Progress(step, 10, skipped, pending))
        going_on = decision.roll_back or decision.save or decision.pause
        assert not (decision.end and going_on)
        assert not (decision.roll_back and (decision.save or decision.pause))
        assert decision.finish_checkpoint == (pending and not signals.writing)
        assert (decision.end == "disk") == signals.disk
        assert (decision.end == "signal") == (signals.stop and not signals.disk)
        # A run that is over is saved, unless it goes back or is stopped.
        assert step < 10 or decision.end or decision.roll_back or decision.save


def test_without_an_interval_the_last_step_alone_is_saved() -> None:
    saved = [
        step
        for step in range(1, 11)
        if decide(Signals(), Progress(step, 10), checkpoint_every=0, max_skipped_steps=MAX_SKIPPED).save
    ]
    assert saved == [10]


def test_evaluations_are_due_between_the_first_and_the_last_step() -> None:
    assert [step for step in range(11) if is_evaluation_due(step, 10, 5)] == [5]
    assert [step for step in range(11) if is_evaluation_due(step, 10, 1)] == list(range(1, 10))
    assert not any(is_evaluation_due(step, 10, 0) for step in range(11))


def test_an_interval_of_nothing_is_never_due() -> None:
    assert [step for step in range(1, 10) if is_multiple(step, 3)] == [3, 6, 9]
    assert not any(is_multiple(step, 0) for step in range(10))
