"""Algorithms side by side: every method from one start, with several seeds; a page with means, deviations, learning
curves and paired tests.

    python examples/compare_algorithms/compare.py --runs RUNS                     # everything; goes on where it stopped
    python examples/compare_algorithms/compare.py COMPARISON.yaml --runs RUNS --seeds 1 2 --methods grpo dasd
    python examples/compare_algorithms/compare.py COMPARISON.yaml --runs RUNS --only-results   # from what is there
    python examples/compare_algorithms/compare.py COMPARISON.yaml --runs RUNS -- model.path=DIR  # further settings

A comparison is a YAML file like the ``comparison.yaml`` beside this script, which is the one that is taken without a
name. :class:`Comparison` and :class:`Task` have its fields.

Runs are made two at a time (``--parallel``), one core each. Every run of a task begins from the same weights and is
evaluated on the same problems with the same sampling seeds. ``run.seed`` decides the order of the problems and the
rollouts. Methods are compared in pairs of runs with the same seed: the mean difference, its deviation over seeds, and p
of a paired t test, two-sided and not corrected for the number of comparisons.

Writes ``results.json`` and ``RESULTS.md`` with its pictures beside the comparison, or under ``--output``. With
``--add`` the runs that stand in ``results.json`` already are not made again and stay on the page, so that a comparison
can be made in parts, on several machines.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAST_STEPS = 5
"""Means over the last steps are over so many, and points of the curves over so many up to theirs."""
TIMEOUT_SECONDS = 14400


@dataclass(frozen=True)
class Measure:
    """A number of a run. ``after``: its name in the last evaluation; ``last``: a metric of training, averaged over the
    last steps. One of the two. ``unit`` is % for a share. ``compared``: the paired tests have it."""

    after: str | None = None
    last: str | None = None
    unit: str = ""
    decimals: int = 2
    compared: bool = False

    def of(self, run: Run) -> float | None:
        """Return the number in its unit; None where the run has none."""
        value = run["after"].get(self.after) if self.after else run["last"].get(self.last)
        return None if value is None else value * self.scale

    @property
    def scale(self) -> float:
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class Task:
    """A task: settings of all of its runs, and the start that they share.

    settings: overrides, ``experiment=...`` among them. start: overrides of the run without reinforcement that makes the
    model all others begin from; without any, all begin from the ``model.path`` of the settings. methods: the names of
    those that are compared here; none for all.
    """

    settings: list[str]
    start: list[str] | None = None
    methods: list[str] | None = None


@dataclass(frozen=True)
class Comparison:
    """A comparison file.

    folder: where it stands; ``experiment/`` in it has the configurations. prepare: a command, a Python script of the
    folder and its arguments, that is run once before all else. pythonpath: folders with functions of the runs' own,
    relative to it. ``{runs}`` in settings and arguments is the folder of the runs. pairs: a title and pairs of methods
    to compare beside those with ``baseline``. before: measures of the start. curves: a title and a metric of training.
    """

    folder: Path
    name: str
    tasks: dict[str, Task]
    methods: dict[str, list[str]]
    baseline: str
    measures: dict[str, Measure]
    before: list[str]
    curves: dict[str, str]
    pairs: dict[str, list[list[str]]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    prepare: list[str] = field(default_factory=list)
    pythonpath: list[str] = field(default_factory=list)

    def methods_of(self, task: str) -> list[str]:
        return self.tasks[task].methods or list(self.methods)

    def environment(self) -> dict[str, str]:
        paths = [str((self.folder / path).resolve()) for path in self.pythonpath]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)}


Run = dict[str, Any]
"""Numbers of a run: ``before`` and ``after`` (evaluations), ``last`` (means over the last steps), ``curves`` (by
metric, a value a step) and ``seconds``."""
Found = dict[str, dict[str, dict[int, Run]]]
"""Runs by task, method and seed."""


class Job(NamedTuple):
    task: str
    method: str
    seed: int


def read_comparison(path: Path) -> Comparison:
    """Read a comparison file."""
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    tasks = {name: Task(**task) for name, task in fields.pop("tasks").items()}
    measures = {name: Measure(**measure) for name, measure in fields.pop("measures").items()}
    comparison = Comparison(folder=path.parent, name=path.stem, tasks=tasks, measures=measures, **fields)
    named = [comparison.baseline, *(method for pairs in comparison.pairs.values() for pair in pairs for method in pair)]
    named += [method for task in tasks.values() for method in task.methods or []]
    unknown = sorted(set(named) - set(comparison.methods))
    if unknown:
        raise SystemExit(f"{path}: no methods {', '.join(unknown)} among {', '.join(comparison.methods)}")
    return comparison


class Runner:
    """The runs of a comparison in a folder. ``extra``: overrides of all of them."""

    def __init__(self, comparison: Comparison, runs: Path, extra: list[str]) -> None:
        self.comparison, self.runs, self.extra = comparison, runs, extra

    def prepare(self) -> None:
        """Run the command of the comparison that makes its data, unless it has been."""
        done, command = self.runs / "prepared", [self._placed(part) for part in self.comparison.prepare]
        if not command or done.exists():
            return
        self.runs.mkdir(parents=True, exist_ok=True)
        script = [sys.executable, str(self.comparison.folder / command[0]), *command[1:]]
        subprocess.run(script, check=True, timeout=TIMEOUT_SECONDS, env=self.comparison.environment())
        done.touch()

    def start(self, task: str) -> None:
        """Make the model that all runs of a task begin from."""
        start = self.comparison.tasks[task].start
        if start is not None:
            self.train(start_of(self.runs, task), task, "run.steps=0", "evaluation.after=false", *start)

    def run(self, job: Job) -> float:
        """Make a run of a method; return its seconds."""
        task = self.comparison.tasks[job.task]
        begin = []
        if task.start is not None:
            model = start_of(self.runs, job.task) / "model"
            begin = ["model=hf", f"model.path={model}", "warm_start.steps=0", "warm_start.path=null"]
            begin += ["evaluation.before=false"]
        method = self.comparison.methods[job.method]
        return self.train(folder_of(self.runs, job), job.task, *begin, *method, f"run.seed={job.seed}")

    def train(self, folder: Path, task: str, *overrides: str) -> float:
        """Make a whole run in ``folder``, unless it is there; return its wall seconds."""
        done = folder / "seconds"
        if not done.exists():
            started = time.perf_counter()
            settings = [*self.comparison.tasks[task].settings, *overrides, *self.extra]
            command = [sys.executable, "-m", "dasd_megatron.cli", "train", f"--config-dir={self.comparison.folder}"]
            command += [*map(self._placed, settings), f"run.dir={folder}", "resume=auto"]
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open(folder.with_suffix(".log"), "w") as log:
                result = subprocess.run(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.comparison.environment(),
                    timeout=TIMEOUT_SECONDS,
                )
            if result.returncode:
                said = folder.with_suffix(".log").read_text()[-3000:]
                raise SystemExit(f"{folder}: {' '.join(overrides)} failed:\n{said}")
            done.write_text(f"{time.perf_counter() - started:.1f}")
        return float(done.read_text())

    def _placed(self, text: str) -> str:
        return text.replace("{runs}", str(self.runs))


def slug(method: str) -> str:
    return method.replace(", ", "-").replace(" ", "_")


def start_of(runs: Path, task: str) -> Path:
    return runs / task / "warm_start"


def folder_of(runs: Path, job: Job) -> Path:
    return runs / job.task / slug(job.method) / f"seed{job.seed}"


def jobs_of(comparison: Comparison, tasks: list[str], methods: list[str], seeds: list[int]) -> Iterator[Job]:
    """Yield the runs of a comparison seed by seed, so that those that are complete after an interruption can be
    compared."""
    for seed in seeds:
        for task in tasks:
            for method in comparison.methods_of(task):
                if method in methods:
                    yield Job(task, method, seed)


def run_all(runner: Runner, jobs: list[Job], parallel: int) -> None:
    """Make the starts of the tasks, and then all runs, ``parallel`` at a time."""
    runner.prepare()
    tasks = list(dict.fromkeys(job.task for job in jobs))
    print(f"starts of {', '.join(tasks)}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        for future in [pool.submit(runner.start, task) for task in tasks]:
            future.result()
    lock, done, began = threading.Lock(), 0, time.perf_counter()

    def run_job(job: Job) -> None:
        nonlocal done
        seconds = runner.run(job)
        with lock:
            done += 1
            left = (time.perf_counter() - began) / done * (len(jobs) - done)
            print(
                f"{done}/{len(jobs)} {job.task}, {job.method}, seed {job.seed}: {seconds:.0f} s; about "
                f"{left / 60:.0f} minutes left",
                flush=True,
            )

    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(run_job, job) for job in jobs]):
                future.result()
        except BaseException:
            # The runs under way end; no other begins.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read_run(comparison: Comparison, runs: Path, job: Job) -> Run:
    """Return the numbers of one run that are compared."""
    folder = folder_of(runs, job)
    after = _evaluation(folder, "after")
    before = _evaluation(start_of(runs, job.task), "before") or _evaluation(folder, "before")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_evaluations = [measure.after for measure in comparison.measures.values() if measure.after]
    last = {}
    for name in [measure.last for measure in comparison.measures.values() if measure.last]:
        values = [row[name] for row in steps[-LAST_STEPS:] if row.get(name) is not None]
        if values:
            last[name] = statistics.mean(values)
    return {
        "before": {name: before[name] for name in of_evaluations if name in before},
        "after": {name: after[name] for name in of_evaluations if name in after},
        "last": last,
        "curves": {name: [_rounded(row.get(name)) for row in steps] for name in comparison.curves.values()},
        "seconds": float((folder / "seconds").read_text()),
    }


def _rounded(value: float | None) -> float | None:
    """Return what a picture shows of a value, so that published curves stay small."""
    return None if value is None else float(f"{value:.5g}")


def _evaluation(folder: Path, label: str) -> dict[str, Any]:
    path = folder / "evaluation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((row for row in reversed(rows) if row["label"] == label), {})


def read_all(comparison: Comparison, runs: Path, jobs: list[Job]) -> Found:
    """Return the runs that are complete."""
    found: Found = {}
    for task, method, seed in sorted(jobs, key=lambda job: job.seed):
        if (folder_of(runs, Job(task, method, seed)) / "seconds").exists():
            run = read_run(comparison, runs, Job(task, method, seed))
            found.setdefault(task, {}).setdefault(method, {})[seed] = run
    return {
        task: {method: found[task][method] for method in comparison.methods if method in found[task]} for task in found
    }


def read_published(output: Path) -> Found:
    """Return the runs of a results.json; none where there is no such file."""
    path = output / "results.json"
    written = json.loads(path.read_text()) if path.exists() else {}
    return {
        task: {method: {int(seed): run for seed, run in seeds.items()} for method, seeds in methods.items()}
        for task, methods in written.items()
    }


def join(comparison: Comparison, published: Found, new: Found) -> Found:
    """Return the runs of both, in the order of the comparison. Raises SystemExit where the runs of a task with a start
    of its own do not all begin from the same policy."""
    joined: Found = {}
    for task in [name for name in comparison.tasks if name in published or name in new]:
        parts = [part.get(task, {}) for part in (published, new)]
        methods = [name for name in comparison.methods if any(name in part for part in parts)]
        joined[task] = {
            name: dict(sorted((parts[0].get(name, {}) | parts[1].get(name, {})).items())) for name in methods
        }
        starts = [run["before"] for seeds in joined[task].values() for run in seeds.values()]
        if comparison.tasks[task].start and any(start != starts[0] for start in starts):
            raise SystemExit(f"runs of {task} begin from different policies: make all of them anew, without --add")
    return joined


class Difference(NamedTuple):
    """Mean and deviation over seeds of a difference, and p of the paired t test."""

    mean: float
    deviation: float
    p: float


def paired(ours: dict[int, float | None], theirs: dict[int, float | None]) -> Difference | None:
    """Return ``ours`` minus ``theirs`` over the seeds that have both; None with fewer than two."""
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    differences = [first - second for first, second in pairs if first is not None and second is not None]
    if len(differences) < 2:
        return None
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    if deviation == 0:
        return Difference(mean, 0.0, 1.0 if mean == 0 else 0.0)
    p = student_p(mean / (deviation / math.sqrt(len(differences))), len(differences) - 1)
    return Difference(mean, deviation, p)


def student_p(t: float, freedom: int) -> float:
    """Return the two-sided p of Student's t of ``freedom`` degrees, by the finite sums of Abramowitz and Stegun, 26.7.3
    and 26.7.4."""
    angle = math.atan2(abs(t), math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (1.0, 1.0) if freedom % 2 == 0 else (cosine, cosine)
    for index in range(1 if freedom % 2 == 0 else 2, freedom - 2, 2):
        term *= cosine * cosine * index / (index + 1)
        total += term
    if freedom % 2 == 0:
        return 1 - sine * total
    return 1 - 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))


def values_of(measure: Measure, seeds: dict[int, Run]) -> dict[int, float | None]:
    return {seed: measure.of(run) for seed, run in seeds.items()}


def difference_row(comparison: Comparison, methods: dict[str, dict[int, Run]], method: str, other: str) -> str:
    """Return ``method`` minus ``other`` in the measures that are compared, as a row of a table."""
    cells = []
    for measure in comparison.measures.values():
        if measure.compared:
            found = paired(values_of(measure, methods[method]), values_of(measure, methods[other]))
            digits = measure.decimals
            cells.append(
                "" if found is None else f"{found.mean:+.{digits}f} ± {found.deviation:.{digits}f} ({found.p:.3f})"
            )
    return f"| {method} − {other} | " + " | ".join(cells) + " |"


def table_of_means(comparison: Comparison, methods: dict[str, dict[int, Run]]) -> list[str]:
    """Return a row for each method, with means and deviations over seeds."""
    lines = [
        "| method | seeds | " + " | ".join(comparison.measures) + " |",
        "|---|---|" + "---|" * len(comparison.measures),
    ]
    for method, seeds in methods.items():
        cells = []
        for measure in comparison.measures.values():
            values = [value for value in values_of(measure, seeds).values() if value is not None]
            spread = f" ± {statistics.stdev(values):.{measure.decimals}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{measure.decimals}f}{measure.unit}{spread}" if values else "")
        lines.append(f"| {method} | {len(seeds)} | " + " | ".join(cells) + " |")
    return lines


def tables_of_differences(comparison: Comparison, methods: dict[str, dict[int, Run]]) -> list[str]:
    """Return the paired tests against the baseline, and those of the comparison's pairs."""
    lines = []
    compared = [
        f"{name}, points" if measure.unit == "%" else name
        for name, measure in comparison.measures.items()
        if measure.compared
    ]
    against_baseline = [[method, comparison.baseline] for method in methods if method != comparison.baseline]
    for title, pairs in {f"Against {comparison.baseline}": against_baseline, **comparison.pairs}.items():
        rows = [difference_row(comparison, methods, *pair) for pair in pairs if methods.keys() >= set(pair)]
        if rows:
            lines += [
                "",
                f"{title}, seed by seed: difference ± deviation (p of a paired t test, not corrected for "
                f"{len(rows)} comparisons)",
                "",
                "| | " + " | ".join(compared) + " |",
                "|---|" + "---|" * len(compared),
                *rows,
            ]
    return lines


