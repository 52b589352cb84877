"""What the files of a run directory say, for the report: read leniently, streamed where they are large, cut to stated
budgets."""

from __future__ import annotations

import heapq
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import yaml

from dasd_megatron.observability.metric_files import EVALUATION, METRICS, WARM_START, restore_non_finite
from dasd_megatron.observability.watch import WARNINGS

# Rollouts of long runs are terabytes: what is read for the table of groups stays some seconds of work.
ROLLOUT_BYTES = 200_000_000
GROUPS_KEPT = 30
SAMPLES_PER_GROUP = 4
SAMPLE_CHARS = 1500
PROBLEM_CHARS = 1500
TOKENS_PER_ROLLOUT = 1500

_ODD = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


class ReportError(RuntimeError):
    """No report can be made of this directory. The message says why and what to do."""


@dataclass
class Run:
    """What the run directory holds, as far as it can be read; ``notes`` lists what could not be."""

    path: Path
    label: str = ""
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    warm_start: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def setting(self, name: str) -> Any:
        """The value of a dotted field of the configuration, None when it is not there."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def evaluation(self, label: str) -> dict[str, Any] | None:
        return next((row for row in reversed(self.evaluations) if row.get("label") == label), None)

    def samples_path(self, row: Mapping[str, Any]) -> Path:
        """File of the samples behind a line of evaluation.jsonl."""
        return self.path / "evaluations" / f"{row.get('label')}-step_{row['step']:06d}" / "samples.jsonl"


def read_run(path: Path) -> Run:
    """Read everything of a run directory but samples and token statistics. Raises :class:`ReportError` when it holds no
    run."""
    if not path.is_dir():
        raise ReportError(f"{path} is not a directory: give the directory of a run, like runs/<name>/<date-time>")
    if not any((path / name).exists() for name in ("config.yaml", METRICS, WARM_START, EVALUATION)):
        raise ReportError(
            f"{path} holds no run (neither config.yaml nor {METRICS}): give the directory of a run, like "
            "runs/<name>/<date-time>"
        )
    run = Run(path)
    run.config_text, run.config = _mapping(run, path / "config.yaml", yaml.safe_load)
    run.environment_text, run.environment = _mapping(run, path / "environment.json", json.loads)
    run.metrics = _rows(run, METRICS)
    run.warm_start = _rows(run, WARM_START)
    evaluations = {(row.get("label"), row["step"]): row for row in _rows(run, EVALUATION)}
    run.evaluations = list(evaluations.values())
    run.warnings = _rows(run, WARNINGS)
    run.label = text_of(run.setting("run.name")) or visible(path.resolve().name)
    return run


def visible(text: object) -> str:
    """``text`` with what would not show, or would mislead, written out: control, zero-width and direction characters as
    ‹U+202E›."""
    return _ODD.sub(
        lambda match: f"‹U+{ord(match.group()):04X}›", str(text).replace("\r\n", "\n").replace("\r", "‹U+000D›")
    )


def text_of(value: Any) -> str:
    return "" if value is None else visible(value)


def bounded(text: str, limit: int) -> str:
    text = visible(text)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters in the file)"


def number(value: Any) -> float | None:
    """A metric as a float, the names of NaN and infinities understood; None for what is no number."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    # JSON has integers that no float holds.
    return float(value) if isinstance(value, float) or abs(value) < 2**1023 else math.inf if value > 0 else -math.inf


def column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float | None]:
    return [number(row.get(key)) for row in rows]


