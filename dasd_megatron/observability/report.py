"""report.html: one self-contained page about a run, built from the files of its directory alone.

The page loads nothing: styles, script and charts stand inside it, and its content security policy refuses everything else, any script but
its own included. All text from the run (rollouts above all) is escaped, and characters that do not show are made visible. Parts whose
files are missing are left out or say so; what could not be read is listed on the page.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from dasd_megatron.observability.charts import Series, compact, line_chart, moving_mean, percent, stacked_chart
from dasd_megatron.observability.loggers import EVALUATION, METRICS, WARM_START, replace_file, restore_non_finite
from dasd_megatron.observability.progress import CollapseWatch, evaluation_rows, format_difference, format_duration, format_result

REPORT = "report.html"
PHASES = (
    ("rollout", "c1"),
    ("verify", "c5"),
    ("score", "c3"),
    ("update", "c2"),
    ("sync", "c4"),
    ("checkpoint", "c6"),
)

# Bounds on what is embedded, so that the page stays a few megabytes whatever the run's length.
HEAT_MAP_STEPS = 3
HEAT_MAPS_PER_STEP = 6
TOKENS_PER_HEAT_MAP = 1500
TOKENS_IN_ALL = 18_000
HELDOUT_PROBLEMS = 6
TRAINING_GROUPS = 3
SAMPLES_PER_GROUP = 4
TEXT_CHARS = 3000
CONFIG_CHARS = 60_000
HEAT_LEVELS = 10

_ODD = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


class ReportError(RuntimeError):
    """No report can be made of this directory. The message says why and what to do."""


@dataclass
class Run:
    """What the run directory holds, as far as it can be read; ``notes`` lists what could not be."""

    path: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    warm_start: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def setting(self, name: str) -> Any:
        """The value of a dotted field of the configuration, None when it is not there."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def evaluation(self, label: str) -> dict[str, Any] | None:
        return next((row for row in reversed(self.evaluations) if row.get("label") == label), None)


def write_report(run_dir: str | Path) -> Path:
    """Build ``<run_dir>/report.html`` and return its path.

    Works on a run that is still going, crashed, was never evaluated or kept no rollouts. The file is replaced atomically. Raises
    :class:`ReportError` when the directory is not there or holds no run, :class:`RunDirectoryError` when the page cannot be written.
    """
    run = read_run(Path(run_dir))
    target = run.path / REPORT
    replace_file(target, render(run))
    return target


def read_run(path: Path) -> Run:
    """Read everything of a run directory but samples and token statistics."""
    if not path.is_dir():
        raise ReportError(f"{path} is not a directory: give the directory of a run, like runs/<name>/<date-time>")
    if not any((path / name).exists() for name in ("config.yaml", METRICS, WARM_START, EVALUATION)):
        raise ReportError(
            f"{path} holds no run (neither config.yaml nor {METRICS}): give the directory of a run, like runs/<name>/<date-time>"
        )
    run = Run(path)
    run.config_text, run.config = _mapping(run, path / "config.yaml", yaml.safe_load)
    run.environment_text, run.environment = _mapping(run, path / "environment.json", json.loads)
    run.metrics = _rows(run, METRICS)
    run.warm_start = _rows(run, WARM_START)
    evaluations = {(row.get("label"), row["step"]): row for row in _rows(run, EVALUATION)}
    run.evaluations = list(evaluations.values())
    return run


