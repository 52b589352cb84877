"""Every algorithm from one warm start, with several seeds, on two tasks; the results page with means, deviations,
curves and paired tests.

    python examples/compare_algorithms/compare.py --runs RUNS                   # everything; goes on where it stopped
    python examples/compare_algorithms/compare.py --runs RUNS --seeds 1 2 --tasks countdown --methods grpo dasd
    python examples/compare_algorithms/compare.py --runs RUNS --only-results    # the page from what is there

Runs are made two at a time (``--parallel``), one core each. Every run of a task begins from the same weights and is
evaluated on the same problems with the same sampling seeds. ``run.seed`` decides the order of the problems and the
rollouts. Methods are compared in pairs of runs with the same seed: the mean difference, its deviation over seeds, and p
of a paired t test, two-sided and not corrected for the number of comparisons.

Writes ``results.json`` and ``RESULTS.md`` with its pictures beside this script, or under ``--output``.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TASKS = ("chain_sum", "countdown")
WARM_START_STEPS = {"chain_sum": 400, "countdown": 400}
METHODS: dict[str, list[str]] = {
    "grpo": ["algorithm=grpo"],
    "opsd": ["algorithm=opsd"],
    "opsd, beta 0.1": ["algorithm=opsd", "algorithm.beta=0.1"],
    "rlsd": ["algorithm=rlsd"],
    "reversed": ["algorithm=reversed"],
    "reversed, beta 0.1": ["algorithm=reversed", "algorithm.beta=0.1"],
    "dasd": ["algorithm=dasd"],
    "dasd, beta 0.005": ["algorithm=dasd", "algorithm.beta=0.005"],
    "dasd, beta 0.1": ["algorithm=dasd", "algorithm.beta=0.1"],
    "dasd, beta 0.1, no scale floor": ["algorithm=dasd", "algorithm.beta=0.1", "algorithm.scale_floor=0.0"],
    "dasd, beta 0.1, rho from below": ["algorithm=dasd", "algorithm.beta=0.1", "algorithm.quantile_side=lower"],
    "dasd, distributional": ["algorithm=dasd", "algorithm.objective=distributional"],
}
"""The settings of each method. Beta and the floor are otherwise the defaults of the project: 0.02 and 1 nat."""
BASELINE = "grpo"
"""The method of :data:`METHODS` that every other one is compared with."""
SAME_BETA = [
    ("dasd", "opsd"),
    ("dasd, beta 0.1", "opsd, beta 0.1"),
    ("reversed", "opsd"),
    ("reversed, beta 0.1", "opsd, beta 0.1"),
]
"""Pairs that differ in nothing but the direction."""
LAST_STEPS = 5
"""Entropy and length are means over so many steps at the end, and points of the curves over so many steps up to
theirs."""
MEASURES = {
    "Avg@16": ("avg@16", 100, "%", 2),
    "Pass@16": ("pass@16", 100, "%", 2),
    "entropy, nats": ("entropy", 1, "", 3),
    "length, tokens": ("length", 1, "", 2),
    "step accuracy": ("step_accuracy", 100, "%", 2),
    "distinct right answers": ("distinct_correct_paths", 1, "", 2),
}
"""Name, key of a run, factor, unit, decimals."""


def train(folder: Path, *overrides: str) -> float:
    """Make a whole run in ``folder``, unless it is there; return its wall seconds."""
    done = folder / "seconds"
    if not done.exists():
        started = time.perf_counter()
        command = [sys.executable, "-m", "dasd_megatron.cli", "train", f"--config-dir={HERE}", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".log"), "w") as log:
            result = subprocess.run(
                [*command, f"run.dir={folder}", "resume=auto"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=7200,
            )
        if result.returncode:
            raise SystemExit(f"{' '.join(overrides)} failed:\n{folder.with_suffix('.log').read_text()[-3000:]}")
        done.write_text(f"{time.perf_counter() - started:.1f}")
    return float(done.read_text())


def warm_start(runs: Path, task: str) -> Path:
    """Train the model that all runs of a task begin from; return its directory."""
    folder = runs / task / "warm_start"
    train(
        folder,
        f"experiment=compare_{task}",
        "run.steps=0",
        f"warm_start.steps={WARM_START_STEPS[task]}",
        "evaluation.after=false",
    )
    return folder / "model"


def slug(method: str) -> str:
    return method.replace(", ", "-").replace(" ", "_")


def run_all(runs: Path, tasks: list[str], methods: list[str], seeds: list[int], parallel: int) -> None:
    print(f"warm start of {' and '.join(tasks)}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        for future in [pool.submit(warm_start, runs, task) for task in tasks]:
            future.result()
    # The jobs go seed by seed, so that the runs that are complete after an interruption can be compared.
    jobs = [(task, method, seed) for seed in seeds for task in tasks for method in methods]
    lock, done, began = threading.Lock(), 0, time.perf_counter()

    def run_job(job: tuple[str, str, int]) -> None:
        nonlocal done
        task, method, seed = job
        model = ["model=hf", f"model.path={runs / task / 'warm_start' / 'model'}"]
        seconds = train(
            runs / task / slug(method) / f"seed{seed}",
            f"experiment=compare_{task}",
            *model,
            *METHODS[method],
            f"run.seed={seed}",
            "evaluation.before=false",
        )
        with lock:
            done += 1
            left = (time.perf_counter() - began) / done * (len(jobs) - done)
            print(
                f"{done}/{len(jobs)} {task}, {method}, seed {seed}: {seconds:.0f} s; about {left / 60:.0f} minutes "
                "left",
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


def read_run(folder: Path) -> dict[str, Any]:
    """Return the numbers of one run that are compared."""
    before, after = (
        json.loads((place / "evaluation.jsonl").read_text().splitlines()[-1])
        for place in (folder.parents[1] / "warm_start", folder)
    )
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = steps[-LAST_STEPS:]
    return {
        "avg@16": after["avg@16"],
        "pass@16": after["pass@16"],
        "avg@16 before": before["avg@16"],
        "pass@16 before": before["pass@16"],
        "step_accuracy": after.get("health/step_accuracy"),
        "distinct_correct_paths": after["health/distinct_correct_paths"],
        "entropy": statistics.mean(row["entropy/mean"] for row in last),
        "length": statistics.mean(row["response/length_mean"] for row in last),
        "curve": [row["reward/accuracy"] for row in steps],
        "entropy curve": [row["entropy/mean"] for row in steps],
        "seconds": float((folder / "seconds").read_text()),
    }


def read_all(
    runs: Path, tasks: list[str], methods: list[str], seeds: list[int]
) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """Return results by task, method and seed, of the runs that are complete."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for task in tasks:
        for method in methods:
            for seed in sorted(seeds):
                folder = runs / task / slug(method) / f"seed{seed}"
                if (folder / "seconds").exists():
                    found.setdefault(task, {}).setdefault(method, {})[seed] = read_run(folder)
    return found