def page(comparison: Comparison, found: Found) -> str:
    """Return the results page. It shows the picture ``<task>.svg`` of each task."""
    lines = [
        "# Results",
        "",
        f"Made by `compare.py` of `{comparison.name}.yaml`; the README beside it says what this can show.",
        "",
    ]
    for task, methods in found.items():
        runs = [run for seeds in methods.values() for run in seeds.values()]
        seconds = [run["seconds"] for run in runs]
        before = []
        for name in comparison.before:
            measure = comparison.measures[name]
            values = [run["before"][measure.after] for run in runs if measure.after in run["before"]]
            if values:
                before.append(f"{name} {statistics.mean(values) * measure.scale:.{measure.decimals}f}{measure.unit}")
        lines += [
            f"## {task}",
            "",
            f"Before: {', '.join(before)}. {len(runs)} runs of {statistics.median(seconds):.0f} s (median), "
            f"{sum(seconds) / 60:.0f} minutes in all. After, mean ± deviation over seeds:",
            "",
            *table_of_means(comparison, methods),
            *tables_of_differences(comparison, methods),
            "",
            f"![learning curves of {task}]({task}.svg)",
            "",
        ]
    return "\n".join(lines)


_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999933",
    "#882255",
    "#44AA99",
    "#332288",
    "#DDCC77",
)
_DASHES = ("", "6 3", "2 2", "8 2 2 2")
_WIDTH, _HEIGHT, _LEFT, _GAP = 360, 240, 44, 60