def render(run: Run) -> str:
    """The page as one string of HTML."""
    files = resources.files("dasd_megatron.observability").joinpath("templates")
    script = files.joinpath("report.js").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    template = environment.from_string(files.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    before, after = run.evaluation("before"), run.evaluation("after")
    heat_maps, limit = _heat_maps(run)
    context = {
        "name": _text(run.setting("run.name")) or run.path.resolve().name,
        "algorithm": _text(run.setting("algorithm.name")),
        "status": _status(run, after),
        "cards": _cards(before, after),
        "interval": _interval(run, before, after),
        "results": [
            (label, format_result(old, unit), format_result(new, unit), format_difference(old, new, unit))
            for label, old, new, unit in evaluation_rows(before, after)
        ],
        "evaluated": _evaluated(before or after),
        "pass_chart": _pass_chart(before, after),
        "facts": _facts(run),
        "warnings": _warnings(run),
        "warm_start_charts": _warm_start_charts(run),
        "training_charts": _training_charts(run),
        "phase_chart": _phase_chart(run),
        "heat_maps": heat_maps,
        "heat_limit": compact(limit),
        "heat_levels": HEAT_LEVELS,
        "heldout": _heldout_samples(run),
        "training_samples": _training_samples(run),
        "config_text": _bounded(run.config_text, CONFIG_CHARS),
        "environment_text": _bounded(run.environment_text, CONFIG_CHARS),
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": _version(),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "notes": run.notes,
    }
    return template.render(context)


def visible(text: object) -> str:
    """``text`` with what would not show, or would mislead, written out: control, zero-width and direction characters as ‹U+202E›."""
    return _ODD.sub(lambda match: f"‹U+{ord(match.group()):04X}›", str(text).replace("\r\n", "\n").replace("\r", "‹U+000D›"))


def _text(value: Any) -> str:
    return "" if value is None else visible(value)


def _version() -> str:
    try:
        return importlib.metadata.version("dasd_megatron")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed as a package)"


def _bounded(text: str, limit: int) -> str:
    text = visible(text)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters in the file)"


