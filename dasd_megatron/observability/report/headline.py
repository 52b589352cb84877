"""The top of the page: a run's state, its results before and after training, facts about it, and how runs differ."""

from __future__ import annotations

import datetime
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dasd_megatron.observability.progress import evaluation_rows, format_difference, format_duration, format_result
from dasd_megatron.observability.report.run_files import (
    Run,
    finite_values,
    read_objects,
    resolve,
    shorten,
)

VALUE_CHARS = 300
WARNING_CHARS = 2000
MOST_WARNINGS = 100
MOST_DIFFERENCES = 400
MOST_PROBLEMS = 200_000
LATEST_TIME = 2**36
"""Seconds since 1970: the year 4147. Later times are no times, and have no date on some machines."""


class Status(NamedTuple):
    """``kind`` is the CSS class: done or open."""

    kind: str
    words: str


def run_status(run: Run) -> Status:
    """Say whether the run is at its end."""
    steps = run.setting("run.steps")
    done = run.metrics[-1]["step"] if run.metrics else 0
    after = run.evaluation("after")
    # A run that was made longer has an evaluation at its former end.
    if (after is not None and after["step"] >= done) or (isinstance(steps, int) and 0 < steps <= done):
        return Status("done", f"finished · {done} steps")
    of_steps = f" of {shorten(steps, VALUE_CHARS)}" if steps is not None else ""
    return Status("open", f"not finished · step {done}{of_steps}")


def run_warnings(run: Run) -> list[str]:
    """Return the warnings of the watch; of very many, the last."""
    texts = [shorten(row.get("text"), WARNING_CHARS) for row in run.warnings[-MOST_WARNINGS:]]
    left_out = len(run.warnings) - len(texts)
    return [f"{left_out:,} earlier warnings are left out", *texts] if left_out else texts


def result_cards(run: Run) -> list[dict[str, str]]:
    """Return the few results that stand in large letters: Avg@k, Maj@k, Pass@k of the largest k, and the length."""
    rows = evaluation_rows(run.evaluation("before"), run.evaluation("after"))
    largest_pass = max(
        (label for label, *_ in rows if label.startswith("Pass@")),
        key=lambda label: int(label.split("@")[1]),
        default=None,
    )
    return [
        _result_card(label, old, new, unit)
        for label, old, new, unit in rows
        if label.startswith(("Avg@", "Maj@")) or label in (largest_pass, "Mean length")
    ]


def _result_card(label: str, old: float | None, new: float | None, unit: str) -> dict[str, str]:
    change = format_difference(old, new, unit)
    direction = ""
    if unit == "share" and old is not None and new is not None and old != new:
        direction = "up" if new > old else "down"
    old_text, new_text = (
        format_result(value, unit).removesuffix(" tokens") if value is not None else "–" for value in (old, new)
    )
    return {
        "label": f"{label}, tokens" if unit == "tokens" else label,
        "before": old_text,
        "after": new_text,
        "change": "" if change == "-" else change,
        "class": direction,
    }


def evaluation_size(row: Mapping[str, Any] | None) -> str:
    """Say how many problems and samples an evaluation had."""
    if row is None:
        return ""
    parts = [
        f"{row[key]:,} {words}"
        for key, words in (("num_problems", "held-out problems"), ("num_samples", "samples of each"))
        if isinstance(row.get(key), int)
    ]
    return " · ".join(parts)


def run_results(run: Run) -> list[tuple[str, str, str, str]]:
    """Return (name, before, after, difference) of each result."""
    return [
        (label, format_result(old, unit), format_result(new, unit), format_difference(old, new, unit))
        for label, old, new, unit in evaluation_rows(run.evaluation("before"), run.evaluation("after"))
    ]