def lines(run: Run, path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file one by one, so that large files are never held whole; unreadable lines are counted in
    the notes."""
    bad = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                row = _parsed(line)
                if isinstance(row, dict):
                    yield row
                else:
                    bad += 1
    except OSError as error:
        run.notes.append(f"{path.relative_to(run.path)} could not be read: {error}")
    if bad:
        run.notes.append(f"{path.relative_to(run.path)}: {bad} unreadable lines were left out")


def _parsed(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        # It knows neither NaN nor lone surrogates, which json writes.
        try:
            return json.loads(line.decode("utf-8", errors="replace"))
        except ValueError:
            return None


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
    rows = [restore_non_finite(row) for row in lines(run, path)] if path.exists() else []
    sound = [row for row in rows if isinstance(row.get("step"), int)]
    if len(sound) != len(rows):
        run.notes.append(f"{name}: {len(rows) - len(sound)} lines without a step were left out")
    return sound


def saved_steps(run: Run, folder: str, suffix: str) -> dict[int, Path]:
    """Files step_<n><suffix> of a folder of the run, by step."""
    found = (
        (re.fullmatch(rf"step_(\d+)\{suffix}", path.name), path) for path in (run.path / folder).glob(f"step_*{suffix}")
    )
    return dict(sorted((int(match.group(1)), path) for match, path in found if match))


def halving_order(count: int) -> list[int]:
    """0 ... count - 1 so that any first part covers the range evenly: the first, the last, then always the middles of
    what lies between."""
    order, stretches = [0, count - 1][: min(count, 2)], [(0, count - 1)]
    while stretches:
        middles = [((low + high) // 2, low, high) for low, high in stretches if high - low > 1]
        order += [middle for middle, _, _ in middles]
        stretches = [part for middle, low, high in middles for part in ((low, middle), (middle, high))]
    return order


# ---- groups
# ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Groups:
    """The groups of a run with the highest and the lowest mean reward, and out of how many."""

    best: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    count: int
    steps_read: int
    steps_saved: int


def extreme_groups(run: Run, keep: int = GROUPS_KEPT, max_bytes: int = ROLLOUT_BYTES) -> Groups:
    """The ``keep`` groups with the highest and with the lowest mean reward in the saved rollouts; ties go to the later
    step, then to the smaller number. At most about ``max_bytes`` are read, in whole steps chosen evenly. Fewer than 2 *
    keep groups are split in two.
    """
    saved = saved_steps(run, "rollouts", ".jsonl")
    steps, left = [], max_bytes
    for index in halving_order(len(saved)):
        step = list(saved)[index]
        size = saved[step].stat().st_size
        if steps and size > left:
            break
        steps.append(step)
        left -= size
    rewards: dict[tuple[int, int], list[float]] = {}
    for step in sorted(steps):
        for row in lines(run, saved[step]):
            reward, group = number(row.get("reward")), row.get("group")
            if reward is not None and math.isfinite(reward) and isinstance(group, int):
                rewards.setdefault((step, group), []).append(reward)
    means = {key: sum(values) / len(values) for key, values in rewards.items()}
    best = heapq.nsmallest(min(keep, (len(means) + 1) // 2), means, key=lambda key: (-means[key], -key[0], key[1]))
    worst = heapq.nsmallest(
        min(keep, len(means) // 2), set(means) - set(best), key=lambda key: (means[key], -key[0], key[1])
    )
    chosen: dict[tuple[int, int], dict[str, Any]] = {}
    for step in sorted({step for step, _ in (*best, *worst)}):
        for row in lines(run, saved[step]):
            group = row.get("group")
            key = (step, group if isinstance(group, int) else None)
            if key in means and (key in best or key in worst):
                _add_to_group(chosen.setdefault(key, {}), step, row)
    return Groups([chosen[key] for key in best], [chosen[key] for key in worst], len(means), len(steps), len(saved))


def _add_to_group(group: dict[str, Any], step: int, row: Mapping[str, Any]) -> None:
    if not group:
        group |= {
            "step": step,
            "group": row["group"],
            "problem": bounded(text_of(row.get("problem")), PROBLEM_CHARS),
            "expected": bounded(text_of(row.get("expected_answer")), PROBLEM_CHARS),
            "solution": bounded(text_of(row.get("reference_solution")), PROBLEM_CHARS),
            "count": 0,
            "rewards": [],
            "tokens": 0,
            "cut": 0,
            "samples": [],
        }
    reward = number(row.get("reward"))
    if reward is not None and not math.isfinite(reward):
        reward = None
    group["count"] += 1
    group["rewards"].append(reward)
    group["tokens"] += len(row["response_ids"]) if isinstance(row.get("response_ids"), list) else 0
    group["cut"] += row.get("finish_reason") == "length"
    if len(group["samples"]) < SAMPLES_PER_GROUP:
        group["samples"].append(
            {
                "text": bounded(text_of(row.get("text")), SAMPLE_CHARS),
                "answer": bounded(text_of(row.get("predicted_answer")), 200),
                "reward": reward,
                "end": text_of(row.get("finish_reason")),
            }
        )


# ---- tokens
# ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """Rollouts with the statistics of their tokens, as the page's script reads them, and out of how many."""

    chosen: list[dict[str, Any]]
    count: int
    steps_read: int
    steps_saved: int


def token_rollouts(run: Run, budget: int) -> Rollouts:
    """Rollouts of ``inspect/`` with at most about ``budget`` tokens in all: the first, the last and then evenly spaced
    saved steps until it is used up; of a rollout the first :data:`TOKENS_PER_ROLLOUT` tokens."""
    saved = saved_steps(run, "inspect", ".json")
    chosen: dict[int, list[dict[str, Any]]] = {}
    # Most runs record as many rollouts at every step, and what is not read need not be counted exactly: sizes stand in
    # for tokens.
    count = left_out = 0
    for index in halving_order(len(saved)):
        step = list(saved)[index]
        if budget <= 0:
            left_out += 1
            continue
        entries = _inspected(run, saved[step])
        count += len(entries)
        kept = []
        for place, entry in enumerate(entries, 1):
            try:
                record = _token_record(entry, min(TOKENS_PER_ROLLOUT, max(budget, 50)))
            except (KeyError, TypeError, ValueError) as error:
                run.notes.append(f"inspect/step_{step:06d}.json, rollout {place} was left out: {error!r}")
                continue
            if budget <= 0:
                break
            budget -= len(record["t"])
            kept.append({"step": step, "place": place, **record})
        chosen[step] = kept
    read = len(saved) - left_out
    per_step = count / read if read else 0.0
    for step, kept in chosen.items():
        _add_details(run, step, kept)
    return Rollouts(
        [one for step in sorted(chosen) for one in chosen[step]], round(count + per_step * left_out), read, len(saved)
    )


def _inspected(run: Run, path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("it does not hold a list of rollouts")
    except (OSError, ValueError) as error:
        run.notes.append(f"inspect/{path.name} could not be read: {error}")
        return []
    return entries


def _token_record(entry: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """One rollout for the page: t tokens, h entropy, d gap, w omega, a advantage, p and q probabilities of student and
    teacher."""
    tokens = [visible(token) for token in entry["tokens"]]
    names = {"h": "entropy", "d": "delta", "w": "omega", "p": "student_log_prob", "q": "teacher_log_prob"}
    columns = {short: [number(value) for value in entry[name]] for short, name in names.items()}
    # Runs before it was recorded have the verifier's part alone.
    advantages = entry.get("token_advantage", [entry.get("advantage")] * len(tokens))
    columns["a"] = [number(value) for value in advantages]
    uneven = {short: len(values) for short, values in columns.items() if len(values) != len(tokens)}
    if uneven:
        raise ValueError(f"{len(tokens)} tokens, but {uneven}")
    for short in ("p", "q"):
        columns[short] = [None if value is None else math.exp(min(value, 0.0)) for value in columns[short]]
    return {
        "id": str(entry.get("problem_id")),
        "text": str(entry.get("text")),
        "problem": bounded(text_of(entry.get("problem")), PROBLEM_CHARS),
        **{name: _short(number(entry.get(name))) for name in ("reward", "advantage", "tau", "sigma")},
        "whole": "token_advantage" in entry,
        "length": len(tokens),
        "t": tokens[:limit],
        **{short: [_short(value) for value in values[:limit]] for short, values in columns.items()},
    }


def _short(value: float | None) -> float | str | None:
    """Three decimals, or two digits below them; JSON has no NaN and no infinity, so they are strings."""
    if value is None:
        return None
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e9:
        return int(value)
    return round(value, 3) if abs(value) >= 1e-3 else float(f"{value:.1e}")


def _add_details(run: Run, step: int, kept: list[dict[str, Any]]) -> None:
    """What the step's saved rollouts say about the same samples; takes the fields out that only this join needs."""
    path = run.path / "rollouts" / f"step_{step:06d}.jsonl"
    wanted = {(one["id"], one["text"]) for one in kept}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if path.exists() and path.stat().st_size <= ROLLOUT_BYTES:
        for row in lines(run, path):
            key = (str(row.get("problem_id")), str(row.get("text")))
            if key in wanted:
                found[key] = row
                if len(found) == len(wanted):
                    break
    for one in kept:
        row = found.get((one.pop("id"), one.pop("text")), {})
        one["expected"] = bounded(text_of(row.get("expected_answer")), PROBLEM_CHARS)
        one["answer"] = bounded(text_of(row.get("predicted_answer")), 200)
        one["solution"] = bounded(text_of(row.get("reference_solution")), PROBLEM_CHARS)
        one["end"] = text_of(row.get("finish_reason"))
