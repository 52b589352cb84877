"""The charts of the page and the curves in them, for one run and for several overlaid."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dasd_megatron.observability.metric_files import METRICS, WARM_START
from dasd_megatron.observability.metric_pages import explain
from dasd_megatron.observability.report.charts import (
    MAX_POINTS,
    Band,
    Format,
    Series,
    format_number,
    format_percent,
    line_chart,
    moving_mean,
    stacked_chart,
)
from dasd_megatron.observability.report.run_files import Row, Run, metric_values, to_number

PHASES = (
    ("rollout", "c1"),
    ("verify", "c5"),
    ("score", "c3"),
    ("update", "c2"),
    ("sync", "c4"),
    ("checkpoint", "c6"),
)
BETWEEN_STEPS = ("sync", "checkpoint")
"""Phases whose seconds are not part of a step's total."""

# The points of a chart of several runs are bounded, so that the page stays small whatever the number of runs.
POINTS_IN_ALL = 1600

# Runs differ in colour (Okabe and Ito's, which colour-blind people can tell apart), and from the fifth on in dashes
# too.
_RUN_COLOURS = 8
_RUN_DASHES = ("", "7 3", "2 3", "9 3 2 3")
MOST_RUNS = 4 * len(_RUN_DASHES)


def run_colour(place: int) -> str:
    """Return the CSS variable of a run's colour."""
    return f"run{place % _RUN_COLOURS + 1}"


