"""The quickstart with several seeds: Avg@16 and Pass@16 on held-out problems before and after, with their spread, and the time each took.

    python benchmarks/quickstart_seeds.py                      # seeds 1 2 3, as configured
    python benchmarks/quickstart_seeds.py --seeds 1 2 3 -- algorithm=grpo

Exits with 1 if any seed gains less than ``--points``. Writes ``benchmarks/results/quickstart_seeds.json`` unless told otherwise.
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


def run_seed(seed: int, overrides: list[str], folder: Path) -> dict[str, float]:
    """Train with one seed in ``folder``; wall seconds include everything but the installation."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "dasd_megatron.cli", "train", "experiment=quickstart", f"run.seed={seed}", f"run.dir={folder}"]
    subprocess.run([*command, *overrides], check=True, timeout=3600, stdout=sys.stderr)
    seconds = time.perf_counter() - started
    rows = {row["label"]: row for row in map(json.loads, (folder / "evaluation.jsonl").read_text().splitlines())}
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    result = {"seed": seed, "seconds": seconds, "entropy_last_step": last["entropy/mean"]}
    for label in ("before", "after"):
        result |= {f"{name} {label}": rows[label][name] for name in ("avg@16", "pass@16", "maj@16")}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--points", type=float, default=10.0, help="least gain in Avg@16, percentage points")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quickstart_seeds.json")
    parser.add_argument("overrides", nargs="*", help="overrides for `dasd train`, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [run_seed(seed, arguments.overrides, Path(folder) / f"seed{seed}") for seed in arguments.seeds]
    print("seed  Avg@16 before  after   gain  Pass@16 before  after  seconds")
    for row in results:
        gain = row["avg@16 after"] - row["avg@16 before"]
        print(
            f"{row['seed']:>4} {row['avg@16 before']:>13.1%} {row['avg@16 after']:>6.1%} {100 * gain:>+6.1f}"
            f" {row['pass@16 before']:>14.1%} {row['pass@16 after']:>6.1%} {row['seconds']:>8.0f}"
        )
    gains = [100 * (row["avg@16 after"] - row["avg@16 before"]) for row in results]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    print(
        f"gain in Avg@16, points: mean {statistics.mean(gains):+.1f}, deviation {spread:.1f}, least {min(gains):+.1f}, {len(gains)} seeds"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "overrides": arguments.overrides,
        "machine": describe(),
        "gain_points": {"mean": statistics.mean(gains), "stdev": spread, "min": min(gains)},
        "seeds": results,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if min(gains) >= arguments.points else 1


if __name__ == "__main__":
    sys.exit(main())
