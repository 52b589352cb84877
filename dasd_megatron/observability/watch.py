"""A watch on training: a pure state machine that is fed each step's metrics and warns of what goes wrong, and a file
of its warnings.

:data:`CONDITIONS` is the table of what it looks for. Thresholds stand in ``watch.*``; docs/health.md explains them.
Acting on a warning (``watch.action``) is the training loop's part.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dasd_megatron.config import WatchConfig
from dasd_megatron.observability.metric_files import METRICS, WARNINGS, append_row, read_metrics, step_of_row

CONTINUE = "watch.continue"
"""A file of this name in the run directory lets a paused run go on."""


class Alert(NamedTuple):
    """One warning. ``text`` is one line: the numbers, what they usually mean, what to do."""

    step: int
    condition: str
    text: str


class MetricHistory:
    """The levels of one metric so far. A level is the mean of ``width`` steps in a row that have the metric; None while
    there are fewer.

    ``first``, ``highest`` and ``lowest`` are of all levels. ``before`` is the level of the steps before the last
    ``lag``.
    """

    def __init__(self, width: int, lag: int) -> None:
        self._width, self._lag = width, lag
        self._recent: deque[float] = deque(maxlen=width + lag)
        self.first: float | None = None
        self.highest = -math.inf
        self.lowest = math.inf

    def add(self, value: float) -> None:
        """Take the value of one step."""
        self._recent.append(value)
        recent = list(self._recent)[-self._width :]
        if len(recent) < self._width:
            return
        level = math.fsum(recent) / self._width
        self.first = level if self.first is None else self.first
        self.highest, self.lowest = max(self.highest, level), min(self.lowest, level)

    @property
    def before(self) -> float | None:
        """The level of the steps before the last ``lag``."""
        # The step under judgement is not in here yet. The last lag steps are that one and lag - 1 of these.
        end = len(self._recent) - (self._lag - 1)
        if end < self._width:
            return None
        return math.fsum(list(self._recent)[end - self._width : end]) / self._width


Values = Mapping[str, float]
Histories = Mapping[str, MetricHistory]
Check = Callable[[Values, Histories, WatchConfig], str | None]


@dataclass(frozen=True)
class Condition:
    """Something that can go wrong with a run."""

    name: str
    metrics: tuple[str, ...]
    """The condition is checked at steps that have at least one of these."""
    check: Check
    """Says in numbers that a step meets the condition, else None. It gets those of ``metrics`` that the step has, and
    the histories of all metrics before the step."""
    means: str
    advice: str
    about_non_finite: bool = False
    """The check also gets numbers that are not finite, and the warning waits for no further step."""


def _entropy_low(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    now, highest = values["entropy/mean"], series["entropy/mean"].highest
    if math.isfinite(highest) and now < settings.entropy_low * highest:
        return (
            f"entropy is {now:.3g} nat a token, under watch.entropy_low={settings.entropy_low:g} of its highest level "
            f"{highest:.3g}"
        )
    return None


def _entropy_high(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    now, first = values["entropy/mean"], series["entropy/mean"].first
    if first is not None and now > max(settings.entropy_high * first, first + 0.5):
        return (
            f"entropy is {now:.3g} nat a token, over watch.entropy_high={settings.entropy_high:g} times its first "
            f"level {first:.3g}"
        )
    return None


def _accuracy_drop(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    now, highest = values["reward/accuracy"], series["reward/accuracy"].highest
    if math.isfinite(highest) and now < highest - max(settings.accuracy_drop * highest, 0.1):
        return (
            f"accuracy is {now:.1%} after a highest level of {highest:.1%} "
            f"(watch.accuracy_drop={settings.accuracy_drop:g})"
        )
    return None


def _length(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    cut = values.get("response/truncated_share", 0.0)
    if cut >= settings.truncated_share > 0:
        return (
            f"{cut:.0%} of the responses end at rollout.max_new_tokens "
            f"(watch.truncated_share={settings.truncated_share:g})"
        )
    now, before = values.get("response/length_mean"), series["response/length_mean"].before
    if now is not None and before is not None and now > settings.length_growth * before:
        return (
            f"responses have {now:.4g} tokens on average, over watch.length_growth={settings.length_growth:g} times "
            f"{before:.4g} before"
        )
    return None


def _mismatch(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    now, lowest = values["rollout/log_prob_diff_mean"], series["rollout/log_prob_diff_mean"].lowest
    if math.isfinite(lowest) and now > max(settings.mismatch_growth * lowest, settings.mismatch_floor):
        return (
            f"servers' and trainer's log-probs differ by {now:.3g} nats a token, over "
            f"watch.mismatch_floor={settings.mismatch_floor:g} and watch.mismatch_growth={settings.mismatch_growth:g} "
            f"times the lowest level {lowest:.3g}"
        )
    return None


def _rejected(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    return _share(
        values["rollout/rejected_share"], settings.rejected_share, "of the tokens are rejected", "rejected_share"
    )


def _all_right(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    return _share(
        values["reward/groups_all_correct"], settings.saturated_share, "of the groups are all right", "saturated_share"
    )


def _all_wrong(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    return _share(
        values["reward/groups_all_wrong"], settings.saturated_share, "of the groups are all wrong", "saturated_share"
    )


def _filtered(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    refused, drawn = values.get("rollout/groups_filtered", 0.0), values.get("rollout/groups_drawn", 0.0)
    if not drawn:
        return None
    return _share(
        min(refused / drawn, 1.0), settings.filtered_share, f"of {drawn:.0f} groups drawn are refused", "filtered_share"
    )


def _share(share: float, limit: float, subject: str, field: str) -> str | None:
    return f"{share:.0%} {subject} (watch.{field}={limit:g})" if share >= limit else None


def _teacher_absent(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    return _share(
        values["teacher/absent_share"], settings.absent_share, "of the rollouts have no teacher", "absent_share"
    )


def _teacher_equals_student(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    gap = values["credit/delta_abs_mean"]
    if gap <= settings.teacher_gap:
        return (
            f"teacher and student differ by {gap:.2g} nats a token on average "
            f"(watch.teacher_gap={settings.teacher_gap:g})"
        )
    return None


def _pushed_unlikely(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    gap = values["credit/pushed_delta_mean"]
    if gap < -settings.pushed_gap:
        return (
            f"tokens pushed away from the teacher are {-gap:.3g} nats less likely under it than under the policy "
            f"(watch.pushed_gap={settings.pushed_gap:g})"
        )
    return None


def _pushed_diverge(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    now, highest = values["credit/pushed_log_prob_mean"], series["credit/pushed_log_prob_mean"].highest
    if math.isfinite(highest) and now < highest - settings.pushed_drop:
        return (
            f"tokens pushed away from the teacher have a mean log-prob of {now:.3g}, {highest - now:.3g} nats under "
            f"their highest level (watch.pushed_drop={settings.pushed_drop:g})"
        )
    return None


def _non_finite(values: Values, series: Histories, settings: WatchConfig) -> str | None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    return f"{' and '.join(bad)} not finite" if bad else None


CONDITIONS = (
    Condition(
        "entropy_low",
        ("entropy/mean",),
        _entropy_low,
        "the policy has become nearly deterministic and explores no more; harmless only where accuracy is near its "
        "best",
        "go back to an earlier checkpoint with a lower optimizer.lr or a higher loss.clip_high, or with another "
        "algorithm.rho or beta",
    ),
    Condition(
        "entropy_high",
        ("entropy/mean",),
        _entropy_high,
        "the policy drifts toward noise: pushing away from the teacher outweighs what rewards it",
        "go back to an earlier checkpoint with a lower algorithm.beta or a higher algorithm.scale_floor, or a lower "
        "optimizer.lr",
    ),
    Condition(
        "accuracy_drop",
        ("reward/accuracy",),
        _accuracy_drop,
        "the policy is losing what it could do, or the problems have become harder",
        "look at the rollouts; go back to an earlier checkpoint with a lower optimizer.lr or algorithm.beta, or a "
        "higher algorithm.scale_floor",
    ),
    Condition(
        "length",
        ("response/length_mean", "response/truncated_share"),
        _length,
        "the policy rambles, repeats itself (health/repetition) or does not end",
        "look at the rollouts; raise rollout.max_new_tokens if they are sound, else write "
        "verify.truncated_is_wrong=true or lower algorithm.beta",
    ),
    Condition(
        "mismatch",
        ("rollout/log_prob_diff_mean",),
        _mismatch,
        "rollouts come from other numbers than those that are trained: stale weights, another precision or kernel, "
        "or a policy that moves too far in a step",
        "write loss.importance_sampling=token, lower rollout.max_staleness or optimizer.lr, or serve in the "
        "trainer's precision",
    ),
    Condition(
        "rejected",
        ("rollout/rejected_share",),
        _rejected,
        "trainer and servers differ more than the bounds of loss.rejection allow, so that an update rests on the few "
        "tokens that are left",
        "wider loss.rejection_low and rejection_high, another loss.rejection, lower rollout.max_staleness, or the "
        "trainer's precision on the servers",
    ),
    Condition(
        "rewards_all_right",
        ("reward/groups_all_correct",),
        _all_right,
        "the problems have become too easy: such groups have no verifier advantage",
        "take harder problems, write rollout.filter=dasd_megatron.rollout.filters:rewards_differ, or end the run",
    ),
    Condition(
        "rewards_all_wrong",
        ("reward/groups_all_wrong",),
        _all_wrong,
        "the problems are too hard for this start, or no answer is found in the responses: such groups have no "
        "verifier advantage",
        "look whether right answers are graded right, warm-start longer (warm_start.steps), take easier problems or "
        "more batch.samples_per_group",
    ),
    Condition(
        "groups_filtered",
        ("rollout/groups_filtered", "rollout/groups_drawn"),
        _filtered,
        "rollout.filter leaves next to nothing: most samples are thrown away, and over rollout.filter_limit refused "
        "groups are trained on",
        "take problems of another difficulty, or loosen the filter",
    ),
    Condition(
        "teacher_absent",
        ("teacher/absent_share",),
        _teacher_absent,
        "no source of teacher.privileged has a text for them, so that the verifier trains alone, and with "
        "algorithm.verifier_weight=0 nothing does: peers need a right response in the group, and feedback a reward "
        "function that says something",
        "take easier problems or more batch.samples_per_group, warm-start longer (warm_start.steps), or write a "
        "further source behind the others, like teacher.privileged=[peer,answer]",
    ),
    Condition(
        "teacher_equals_student",
        ("credit/delta_abs_mean",),
        _teacher_equals_student,
        "what the teacher sees beside the problem has no effect, so its term is noise",
        "look at teacher.template and teacher.privileged, show it examples in the warm start "
        "(warm_start.privileged_share), or raise algorithm.scale_floor",
    ),
    Condition(
        "pushed_unlikely",
        ("credit/pushed_delta_mean",),
        _pushed_unlikely,
        "the policy is uncertain because it does not know the next step, and pushing raises what the teacher knows to "
        "be wrong",
        "start from a policy that mostly knows the steps (a longer warm start, easier problems), lower algorithm.beta, "
        "or write algorithm.push_gate=teacher_entropy",
    ),
    Condition(
        "pushed_diverge",
        ("credit/pushed_log_prob_mean",),
        _pushed_diverge,
        "pushing has nothing that stops it: the policy gives these places ever less likely tokens",
        "go back to an earlier checkpoint with a lower algorithm.beta or algorithm.rho, or a loss.kl_coef above 0",
    ),
    Condition(
        "non_finite",
        ("update/loss", "update/grad_norm"),
        _non_finite,
        "an overflow, or numbers that were broken before",
        "go back to an earlier checkpoint with a lower optimizer.lr",
        about_non_finite=True,
    ),
)


class Watch:
    """The state of the conditions of one run. It takes every step's metrics in order, and reads, prints and stores
    nothing else. Its warnings depend on these rows alone, so that a resumed run feeds the rows of metrics.jsonl first.

    A condition must hold in ``patience`` steps in a row. Then it warns, and not again for ``cooldown`` steps, whether
    it holds on or comes back. After these, a condition that still holds warns again. Steps without a condition's
    metrics neither count nor break a row.

    Args:
        has_teacher: False leaves out the condition about the teacher: without one all gaps are 0.
    """

    def __init__(self, settings: WatchConfig, *, has_teacher: bool) -> None:
        self.settings = settings
        left_out = {*settings.ignore, *(() if has_teacher else ("teacher_equals_student",))}
        self._conditions = [condition for condition in CONDITIONS if condition.name not in left_out]
        names = {name for condition in self._conditions for name in condition.metrics}
        self._series = {name: MetricHistory(settings.baseline_steps, settings.patience) for name in sorted(names)}
        self._steps_in_a_row: dict[str, int] = {}
        self._last_warning: dict[str, int] = {}

    def update(self, metrics: Mapping[str, Any]) -> list[Alert]:
        """Take one step's metrics, with ``step``; return its warnings, in the order of :data:`CONDITIONS`."""
        step = int(metrics["step"])
        numbers = {name: float(metrics[name]) for name in self._series if isinstance(metrics.get(name), (int, float))}
        alerts = [
            Alert(step, condition.name, text)
            for condition in self._conditions
            if (text := self._check(condition, step, numbers)) is not None
        ]
        for name, value in numbers.items():
            if math.isfinite(value):
                self._series[name].add(value)
        return alerts

    def _check(self, condition: Condition, step: int, numbers: Values) -> str | None:
        """Return the text of a warning, or None; counts the steps in a row in which the condition holds."""
        values = {name: numbers[name] for name in condition.metrics if name in numbers}
        if not condition.about_non_finite:
            values = {name: value for name, value in values.items() if math.isfinite(value)}
        if not values:
            return None
        finding = condition.check(values, self._series, self.settings)
        count = self._steps_in_a_row.get(condition.name, 0) + 1 if finding else 0
        self._steps_in_a_row[condition.name] = count
        patience = 1 if condition.about_non_finite else self.settings.patience
        last = self._last_warning.get(condition.name)
        if count < patience or (last is not None and step <= last + self.settings.cooldown):
            return None
        self._last_warning[condition.name] = step
        steps = f" in {count} steps in a row" if count > 1 else ""
        return f"step {step}, {condition.name}: {finding}{steps}. Usually {condition.means}. Advice: {condition.advice}"

    def action(self, alerts: Iterable[Alert]) -> str:
        """Return what the settings want done about a step's warnings: warn, pause or stop."""
        return self.settings.action if any(alert.condition in self.settings.act_on for alert in alerts) else "warn"


def open_watch(run_dir: Path, settings: WatchConfig, *, has_teacher: bool) -> Watch:
    """Return the watch of a run that goes on behind the last row of its metrics.jsonl. Raises RunDirectoryError where
    that file is damaged."""
    watch, path = Watch(settings, has_teacher=has_teacher), run_dir / METRICS
    for row in read_metrics(path):
        watch.update(row | {"step": step_of_row(row, path)})
    return watch


def record_alerts(run_dir: Path, alerts: Iterable[Alert], action: str) -> None:
    """Append warnings to watch.jsonl, a line each: ``step``, ``time`` (unix seconds), ``condition``, ``action`` (to
    follow), ``text``. Raises RunDirectoryError."""
    for alert in alerts:
        row = {"step": alert.step, "time": time.time(), "condition": alert.condition}
        append_row(run_dir / WARNINGS, row | {"action": action, "text": alert.text})