def picture(comparison: Comparison, methods: dict[str, dict[int, Run]]) -> str:
    """Draw the comparison's curves by step, means over seeds and the last steps, as SVG."""
    styles = [(colour, dash) for dash in _DASHES for colour in _COLOURS]
    parts = []
    for place, (title, metric) in enumerate(comparison.curves.items()):
        curves = {method: mean_curve(seeds, metric) for method, seeds in methods.items()}
        top = max((value for curve in curves.values() for value in curve if value is not None), default=0.0) or 1.0
        x0 = _LEFT + place * (_WIDTH + _GAP)
        parts.append(
            f'<text x="{x0}" y="16">{title}, mean of {LAST_STEPS} steps</text>'
            f'<path d="M{x0} 28V{28 + _HEIGHT}H{x0 + _WIDTH}" fill="none" stroke="#888"/>'
        )
        for share in (0.0, 0.5, 1.0):
            y = 28 + _HEIGHT * (1 - share) + 4
            parts.append(f'<text x="{x0 - 6}" y="{y:.0f}" text-anchor="end">{top * share:.2g}</text>')
        for (colour, dash), curve in zip(styles, curves.values(), strict=False):
            points = " ".join(
                f"{x0 + _WIDTH * step / max(len(curve) - 1, 1):.1f},{28 + _HEIGHT * (1 - value / top):.1f}"
                for step, value in enumerate(curve)
                if value is not None
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-dasharray="{dash}" '
                'stroke-width="1.5"/>'
            )
    for index, ((colour, dash), method) in enumerate(zip(styles, methods, strict=False)):
        x, y = _LEFT + (index % 3) * 270, 28 + _HEIGHT + 28 + (index // 3) * 20
        parts.append(
            f'<path d="M{x} {y - 4}h20" stroke="{colour}" stroke-dasharray="{dash}" stroke-width="3"/>'
            f'<text x="{x + 26}" y="{y}">{method}</text>'
        )
    width = max(_LEFT + len(comparison.curves) * (_WIDTH + _GAP) - _GAP + 16, _LEFT + 3 * 270)
    height = 28 + _HEIGHT + 36 + 20 * math.ceil(len(methods) / 3)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def mean_curve(seeds: dict[int, Run], metric: str) -> list[float | None]:
    """Return the mean over seeds and over the last steps up to each; None where no run has a value."""
    curves = [run["curves"][metric] for run in seeds.values()]
    points: list[float | None] = []
    for step in range(min(map(len, curves))):
        window = slice(max(0, step + 1 - LAST_STEPS), step + 1)
        values = [value for curve in curves for value in curve[window] if value is not None]
        points.append(statistics.mean(values) if values else None)
    return points


def write_results(comparison: Comparison, found: Found, output: Path) -> Path:
    """Write results.json, the page and its pictures; return the page."""
    output.mkdir(parents=True, exist_ok=True)
    for task, methods in found.items():
        (output / f"{task}.svg").write_text(picture(comparison, methods))
    (output / "results.json").write_text(_with_a_line_for_each_run(found))
    (output / "RESULTS.md").write_text(page(comparison, found) + "\n")
    return output / "RESULTS.md"


def _with_a_line_for_each_run(found: Found) -> str:
    """Return the runs as JSON that can be read by line and compared by ``diff``."""
    tasks = []
    for task, methods in found.items():
        parts = []
        for method, seeds in methods.items():
            runs = ",\n".join(f"   {json.dumps(str(seed))}: {json.dumps(run)}" for seed, run in seeds.items())
            parts.append(f"  {json.dumps(method)}: {{\n{runs}\n  }}")
        tasks.append(f" {json.dumps(task)}: {{\n" + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(tasks) + "\n}\n"


def preload() -> None:
    """Fork the runs from a process that has imported what they import, as the tests do: most of a short run's seconds
    are imports. Needs the repository's folder on PYTHONPATH."""
    from tests.support.preloaded import fork_children

    fork_children()


def main() -> None:
    arguments = sys.argv[1:]
    place = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, further = arguments[:place], arguments[place + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, nargs="?", default=HERE / "comparison.yaml")
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder of the runs; what is complete in it is not run again"
    )
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--preload", action="store_true", help="fork the runs from a process with everything imported")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--add", action="store_true", help="keep the runs of results.json, and add those it lacks")
    parser.add_argument("--only-results", action="store_true")
    options = parser.parse_args(arguments)
    comparison = read_comparison(options.comparison)
    tasks, methods = options.tasks or list(comparison.tasks), options.methods or list(comparison.methods)
    for kind, chosen, known in (("task", tasks, comparison.tasks), ("method", methods, comparison.methods)):
        for name in chosen:
            if name not in known:
                parser.error(f"{options.comparison} has no {kind} {name!r}: choose of {', '.join(known)}")
    output = options.output or comparison.folder
    published = read_published(output) if options.add else {}
    jobs = [
        job
        for job in jobs_of(comparison, tasks, methods, options.seeds or comparison.seeds)
        if job.seed not in published.get(job.task, {}).get(job.method, {})
    ]
    if jobs and not options.only_results:
        if options.preload:
            preload()
        run_all(Runner(comparison, options.runs.absolute(), further), jobs, options.parallel)
    found = join(comparison, published, read_all(comparison, options.runs, jobs))
    if not found:
        parser.error(f"{options.runs} holds no complete run")
    print(write_results(comparison, found, output))


if __name__ == "__main__":
    main()