def paired(
    ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], key: str
) -> tuple[float, float, float] | None:
    """Return (mean difference, its deviation, p of the paired t test) over the seeds that both have; None with fewer
    than two."""
    differences = [
        ours[seed][key] - theirs[seed][key]
        for seed in sorted(ours.keys() & theirs.keys())
        if ours[seed][key] is not None
    ]
    if len(differences) < 2:
        return None
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    if deviation == 0:
        return mean, 0.0, 1.0 if mean == 0 else 0.0
    return mean, deviation, student_p(mean / (deviation / math.sqrt(len(differences))), len(differences) - 1)


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


def difference_row(methods: dict[str, dict[int, dict[str, Any]]], method: str, other: str) -> str:
    """Return ``method`` minus ``other`` in the first three measures, as a row of a table."""
    cells = []
    for key, scale, _, decimals in list(MEASURES.values())[:3]:
        result = paired(methods[method], methods[other], key)
        cells.append(
            ""
            if result is None
            else f"{result[0] * scale:+.{decimals}f} ± {result[1] * scale:.{decimals}f} ({result[2]:.3f})"
        )
    return f"| {method} − {other} | " + " | ".join(cells) + " |"


def page(found: dict[str, dict[str, dict[int, dict[str, Any]]]], pictures: dict[str, str]) -> str:
    """Return the results page; ``pictures`` has the file of each task's curves."""
    lines = [
        "# Results",
        "",
        "Made by `python examples/compare_algorithms/compare.py`; the README beside it says what this can show.",
        "",
    ]
    for task, methods in found.items():
        runs = [run for seeds in methods.values() for run in seeds.values()]
        first_entropy = statistics.mean(run["entropy curve"][0] for run in runs)
        lines += [
            f"## {task}",
            "",
            f"Before: Avg@16 {runs[0]['avg@16 before']:.1%}, Pass@16 {runs[0]['pass@16 before']:.1%}, entropy of the "
            f"first step {first_entropy:.3f} nats. {len(runs)} runs of "
            f"{statistics.median(run['seconds'] for run in runs):.0f} s (median). After, mean ± deviation over seeds:",
            "",
            "| method | seeds | " + " | ".join(MEASURES) + " |",
            "|---|---|" + "---|" * len(MEASURES),
        ]
        for method, seeds in methods.items():
            cells = []
            for key, scale, unit, decimals in MEASURES.values():
                values = [run[key] * scale for run in seeds.values() if run[key] is not None]
                spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.{decimals}f}{unit}{spread}" if values else "")
            lines.append(f"| {method} | {len(seeds)} | " + " | ".join(cells) + " |")
        against_baseline = [(method, BASELINE) for method in methods if method != BASELINE]
        for title, pairs in (
            (f"Against {BASELINE}", against_baseline),
            ("Of the same beta, in two directions", SAME_BETA),
        ):
            rows = [difference_row(methods, *pair) for pair in pairs if methods.keys() >= set(pair)]
            if rows:
                lines += [
                    "",
                    f"{title}, seed by seed: difference ± deviation (p of a paired t test, not corrected for "
                    f"{len(rows)} comparisons)",
                    "",
                    "| | Avg@16, points | Pass@16, points | entropy, nats |",
                    "|---|---|---|---|",
                    *rows,
                ]
        lines += ["", f"![learning curves of {task}]({pictures[task]})", ""]
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


