"""``metrics.json`` of an evaluation, in NeMo-Skills' terms and in ours, and the table that is printed of it."""

from __future__ import annotations

import functools
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from dasd_megatron.config import EvaluationConfig, HealthConfig
from dasd_megatron.data.benchmarks import BENCHMARKS
from dasd_megatron.evaluation import nemo_skills
from dasd_megatron.evaluation.health import from_rows, health_metrics, health_tables
from dasd_megatron.evaluation.pass_at_k import bootstrap, interval, mean, nemo_skills_metrics, problem_scores
from dasd_megatron.evaluation.sampling import Records, duplicate_share
from dasd_megatron.files import replace_file

OURS = "dasd"
"""In ``metrics.json``, the entry of each benchmark that has what NeMo-Skills does not count; the others are
NeMo-Skills'."""
MACRO_AVERAGE = "macro_average"


def write_metrics(
    evaluation: EvaluationConfig, health_limits: HealthConfig, root: Path, results: Mapping[str, Records], *, seed: int
) -> dict[str, Any]:
    """Write ``metrics.json`` and return it: NeMo-Skills' entries of each benchmark, ours beside them, and the mean over
    benchmarks. Each benchmark's folder gets ``health.json``. ``seed`` is that of the bootstrap."""
    metrics: dict[str, Any] = {}
    drawn: dict[str, NDArray[np.float64]] = {}
    names: list[str] = []
    for name, records in results.items():
        # NeMo-Skills counts files in the order of their names: rs10 comes before rs2.
        order = sorted(range(evaluation.samples), key=str)
        answers, outcomes, tokens = nemo_skills.verdicts([[row[sample] for sample in order] for row in records])
        scores = problem_scores(answers, outcomes, range(1, evaluation.samples + 1))
        names = list(scores)
        # Each benchmark has a generator of its own, so that benchmarks of equal size are drawn independently.
        drawn[name] = bootstrap(
            list(zip(*scores.values(), strict=True)), evaluation.bootstrap_resamples, [seed, zlib.crc32(name.encode())]
        )
        ours = _benchmark_metrics(records, {metric: mean(values) for metric, values in scores.items()})
        metrics[name] = {**nemo_skills_metrics(answers, outcomes, tokens), OURS: ours}
        health = from_rows([record["health"] for row in records for record in row])
        ours |= health_metrics(health, health_limits)
        replace_file(root / name / "health.json", json.dumps(health_tables(health), indent=2) + "\n")
        ours["confidence_intervals"] = _intervals(names, drawn[name], evaluation.confidence)
    metrics[MACRO_AVERAGE] = {
        OURS: {
            "num_benchmarks": len(results),
            **{metric: sum(metrics[name][OURS][metric] for name in results) / len(results) for metric in names},
            "confidence_intervals": _intervals(
                names, functools.reduce(np.add, drawn.values()) / len(drawn), evaluation.confidence
            ),
            "confidence": evaluation.confidence,
            "bootstrap_resamples": evaluation.bootstrap_resamples,
        }
    }
    replace_file(root / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _benchmark_metrics(records: Records, scores: Mapping[str, float]) -> dict[str, Any]:
    flat = [record for row in records for record in row]
    total_tokens = sum(record["num_generated_tokens"] for record in flat)
    return {
        "num_problems": len(records),
        "num_samples": len(records[0]),
        **scores,
        "no_answer_share": sum(record["predicted_answer"] is None for record in flat) / len(flat),
        "truncated_share": sum(record["finish_reason"] == "length" for record in flat) / len(flat),
        "duplicate_share": duplicate_share(records),
        "response/length_mean": total_tokens / len(flat),
        "nll_mean": -sum(record["log_prob"] for record in flat) / total_tokens,
        "timeouts": sum(record["grading_timed_out"] for record in flat),
    }


def _intervals(names: Sequence[str], means: NDArray[np.float64], confidence: float) -> dict[str, list[float]]:
    low, high = interval(means, confidence)
    return {name: [float(low[index]), float(high[index])] for index, name in enumerate(names)}


def print_table(metrics: Mapping[str, Any], confidence: float) -> None:
    """Print a row for each benchmark and one for their mean: Avg@n with its confidence interval, Pass@n, Maj@n, and the
    shares of responses that were cut off, repeated or had no answer."""
    names = [name for name in metrics if name != MACRO_AVERAGE]
    n = metrics[names[0]][OURS]["num_samples"]
    table = Table(box=box.SIMPLE_HEAVY)
    table.add_column("benchmark")
    for heading in (
        "problems",
        f"Avg@{n} [{confidence:.0%}]",
        f"Pass@{n}",
        f"Maj@{n}",
        "no answer",
        "cut off",
        "repeated",
        "tokens",
    ):
        table.add_column(heading, justify="right")

    def scores(entry: Mapping[str, Any]) -> list[str]:
        low, high = entry["confidence_intervals"][f"avg@{n}"]
        return [
            f"{entry[f'avg@{n}']:.1%} [{low:.1%}, {high:.1%}]",
            f"{entry[f'pass@{n}']:.1%}",
            f"{entry[f'maj@{n}']:.1%}",
        ]

    for name in names:
        ours = metrics[name][OURS]
        shares = [f"{ours[share]:.1%}" for share in ("no_answer_share", "truncated_share", "duplicate_share")]
        title = BENCHMARKS[name].title if name in BENCHMARKS else name
        table.add_row(title, str(ours["num_problems"]), *scores(ours), *shares, f"{ours['response/length_mean']:.1f}")
    if len(names) > 1:
        table.add_row("mean", "", *scores(metrics[MACRO_AVERAGE][OURS]), "", "", "", "")
    Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 140).print(table)
