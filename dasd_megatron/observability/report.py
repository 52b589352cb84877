"""One self-contained page about one run or several, built from the files of their directories alone.

The page loads nothing: styles, script, charts and data stand inside it, and its content security policy refuses
everything else, any script but its own included. All text from runs (rollouts above all) is escaped, and characters
that do not show are made visible. Parts whose files are missing are left out or say so; what could not be read, and
what was left out to keep the page small, is said on the page.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dasd_megatron.algorithms.methods import METHODS
from dasd_megatron.files import replace_file
from dasd_megatron.observability.charts import Series, compact, line_chart, moving_mean, percent, stacked_chart
from dasd_megatron.observability.metric_docs import explain
from dasd_megatron.observability.metric_files import WARM_START
from dasd_megatron.observability.progress import evaluation_rows, format_difference, format_duration, format_result
from dasd_megatron.observability.run_files import (
    Groups,
    ReportError,
    Rollouts,
    Run,
    bounded,
    column,
    extreme_groups,
    lines,
    number,
    read_run,
    text_of,
    token_rollouts,
    visible,
)

REPORT = "report.html"
PHASES = (
    ("rollout", "c1"),
    ("verify", "c5"),
    ("score", "c3"),
    ("update", "c2"),
    ("sync", "c4"),
    ("checkpoint", "c6"),
)

# Bounds on what is embedded, so that the page stays under 5 MB whatever the runs' lengths and their number.
MOST_RUNS = 16
TOKENS_IN_ALL = 48_000
GROUPS_IN_ALL = 60
POINTS_IN_ALL = 1600
HELDOUT_PROBLEMS = 6
TEXT_CHARS = 3000
CONFIG_CHARS = 60_000

# Runs differ in colour (Okabe and Ito's, which colour-blind people can tell apart), and from the fifth on in dashes
# too.
_RUN_COLOURS = 8
_RUN_DASHES = (
    "",
    "",
    "",
    "",
    "7 3",
    "7 3",
    "7 3",
    "7 3",
    "2 3",
    "2 3",
    "2 3",
    "2 3",
    "9 3 2 3",
    "9 3 2 3",
    "9 3 2 3",
    "9 3 2 3",
)


def write_report(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Build the page about these runs and return its path: ``output``, or ``report.html`` in the run's directory (in
    the current one for several runs).

    Works on runs that are still going, crashed, were never evaluated or kept no rollouts. The file is replaced
    atomically. Raises :class:`ReportError` when a directory is not there or holds no run, :class:`RunDirectoryError`
    when the page cannot be written.
    """
    paths = [Path(path) for path in run_dirs]
    if not paths:
        raise ReportError("no run is given: give the directories of one run or more, like runs/<name>/<date-time>")
    twice = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise ReportError(f"{twice[0]} is given more than once: give each run once")
    if len(paths) > MOST_RUNS:
        raise ReportError(f"{len(paths)} runs do not fit into the colours of one page: give at most {MOST_RUNS}")
    target = Path(output) if output is not None else paths[0] / REPORT if len(paths) == 1 else Path(REPORT)
    if output is not None and not target.parent.is_dir():
        raise ReportError(f"{target.parent} is not a directory: make it first, or give --output elsewhere")
    if output is not None and target.is_dir():
        raise ReportError(f"{target} is a directory: give --output a file")
    runs = [read_run(path) for path in paths]
    _distinguish(runs)
    replace_file(target, render(runs))
    return target


def _distinguish(runs: Sequence[Run]) -> None:
    """Runs of one name are told apart by their directories' names, or by number where these are the same too."""
    counts = Counter(run.label for run in runs)
    for run in runs:
        if counts[run.label] > 1:
            run.label = f"{run.label} {visible(run.path.resolve().name)}"
    counts = Counter(run.label for run in runs)
    for place, run in enumerate(runs, 1):
        if counts[run.label] > 1:
            run.label = f"{run.label} ({place})"


