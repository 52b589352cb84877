"""One experiment with several seeds: Avg@16, Pass@16 and entropy before and after, with their spread, and the time of
each seed.

    python benchmarks/seeds.py                                      # the quickstart, seeds 1 2 3
    python benchmarks/seeds.py --output grpo.json -- experiment=quickstart algorithm=grpo
    python benchmarks/seeds.py --output out.json -- --config-dir examples/smollm2_arithmetic experiment=chain_sum

Prints a Markdown table and exits with 1 if any seed gains less than ``--points``. A seed whose run stands complete
under ``--runs`` is not run again. Entropy is the mean over the response tokens of the first and of the last step's
rollouts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe
from record import write_record


def run_seed(seed: int, arguments: list[str], folder: Path) -> dict[str, float]:
    """Train with one seed in ``folder``; wall seconds include everything but the installation."""
    done = folder / "seconds"
    if not done.exists():
        started = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "dasd_megatron.cli",
            "train",
            *arguments,
            f"run.seed={seed}",
            f"run.dir={folder}",
        ]
        subprocess.run(command, check=True, timeout=7200, stdout=sys.stderr)
        done.write_text(f"{time.perf_counter() - started:.1f}")
    rows = {row["label"]: row for row in map(json.loads, (folder / "evaluation.jsonl").read_text().splitlines())}
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {"seed": seed, "seconds": float(done.read_text()), "steps": len(steps)}
    for label, step in (("before", steps[0]), ("after", steps[-1])):
        result |= {
            f"{name} {label}": rows[label][name]
            for name in ("avg@16", "pass@4", "pass@16", "maj@16", "response/length_mean")
        }
        result[f"entropy {label}"] = step["entropy/mean"]
    return result


def table(results: list[dict[str, float]]) -> str:
    """Return a Markdown table: one row for each seed, and the means with standard deviations."""
    kinds = {"Avg@16": ("avg@16", "{:.1%}"), "Pass@16": ("pass@16", "{:.1%}"), "entropy, nats": ("entropy", "{:.3f}")}
    lines = [
        "| seed | " + " | ".join(f"{title} before | after" for title in kinds) + " | seconds |",
        "|---" * (2 + 2 * len(kinds)) + "|",
    ]
    columns = [(f"{key} {label}", form) for key, form in kinds.values() for label in ("before", "after")] + [
        ("seconds", "{:.0f}")
    ]
    for row in results:
        lines.append(f"| {row['seed']} | " + " | ".join(form.format(row[key]) for key, form in columns) + " |")
    if len(results) > 1:
        cells = []
        for key, form in columns:
            values = [row[key] for row in results]
            cells.append(f"{form.format(statistics.mean(values))} ± {form.format(statistics.stdev(values))}")
        lines.append("| mean ± deviation | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--points", type=float, default=10.0, help="least gain in Avg@16, percentage points")
    parser.add_argument(
        "--runs", type=Path, help="keep the runs here, as seed1, seed2, ... (default: a temporary folder)"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quickstart_seeds.json")
    parser.add_argument(
        "arguments", nargs="*", help="arguments of `dasd train`, after -- (default: experiment=quickstart)"
    )
    options = parser.parse_args()
    arguments = options.arguments or ["experiment=quickstart"]
    with tempfile.TemporaryDirectory() as temporary:
        runs = options.runs or Path(temporary)
        results = [run_seed(seed, arguments, runs / f"seed{seed}") for seed in options.seeds]
    print(table(results))
    gains = [100 * (row["avg@16 after"] - row["avg@16 before"]) for row in results]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    print(
        f"gain in Avg@16, points: mean {statistics.mean(gains):+.1f}, deviation {spread:.1f}, least "
        f"{min(gains):+.1f}, {len(gains)} seeds"
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "arguments": arguments,
        "machine": describe(),
        "gain_points": {"mean": statistics.mean(gains), "stdev": spread, "min": min(gains)},
        "seeds": results,
    }
    write_record(options.output, record)
    return 0 if min(gains) >= options.points else 1


if __name__ == "__main__":
    sys.exit(main())