def _run_dash(place: int) -> str:
    return _RUN_DASHES[place // 4]


@dataclass(frozen=True)
class Curve:
    """One metric of a chart: its name there, its metric's name, and how it is drawn where a chart shows one run."""

    name: str
    metric: str
    colour: str = "c1"
    dash: str = ""
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves in one unit. Of one run they share a chart; of several, each gets its own, with one curve for each run."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    form: Format = format_number
    most: float | None = None
    zero: bool = True
    note: str = ""
    band: tuple[str, str, str] | None = None
    """(name, metric of the mean, metric of the standard deviation) of an area behind the curves of one run."""


_SMOOTHED = "reward/accuracy of 10 steps"
_LOST = "update/skipped where above 0"
_MEASURE = re.compile(r"measure/[a-z][a-z0-9_]{0,47}")
_MOST_MEASURES = 32
_SOURCES = {_LOST: "update/skipped", _SMOOTHED: "reward/accuracy"}
"""The metrics behind the columns that :func:`_rows_with_derived` adds."""

WARM_START_CHARTS = (
    Chart(
        "Loss of the warm start",
        "nats per token",
        (Curve("loss", "loss"),),
        note="Supervised fine-tuning before reinforcement, on worked solutions or on the examples of a file.",
    ),
    Chart("Gradient norm of the warm start", "L2, before clipping", (Curve("gradient norm", "grad_norm"),)),
)

TRAINING_CHARTS = (
    Chart(
        "Reward: accuracy on training problems",
        "share of rollouts",
        (
            Curve("each step", "reward/accuracy", faint=True),
            Curve("mean of 10 steps", _SMOOTHED),
            Curve("mean reward", "reward/mean", "c2", "5 4"),
        ),
        format_percent,
        most=1.0,
        zero=False,
        note="Share of the step's rollouts that the verifier accepts.",
    ),
    Chart(
        "Student entropy H",
        "nats per token",
        (
            Curve("all tokens", "entropy/mean", "ink"),
            Curve("pushed tokens", "entropy/pushed", "push", "5 4"),
            Curve("pulled tokens", "entropy/pulled", "pull", "2 3"),
        ),
        note="A mean near zero means that exploration has ended.",
    ),
    Chart(
        "Response length",
        "tokens",
        (Curve("mean", "response/length_mean"), Curve("longest", "response/length_max", "c6", "5 4")),
    ),
    Chart(
        "Responses cut off at the limit",
        "share of rollouts",
        (Curve("cut off", "response/truncated_share"),),
        format_percent,
        1.0,
    ),
    Chart(
        "Tokens pushed away from the teacher",
        "share of response tokens",
        (Curve("pushed", "credit/pushed_share", "push"),),
        format_percent,
        1.0,
    ),
    Chart(
        "Direction weight ω",
        "dimensionless, −1 to 1",
        (
            Curve("mean", "credit/omega_mean", "ink"),
            Curve("largest", "credit/omega_max", "pull", "2 3"),
            Curve("smallest", "credit/omega_min", "push", "5 4"),
        ),
        note="Above zero pulls toward the teacher, below zero pushes away.",
        band=("mean ± std", "credit/omega_mean", "credit/omega_std"),
    ),
    Chart(
        "Teacher–student gap δ",
        "nats per token",
        (Curve("mean δ", "credit/delta_mean"), Curve("mean |δ|", "credit/delta_abs_mean", "c2", "5 4")),
        note="δ = log q(y) − log p(y) of the sampled token: teacher with privileged information minus student.",
    ),
    Chart(
        "KL to the rollout policy",
        "nats per token",
        (Curve("KL", "rollout/kl"),),
        note="What the rollout engine's log-probs differ from the trainer's. Growth means stale weights or other "
        "numerics.",
    ),
    Chart(
        "Importance weights",
        "share of response tokens",
        (Curve("lowered by the cap", "rollout/importance_cut_share"),),
        format_percent,
        note="Tokens that the trainer finds far more likely than the rollout engine did; with "
        "loss.importance_sampling only.",
    ),
    Chart(
        "Rejected",
        "share",
        (
            Curve("tokens", "rollout/rejected_share"),
            Curve("whole responses", "rollout/rejected_response_share", "c2", "5 4"),
        ),
        format_percent,
        note="Left out of the loss, since trainer and rollout engine differ too much; with loss.rejection only.",
    ),
    Chart("KL to the starting model", "nats per token", (Curve("KL", "update/kl_to_start"),)),
    Chart("Clipped tokens", "share of response tokens", (Curve("clipped", "update/clip_share"),), format_percent),
    Chart("Gradient norm", "L2, before clipping", (Curve("gradient norm", "update/grad_norm"),)),
    Chart(
        "Divergence from the teacher",
        "nats per token",
        (Curve("D", "update/divergence"),),
        note="Over the full vocabulary, before the cap; of the distributional objective only.",
    ),
    Chart(
        "Updates skipped",
        "per step",
        (Curve("skipped", _LOST, "push"),),
        note="Optimizer steps that were not applied because logits or gradients were not finite.",
    ),
    Chart(
        "Groups without a verifier signal",
        "share of groups",
        (
            Curve("all correct", "reward/groups_all_correct", "c3"),
            Curve("all wrong", "reward/groups_all_wrong", "c2", "5 4"),
        ),
        format_percent,
        1.0,
        note="Where all rollouts of a problem fare alike, the group-relative advantage is zero.",
    ),
    Chart("Learning rate", "per step", (Curve("learning rate", "update/lr"),)),
    Chart("Throughput", "tokens per second", (Curve("throughput", "throughput/tokens_per_second"),)),
    Chart("Duration of a step", "seconds", (Curve("seconds", "seconds/total"),)),
)


def warm_start_charts(runs: Sequence[Run]) -> list[Markup]:
    """Draw the curves of the warm start."""
    tables = [run.warm_start for run in runs]
    return _draw_charts(runs, WARM_START_CHARTS, tables, "warm-start step", WARM_START)


def training_charts(runs: Sequence[Run]) -> list[Markup]:
    """Draw the curves of training, after the held-out accuracy where it was evaluated between steps."""
    heldout = _heldout_chart(runs)
    tables = [_rows_with_derived(run) for run in runs]
    charts = _draw_charts(runs, [*TRAINING_CHARTS, *_measure_charts(tables)], tables, "training step", METRICS)
    return [heldout, *charts] if heldout is not None else charts


def _measure_charts(tables: Sequence[list[Row]]) -> list[Chart]:
    """Return a chart for each of the user's own measures (``verify.measures``) that a step has."""
    names = sorted({name for rows in tables for row in rows for name in row if _MEASURE.fullmatch(name)})
    return [
        Chart(f"Measure: {name.partition('/')[2]}", "mean over responses", (Curve(name.partition("/")[2], name),))
        for name in names[:_MOST_MEASURES]
    ]


def _rows_with_derived(run: Run) -> list[Row]:
    """Return the run's steps with two more columns, which charts show in place of others."""
    accuracy = metric_values(run.metrics, "reward/accuracy")
    skipped = metric_values(run.metrics, "update/skipped")
    extra = {}
    if any(value is not None for value in accuracy):
        extra[_SMOOTHED] = moving_mean(accuracy, 10)
    if any(skipped):
        extra[_LOST] = skipped
    return [{**row, **{name: values[place] for name, values in extra.items()}} for place, row in enumerate(run.metrics)]


def _draw_charts(
    runs: Sequence[Run], charts: Sequence[Chart], tables: Sequence[list[Row]], x_label: str, file: str
) -> list[Markup]:
    """Draw the curves of all runs; a chart whose metrics no step has is left out. ``tables``: the rows of each run, as
    they stand in ``file``."""
    if len(runs) > 1:
        drawn = [
            _chart_of_runs(chart, curve, runs, tables, x_label, file)
            for chart in charts
            for curve in chart.curves
            if not curve.faint
        ]
    else:
        drawn = [_chart_of_one_run(chart, tables[0], x_label, file) for chart in charts]
    return [chart for chart in drawn if chart is not None]


def explain_curves(curves: Sequence[Curve], file: str) -> str:
    """Return what the metrics of ``file`` that the curves show mean."""
    names = dict.fromkeys(_SOURCES.get(curve.metric, curve.metric) for curve in curves)
    return explain(*names, file=file)


def _chart_of_one_run(chart: Chart, rows: list[Row], x_label: str, file: str) -> Markup | None:
    series = [
        Series(curve.name, metric_values(rows, curve.metric), curve.colour, curve.dash, curve.faint)
        for curve in chart.curves
    ]
    series = [curve for curve in series if any(value is not None for value in curve.values)]
    # A mean reward that is the accuracy says nothing.
    accuracy = metric_values(rows, "reward/accuracy")
    series = [curve for curve in series if curve.name != "mean reward" or curve.values != accuracy]
    if not series:
        return None
    return line_chart(
        chart.title,
        chart.unit,
        [row["step"] for row in rows],
        series,
        form=chart.form,
        x_label=x_label,
        band=_deviation_band(chart.band, rows) if chart.band is not None else None,
        include_zero=chart.zero,
        most=chart.most,
        note=chart.note,
        about=explain_curves(chart.curves, file),
    )


def _deviation_band(names: tuple[str, str, str], rows: list[Row]) -> Band | None:
    """Return the area of one standard deviation about a mean; None where no step has both."""
    name, mean, deviation = names
    lower: list[float | None] = []
    upper: list[float | None] = []
    for middle, half in zip(metric_values(rows, mean), metric_values(rows, deviation), strict=True):
        lower.append(None if middle is None or half is None else middle - half)
        upper.append(None if middle is None or half is None else middle + half)
    return Band(name, lower, upper, "c6") if any(value is not None for value in lower) else None


def _chart_of_runs(
    chart: Chart, curve: Curve, runs: Sequence[Run], tables: Sequence[list[Row]], x_label: str, file: str
) -> Markup | None:
    if all(value is None for rows in tables for value in metric_values(rows, curve.metric)):
        return None
    if curve.metric == "reward/mean" and all(
        metric_values(rows, curve.metric) == metric_values(rows, "reward/accuracy") for rows in tables
    ):
        return None
    steps = sorted({row["step"] for rows in tables for row in rows})
    series = []
    for place, (run, rows) in enumerate(zip(runs, tables, strict=True)):
        values = {row["step"]: to_number(row.get(curve.metric)) for row in rows}
        if any(value is not None for value in values.values()):
            series.append(Series(run.label, [values.get(step) for step in steps], run_colour(place), _run_dash(place)))
    alone = sum(not other.faint for other in chart.curves) == 1
    return line_chart(
        chart.title if alone else f"{chart.title}: {curve.name}",
        chart.unit,
        steps,
        series,
        form=chart.form,
        x_label=x_label,
        include_zero=chart.zero,
        most=chart.most,
        note=chart.note,
        about=explain_curves([curve], file),
        points=min(MAX_POINTS, POINTS_IN_ALL // len(runs)),
    )


def _heldout_chart(runs: Sequence[Run]) -> Markup | None:
    """Draw held-out accuracy over the steps, where it was evaluated during training."""
    tables = [[row for row in run.evaluations if row.get("label") in ("before", "step", "after")] for run in runs]
    metric = next((name for rows in tables for row in rows for name in row if name.startswith("avg@")), None)
    steps = sorted({row["step"] for rows in tables for row in rows})
    if metric is None or len(steps) < 3:
        return None
    series = []
    for place, (run, rows) in enumerate(zip(runs, tables, strict=True)):
        values = {row["step"]: to_number(row.get(metric)) for row in rows}
        name, colour, dash = (metric, "c1", "") if len(runs) == 1 else (run.label, run_colour(place), _run_dash(place))
        if any(value is not None for value in values.values()):
            series.append(Series(name, [values.get(step) for step in steps], colour, dash))
    return line_chart(
        f"Held-out {metric.capitalize()}",
        "share of samples",
        steps,
        series,
        form=format_percent,
        most=1.0,
        markers=True,
        bridge=True,
    )


def pass_chart(runs: Sequence[Run]) -> Markup | None:
    """Draw Pass@k over k: before and after of one run, else the last evaluation of each run."""
    curves: list[tuple[str, Row | None, str, str]] = []
    for place, run in enumerate(runs):
        before, after = run.evaluation("before"), run.evaluation("after")
        if len(runs) == 1:
            curves += [("before", before, "c6", "5 4"), ("after", after, "c1", "")]
        elif after is not None:
            curves.append((run.label, after, run_colour(place), _run_dash(place)))
        else:
            curves.append((f"{run.label} (before)", before, run_colour(place), _run_dash(place)))
    known = [(name, row, colour, dash) for name, row, colour, dash in curves if row is not None]
    ks = sorted({int(key[5:]) for _, row, *_ in known for key in row if re.fullmatch(r"pass@\d+", key)})
    # Each point has its name, so that none can be averaged away.
    ks = ks[:MAX_POINTS]
    if not ks:
        return None
    return line_chart(
        "Pass@k",
        "share of held-out problems solved by at least one of k samples",
        ks,
        [
            Series(name, [to_number(row.get(f"pass@{k}")) for k in ks], colour, dash)
            for name, row, colour, dash in known
        ],
        form=format_percent,
        x_names=[str(k) for k in ks],
        x_label="k",
        markers=True,
        most=1.0,
        height=340,
    )


def phase_chart(run: Run) -> Markup | None:
    """Draw the seconds of each step, by phase."""
    layers = [Series(name, metric_values(run.metrics, f"seconds/{name}"), colour) for name, colour in PHASES]
    layers = [layer for layer in layers if any(layer.values)]
    if not layers:
        return None
    within = [layer.values for layer in layers if layer.name not in BETWEEN_STEPS]
    known = (
        [sum(value or 0.0 for value in values) for values in zip(*within, strict=True)]
        if within
        else [0.0] * len(run.metrics)
    )
    totals = metric_values(run.metrics, "seconds/total")
    rest = [max(0.0, total - part) if total is not None else None for total, part in zip(totals, known, strict=True)]
    if any(rest):
        layers.append(Series("other", rest, "c7"))
    return stacked_chart("Where a step's time goes", "seconds per step", [row["step"] for row in run.metrics], layers)


def phase_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return, for each run and phase, seconds per step, share of the time, and tokens of the step divided by the
    phase's seconds."""
    return [{"run": place, **row} for place, run in enumerate(runs) for row in _phase_rows(run)]


def _phase_rows(run: Run) -> list[dict[str, Any]]:
    totals = metric_values(run.metrics, "seconds/total")
    rates = metric_values(run.metrics, "throughput/tokens_per_second")
    sound = [
        (row, total, total * rate)
        for row, total, rate in zip(run.metrics, totals, rates, strict=True)
        if total is not None and rate is not None and math.isfinite(total * rate)
    ]
    if not sound:
        return []
    all_tokens = sum(tokens for *_, tokens in sound)
    names = (*(name for name, _ in PHASES), "route", "health")
    spent = {name: sum(to_number(row.get(f"seconds/{name}")) or 0.0 for row, *_ in sound) for name in names}
    whole = sum(total for _, total, _ in sound) + sum(spent[name] for name in BETWEEN_STEPS)
    spent["other"] = max(0.0, whole - sum(spent.values()))
    return [
        {
            "phase": name,
            "seconds": f"{seconds / len(sound):.3f}" if seconds else "0",
            "share": format_percent(seconds / whole) if whole else "–",
            "width": round(100 * seconds / whole, 1) if whole else 0,
            "rate": f"{all_tokens / seconds:,.0f}" if seconds else "–",
        }
        for name, seconds in (*spent.items(), ("all", whole))
        if seconds
    ]