def render(runs: Sequence[Run]) -> str:
    """The page as one string of HTML."""
    files = resources.files("dasd_megatron.observability").joinpath("templates")
    script = files.joinpath("report.js").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    template = environment.from_string(files.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    single = len(runs) == 1
    rollouts = [token_rollouts(run, TOKENS_IN_ALL // len(runs)) for run in runs]
    groups = [extreme_groups(run, max(3, GROUPS_IN_ALL // (2 * len(runs)))) for run in runs]
    context = {
        "single": single,
        "name": runs[0].label if single else f"{len(runs)} runs",
        "algorithm": text_of(runs[0].setting("algorithm.name")) if single else "",
        "runs": [
            {
                "label": run.label,
                "key": _run_key(place),
                "status": _status(run),
                "algorithm": text_of(run.setting("algorithm.name")),
                "config_text": bounded(run.config_text, CONFIG_CHARS // len(runs)),
                "environment_text": bounded(run.environment_text, CONFIG_CHARS // len(runs)),
            }
            for place, run in enumerate(runs)
        ],
        "cards": _cards(runs[0]) if single else [],
        "interval": _interval(runs[0]) if single else "",
        "results": _results(runs[0]) if single else _results_of_runs(runs),
        "evaluated": _evaluated(runs[0].evaluation("before") or runs[0].evaluation("after")) if single else "",
        "pass_chart": _pass_chart(runs),
        "facts": _facts_table(runs),
        "differences": [] if single else differences(runs),
        "warnings": _named(runs, _warnings),
        "warm_start_charts": _charts(runs, _WARM_START_CHARTS, lambda run: run.warm_start, "warm-start step"),
        "training_charts": _heldout_chart(runs)
        + _charts(runs, _TRAINING_CHARTS, _with_smoothed_accuracy, "training step"),
        "phase_chart": _phase_chart(runs[0]) if single else None,
        "phases": _phase_table(runs),
        "rollouts_rule": _rollouts_rule(rollouts),
        "groups_rule": _groups_rule(groups),
        "heldout": _heldout_samples(runs),
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": _version(),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": Markup(_embedded(_data(runs, rollouts, groups))),
        "notes": _named(runs, lambda run: run.notes),
    }
    return template.render(context)


def _named(runs: Sequence[Run], texts: Callable[[Run], list[str]]) -> list[str]:
    return [text if len(runs) == 1 else f"{run.label}: {text}" for run in runs for text in texts(run)]


def _run_key(place: int) -> str:
    """CSS variable of a run's colour."""
    return f"run{place % _RUN_COLOURS + 1}"


def _embedded(data: Any) -> str:
    """JSON that no HTML parser takes for the end of its element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _version() -> str:
    try:
        return importlib.metadata.version("dasd_megatron")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed as a package)"


# ---- headline
# ----------------------------------------------------------------------------------------------------------------------------


def _status(run: Run) -> tuple[str, str]:
    """(class, words): whether the run is at its end."""
    steps = run.setting("run.steps")
    done = run.metrics[-1]["step"] if run.metrics else 0
    after = run.evaluation("after")
    # A run that was made longer has one of its former end.
    if (after is not None and after["step"] >= done) or (isinstance(steps, int) and 0 < steps <= done):
        return "done", f"finished · {done} steps"
    of = f" of {steps}" if steps is not None else ""
    return "open", f"not finished · step {done}{of}"


def _cards(run: Run) -> list[dict[str, str]]:
    rows = evaluation_rows(run.evaluation("before"), run.evaluation("after"))
    largest_pass = max(
        (label for label, *_ in rows if label.startswith("Pass@")),
        key=lambda label: int(label.split("@")[1]),
        default=None,
    )
    cards = []
    for label, old, new, unit in rows:
        if label.startswith(("Avg@", "Maj@")) or label in (largest_pass, "Mean length"):
            change = format_difference(old, new, unit)
            better = "" if None in (old, new) or unit != "share" or old == new else "up" if new > old else "down"
            old_text, new_text = (
                format_result(value, unit).removesuffix(" tokens") if value is not None else "–" for value in (old, new)
            )
            title = f"{label}, tokens" if unit == "tokens" else label
            cards.append(
                {
                    "label": title,
                    "before": old_text,
                    "after": new_text,
                    "change": "" if change == "-" else change,
                    "class": better,
                }
            )
    return cards


def _evaluated(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    parts = [
        f"{row[key]:,} {words}"
        for key, words in (("num_problems", "held-out problems"), ("num_samples", "samples of each"))
        if isinstance(row.get(key), int)
    ]
    return " · ".join(parts)


def _results(run: Run) -> list[tuple[str, str, str, str]]:
    return [
        (label, format_result(old, unit), format_result(new, unit), format_difference(old, new, unit))
        for label, old, new, unit in evaluation_rows(run.evaluation("before"), run.evaluation("after"))
    ]


def _results_of_runs(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(name, (result after training, difference from before) of each run)."""
    found: dict[str, dict[int, tuple[str, str]]] = {}
    # Runs that were evaluated with other numbers of samples have other rows: the order is that of one row with all of
    # them.
    everything = {key: None for run in runs for label in ("before", "after") for key in run.evaluation(label) or {}}
    order = [label for label, *_ in evaluation_rows(everything, None)]
    for place, run in enumerate(runs):
        for label, old, new, unit in evaluation_rows(run.evaluation("before"), run.evaluation("after")):
            result = format_result(new, unit) if new is not None else f"{format_result(old, unit)} before"
            change = "" if None in (old, new) else format_difference(old, new, unit)
            found.setdefault(label, {})[place] = (result, change)
    return [(label, [found[label].get(place, ("–", "")) for place in range(len(runs))]) for label in order]


def _outcomes(run: Run, row: Mapping[str, Any]) -> dict[str, list[bool]]:
    path = run.samples_path(row)
    found: dict[str, list[bool]] = {}
    if path.exists():
        for sample in lines(run, path):
            found.setdefault(str(sample.get("problem_id")), []).append(bool(sample.get("symbolic_correct")))
    return found


def _interval(run: Run) -> str:
    """What sampling problems leaves open about the difference of Avg: normal 95% interval of the paired per-problem
    differences."""
    before, after = run.evaluation("before"), run.evaluation("after")
    if before is None or after is None:
        return ""
    old, new = _outcomes(run, before), _outcomes(run, after)
    changes = [sum(new[key]) / len(new[key]) - sum(old[key]) / len(old[key]) for key in old if key in new]
    if len(changes) < 2:
        return ""
    mean = sum(changes) / len(changes)
    half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in changes) / (len(changes) - 1) / len(changes))
    return (
        f"Difference of average accuracy, paired over {len(changes)} problems: {100 * mean:+.1f} points, 95% interval "
        f"{100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}. This is one seed; it says nothing about others."
    )


def _pass_chart(runs: Sequence[Run]) -> Markup | None:
    curves = []
    for place, run in enumerate(runs):
        rows = {label: run.evaluation(label) for label in ("before", "after")}
        if len(runs) == 1:
            curves += [("before", rows["before"], "c6", "5 4"), ("after", rows["after"], "c1", "")]
        else:
            label = "after" if rows["after"] is not None else "before"
            curves.append(
                (
                    run.label + (" (before)" if label == "before" else ""),
                    rows[label],
                    _run_key(place),
                    _RUN_DASHES[place],
                )
            )
    curves = [curve for curve in curves if curve[1] is not None]
    ks = sorted({int(key[5:]) for _, row, *_ in curves for key in row if re.fullmatch(r"pass@\d+", key)})
    if not ks:
        return None
    return line_chart(
        "Pass@k",
        "share of held-out problems solved by at least one of k samples",
        ks,
        [Series(name, [number(row.get(f"pass@{k}")) for k in ks], colour, dash) for name, row, colour, dash in curves],
        form=percent,
        x_names=[str(k) for k in ks],
        x_label="k",
        markers=True,
        most=1.0,
        height=340,
    )


def _facts(run: Run) -> dict[str, str]:
    """What one asks first about a run, by name; absent ones left out."""
    get = run.setting
    sizes = [
        (short, get(f"parallel.{long}_parallel_size"))
        for short, long in (("TP", "tensor_model"), ("PP", "pipeline_model"), ("CP", "context"), ("DP", "data"))
    ]
    groups, samples = get("batch.groups"), get("batch.samples_per_group")
    model = get("model.path")
    if model is None and isinstance(get("model.tiny"), dict):
        model = (
            f"tiny Qwen3 made in code: {get('model.tiny.num_layers')} layers of width {get('model.tiny.hidden_size')}"
        )
    spent = sum(value for value in column(run.metrics, "seconds/total") if value is not None and math.isfinite(value))
    speed = [
        value
        for value in column(run.metrics, "throughput/tokens_per_second")
        if value is not None and math.isfinite(value)
    ]
    times = [value for value in column(run.metrics, "time") if value is not None and math.isfinite(value)]
    facts = {
        "Algorithm": get("algorithm.name"),
        "β (teacher weight)": get("algorithm.beta"),
        "ρ (share pushed)": get("algorithm.rho"),
        "Gap scale floor": None if get("algorithm.scale_floor") is None else f"{get('algorithm.scale_floor')} nats",
        "Teacher": None
        if get("teacher.weights") is None
        else f"{get('teacher.weights')} weights, sees the {get('teacher.privileged')}",
        "Model": model,
        "Backend": get("backend.kind"),
        "Parallel": " × ".join(f"{short} {size}" for short, size in sizes if size is not None),
        "Rollouts of a step": None if None in (groups, samples) else f"{groups} problems × {samples} samples",
        "Learning rate": get("optimizer.lr"),
        "Warm start": f"{run.warm_start[-1]['step']} steps" if run.warm_start else None,
        "Training": f"{run.metrics[-1]['step']} steps in {format_duration(spent)}" if run.metrics else None,
        "Speed": f"{sum(speed) / len(speed):,.0f} tokens/s, mean over steps" if speed else None,
        "Verifier timeouts": f"{sum(v or 0 for v in column(run.metrics, 'verify/timeouts')):.0f}"
        if run.metrics
        else None,
        "Seed": get("run.seed"),
        "Last step": datetime.datetime.fromtimestamp(times[-1]).astimezone().strftime("%Y-%m-%d %H:%M %Z")
        if times
        else None,
        "Git revision": run.environment.get("git_revision"),
        "Directory": run.path.resolve(),
    }
    return {name: visible(value) for name, value in facts.items() if value not in (None, "")}


def _facts_table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(name, value of each run), in reading order."""
    found = [_facts(run) for run in runs]
    names = dict.fromkeys(itertools.chain.from_iterable(found))
    return [(name, [facts.get(name, "–") for facts in found]) for name in names]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(dotted field, value in each run) of the configuration's fields that are not the same in all; the run's directory
    is left out."""
    flat = [_flat(run.config) for run in runs]
    names = sorted(set().union(*flat) - {"run.dir"})
    rows = [(name, [bounded(values[name], 300) if name in values else "–" for values in flat]) for name in names]
    return [(visible(name), cells) for name, cells in rows if len(set(cells)) > 1]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = (
                json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, str) else value
            )
    return found


def _warnings(run: Run) -> list[str]:
    return [text_of(row.get("text")) for row in run.warnings]


# ---- curves
# ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One metric of a chart: its name there, its key, and how it is drawn where a chart shows one run."""

    name: str
    key: str
    colour: str = "c1"
    dash: str = ""
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves in one unit. Of one run they share a chart; of several, each gets its own, with one curve for each run."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    form: Callable[[float], str] = compact
    most: float | None = None
    zero: bool = True
    note: str = ""
    band: tuple[str, str, str] | None = None
    """(name, key of the mean, key of the standard deviation) of an area behind the curves of one run."""


_SMOOTHED = "reward/accuracy of 10 steps"
_LOST = "update/skipped where above 0"

_WARM_START_CHARTS = (
    Chart(
        "Loss of the warm start",
        "nats per token",
        (Curve("loss", "loss"),),
        note="Supervised fine-tuning on worked solutions, before reinforcement.",
    ),
    Chart("Gradient norm of the warm start", "L2, before clipping", (Curve("gradient norm", "grad_norm"),)),
)

_TRAINING_CHARTS = (
    Chart(
        "Reward: accuracy on training problems",
        "share of rollouts",
        (
            Curve("each step", "reward/accuracy", faint=True),
            Curve("mean of 10 steps", _SMOOTHED),
            Curve("mean reward", "reward/mean", "c2", "5 4"),
        ),
        percent,
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
        percent,
        1.0,
    ),
    Chart(
        "Tokens pushed away from the teacher",
        "share of response tokens",
        (Curve("pushed", "credit/pushed_share", "push"),),
        percent,
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
        percent,
        note="Tokens that the trainer finds far more likely than the rollout engine did; with "
        "loss.importance_sampling only.",
    ),
    Chart("KL to the starting model", "nats per token", (Curve("KL", "update/kl_to_start"),)),
    Chart("Clipped tokens", "share of response tokens", (Curve("clipped", "update/clip_share"),), percent),
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
        percent,
        1.0,
        note="Where all rollouts of a problem fare alike, the group-relative advantage is zero.",
    ),
    Chart("Learning rate", "per step", (Curve("learning rate", "update/lr"),)),
    Chart("Throughput", "tokens per second", (Curve("throughput", "throughput/tokens_per_second"),)),
    Chart("Duration of a step", "seconds", (Curve("seconds", "seconds/total"),)),
)


def _with_smoothed_accuracy(run: Run) -> list[dict[str, Any]]:
    """The run's steps with two more columns, which charts show in place of others."""
    accuracy = column(run.metrics, "reward/accuracy")
    skipped = column(run.metrics, "update/skipped")
    extra = {}
    if any(value is not None for value in accuracy):
        extra[_SMOOTHED] = moving_mean(accuracy, 10)
    if any(skipped):
        extra[_LOST] = skipped
    return [{**row, **{name: values[place] for name, values in extra.items()}} for place, row in enumerate(run.metrics)]


def _charts(
    runs: Sequence[Run], charts: Sequence[Chart], rows_of: Callable[[Run], list[dict[str, Any]]], x_label: str
) -> list[Markup]:
    """The curves of all runs; a chart whose metrics no step has is left out."""
    tables = [rows_of(run) for run in runs]
    if len(runs) > 1:
        drawn = [
            _chart_of_runs(chart, curve, runs, tables, x_label)
            for chart in charts
            for curve in chart.curves
            if not curve.faint
        ]
    else:
        drawn = [_chart_of_one(chart, tables[0], x_label) for chart in charts]
    return [chart for chart in drawn if chart is not None]


def _about(curves: Sequence[Curve], x_label: str) -> str:
    sources = {_LOST: "update/skipped", _SMOOTHED: "reward/accuracy"}
    keys = dict.fromkeys(sources.get(curve.key, curve.key) for curve in curves)
    return explain(*keys, file=WARM_START) if x_label == "warm-start step" else explain(*keys)


def _chart_of_one(chart: Chart, rows: list[dict[str, Any]], x_label: str) -> Markup | None:
    series = [
        Series(curve.name, column(rows, curve.key), curve.colour, curve.dash, curve.faint) for curve in chart.curves
    ]
    series = [one for one in series if any(value is not None for value in one.values)]
    # A mean reward that is the accuracy says nothing.
    accuracy = column(rows, "reward/accuracy")
    series = [one for one in series if one.name != "mean reward" or one.values != accuracy]
    if not series:
        return None
    band = None
    if chart.band is not None:
        name, mean, deviation = chart.band
        pairs = list(zip(column(rows, mean), column(rows, deviation), strict=True))
        spread = [(None, None) if None in pair else (pair[0] - pair[1], pair[0] + pair[1]) for pair in pairs]
        if any(low is not None for low, _ in spread):
            band = (name, [low for low, _ in spread], [high for _, high in spread], "c6")
    return line_chart(
        chart.title,
        chart.unit,
        column(rows, "step"),
        series,
        form=chart.form,
        x_label=x_label,
        band=band,
        include_zero=chart.zero,
        most=chart.most,
        note=chart.note,
        about=_about(chart.curves, x_label),
    )


def _chart_of_runs(
    chart: Chart, curve: Curve, runs: Sequence[Run], tables: Sequence[list[dict[str, Any]]], x_label: str
) -> Markup | None:
    if all(row.get(curve.key) is None for rows in tables for row in rows):
        return None
    if curve.key == "reward/mean" and all(
        row.get(curve.key) == row.get("reward/accuracy") for rows in tables for row in rows
    ):
        return None
    steps = sorted({row["step"] for rows in tables for row in rows})
    series = []
    for place, (run, rows) in enumerate(zip(runs, tables, strict=True)):
        values = {row["step"]: number(row.get(curve.key)) for row in rows}
        if any(value is not None for value in values.values()):
            series.append(Series(run.label, [values.get(step) for step in steps], _run_key(place), _RUN_DASHES[place]))
    alone = sum(not one.faint for one in chart.curves) == 1
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
        about=_about([curve], x_label),
        points=min(400, POINTS_IN_ALL // len(runs)),
    )


def _heldout_chart(runs: Sequence[Run]) -> list[Markup]:
    """Held-out accuracy over the steps, where it was evaluated during training."""
    tables = [[row for row in run.evaluations if row.get("label") in ("before", "step", "after")] for run in runs]
    key = next((key for rows in tables for row in rows for key in row if key.startswith("avg@")), None)
    steps = sorted({row["step"] for rows in tables for row in rows})
    if key is None or len(steps) < 3:
        return []
    series = []
    for place, (run, rows) in enumerate(zip(runs, tables, strict=True)):
        values = {row["step"]: number(row.get(key)) for row in rows}
        name, colour, dash = (key, "c1", "") if len(runs) == 1 else (run.label, _run_key(place), _RUN_DASHES[place])
        if any(value is not None for value in values.values()):
            series.append(Series(name, [values.get(step) for step in steps], colour, dash))
    return [
        line_chart(
            f"Held-out {key.capitalize()}",
            "share of samples",
            steps,
            series,
            form=percent,
            most=1.0,
            markers=True,
            bridge=True,
        )
    ]


def _phase_chart(run: Run) -> Markup | None:
    layers = [Series(name, column(run.metrics, f"seconds/{name}"), colour) for name, colour in PHASES]
    layers = [layer for layer in layers if any(layer.values)]
    if not layers:
        return None
    # What stands between steps is not part of the total.
    within = [layer.values for layer in layers if layer.name not in ("sync", "checkpoint")]
    known = (
        [sum(value or 0.0 for value in values) for values in zip(*within, strict=True)]
        if within
        else [0.0] * len(run.metrics)
    )
    totals = column(run.metrics, "seconds/total")
    rest = [max(0.0, total - part) if total is not None else None for total, part in zip(totals, known, strict=True)]
    if any(rest):
        layers.append(Series("other", rest, "c7"))
    return stacked_chart("Where a step's time goes", "seconds per step", column(run.metrics, "step"), layers)


def _phase_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run and phase: seconds per step, share of the time, and tokens of the step divided by the phase's
    seconds."""
    rows = []
    for place, run in enumerate(runs):
        totals = column(run.metrics, "seconds/total")
        rates = column(run.metrics, "throughput/tokens_per_second")
        sound = [
            (row, total, total * rate)
            for row, total, rate in zip(run.metrics, totals, rates, strict=True)
            if total is not None and rate is not None and math.isfinite(total * rate)
        ]
        if not sound:
            continue
        tokens = sum(one for *_, one in sound)
        names = (*(name for name, _ in PHASES), "route", "health")
        spent = {name: sum(number(row.get(f"seconds/{name}")) or 0.0 for row, *_ in sound) for name in names}
        # The time of a step leaves out what stands between steps.
        whole = sum(total for _, total, _ in sound) + spent["sync"] + spent["checkpoint"]
        spent["other"] = max(0.0, whole - sum(spent.values()))
        rows += [
            {
                "run": place,
                "phase": name,
                "seconds": f"{seconds / len(sound):.3f}" if seconds else "0",
                "share": percent(seconds / whole) if whole else "–",
                "width": round(100 * seconds / whole, 1) if whole else 0,
                "rate": f"{tokens / seconds:,.0f}" if seconds else "–",
            }
            for name, seconds in (*spent.items(), ("all", whole))
            if seconds
        ]
    return rows


# ---- tokens and samples
# ------------------------------------------------------------------------------------------------------------------


def _data(runs: Sequence[Run], rollouts: Sequence[Rollouts], groups: Sequence[Groups]) -> dict[str, Any]:
    """What the page's script shows in pages: rollouts with their tokens, and groups."""
    limits = {}
    for short in "wdha":
        sizes = sorted(
            abs(value)
            for part in rollouts
            for one in part.chosen
            for value in one[short]
            if isinstance(value, (int, float))  # NaN and infinities are strings here.
        )
        # The 98th percentile takes the full colour, so that a single outlier does not make all other tokens pale.
        limits[short] = (sizes[int(0.98 * (len(sizes) - 1))] if sizes else 0.0) or 1.0
    return {
        "runs": [{"label": run.label, "colour": _run_key(place)} for place, run in enumerate(runs)],
        "limits": limits,
        "routed": [_routes_by_entropy(run.setting("algorithm.name")) for run in runs],
        "rollouts": [{"run": place, **one} for place, part in enumerate(rollouts) for one in part.chosen],
        "groups": {
            # Each run's first, then each run's second.
            end: [
                {"run": place, **group}
                for row in itertools.zip_longest(*(getattr(part, end) for part in groups))
                for place, group in enumerate(row)
                if group is not None
            ]
            for end in ("best", "worst")
        },
    }


def _routes_by_entropy(algorithm: object) -> bool:
    """Return whether tau decides the direction of tokens under this ``algorithm.name``, which may be of any version."""
    return isinstance(algorithm, str) and algorithm in METHODS and METHODS[algorithm].routes_by_entropy


def _rollouts_rule(parts: Sequence[Rollouts]) -> str:
    """Which rollouts are on the page, and how many are not; empty where none is."""
    shown, count = sum(len(part.chosen) for part in parts), sum(part.count for part in parts)
    if not shown:
        return ""
    read, saved = sum(part.steps_read for part in parts), sum(part.steps_saved for part in parts)
    if shown == count:
        return f"All {shown:,} rollouts whose token statistics were saved."
    return (
        f"{shown:,} of about {count:,} rollouts whose token statistics were saved, from {read:,} of {saved:,} steps: "
        f"the first, the last, and evenly spaced ones between them until {TOKENS_IN_ALL:,} tokens are on the page. "
        f"About {count - shown:,} are left out."
    )


def _groups_rule(parts: Sequence[Groups]) -> str:
    shown, count = sum(len(part.best) + len(part.worst) for part in parts), sum(part.count for part in parts)
    if not shown:
        return ""
    read, saved = sum(part.steps_read for part in parts), sum(part.steps_saved for part in parts)
    steps = f"{saved:,} saved steps" if read == saved else f"{read:,} evenly spaced of {saved:,} saved steps"
    left_out = f" {count - shown:,} groups between them are left out." if count > shown else ""
    each = " of each run" if len(parts) > 1 else ""
    return (
        f"Of {count:,} groups in {steps}, the {shown:,} with the highest or lowest mean reward{each}; among equals "
        f"the later step comes first.{left_out}"
    )


def _heldout_samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The first problems of the held-out set with the first generation and all outcomes: before and after of one run,
    else the last of each run."""
    problems: dict[str, dict[str, Any]] = {}
    for run in runs:
        labels = [label for label in ("before", "after") if run.evaluation(label)]
        for label in labels if len(runs) == 1 else labels[-1:]:
            path = run.samples_path(run.evaluation(label))
            for sample in lines(run, path) if path.exists() else ():
                # The first words of runs on other data differ, whatever they call their problems.
                key = f"{sample.get('problem_id')} {sample.get('problem')}"
                if key not in problems and len(problems) >= HELDOUT_PROBLEMS:
                    continue
                problem = problems.setdefault(
                    key,
                    {
                        "problem": bounded(text_of(sample.get("problem")), TEXT_CHARS),
                        "expected": text_of(sample.get("expected_answer")),
                        "sides": {},
                    },
                )
                name = label.capitalize() if len(runs) == 1 else f"{run.label}, {label}"
                correct = bool(sample.get("symbolic_correct"))
                side = problem["sides"].setdefault(
                    name,
                    {
                        "text": bounded(text_of(sample.get("generation")), TEXT_CHARS // len(runs)),
                        "predicted": text_of(sample.get("predicted_answer")),
                        "accepted": correct,
                        "finish": text_of(sample.get("finish_reason")),
                        "correct": 0,
                        "of": 0,
                    },
                )
                side["of"] += 1
                side["correct"] += correct
    return list(problems.values())