def results_of_runs(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (name, (result after training, difference from before) of each run) of each result."""
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for place, run in enumerate(runs):
        for label, old, new, unit in evaluation_rows(run.evaluation("before"), run.evaluation("after")):
            result = format_result(new, unit) if new is not None else f"{format_result(old, unit)} before"
            change = "" if None in (old, new) else format_difference(old, new, unit)
            found.setdefault(label, {})[place] = (result, change)
    # Runs that were evaluated with other numbers of samples have other rows: the order is that of a row with all of
    # them.
    everything = {key: None for run in runs for label in ("before", "after") for key in run.evaluation(label) or {}}
    order = [label for label, *_ in evaluation_rows(everything, None)]
    return [(label, [found[label].get(place, ("–", "")) for place in range(len(runs))]) for label in order]


def accuracy_interval(run: Run) -> str:
    """Say how far the choice of problems leaves the difference of Avg open: normal 95% interval of the paired
    per-problem differences. Empty without two evaluations of the same problems."""
    before, after = run.evaluation("before"), run.evaluation("after")
    if before is None or after is None:
        return ""
    old, new = _accuracies(run, before), _accuracies(run, after)
    changes = [new[key] - old[key] for key in old if key in new]
    if len(changes) < 2:
        return ""
    mean = sum(changes) / len(changes)
    half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in changes) / (len(changes) - 1) / len(changes))
    return (
        f"Difference of average accuracy, paired over {len(changes)} problems: {100 * mean:+.1f} points, 95% interval "
        f"{100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}. This is one seed; it says nothing about others."
    )


def _accuracies(run: Run, row: Mapping[str, Any]) -> dict[str, float]:
    """Return by problem the share of an evaluation's samples that are right; empty where there are very many
    problems."""
    right, count = Counter[str](), Counter[str]()
    for sample in read_objects(run, run.samples_path(row)):
        problem = shorten(sample.get("problem_id"), VALUE_CHARS)
        count[problem] += 1
        right[problem] += bool(sample.get("symbolic_correct"))
        if len(count) > MOST_PROBLEMS:
            return {}
    return {problem: right[problem] / count[problem] for problem in count}


def run_facts(run: Run) -> dict[str, str]:
    """Return the answers to first questions about a run, by name; absent ones are left out."""
    facts = {**_settings(run), **_course(run), "Git revision": run.environment.get("git_revision")}
    facts["Directory"] = resolve(run.path)
    return {name: shorten(value, VALUE_CHARS) for name, value in facts.items() if value is not None and value != ""}


def _settings(run: Run) -> dict[str, Any]:
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
    floor, weights, shown = map(get, ("algorithm.scale_floor", "teacher.weights", "teacher.privileged"))
    # A run from before there were several sources has the name of one.
    shown = ", ".join(map(str, shown)) if isinstance(shown, list) else shown
    return {
        "Algorithm": get("algorithm.name"),
        "β (teacher weight)": get("algorithm.beta"),
        "ρ (share pushed)": get("algorithm.rho"),
        "Gap scale floor": None if floor is None else f"{floor} nats",
        "Teacher": None if weights is None else f"{weights} weights, sees {shown}",
        "Model": model,
        "Backend": get("backend.kind"),
        "Parallel": " × ".join(f"{short} {size}" for short, size in sizes if size is not None),
        "Rollouts of a step": None if None in (groups, samples) else f"{groups} problems × {samples} samples",
        "Learning rate": get("optimizer.lr"),
    }


def _course(run: Run) -> dict[str, Any]:
    """Return the facts that the run's metrics have, and its seed between them."""
    spent = run.metrics_every * sum(finite_values(run.metrics, "seconds/total"))
    speed = finite_values(run.metrics, "throughput/tokens_per_second")
    times = [value for value in finite_values(run.metrics, "time") if 0 <= value < LATEST_TIME]
    timeouts = run.metrics_every * sum(finite_values(run.metrics, "verify/timeouts"))
    return {
        "Warm start": f"{run.warm_start[-1]['step']} steps" if run.warm_start else None,
        "Training": f"{run.metrics[-1]['step']} steps in {format_duration(spent)}" if run.metrics else None,
        "Speed": f"{sum(speed) / len(speed):,.0f} tokens/s, mean over steps" if speed else None,
        "Verifier timeouts": f"{timeouts:.0f}" if run.metrics else None,
        "Seed": run.setting("run.seed"),
        "Last step": datetime.datetime.fromtimestamp(times[-1]).astimezone().strftime("%Y-%m-%d %H:%M %Z")
        if times
        else None,
    }


def facts_of_runs(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return (name, value in each run) of each fact, in reading order."""
    found = [run_facts(run) for run in runs]
    names = dict.fromkeys(itertools.chain.from_iterable(found))
    return [(name, [facts.get(name, "–") for facts in found]) for name in names]


def setting_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return (dotted field, value in each run) of the configuration's fields that are not the same in all; the run's
    directory is left out."""
    flat = [_flatten(run.config) for run in runs]
    names = sorted(set().union(*flat) - {"run.dir"})
    rows = [
        (name, [shorten(values[name], VALUE_CHARS) if name in values else "–" for values in flat]) for name in names
    ]
    differing = [(shorten(name, VALUE_CHARS), cells) for name, cells in rows if len(set(cells)) > 1]
    left_out = len(differing) - MOST_DIFFERENCES
    if left_out > 0:
        differing[MOST_DIFFERENCES:] = [(f"{left_out:,} more fields differ", [""] * len(runs))]
    return differing


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = (
                json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, str) else value
            )
    return found