def _mapping(run: Run, path: Path, parse: Any) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        run.notes.append(f"{path.name} is missing")
        return "", {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        value = parse(text)
        if not isinstance(value, dict):
            raise ValueError("it does not hold a mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.notes.append(f"{path.name} could not be read: {error}")
        return "", {}
    return text, value


def _rows(run: Run, name: str) -> list[dict[str, Any]]:
    path = run.path / name
    rows = [restore_non_finite(row) for row in _lines(run, path)] if path.exists() else []
    sound = [row for row in rows if isinstance(row.get("step"), int)]
    if len(sound) != len(rows):
        run.notes.append(f"{name}: {len(rows) - len(sound)} lines without a step were left out")
    return sound


def _lines(run: Run, path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file one by one, so that large files are never held whole; unreadable lines are counted in the notes."""
    bad = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    bad += 1
                    continue
                if isinstance(row, dict):
                    yield row
                else:
                    bad += 1
    except OSError as error:
        run.notes.append(f"{path.relative_to(run.path)} could not be read: {error}")
    if bad:
        run.notes.append(f"{path.relative_to(run.path)}: {bad} unreadable lines were left out")


def _number(value: Any) -> float | None:
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float | None]:
    return [_number(row.get(key)) for row in rows]


# ---- headline ----------------------------------------------------------------------------------------------------------------------------


def _status(run: Run, after: Mapping[str, Any] | None) -> tuple[str, str]:
    """(class, words): whether the run is at its end."""
    steps = run.setting("run.steps")
    done = run.metrics[-1]["step"] if run.metrics else 0
    if after is not None or (isinstance(steps, int) and 0 < steps <= done):
        return "done", f"finished · {done} steps"
    of = f" of {steps}" if steps is not None else ""
    return "open", f"not finished · step {done}{of}"


def _cards(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[dict[str, str]]:
    rows = evaluation_rows(before, after)
    largest_pass = max((label for label, *_ in rows if label.startswith("Pass@")), key=lambda label: int(label.split("@")[1]), default=None)
    cards = []
    for label, old, new, unit in rows:
        if label.startswith(("Avg@", "Maj@")) or label in (largest_pass, "Mean length"):
            change = format_difference(old, new, unit)
            better = "" if None in (old, new) or unit != "share" or old == new else "up" if new > old else "down"
            old_text, new_text = (format_result(value, unit).removesuffix(" tokens") if value is not None else "–" for value in (old, new))
            title = f"{label}, tokens" if unit == "tokens" else label
            cards.append(
                {"label": title, "before": old_text, "after": new_text, "change": "" if change == "-" else change, "class": better}
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


def _outcomes(run: Run, row: Mapping[str, Any]) -> dict[str, list[bool]]:
    path = _samples_path(run, row)
    found: dict[str, list[bool]] = {}
    if path.exists():
        for sample in _lines(run, path):
            found.setdefault(str(sample.get("problem_id")), []).append(bool(sample.get("symbolic_correct")))
    return found


def _samples_path(run: Run, row: Mapping[str, Any]) -> Path:
    return run.path / "evaluations" / f"{row.get('label')}-step_{row['step']:06d}" / "samples.jsonl"


def _interval(run: Run, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """What sampling problems leaves open about the difference of Avg: normal 95% interval of the paired per-problem differences."""
    if before is None or after is None:
        return ""
    old, new = _outcomes(run, before), _outcomes(run, after)
    differences = [sum(new[key]) / len(new[key]) - sum(old[key]) / len(old[key]) for key in old if key in new]
    if len(differences) < 2:
        return ""
    mean = sum(differences) / len(differences)
    half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in differences) / (len(differences) - 1) / len(differences))
    return (
        f"Difference of average accuracy, paired over {len(differences)} problems: {100 * mean:+.1f} points, "
        f"95% interval {100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}. This is one seed; it says nothing about others."
    )


def _pass_chart(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Markup | None:
    ks = sorted({int(key[5:]) for row in (before, after) for key in (row or {}) if re.fullmatch(r"pass@\d+", key)})
    if not ks:
        return None
    series = []
    for name, row, colour, dash in (("before", before, "c6", "5 4"), ("after", after, "c1", "")):
        if row is not None:
            series.append(Series(name, [_number(row.get(f"pass@{k}")) for k in ks], colour, dash))
    return line_chart(
        "Pass@k",
        "share of held-out problems solved by at least one of k samples",
        ks,
        series,
        form=percent,
        x_names=[str(k) for k in ks],
        x_label="k",
        markers=True,
        most=1.0,
        height=340,
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    """(name, value) of what one asks first about a run; absent ones left out."""
    get = run.setting
    sizes = [
        (short, get(f"parallel.{long}_parallel_size"))
        for short, long in (("TP", "tensor_model"), ("PP", "pipeline_model"), ("CP", "context"), ("DP", "data"))
    ]
    groups, samples = get("batch.groups"), get("batch.samples_per_group")
    model = get("model.path")
    if model is None and isinstance(get("model.tiny"), dict):
        model = f"tiny Qwen3 made in code: {get('model.tiny.num_layers')} layers of width {get('model.tiny.hidden_size')}"
    spent = sum(value for value in _column(run.metrics, "seconds/total") if value is not None and math.isfinite(value))
    speed = [value for value in _column(run.metrics, "throughput/tokens_per_second") if value is not None and math.isfinite(value)]
    times = [value for value in _column(run.metrics, "time") if value is not None and math.isfinite(value)]
    facts = {
        "Algorithm": get("algorithm.name"),
        "β (teacher weight)": get("algorithm.beta"),
        "ρ (share pushed)": get("algorithm.rho"),
        "Gap scale floor": None if get("algorithm.scale_floor") is None else f"{get('algorithm.scale_floor')} nats",
        "Teacher": None if get("teacher.weights") is None else f"{get('teacher.weights')} weights, sees the {get('teacher.privileged')}",
        "Model": model,
        "Backend": get("backend.kind"),
        "Parallel": " × ".join(f"{short} {size}" for short, size in sizes if size is not None),
        "Rollouts of a step": None if None in (groups, samples) else f"{groups} problems × {samples} samples",
        "Learning rate": get("optimizer.lr"),
        "Warm start": f"{run.warm_start[-1]['step']} steps" if run.warm_start else None,
        "Training": f"{run.metrics[-1]['step']} steps in {format_duration(spent)}" if run.metrics else None,
        "Speed": f"{sum(speed) / len(speed):,.0f} tokens/s, mean over steps" if speed else None,
        "Verifier timeouts": f"{sum(v or 0 for v in _column(run.metrics, 'verify/timeouts')):.0f}" if run.metrics else None,
        "Seed": get("run.seed"),
        "Last step": datetime.datetime.fromtimestamp(times[-1]).astimezone().strftime("%Y-%m-%d %H:%M %Z") if times else None,
        "Git revision": run.environment.get("git_revision"),
        "Directory": run.path.resolve(),
    }
    return [(name, visible(value)) for name, value in facts.items() if value not in (None, "")]


def _warnings(run: Run) -> list[str]:
    watch = CollapseWatch()
    numeric = ("reward/accuracy", "entropy/mean", "response/truncated_share", "update/loss", "update/grad_norm")
    rows = ({"step": row["step"], **{key: _number(row.get(key)) for key in numeric}} for row in run.metrics)
    return [warning for row in rows if (warning := watch.update(row))]


# ---- curves ------------------------------------------------------------------------------------------------------------------------------


def _warm_start_charts(run: Run) -> list[Markup]:
    rows = run.warm_start
    charts = []
    for title, unit, key, note in (
        ("Loss of the warm start", "nats per token", "loss", "Supervised fine-tuning on worked solutions, before reinforcement."),
        ("Gradient norm of the warm start", "L2, before clipping", "grad_norm", ""),
    ):
        if any(value is not None for value in _column(rows, key)):
            series = [Series(title, _column(rows, key), "c1")]
            charts.append(line_chart(title, unit, _column(rows, "step"), series, x_label="warm-start step", include_zero=True, note=note))
    return charts


def _training_charts(run: Run) -> list[Markup]:
    """The curves of the training steps; a chart whose metrics no step has is left out."""
    rows = run.metrics
    steps = _column(rows, "step")
    charts: list[Markup] = []

    def chart(
        title: str, unit: str, curves: Sequence[tuple[str, str, str]], *, dash: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        series = [Series(name, _column(rows, key), colour, (dash or {}).get(name, "")) for name, key, colour in curves]
        series = [entry for entry in series if any(value is not None for value in entry.values)]
        if series:
            charts.append(line_chart(title, unit, steps, series, **options))

    accuracy = _column(rows, "reward/accuracy")
    if any(value is not None for value in accuracy):
        series = [Series("each step", accuracy, "c1", faint=True), Series("mean of 10 steps", moving_mean(accuracy, 10), "c1")]
        reward = _column(rows, "reward/mean")
        if any(value is not None and value != other for value, other in zip(reward, accuracy, strict=True)):
            series.append(Series("mean reward", reward, "c2", "5 4"))
        note = "Share of the step's rollouts that the verifier accepts."
        charts.append(
            line_chart("Reward: accuracy on training problems", "share of rollouts", steps, series, form=percent, most=1.0, note=note)
        )
    inner = [row for row in run.evaluations if row.get("label") in ("before", "step", "after")]
    key = next((key for row in inner for key in row if key.startswith("avg@")), None)
    if key and len({row["step"] for row in inner}) > 2:
        inner.sort(key=lambda row: row["step"])
        values = Series(key, _column(inner, key), "c1")
        charts.append(
            line_chart(
                f"Held-out {key.capitalize()}", "share of samples", _column(inner, "step"), [values], form=percent, most=1.0, markers=True
            )
        )
    entropy = (
        ("all tokens", "entropy/mean", "ink"),
        ("pushed tokens", "entropy/pushed", "push"),
        ("pulled tokens", "entropy/pulled", "pull"),
    )
    chart(
        "Student entropy H",
        "nats per token",
        entropy,
        dash={"pushed tokens": "5 4", "pulled tokens": "2 3"},
        include_zero=True,
        note="A mean near zero means that exploration has ended.",
    )
    lengths = (("mean", "response/length_mean", "c1"), ("longest", "response/length_max", "c6"))
    chart("Response length", "tokens", lengths, dash={"longest": "5 4"}, include_zero=True)
    chart(
        "Tokens pushed away from the teacher",
        "share of response tokens",
        (("pushed", "credit/pushed_share", "push"),),
        form=percent,
        most=1.0,
        include_zero=True,
    )
    omega, deviation = _column(rows, "credit/omega_mean"), _column(rows, "credit/omega_std")
    spread = [(None, None) if None in pair else (pair[0] - pair[1], pair[0] + pair[1]) for pair in zip(omega, deviation, strict=True)]
    lower, upper = [low for low, _ in spread], [high for _, high in spread]
    chart(
        "Direction weight ω",
        "dimensionless, −1 to 1",
        (("mean", "credit/omega_mean", "ink"), ("largest", "credit/omega_max", "pull"), ("smallest", "credit/omega_min", "push")),
        dash={"largest": "2 3", "smallest": "5 4"},
        band=("mean ± std", lower, upper, "c6") if any(value is not None for value in lower) else None,
        include_zero=True,
        note="Above zero pulls toward the teacher, below zero pushes away.",
    )
    chart(
        "Teacher–student gap δ",
        "nats per token",
        (("mean δ", "credit/delta_mean", "c1"), ("mean |δ|", "credit/delta_abs_mean", "c2")),
        dash={"mean |δ|": "5 4"},
        include_zero=True,
        note="δ = log q(y) − log p(y) of the sampled token: teacher with privileged information minus student.",
    )
    chart(
        "KL to the rollout policy",
        "nats per token",
        (("KL", "rollout/kl", "c1"),),
        include_zero=True,
        note="What the rollout engine's log-probs differ from the trainer's. Growth means stale weights or other numerics.",
    )
    chart(
        "Importance weights",
        "share of response tokens",
        (("lowered by the cap", "rollout/importance_cut_share", "c1"),),
        form=percent,
        include_zero=True,
        note="Tokens that the trainer finds far more likely than the rollout engine did; with loss.importance_sampling only.",
    )
    chart("KL to the starting model", "nats per token", (("KL", "update/kl_to_start", "c1"),), include_zero=True)
    chart("Clipped tokens", "share of response tokens", (("clipped", "update/clip_share", "c1"),), form=percent, include_zero=True)
    chart("Gradient norm", "L2, before clipping", (("gradient norm", "update/grad_norm", "c1"),), include_zero=True)
    chart(
        "Divergence from the teacher",
        "nats per token",
        (("D", "update/divergence", "c1"),),
        include_zero=True,
        note="Over the full vocabulary, before the cap; of the distributional objective only.",
    )
    if any(_column(rows, "update/skipped")):
        chart(
            "Updates skipped",
            "per step",
            (("skipped", "update/skipped", "push"),),
            include_zero=True,
            note="Optimizer steps that were not applied because logits or gradients were not finite.",
        )
    alike = (("all correct", "reward/groups_all_correct", "c3"), ("all wrong", "reward/groups_all_wrong", "c2"))
    shares = all(value <= 1 for _, key, _ in alike for value in _column(rows, key) if value is not None)
    chart(
        "Groups without a verifier signal",
        "share of groups" if shares else "groups",
        alike,
        dash={"all wrong": "5 4"},
        form=percent if shares else compact,
        include_zero=True,
        most=1.0 if shares else None,
        note="Where all rollouts of a problem fare alike, the group-relative advantage is zero.",
    )
    chart("Learning rate", "per step", (("learning rate", "update/lr", "c1"),), include_zero=True)
    chart("Throughput", "tokens per second", (("throughput", "throughput/tokens_per_second", "c1"),), include_zero=True)
    return charts


def _phase_chart(run: Run) -> Markup | None:
    layers = [Series(name, _column(run.metrics, f"seconds/{name}"), colour) for name, colour in PHASES]
    layers = [layer for layer in layers if any(layer.values)]
    if not layers:
        return None
    totals = _column(run.metrics, "seconds/total")
    known = [sum(value or 0.0 for value in values) for values in zip(*(layer.values for layer in layers), strict=True)]
    rest = [max(0.0, total - part) if total is not None else None for total, part in zip(totals, known, strict=True)]
    if any(rest):
        layers.append(Series("other", rest, "c7"))
    spent = {layer.name: sum(value or 0.0 for value in layer.values) for layer in layers}
    whole = sum(spent.values()) or 1.0
    note = "Share of the time: " + ", ".join(f"{name} {value / whole:.0%}" for name, value in spent.items()) + "."
    return stacked_chart("Where a step's time goes", "seconds per step", _column(run.metrics, "step"), layers, note=note)


# ---- tokens and samples ------------------------------------------------------------------------------------------------------------------


def _numbered(run: Run, folder: str, suffix: str) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(rf"step_(\d+)\{suffix}", path.name), path) for path in (run.path / folder).glob(f"step_*{suffix}"))
    return sorted((int(match.group(1)), path) for match, path in found if match)


def _heat_maps(run: Run) -> tuple[list[dict[str, Any]], float]:
    """The heat maps to embed, of the first, middle and last saved step, and the |omega| of the strongest colour."""
    saved = _numbered(run, "inspect", ".json")
    chosen = [saved[index] for index in sorted({0, len(saved) // 2, len(saved) - 1})[:HEAT_MAP_STEPS]] if saved else []
    entries: list[tuple[int, dict[str, Any]]] = []
    left = TOKENS_IN_ALL
    for number, (step, path) in enumerate(chosen):
        budget = left // (len(chosen) - number)
        for position, entry in enumerate(_inspected(run, path)[:HEAT_MAPS_PER_STEP]):
            try:
                columns = _token_columns(entry)
            except (KeyError, TypeError, ValueError) as error:
                run.notes.append(f"inspect/{path.name}, rollout {position + 1} was left out: {error!r}")
                continue
            shown = min(len(columns), TOKENS_PER_HEAT_MAP, budget)
            if shown < len(columns) and shown < 50:
                break
            budget -= shown
            left -= shown
            entries.append((step, {**entry, "columns": columns[:shown], "length": len(columns), "rollout": position + 1}))
    omegas = sorted(
        abs(column[3]) for _, entry in entries for column in entry["columns"] if column[3] is not None and math.isfinite(column[3])
    )
    # The 98th percentile takes the full colour, so that a single outlier does not make all other tokens pale.
    limit = (omegas[int(0.98 * (len(omegas) - 1))] if omegas else 0.0) or 1.0
    routed = run.setting("algorithm.name") == "dasd"
    details = {
        step: _rollout_details(run, step, {(str(e.get("problem_id")), str(e.get("text"))) for s, e in entries if s == step})
        for step, _ in chosen
    }
    return [_heat_map(step, entry, details[step], limit, routed) for step, entry in entries], limit


def _inspected(run: Run, path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("it does not hold a list of rollouts")
    except (OSError, ValueError) as error:
        run.notes.append(f"inspect/{path.name} could not be read: {error}")
        return []
    return entries


def _token_columns(entry: Mapping[str, Any]) -> list[tuple[str, float | None, float | None, float | None, float | None, float | None]]:
    """(token, H, delta, omega, student log-prob, teacher log-prob) of each token."""
    names = ("entropy", "delta", "omega", "student_log_prob", "teacher_log_prob")
    return [(str(token), *map(_number, values)) for token, *values in zip(entry["tokens"], *(entry[name] for name in names), strict=True)]


def _rollout_details(run: Run, step: int, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    path = run.path / "rollouts" / f"step_{step:06d}.jsonl"
    if not path.exists():
        return {}
    return {key: row for row in _lines(run, path) if (key := (str(row.get("problem_id")), str(row.get("text")))) in wanted}


def _heat_map(
    step: int, entry: Mapping[str, Any], details: Mapping[tuple[str, str], Mapping[str, Any]], limit: float, routed: bool
) -> dict[str, Any]:
    columns = entry["columns"]
    sampled = details.get((str(entry.get("problem_id")), str(entry.get("text"))), {})
    tau, reward = _number(entry.get("tau")), _number(entry.get("reward"))
    pushed = sum(1 for column in columns if column[3] is not None and column[3] < 0)
    numbers = [("τ", entry.get("tau"), "nats"), ("σ", entry.get("sigma"), "nats"), ("verifier advantage", entry.get("advantage"), "")]
    values = [(name, f"{compact(number)} {unit}".strip()) for name, value, unit in numbers if (number := _number(value)) is not None]
    values += [("tokens", f"{entry['length']:,}"), ("pushed", percent(pushed / len(columns)) if columns else "–")]
    chart = None
    if columns:
        chart = line_chart(
            "Entropy along the rollout",
            "nats",
            list(range(1, len(columns) + 1)),
            [Series("H", [column[1] for column in columns], "ink")],
            x_label="token",
            level=("τ", tau) if tau is not None and math.isfinite(tau) else None,
            include_zero=True,
            wide=True,
            note="Tokens above τ are pushed away from the teacher, tokens below are pulled toward it." if routed else "",
        )
    cut = f"The first {len(columns):,} of {entry['length']:,} tokens are shown." if len(columns) < entry["length"] else ""
    return {
        "step": step,
        "rollout": entry["rollout"],
        "problem": _bounded(_text(entry.get("problem")), TEXT_CHARS),
        "reward": "" if reward is None else compact(reward),
        "accepted": None if reward is None else reward > 0,
        "expected": _text(sampled.get("expected_answer")),
        "predicted": _text(sampled.get("predicted_answer")),
        "solution": _bounded(_text(sampled.get("reference_solution")), TEXT_CHARS),
        "finish": _text(sampled.get("finish_reason")),
        "values": values,
        "tokens": Markup("").join(_token(column, limit) for column in columns),
        "chart": chart,
        "cut": cut,
    }


def _token(column: tuple[str, float | None, float | None, float | None, float | None, float | None], limit: float) -> Markup:
    token, entropy, delta, omega, student, teacher = column
    level = 0 if omega is None or not math.isfinite(omega) else math.ceil(HEAT_LEVELS * abs(omega) / limit - 1e-9)
    kind = "" if level == 0 else f"{'l' if omega > 0 else 's'}{min(level, HEAT_LEVELS)}"
    shown = escape(visible(token)).replace("\n", Markup("<b>⏎</b>\n")).replace("\t", Markup("<b>⇥</b>\t"))
    data = "|".join("" if value is None else _short(value) for value in (entropy, delta, omega, _exp(student), _exp(teacher)))
    return Markup('<i class="{}" data-v="{}">{}</i>').format(kind, data, shown)


def _exp(log_prob: float | None) -> float | None:
    return None if log_prob is None else math.exp(min(log_prob, 0.0))


def _short(value: float) -> str:
    return (
        f"{value:.3f}".replace("-", "−")
        if math.isfinite(value) and (abs(value) >= 1e-3 or value == 0)
        else f"{value:.1e}".replace("-", "−")
    )


def _heldout_samples(run: Run) -> list[dict[str, Any]]:
    """The first problems of the held-out set with their first generation and all outcomes, before and after."""
    problems: dict[str, dict[str, Any]] = {}
    for label in ("before", "after"):
        row = run.evaluation(label)
        path = _samples_path(run, row) if row else None
        if path is None or not path.exists():
            continue
        for sample in _lines(run, path):
            key = str(sample.get("problem_id"))
            if key not in problems and len(problems) >= HELDOUT_PROBLEMS:
                continue
            problem = problems.setdefault(
                key,
                {
                    "problem": _bounded(_text(sample.get("problem")), TEXT_CHARS),
                    "expected": _text(sample.get("expected_answer")),
                    "sides": {},
                },
            )
            side = problem["sides"].setdefault(
                label, {**_sample(sample, "generation", bool(sample.get("symbolic_correct"))), "correct": 0, "of": 0}
            )
            side["of"] += 1
            side["correct"] += bool(sample.get("symbolic_correct"))
    return list(problems.values())


def _sample(row: Mapping[str, Any], text_key: str, accepted: bool) -> dict[str, Any]:
    return {
        "text": _bounded(_text(row.get(text_key)), TEXT_CHARS),
        "predicted": _text(row.get("predicted_answer")),
        "accepted": accepted,
        "finish": _text(row.get("finish_reason")),
    }


def _training_samples(run: Run) -> dict[str, Any] | None:
    """The first groups of the last saved step: problem, worked solution, and some rollouts with their rewards."""
    saved = _numbered(run, "rollouts", ".jsonl")
    if not saved:
        return None
    step, path = saved[-1]
    groups: dict[Any, dict[str, Any]] = {}
    for row in _lines(run, path):
        key = str(row.get("group"))
        if key not in groups and len(groups) >= TRAINING_GROUPS:
            continue
        group = groups.setdefault(
            key,
            {
                "problem": _bounded(_text(row.get("problem")), TEXT_CHARS),
                "expected": _text(row.get("expected_answer")),
                "solution": _bounded(_text(row.get("reference_solution")), TEXT_CHARS),
                "samples": [],
                "count": 0,
            },
        )
        group["count"] += 1
        if len(group["samples"]) < SAMPLES_PER_GROUP:
            reward = _number(row.get("reward"))
            group["samples"].append(
                {**_sample(row, "text", bool(reward and reward > 0)), "reward": "–" if reward is None else compact(reward)}
            )
    return {"step": step, "groups": list(groups.values())} if groups else None
