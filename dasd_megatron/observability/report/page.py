"""One self-contained page about one run or several, built from the files of their directories alone.

The page loads nothing: styles, script, charts and data stand inside it, and its content security policy refuses
everything else, any script but its own included. All text from runs (rollouts above all) is escaped, and characters
that do not show are made visible. Parts whose files are missing are left out or say so. The page names what could not
be read, and what was left out to keep it small.
"""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from dasd_megatron.algorithms.methods import METHODS
from dasd_megatron.files import replace_file
from dasd_megatron.observability.report import curves, headline
from dasd_megatron.observability.report.curves import MOST_RUNS, run_colour
from dasd_megatron.observability.report.rollouts import (
    Groups,
    Rollouts,
    extreme_groups,
    groups_rule,
    heldout_samples,
    rollouts_rule,
    token_rollouts,
)
from dasd_megatron.observability.report.run_files import (
    LABEL_CHARS,
    ReportError,
    Run,
    read_run,
    resolve,
    shorten,
    show_hidden,
)

REPORT = "report.html"

# The embedded data is bounded, so that the page stays under 5 MB whatever the runs' lengths and their number.
TOKENS_IN_ALL = 48_000
GROUPS_IN_ALL = 60
CONFIG_CHARS = 60_000


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
    twice = [path for path, count in Counter(map(resolve, paths)).items() if count > 1]
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
    _make_labels_unique(runs)
    replace_file(target, render(runs))
    return target


def _make_labels_unique(runs: Sequence[Run]) -> None:
    """Add the directories' names to the labels of runs of one name, and numbers where these are the same too."""
    counts = Counter(run.label for run in runs)
    for run in runs:
        if counts[run.label] > 1:
            run.label = f"{run.label} {show_hidden(resolve(run.path).name)}"
    counts = Counter(run.label for run in runs)
    for place, run in enumerate(runs, 1):
        if counts[run.label] > 1:
            run.label = f"{run.label} ({place})"


def _template_file(name: str) -> str:
    files = resources.files("dasd_megatron.observability.report").joinpath("templates")
    return files.joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = show_hidden
    return environment.from_string(_template_file("report.html.jinja"))


def render(runs: Sequence[Run]) -> str:
    """Return the page as one string of HTML."""
    template, script = _template(), _template_file("report.js")
    rollouts = [token_rollouts(run, TOKENS_IN_ALL // len(runs)) for run in runs]
    groups = [extreme_groups(run, max(3, GROUPS_IN_ALL // (2 * len(runs)))) for run in runs]
    return template.render(
        {
            **_headline_context(runs),
            **_chart_context(runs),
            "rollouts_rule": rollouts_rule(rollouts, TOKENS_IN_ALL),
            "groups_rule": groups_rule(groups),
            "heldout": heldout_samples(runs),
            "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            "version": _version(),
            "script": Markup(script),
            "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            "data": Markup(_to_embedded_json(_script_data(runs, rollouts, groups))),
            # The notes come last, since reading the rest adds to them.
            "notes": _named_texts(runs, lambda run: run.notes),
        }
    )


def _headline_context(runs: Sequence[Run]) -> dict[str, Any]:
    single = len(runs) == 1
    first = runs[0]
    chars = CONFIG_CHARS // len(runs)
    return {
        "single": single,
        "name": first.label if single else f"{len(runs)} runs",
        "algorithm": shorten(first.setting("algorithm.name"), LABEL_CHARS) if single else "",
        "runs": [
            {
                "label": run.label,
                "key": run_colour(place),
                "status": headline.run_status(run),
                "algorithm": shorten(run.setting("algorithm.name"), LABEL_CHARS),
                "config_text": shorten(run.config_text, chars),
                "environment_text": shorten(run.environment_text, chars),
            }
            for place, run in enumerate(runs)
        ],
        "cards": headline.result_cards(first) if single else [],
        "interval": headline.accuracy_interval(first) if single else "",
        "results": headline.run_results(first) if single else headline.results_of_runs(runs),
        "evaluated": headline.evaluation_size(first.evaluation("before") or first.evaluation("after"))
        if single
        else "",
        "facts": headline.facts_of_runs(runs),
        "differences": [] if single else headline.setting_differences(runs),
        "warnings": _named_texts(runs, headline.run_warnings),
    }


def _chart_context(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "pass_chart": curves.pass_chart(runs),
        "warm_start_charts": curves.warm_start_charts(runs),
        "training_charts": curves.training_charts(runs),
        "phase_chart": curves.phase_chart(runs[0]) if len(runs) == 1 else None,
        "phases": curves.phase_table(runs),
    }


def _script_data(runs: Sequence[Run], rollouts: Sequence[Rollouts], groups: Sequence[Groups]) -> dict[str, Any]:
    """Return the lists that the page's script shows in pages: rollouts with their tokens, and groups."""
    return {
        "runs": [{"label": run.label, "colour": run_colour(place)} for place, run in enumerate(runs)],
        "limits": {short: _full_colour(rollouts, short) for short in "wdha"},
        "routed": [_routes_by_entropy(run.setting("algorithm.name")) for run in runs],
        "rollouts": [{"run": place, **record} for place, part in enumerate(rollouts) for record in part.chosen],
        "groups": {
            "best": _interleave([part.best for part in groups]),
            "worst": _interleave([part.worst for part in groups]),
        },
    }


def _routes_by_entropy(algorithm: object) -> bool:
    """Return whether tau decides the direction of tokens under this ``algorithm.name``, which may be of any version."""
    return isinstance(algorithm, str) and algorithm in METHODS and METHODS[algorithm].routes_by_entropy


def _full_colour(rollouts: Sequence[Rollouts], short: str) -> float:
    """Return the size that takes the full colour: the 98th percentile, so that a single outlier does not make all other
    tokens pale."""
    sizes = sorted(
        abs(value)
        for part in rollouts
        for record in part.chosen
        for value in record[short]
        if isinstance(value, (int, float))  # NaN and infinities are strings here.
    )
    return (sizes[int(0.98 * (len(sizes) - 1))] if sizes else 0.0) or 1.0


def _interleave(lists: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return each run's first group, then each run's second, with the run's place."""
    return [
        {"run": place, **group}
        for row in itertools.zip_longest(*lists)
        for place, group in enumerate(row)
        if group is not None
    ]


def _named_texts(runs: Sequence[Run], texts: Callable[[Run], list[str]]) -> list[str]:
    return [text if len(runs) == 1 else f"{run.label}: {text}" for run in runs for text in texts(run)]


def _to_embedded_json(data: Any) -> str:
    """Return JSON that no HTML parser takes for the end of its element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _version() -> str:
    try:
        return importlib.metadata.version("dasd_megatron")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed as a package)"