def picture(methods: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Draw accuracy of the rollouts and entropy by step, means over seeds and the last steps, as SVG."""
    width, height, left, gap = 360, 240, 44, 60
    parts = []
    for place, (title, key) in enumerate(
        (
            (f"accuracy of rollouts, mean of {LAST_STEPS} steps", "curve"),
            (f"entropy, nats, mean of {LAST_STEPS} steps", "entropy curve"),
        )
    ):
        curves = {}
        for method, seeds in methods.items():
            steps = min(len(run[key]) for run in seeds.values())
            means = [statistics.mean(run[key][step] for run in seeds.values()) for step in range(steps)]
            curves[method] = [statistics.mean(means[max(0, step + 1 - LAST_STEPS) : step + 1]) for step in range(steps)]
        top = max(max(curve) for curve in curves.values()) or 1.0
        x0 = left + place * (width + gap)
        parts.append(
            f'<text x="{x0}" y="16">{title}</text><path d="M{x0} 28V{28 + height}H{x0 + width}" fill="none" '
            'stroke="#888"/>'
        )
        for share in (0.0, 0.5, 1.0):
            parts.append(
                f'<text x="{x0 - 6}" y="{28 + height * (1 - share) + 4:.0f}" text-anchor="end">{top * share:.2g}</text>'
            )
        for colour, curve in zip(_COLOURS * 2, curves.values(), strict=False):
            points = " ".join(
                f"{x0 + width * step / max(len(curve) - 1, 1):.1f},{28 + height * (1 - value / top):.1f}"
                for step, value in enumerate(curve)
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    for index, (colour, method) in enumerate(zip(_COLOURS * 2, methods, strict=False)):
        x, y = left + (index % 3) * 270, 28 + height + 28 + (index // 3) * 20
        parts.append(
            f'<path d="M{x} {y - 4}h20" stroke="{colour}" stroke-width="3"/><text x="{x + 26}" y="{y}">{method}</text>'
        )
    total_width, total_height = left + 2 * width + gap + 16, 28 + height + 36 + 20 * math.ceil(len(methods) / 3)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder of the runs; what is complete in it is not run again"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--only-results", action="store_true")
    options = parser.parse_args()
    if not options.only_results:
        run_all(options.runs, options.tasks, options.methods, options.seeds, options.parallel)
    found = read_all(options.runs, options.tasks, options.methods, options.seeds)
    if not found:
        parser.error(f"{options.runs} holds no complete run")
    options.output.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for task, methods in found.items():
        pictures[task] = f"{task}.svg"
        (options.output / pictures[task]).write_text(picture(methods))
    (options.output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "RESULTS.md").write_text(page(found, pictures) + "\n")
    print(options.output / "RESULTS.md")


if __name__ == "__main__":
    main()
