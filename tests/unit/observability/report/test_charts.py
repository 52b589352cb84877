from __future__ import annotations

import html
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dasd_megatron.observability.report.charts import (
    MAX_POINTS,
    Series,
    format_number,
    format_percent,
    line_chart,
    moving_mean,
    nice_ticks,
    stacked_chart,
)

values = st.lists(st.one_of(st.none(), st.floats()), min_size=1, max_size=12)


def tree(figure: str) -> ET.Element:
    return ET.fromstring(str(figure))


def drawn(figure: str) -> list[float]:
    """Every coordinate of curves, areas and marks."""
    found = []
    for element in tree(figure).iter():
        if element.tag == "path":
            found += [float(number) for number in re.findall(r"-?[\d.]+", element.get("d"))]
        if element.tag == "circle":
            found += [float(element.get("cx")), float(element.get("cy"))]
    return found


@settings(max_examples=200, deadline=None)
@given(values, st.booleans(), st.sampled_from([format_percent, format_number]))
@example([5e-324], False, format_percent)
@example([-1e-305, 1e-305], False, format_number)
def test_any_values_give_a_sound_figure(column, zero, form):
    figure = line_chart("t", "u", range(len(column)), [Series("a", column, "c1")], include_zero=zero, form=form)
    assert all(math.isfinite(number) and -50 <= number <= 600 for number in drawn(figure))
    if any(value is not None and abs(value) < 1e300 for value in column):
        data = json.loads(tree(figure).find("svg").get("data-chart"))
        assert len(data["x"]) == len(data["at"].split("|")) == len(data["rows"][0][2].split("|")) == len(column)
    else:
        assert "No finite values" in figure


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e12, 1e12), st.floats(1e-8, 1e6))
def test_ticks_cover_the_range_with_few_round_numbers(low, relative):
    span = relative * max(1.0, abs(low))
    ticks = nice_ticks(low, low + span)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= low + span - 1e-6 * step


def test_non_finite_values_are_gaps_and_are_counted():
    figure = line_chart("t", "u", range(5), [Series("a", [1.0, math.nan, 2.0, math.inf, 3.0], "c1")])
    (path,) = [element for element in tree(figure).iter("path")]
    assert path.get("d").count("M") == 3
    assert "2 values were NaN or infinite" in figure


def test_long_runs_are_averaged_in_groups():
    count = 3 * MAX_POINTS
    figure = line_chart("t", "u", range(count), [Series("a", [float(i) for i in range(count)], "c1")])
    data = json.loads(tree(figure).find("svg").get("data-chart"))
    assert len(data["x"]) == MAX_POINTS and data["rows"][0][2].split("|")[0] == format_number(1.0)
    assert "mean of 3, areas span their smallest and largest" in figure


def test_averaging_hides_no_spike():
    values = [0.0] * 2000
    values[1234] = 50.0
    figure = line_chart("t", "u", range(2000), [Series("a", values, "c1")])
    (area,) = [element for element in tree(figure).iter("path") if element.get("class") == "range"]
    heights = [float(y) for y in re.findall(r" (-?[\d.]+)", area.get("d"))]
    # The axis goes to 60, from 184 at its foot to 12 at its top.
    assert min(heights) == round(184 - (184 - 12) * 50 / 60, 1)


def test_curves_bridge_gaps_only_when_asked():
    for bridge, strokes in ((False, 2), (True, 1)):
        figure = line_chart("t", "u", range(3), [Series("a", [1.0, None, 2.0], "c1")], bridge=bridge)
        (path,) = [element for element in tree(figure).iter("path")]
        assert path.get("d").count("M") == strokes


def test_a_chart_may_explain_itself():
    hostile = "</button><script>\"'"
    figure = line_chart("t", "u", [1, 2], [Series("a", [1.0, 2.0], "c1")], about=hostile)
    assert tree(figure).find("h3/button").get("data-about") == hostile


def test_a_share_never_gets_an_axis_over_one():
    figure = line_chart("t", "u", [1, 2], [Series("a", [0.5, 1.0], "c1")], form=format_percent, most=1.0)
    labels = [element.text for element in tree(figure).iter("text")]
    assert "100%" in labels and not {"110%", "120%"} & set(labels)


def test_names_are_escaped():
    hostile = "</svg><script>alert(1)</script>\"'"
    series = [Series(hostile, [1.0, 2.0], "c1"), Series("b", [1.0, 2.0], "c2")]
    for figure in (
        line_chart(hostile, hostile, [1, 2], series, note=hostile, x_label=hostile),
        stacked_chart(hostile, hostile, [1, 2], series),
    ):
        assert "<script>" not in figure
        assert html.unescape(tree(figure).find("h3").text).strip() == hostile


def test_a_stack_piles_up_to_the_total():
    figure = stacked_chart("t", "s", [1, 2], [Series("a", [1.0, 2.0], "c1"), Series("b", [1.0, None], "c2")])
    data = json.loads(tree(figure).find("svg").get("data-chart"))
    assert data["rows"][-1] == ["total", "ink", "2|2"]
    assert len(list(tree(figure).iter("path"))) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.03121, "0.0312"), (12.53, "12.5"), (4123.4, "4,123"), (1.2e-5, "1.20e-05"), (-0.5, "-0.5")],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


def test_the_moving_mean_skips_gaps():
    assert moving_mean([1.0, None, 3.0, math.nan, 5.0], 3) == [1.0, 1.0, 2.0, 3.0, 4.0]
    assert moving_mean([None, 2.0], 2) == [None, 2.0]
