"""Sections of the configuration for what a run shows: loggers, reasoning health and the watch on training."""

from __future__ import annotations

from dataclasses import dataclass

from dasd_megatron.config.fields import setting

WATCH_CONDITIONS = (
    "entropy_low", "entropy_high", "accuracy_drop", "length", "mismatch", "rejected", "rewards_all_right",
    "rewards_all_wrong", "groups_filtered", "teacher_absent", "teacher_equals_student", "pushed_unlikely",
    "pushed_diverge", "non_finite",
)  # fmt: skip
"""Conditions that :class:`dasd_megatron.observability.watch.Watch` looks for."""


@dataclass
class LoggingConfig:
    """Files and services that get the numbers of a run."""

    tensorboard: bool = setting(True, "write TensorBoard events beside metrics.jsonl")
    save_rollouts_every: int = setting(
        1, "save all rollouts of every so many steps, for replay and the report; 0: never", low=0
    )
    inspect_rollouts: int = setting(
        4, "rollouts of each saved step whose per-token statistics are kept for the report", low=0
    )
    wandb: str = setting(
        "none",
        "none, offline (files in the run directory, for `wandb sync`) or online (WANDB_API_KEY): numbers for W&B",
        choices=("none", "offline", "online"),
    )
    wandb_project: str = setting("dasd", "project of the run in W&B")
    mlflow: bool = setting(False, "send the numbers to MLflow too")
    mlflow_uri: str | None = setting(
        None, "MLflow's tracking server, or a store of its own as file:/...; null: mlruns/ in the run directory"
    )
    mlflow_experiment: str = setting("dasd", "experiment of the run in MLflow")


@dataclass
class HealthConfig:
    """Words, n-grams and positions that reasoning health counts."""

    every: int = setting(
        1,
        "training steps between measurements of reasoning health, health/... in the metrics; 0: in evaluations only",
        low=0,
    )
    epistemic_words: list[str] = setting(
        [
            "wait", "hmm", "perhaps", "maybe", "possibly", "actually", "alternatively", "probably", "likely",
            "unlikely", "i think", "not sure", "unsure", "seems", "suppose", "let me check", "let me verify",
            "double check",
        ],
        "words and phrases of doubt, counted in health/epistemic_per_100; a phrase counts once. Case does not matter",
    )  # fmt: skip
    correction_phrases: list[str] = setting(
        [
            "wait", "actually", "no that's", "that's wrong", "that is wrong", "that's not right",
            "that is not right", "not correct", "incorrect", "mistake", "i was wrong", "on second thought",
            "let me redo", "let me recompute", "let me recalculate", "let me try again",
        ],
        "words and phrases that a response corrects itself with, for health/correction_phrase_share and "
        "health/self_correction_share",
    )  # fmt: skip
    repetition_ngram: int = setting(8, "tokens of an n-gram in health/repetition and health/repeated_run_...", low=1)
    position_bins: list[int] = setting(
        [16, 64, 256, 1024, 4096, 16384],
        "positions in the response at which a new bin of health/entropy_from_... begins, tokens; the first bin "
        "begins at 0",
    )


@dataclass
class WatchConfig:
    """Conditions that the watch on training looks for, and its action."""

    action: str = setting(
        "warn",
        "warn; pause: save a checkpoint and wait until the file watch.continue appears in the run directory; or "
        "stop: save a checkpoint and end with exit status 76",
        choices=("warn", "pause", "stop"),
    )
    act_on: list[str] = setting(
        ["entropy_low", "entropy_high", "accuracy_drop", "length", "mismatch", "pushed_diverge", "non_finite"],
        "conditions for which watch.action is taken; the others only warn. Known: " + ", ".join(WATCH_CONDITIONS),
    )
    ignore: list[str] = setting([], "conditions that are not looked for")
    patience: int = setting(5, "steps in a row in which a condition must hold; non_finite warns at once", low=1)
    cooldown: int = setting(50, "steps after a warning in which the same condition does not warn again", low=0)
    baseline_steps: int = setting(
        10, "steps whose mean is a level of a metric, with which later steps are compared", low=1
    )
    pause_timeout_seconds: float = setting(
        3600.0, "watch.action=pause: longest wait; then the run ends as with stop", low=1
    )
    entropy_low: float = setting(
        0.1, "entropy_low: share of its highest level so far that mean entropy is under", low=0, high=1
    )
    entropy_high: float = setting(
        3.0, "entropy_high: multiple of its first level that mean entropy is over, and by 0.5 nat at least", low=1
    )
    accuracy_drop: float = setting(
        0.3,
        "accuracy_drop: share of its highest level so far that accuracy has lost, and 10 points at least",
        low=0,
        high=1,
    )
    length_growth: float = setting(
        2.0, "length: multiple of its level before the last patience steps that the mean response length is over", low=1
    )
    truncated_share: float = setting(
        0.5,
        "length: or this share of responses, or more, ends at rollout.max_new_tokens; 0: that does not count",
        low=0,
        high=1,
    )
    mismatch_growth: float = setting(
        3.0,
        "mismatch: multiple of its lowest level so far that the mean difference between servers' and trainer's "
        "log-probs is over",
        low=1,
    )
    mismatch_floor: float = setting(0.03, "mismatch: differences up to this are left alone, nats a token", low=0)
    rejected_share: float = setting(
        0.5, "rejected: share of the tokens that loss.rejection leaves out, at least; above 0", above=0, high=1
    )
    saturated_share: float = setting(
        0.9, "rewards_all_right, rewards_all_wrong: share of groups, at least; above 0", above=0, high=1
    )
    filtered_share: float = setting(
        0.9,
        "groups_filtered: share of the groups drawn that rollout.filter refuses, at least; above 0",
        above=0,
        high=1,
    )
    absent_share: float = setting(
        0.9, "teacher_absent: share of rollouts without a teacher, at least; above 0", above=0, high=1
    )
    teacher_gap: float = setting(1e-3, "teacher_equals_student: mean |delta| of a token, at most, nats", low=0)
    pushed_gap: float = setting(
        2.0,
        "pushed_unlikely: the mean gap of tokens pushed away from the teacher, weighted by |omega|, is below minus "
        "this, nats",
        low=0,
    )
    pushed_drop: float = setting(
        2.0,
        "pushed_diverge: the mean log-prob of tokens pushed away from the teacher is under its highest level by "
        "more than this, nats",
        low=0,
    )
