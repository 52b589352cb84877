from __future__ import annotations

from types import SimpleNamespace

import pytest

from dasd_megatron.verify.countdown import uses_all_numbers


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7-4=3\n3-1=2\n#### 7-4-1", 1.0),
        ("#### 7 - 1 - 4", 1.0),
        ("#### 1\n#### 7-1-4", 1.0),
        ("#### 7-1-4\n#### 2", 0.0),
        ("#### 2", 0.0),
        ("#### 1+1", 0.0),
        ("#### 4-1-1", 0.0),
        ("#### 7-4-1-0", 0.0),
        ("#### 7-4-1.", 0.0),
        ("#### -1-4+7", 0.0),
        ("7-4-1", 0.0),
        ("", 0.0),
        ("#### " + "9" * 40_000, 0.0),
    ],
)
def test_only_chains_of_all_numbers_to_the_target_are_right(text: str, reward: float) -> None:
    assert uses_all_numbers(SimpleNamespace(problem="4 1 7 = 2", text=text)) == reward


def test_other_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="countdown"):
        uses_all_numbers(SimpleNamespace(problem="4-1-7=", text="#### 2"))
