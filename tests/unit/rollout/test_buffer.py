"""Prompts are drawn once and stay in one place; steps get the groups that they may train on."""

from __future__ import annotations

import random
import secrets

import pytest

from dasd_megatron.rollout.buffer import BufferState, Group, GroupBuffer


def make_buffer(groups: int = 4, state: BufferState | None = None, **changes: object) -> GroupBuffer:
    options = {"over_sampling": 1.0, "filter_limit": 4.0, "wait_for_all": True, "max_staleness": 0}
    return GroupBuffer(groups, **{**options, **changes}, state=state or BufferState())


def group(position: int, version: int = 0) -> Group:
    return Group(position, version, [])


def finish(buffer: GroupBuffer, *positions: int, keep: bool = True, version: int = 0) -> None:
    for position in positions:
        buffer.finish(group(position, version), keep)


def test_a_step_starts_what_is_missing_and_waits_for_all_of_it() -> None:
    buffer = make_buffer()
    assert buffer.start(1, 0) == [0, 1, 2, 3] and buffer.start(1, 0) == []
    finish(buffer, 3, 1, 0)
    assert not buffer.can_take()
    finish(buffer, 2)
    taken, counts = buffer.take()
    assert [member.position for member in taken] == [0, 1, 2, 3]
    assert (counts.drawn, counts.filtered, counts.restarted) == (4, 0, 0)
    assert buffer.start(1, 1) == [4, 5, 6, 7]


def test_refused_groups_are_replaced_by_over_sampling() -> None:
    buffer = make_buffer(over_sampling=1.5)
    assert buffer.start(1, 0) == [0, 1, 2, 3, 4, 5]
    finish(buffer, 0, 1, 2, keep=False)
    finish(buffer, 3)
    assert buffer.start(1, 0) == [6, 7]  # one is there and two may come: half as many again as the one that is missing
    finish(buffer, 4, keep=False)
    assert buffer.start(1, 0) == []  # one is there and three may come
    finish(buffer, 5, keep=False)
    assert buffer.start(1, 0) == [8, 9]
    finish(buffer, 6, 7, 8, 9)
    taken, counts = buffer.take()
    assert [member.position for member in taken] == [3, 6, 7, 8]
    assert (counts.drawn, counts.filtered) == (10, 5)
    # Left over, and too old for the next step: its prompt comes first there.
    assert buffer.age(1) == []
    assert buffer.start(1, 1) == [9, 10, 11, 12, 13, 14]
    assert buffer.counts.restarted == 1


def test_without_waiting_a_step_is_complete_with_the_first_groups() -> None:
    buffer = make_buffer(over_sampling=1.5, wait_for_all=False)
    buffer.start(1, 0)
    finish(buffer, 5, 1, 2)
    assert not buffer.can_take()
    finish(buffer, 4)
    taken, _ = buffer.take()
    assert [member.position for member in taken] == [1, 2, 4, 5]
    buffer.give_back([0, 3])
    assert buffer.start(1, 1)[:2] == [0, 3]


def test_where_all_are_refused_a_step_comes_to_an_end() -> None:
    buffer = make_buffer(groups=2, filter_limit=2.0)
    drawn = 0
    while not buffer.can_take():
        for position in buffer.start(1, 0):
            finish(buffer, position, keep=False)
            drawn += 1
    assert drawn == 4
    assert [member.position for member in buffer.take()[0]] == [0, 1]


def test_too_old_groups_are_started_again() -> None:
    buffer = make_buffer(groups=2, max_staleness=1, wait_for_all=False)
    assert buffer.start(2, 0) == [0, 1, 2, 3]
    finish(buffer, 0, 1, 2)
    assert [member.position for member in buffer.take()[0]] == [0, 1]
    assert buffer.age(1) == []  # one step old by now
    assert buffer.start(2, 1) == [4, 5]
    assert buffer.age(2) == [3]  # 2 is ready and too old, 3 in flight and too old
    buffer.give_back([3])
    assert buffer.pending == [2, 3]
    assert buffer.start(2, 2) == [2, 3]


def test_what_is_saved_goes_on() -> None:
    buffer = make_buffer(groups=2, max_staleness=1)
    buffer.start(2, 0)
    finish(buffer, 1, 2)
    again = make_buffer(groups=2, max_staleness=1, state=buffer.state())
    assert again.position == 4 and again.pending == [0, 3] and [member.position for member in again.ready] == [1, 2]
    assert again.start(2, 0) == [0, 3]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("wait_for_all", [True, False])
def test_nothing_is_lost_or_doubled(max_staleness: int, wait_for_all: bool) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    groups = draw.randint(1, 5)
    buffer = make_buffer(
        groups, over_sampling=draw.uniform(1, 2), wait_for_all=wait_for_all, max_staleness=max_staleness
    )
    trained: list[int] = []
    refused: list[int] = []
    ahead = max(1, max_staleness)
    for step in range(60):
        while not buffer.can_take():
            buffer.start(ahead, step)
            position = draw.choice(list(buffer.in_flight))
            if draw.random() < 0.1:
                buffer.give_back([position])
                continue
            keep = draw.random() < 0.7
            if not keep:
                refused.append(position)
            buffer.finish(group(position, buffer.in_flight[position]), keep)
        taken, _ = buffer.take()
        assert len(taken) == groups
        assert all(step - member.version <= max_staleness for member in taken)
        trained += [member.position for member in taken]
        if draw.random() < 0.3:  # killed and resumed
            buffer = make_buffer(
                groups,
                over_sampling=buffer.over_sampling,
                wait_for_all=wait_for_all,
                max_staleness=max_staleness,
                state=buffer.state(),
            )
        buffer.give_back(buffer.age(step + 1))
    assert len(set(trained)) == len(trained)
    left = [*buffer.pending, *buffer.in_flight, *(member.position for member in buffer.ready)]
    assert sorted({*trained, *left, *refused}) == list(range(buffer.position))
    assert not set(trained) & set(left)
