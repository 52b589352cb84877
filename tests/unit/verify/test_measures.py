"""Measures of the user's own: what a function may give, and one line for what it may not."""

from __future__ import annotations

from typing import Any

import pytest

from dasd_megatron.verify.measures import MOST_MEASURES, MeasureError, Measures
from tests.support.small_samples import make_sample


def refusal(found: Any) -> str:
    def function(_: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    with pytest.raises(MeasureError) as caught:
        Measures(function).of(make_sample(3, 1, [5], "#### 2"))
    message = str(caught.value)
    assert message.startswith("verify.measures: ") and "problem 3, sample 1" in message and "\n" not in message
    return message


def test_numbers_are_kept_and_none_is_left_out() -> None:
    found = Measures(lambda sample: {"thinks": sample.text.startswith("?"), "steps": 3, "share": 0.5, "none": None})
    assert found.of(make_sample(0, 0, [5], "?")) == {"thinks": 1.0, "steps": 3.0, "share": 0.5}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (KeyError("x\ny"), "KeyError"),
        (None, "return a dict of names and numbers"),
        ([1, 2], "return a dict of names and numbers"),
        ({"a": "many"}, "return a dict of names and numbers"),
        ({"a": float("nan")}, "a=nan"),
        ({"a": 1e300}, "a=1e+300"),
        ({"A b": 1}, "the name 'A b'"),
        ({7: 1}, "the name 7"),
        ({f"n{index}": 1 for index in range(MOST_MEASURES + 1)}, f"over {MOST_MEASURES} names"),
    ],
    ids=str,
)
def test_what_are_no_named_numbers_is_refused(found: Any, said: str) -> None:
    assert said in refusal(found)


def test_names_are_few_over_all_responses() -> None:
    measures = Measures(lambda sample: {f"n{sample.sample}": 1})
    for place in range(MOST_MEASURES):
        measures.of(make_sample(0, place, [5], ""))
    with pytest.raises(MeasureError, match=f"over {MOST_MEASURES} names by now, like n{MOST_MEASURES}"):
        measures.of(make_sample(0, MOST_MEASURES, [5], ""))
