"""The switch that turns a teacher's term off while the teacher is too certain."""

from __future__ import annotations

import random
import statistics

from dasd_megatron.algorithms import EntropySwitch


def follow(entropies: list[float | None], warmup_steps: int = 3, off_share: float = 0.9) -> list[bool]:
    """Return whether the switch is on in each of these steps."""
    switch, on = EntropySwitch(), []
    for entropy in entropies:
        switch = switch.after(entropy, warmup_steps=warmup_steps, off_share=off_share)
        on.append(switch.is_on)
    return on


def test_it_goes_on_at_the_median_of_the_first_steps_and_off_below_its_share() -> None:
    warm_up = [9.0, 1.0, 2.0]
    assert follow([*warm_up, 1.9, 2.0, 1.81, 1.79, 1.9, 1.99, 2.0, 1.8]) == [
        *[False] * 3, False, True, True, False, False, False, True, True
    ]  # fmt: skip


def test_steps_without_a_teacher_change_and_measure_nothing() -> None:
    assert follow([None, 1.0, None, 1.0, 1.0, None, 1.0, None, 0.5, None]) == [
        *[False] * 6, True, True, False, False
    ]  # fmt: skip


def test_it_follows_the_published_rule() -> None:
    seed = random.randrange(2**31)
    draw = random.Random(seed)
    entropies = [draw.uniform(0.5, 1.5) for _ in range(200)]
    before, is_on, want = statistics.median(entropies[:5]), False, [False] * 5
    for entropy in entropies[5:]:
        if not is_on and entropy >= before:
            is_on = True
        elif is_on and entropy < 0.93 * before:
            is_on = False
        want.append(is_on)
    assert follow(entropies, 5, 0.93) == want, f"seed {seed}"
    assert {True, False} == set(want[5:])
