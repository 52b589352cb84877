"""The meaning of every metric, in one table: docs/metrics.md is generated from it, and the report explains its charts
by it (:mod:`dasd_megatron.observability.metric_pages`).

``python -m dasd_megatron.observability.metric_docs > docs/metrics.md`` writes the page again. Tests compare the table
with the metrics that runs write.
"""

from __future__ import annotations

import runpy
from dataclasses import dataclass

from dasd_megatron.observability.metric_files import EVALUATION, METRICS, WARM_START


@dataclass(frozen=True)
class Metric:
    """The documentation of one metric."""

    name: str
    """It may hold ``<k>`` for a number, and ``<name>`` for a name of the user's choice."""
    unit: str
    meaning: str
    healthy: str = ""
    """The range to expect."""
    action: str = ""
    """Advice for values outside that range."""
    when: str = ""
    """The condition under which a run writes the metric; empty: every line has it."""


_RESPONSE_HEALTH = [
    Metric("health/length_p10", "tokens", "a tenth of the responses is shorter", "steady", "see response/length_mean"),
    Metric("health/length_p50", "tokens", "median length of a response", "steady", "see response/length_mean"),
    Metric("health/length_p90", "tokens", "a tenth of the responses is longer", "steady", "see response/length_mean"),
    Metric(
        "health/epistemic_per_100",
        "words per 100 tokens",
        "voiced doubt: health.epistemic_words",
        "steady",
        "falls to 0: the policy has stopped to weigh alternatives; see entropy/mean",
    ),
    Metric(
        "health/repetition",
        "share",
        "n-grams of a response that stood in it before",
        "steady",
        "rises: loops; read rollouts",
    ),
    Metric(
        "health/repeated_run_mean",
        "tokens",
        "longest repeated stretch, mean over responses",
        "steady",
        "rises: loops; read rollouts",
    ),
    Metric(
        "health/repeated_run_max",
        "tokens",
        "longest repeated stretch of any response",
        "steady",
        "rises: loops; read rollouts",
    ),
    Metric(
        "health/correction_phrase_share",
        "share",
        "responses with one of health.correction_phrases",
        "steady",
        "see health/self_correction_share",
    ),
    Metric(
        "health/self_correction_share",
        "share",
        "responses that change a result that they had written",
        "steady",
        "falls to 0: see entropy/mean",
    ),
    Metric(
        "health/distinct_answers",
        "answers per problem",
        "different answers among a problem's samples",
        "above 1",
        "1: nothing to tell samples apart by",
    ),
    Metric(
        "health/distinct_paths",
        "texts per problem",
        "different texts among a problem's samples",
        "near the number of samples",
        "falls: see entropy/mean",
    ),
    Metric(
        "health/distinct_correct_paths",
        "texts per problem",
        "different right texts among a problem's samples",
        "rises with accuracy",
        "falls while accuracy rises: Pass@k will",
    ),
    Metric(
        "health/calibration_error",
        "share",
        "gap between confidence per token and accuracy, over ten bins",
        "steady",
        "compare it with itself alone",
    ),
    Metric(
        "health/step_accuracy",
        "share",
        "right steps of those in the worked solution",
        "rises with accuracy",
        "falls while accuracy rises: answers without reasoning",
        when="the steps of the task can be checked",
    ),
    Metric(
        "health/first_wrong_step",
        "steps",
        "place of the first wrong step, from 1, over responses that have one",
        "rises",
        "see health/step_accuracy",
        when="the steps of the task can be checked",
    ),
    Metric(
        "measure/<name>",
        "your own",
        "mean of a number that verify.measures gives, over the responses that have it",
        when="verify.measures is set",
    ),
]


def _health(kind: str) -> list[Metric]:
    """Return the metrics of reasoning health; ``kind``: entropy in training, nll in evaluations. docs/health.md has the
    formulas."""
    place = "entropy" if kind == "entropy" else "-log-prob of the sampled token"
    return [
        Metric(
            f"health/{kind}_decile_<k>",
            "nats",
            f"mean {place} in the k-th tenth of a response",
            "steady",
            "falls everywhere: see entropy/mean",
        ),
        Metric(
            f"health/{kind}_from_<k>",
            "nats",
            f"mean {place} at positions from k on, up to the next such metric",
            "steady",
            "as its deciles",
        ),
        Metric(
            f"health/{kind}_auroc",
            "0 to 1",
            f"chance that the mean {place} of a wrong response is above that of a right one",
            "above 0.5",
            "at 0.5 doubt says nothing about being right",
            when="some responses are right and some wrong",
        ),
        *_RESPONSE_HEALTH,
    ]


_STEP = [
    Metric("step", "steps", "training step, counted from 1"),
    Metric("time", "unix seconds", "when the line was written"),
    Metric("weight_version", "name", "weights that the first rollout of the step began with"),
    Metric(
        "reward/mean",
        "reward",
        "mean reward of the step's rollouts",
        "rises",
        "see reward/accuracy; with verify.reward read the rollouts",
    ),
    Metric(
        "reward/std",
        "reward",
        "standard deviation over the step's rollouts",
        "above 0",
        "0: all rollouts fare alike, and the verifier teaches nothing: other problems",
    ),
    Metric(
        "reward/accuracy",
        "share",
        "rollouts whose reward is above 0",
        "0.2 to 0.8, rising",
        "under 0.1: warm-start, or easier problems; over 0.95: harder problems; falling: lower optimizer.lr or "
        "algorithm.beta",
    ),
    Metric(
        "reward/groups_all_correct",
        "share of groups",
        "groups whose rollouts are all right; their group-relative advantage is 0",
        "under 0.5",
        "harder problems, or rollout.filter=dasd_megatron.rollout.filters:rewards_differ where it is worth the extra "
        "rollouts",
    ),
    Metric(
        "reward/groups_all_wrong",
        "share of groups",
        "groups whose rollouts are all wrong; their group-relative advantage is 0",
        "under 0.5",
        "warm-start, easier problems, or more batch.samples_per_group",
    ),
    Metric(
        "response/length_mean",
        "tokens",
        "mean number of sampled tokens of a response",
        "steady, or rising with accuracy",
        "exploding without accuracy: read rollouts for repetition; lower algorithm.beta or optimizer.lr",
    ),
    Metric(
        "response/length_max",
        "tokens",
        "longest response of the step",
        "under rollout.max_new_tokens",
        "see response/truncated_share",
    ),
    Metric(
        "response/truncated_share",
        "share",
        "responses that ended at rollout.max_new_tokens",
        "under 0.1",
        "raise rollout.max_new_tokens, or set verify.truncated_is_wrong=true so that endless answers do not pay",
    ),
    Metric(
        "verify/timeouts",
        "rollouts",
        "rollouts whose grading ran out of time and that count as wrong",
        "0",
        "raise verify.timeout_seconds or verify.workers; read the answers concerned",
    ),
    Metric(
        "entropy/mean",
        "nats per token",
        "mean entropy H of the student's next-token distribution, over the whole vocabulary",
        "slow fall; over a tenth of its start",
        "collapsing: lower optimizer.lr, or algorithm.name=dasd with a larger algorithm.rho; rising without end: "
        "lower algorithm.beta",
    ),
    Metric(
        "entropy/pushed",
        "nats per token",
        "mean entropy of the tokens with omega < 0",
        "above entropy/mean under dasd",
        "below it: check algorithm.quantile_side",
        when="a token is pushed",
    ),
    Metric(
        "entropy/pulled",
        "nats per token",
        "mean entropy of the tokens with omega > 0",
        "below entropy/mean under dasd",
        "above it: check algorithm.quantile_side",
        when="a token is pulled",
    ),
    Metric(
        "credit/pushed_share",
        "share of tokens",
        "tokens with omega < 0, pushed away from the teacher",
        "up to algorithm.rho under dasd, less where the policy is certain; 0 under grpo and opsd, 1 under reversed",
        "0 under dasd: no token is more uncertain than algorithm.entropy_floor, so the teacher only pulls",
    ),
    Metric(
        "credit/omega_mean",
        "-1 to 1",
        "mean direction weight omega",
        "steady",
        "a drift to -1 or 1: see credit/delta_mean",
    ),
    Metric(
        "credit/omega_std",
        "-1 to 1",
        "standard deviation of omega over tokens",
        "above 0",
        "0: routing is off; see credit/delta_abs_mean",
    ),
    Metric(
        "credit/omega_min",
        "-1 to 1",
        "smallest omega of the step",
        "-1 to 0",
        "-1 everywhere: gaps saturate; raise algorithm.scale_floor",
    ),
    Metric(
        "credit/omega_max",
        "-1 to 1",
        "largest omega of the step",
        "0 to 1",
        "1 everywhere: gaps saturate; raise algorithm.scale_floor",
    ),
    Metric(
        "teacher/absent_share",
        "share of rollouts",
        "rollouts without a teacher: they have no source of teacher.privileged, and learn from the verifier alone",
        "0 with solution or answer; with peer alone, those of groups that are all wrong, and right ones that are alone",
        "over watch.absent_share: easier problems, more batch.samples_per_group, or a further source behind the others",
        "for algorithms with a teacher",
    ),
    *(
        Metric(
            f"teacher/{source}_share",
            "share of rollouts",
            f"rollouts whose teacher is shown {what}",
            "steady; with teacher/absent_share they add up to 1",
            "0: the sources before it in teacher.privileged are always there, or it never is",
            f"with {source} in teacher.privileged",
        )
        for source, what in (
            ("solution", "the reference solution"),
            ("hint", "the first part of the reference solution"),
            ("answer", "the final answer"),
            ("peer", "a right response of the same group"),
            ("feedback", "the response with the reward function's feedback on it"),
            ("unpaired", "another problem with its solution"),
        )
    ),
    Metric(
        "credit/delta_mean",
        "nats per token",
        "mean gap delta = log q - log p of the sampled tokens, teacher minus student",
        "near 0",
        "strongly negative: the teacher finds the student's tokens unlikely; check teacher.template and "
        "teacher.privileged",
        when="a sample has a teacher",
    ),
    Metric(
        "credit/delta_abs_mean",
        "nats per token",
        "mean size of the gap",
        "0.01 to 1, larger than rollout/log_prob_diff_mean",
        "near 0: the privileged text has no effect; check that problems have solutions, and teacher.template",
        when="a sample has a teacher",
    ),
    Metric(
        "credit/delta_bar_abs_mean",
        "scales",
        "mean size of the gap divided by its scale",
        "under 3",
        "large: a few outliers rule; raise algorithm.scale_floor",
        when="a sample has a teacher",
    ),
    Metric(
        "credit/tau_mean",
        "nats",
        "mean entropy threshold over rollouts; tokens above it are pushed",
        "falls with entropy/mean to algorithm.entropy_floor",
        "at the floor: few tokens are uncertain enough to be pushed; see entropy/mean",
    ),
    Metric(
        "credit/sigma_mean",
        "nats",
        "mean absolute deviation of the entropy within a rollout, mean over rollouts",
        "above 0",
        "tiny: all tokens of a response are equally uncertain, so that the router tells noise apart; see entropy/mean",
    ),
    Metric(
        "credit/advantage_abs_mean",
        "advantage",
        "mean size of the tokens' advantages, verifier and teacher together",
        "0.1 to 2",
        "near 0: nothing is learned; large: lower algorithm.beta",
    ),
    Metric(
        "rollout/kl",
        "nats per token",
        "estimate (k3) of KL(rollout policy || trainer), from the sampled tokens",
        "under 1e-3; more with rollout.max_staleness",
        "growing: stale weights or other numerics; rollout.max_staleness=0, loss.importance_sampling=token, the same "
        "dtype on both sides",
    ),
    Metric(
        "rollout/log_prob_diff_mean",
        "nats per token",
        "mean |log-prob of the rollout engine - log-prob of the trainer|",
        "under 1e-5 in float32, 0.05 in bfloat16",
        "as rollout/kl; a run stops over rollout.max_log_prob_diff",
    ),
    Metric(
        "rollout/log_prob_diff_max",
        "nats",
        "largest such difference",
        "under 1e-3 in float32, 2 in bfloat16",
        "as rollout/kl",
    ),
    Metric(
        "rollout/importance_mean",
        "ratio",
        "mean truncated importance weight",
        "0.9 to 1.1",
        "far from 1: as rollout/kl",
        when="loss.importance_sampling is not none",
    ),
    Metric(
        "rollout/importance_cut_share",
        "share of tokens",
        "importance weights that loss.importance_cap has lowered",
        "under 0.01",
        "as rollout/kl",
        when="loss.importance_sampling is not none",
    ),
    Metric(
        "rollout/rejected_share",
        "share of tokens",
        "tokens that loss.rejection or its veto has left out, alone or with their response",
        "under 0.1",
        "trainer and servers differ: as rollout/kl, or wider bounds",
        when="loss.rejection is not none, or loss.rejection_veto is set",
    ),
    Metric(
        "rollout/rejected_response_share",
        "share of responses",
        "responses of which no token is left",
        "under 0.1",
        "as rollout/rejected_share; long responses leave loss.rejection=sequence first",
        when="loss.rejection is not none, or loss.rejection_veto is set",
    ),
    Metric(
        "rollout/vetoed_share",
        "share of responses",
        "responses that loss.rejection_veto has left out",
        "under 0.01",
        "as rollout/kl",
        when="loss.rejection is not none, or loss.rejection_veto is set",
    ),
    Metric(
        "rollout/staleness_mean",
        "steps",
        "mean age of the weights that rollouts began with",
        "0; up to rollout.max_staleness",
        "lower rollout.max_staleness",
    ),
    Metric(
        "rollout/staleness_max",
        "steps",
        "largest such age",
        "up to rollout.max_staleness",
        "lower rollout.max_staleness",
    ),
    Metric(
        "rollout/mixed_share",
        "share",
        "rollouts whose tokens come from more than one version of the weights",
        "0; any with rollout.unfinished=retract",
        "rollout.unfinished=finish",
    ),
    Metric(
        "rollout/groups_drawn",
        "groups",
        "groups sampled for the step, those thrown away too",
        "batch.groups",
        "see the next two",
    ),
    Metric(
        "rollout/groups_filtered",
        "groups",
        "groups that rollout.filter has thrown away",
        "under batch.groups",
        "problems too easy or too hard for the policy: other problems, or no filter",
    ),
    Metric(
        "rollout/groups_restarted",
        "groups",
        "groups begun again because their server failed",
        "0",
        "read logs/rollout_server*.log, and the servers' memory",
    ),
    Metric(
        "update/skipped",
        "updates",
        "optimizer steps not applied, since logits or gradients were not finite",
        "0",
        "lower optimizer.lr; the first case is described in the log; over loss.max_skipped_steps in a row the run "
        "goes back",
    ),
    Metric(
        "update/loss",
        "loss",
        "surrogate loss; its gradient counts, its level says little",
        "finite",
        "NaN: see update/skipped",
        when="an update was applied",
    ),
    Metric(
        "update/clip_share",
        "share of tokens",
        "tokens that the clip of loss.surrogate acts on",
        "ppo: under 0.2; gspo: more is normal; cispo: under 0.01; 0 with one update a step",
        "lower optimizer.lr, or fewer batch.minibatches and batch.epochs",
        when="an update was applied",
    ),
    Metric(
        "update/grad_norm",
        "L2 norm",
        "norm of the whole gradient before clipping",
        "steady, spikes under ten times its median",
        "growing: lower optimizer.lr or optimizer.clip_grad",
        when="an update was applied",
    ),
    Metric(
        "update/lr",
        "learning rate",
        "learning rate of the last update",
        "follows the schedule",
        "",
        when="an update was applied",
    ),
    Metric(
        "update/kl_to_start",
        "nats per token",
        "estimate of KL(policy || starting model)",
        "under 0.5",
        "raise loss.kl_coef, or lower optimizer.lr",
        when="loss.kl_coef is above 0",
    ),
    Metric(
        "update/divergence",
        "nats per token",
        "divergence from the teacher as algorithm.divergence* define it, before the caps, over the tokens that have a "
        "teacher",
        "falls where pulled",
        "growing: lower algorithm.divergence_weight or algorithm.beta",
        when="algorithm.objective=distributional and a sample has a teacher",
    ),
    Metric(
        "update/capped_share",
        "share of tokens with a teacher",
        "pushed tokens whose divergence is over algorithm.divergence_cap, and pulled ones over divergence_pull_cap",
        "under 0.1",
        "lower algorithm.beta or algorithm.rho; raise a divergence_pull_cap",
        when="algorithm.objective=distributional and a sample has a teacher",
    ),
    Metric(
        "teacher/switch_on",
        "0 or 1",
        "whether the teacher acts at this step",
        "0 in the first algorithm.antisd_warmup_steps, then mostly 1",
        "0 for good: the teacher has become certain; see teacher/entropy_mean",
        when="algorithm.name=antisd",
    ),
    Metric(
        "schedule/beta",
        "weight",
        "value of algorithm.beta at this step",
        "follows algorithm.beta_schedule",
        when="algorithm.beta_schedule.style is not constant",
    ),
    Metric(
        "schedule/rho",
        "share of tokens",
        "value of algorithm.rho at this step",
        "follows algorithm.rho_schedule",
        when="algorithm.rho_schedule.style is not constant",
    ),
    Metric(
        "schedule/divergence_weight",
        "weight",
        "value of algorithm.divergence_weight at this step",
        "follows algorithm.divergence_weight_schedule",
        when="algorithm.divergence_weight_schedule.style is not constant",
    ),
    Metric(
        "schedule/rlsd_lambda",
        "share",
        "value of algorithm.rlsd_lambda at this step",
        "follows algorithm.rlsd_lambda_schedule",
        when="algorithm.rlsd_lambda_schedule.style is not constant",
    ),
    Metric(
        "precision/fp8_log_prob_diff_mean",
        "nats per token",
        "mean |log-prob under FP8 - under bf16| of some rollouts",
        "under precision.fp8_max_diff",
        "precision.bf16_first_layers and bf16_last_layers, or another precision.fp8",
        when="precision.fp8 is not none, every precision.fp8_check_every steps",
    ),
    Metric(
        "precision/fp8_log_prob_diff_max",
        "nats",
        "largest such difference",
        "under 10 times precision.fp8_max_diff",
        "as the mean",
        when="precision.fp8 is not none, every precision.fp8_check_every steps",
    ),
    Metric(
        "throughput/tokens_per_second",
        "tokens per second",
        "tokens of prompts and responses divided by seconds/total",
        "steady",
        "falling: look which phase's seconds grow",
    ),
    Metric(
        "seconds/rollout",
        "seconds",
        "waiting for rollouts, without verification",
        "under two thirds of seconds/total",
        "more servers, rollout.max_staleness above 0 to overlap, rollout.over_sampling against stragglers",
    ),
    Metric(
        "seconds/verify",
        "seconds",
        "grading, as far as rollouts waited for it",
        "under a tenth of seconds/total",
        "verify.workers",
    ),
    Metric(
        "seconds/score",
        "seconds",
        "log-probs and entropy of teacher and starting model, and of the student where the update does not score it",
        "under seconds/update",
        "batch.packing=true, a larger batch.micro_batch_size",
    ),
    Metric(
        "seconds/route",
        "seconds",
        "advantages and direction weights",
        "under 0.01 of seconds/total",
        "report it: it should be small",
    ),
    Metric(
        "seconds/update",
        "seconds",
        "forward, backward and optimizer",
        "the largest after rollouts",
        "batch.packing=true, less recompute",
    ),
    Metric(
        "seconds/total",
        "seconds",
        "the whole step, without sync and checkpoint",
        "steady",
        "look which phase's seconds grow",
    ),
    Metric(
        "evaluation/failures",
        "count",
        "evaluations that the servers failed at before this step, since the process began; the run goes on without "
        "their results",
        "0",
        "look at the warning about the first one and at the server's log; evaluate the checkpoint with dasd evaluate",
    ),
    Metric(
        "seconds/sync",
        "seconds",
        "handing the weights to the servers, after the step before this one",
        "under a tenth of seconds/total",
        "rollout.weight_sync=distributed",
    ),
    Metric(
        "seconds/checkpoint",
        "seconds",
        "how long checkpoints held up training since the step before",
        "near 0 with checkpoint.async_save",
        "checkpoint.async_save=true, faster storage, or a larger checkpoint.every",
    ),
    Metric(
        "seconds/release",
        "seconds",
        "moving the trainer's state to host memory since the step before, once or more",
        "memory/released at the speed of the bus: 0.02 to 0.1 s a GB",
        "longer than that: processes far from their GPU (NUMA)",
        when="backend.offload is not none",
    ),
    Metric(
        "seconds/restore",
        "seconds",
        "moving it back, with the wait for memory that servers give back; part of seconds/total",
        "as seconds/release",
        "longer: servers are slow to give their memory back; see also seconds/release",
        when="backend.offload is not none",
    ),
    Metric(
        "memory/released",
        "GB",
        "most memory of rank 0's device that was left to the servers since the step before, 10^9 bytes",
        "what `dasd plan` says of the trainer's state",
        "less: see backend.offload",
        when="backend.offload is not none",
    ),
    Metric(
        "seconds/health",
        "seconds",
        "reasoning health of the step's responses",
        "under 0.01 of seconds/total",
        "a larger health.every",
    ),
    Metric(
        "teacher/entropy_mean",
        "nats per token",
        "mean entropy of the teacher's next-token distribution, over the tokens that have a teacher",
        "under entropy/mean: what the teacher sees makes it more certain",
        "over entropy/mean: the privileged text confuses the teacher; check teacher.template",
        when="a sample has a teacher",
    ),
    Metric(
        "credit/pushed_delta_mean",
        "nats per token",
        "mean gap of the tokens that are pushed away, weighted by |omega|",
        "over -1",
        "far below 0: pushing raises tokens that the teacher all but rules out, so the policy does not know what the "
        "teacher knows; warm-start longer, lower algorithm.beta, write algorithm.push_gate=teacher_entropy",
        when="a token is pushed",
    ),
    Metric(
        "credit/pushed_log_prob_mean",
        "nats per token",
        "mean log-prob of the tokens that are pushed away from the teacher",
        "steady",
        "falls without end: lower algorithm.beta or algorithm.rho, loss.kl_coef above 0",
        when="a token is pushed",
    ),
    Metric(
        "watch/warnings",
        "warnings",
        "warnings of the watch in this step; watch.jsonl has them",
        "0",
        "read them, and what the watch's documentation says about each",
    ),
    *_health("entropy"),
]

_WARM_START = [
    Metric("step", "steps", "step of supervised fine-tuning, counted from 1"),
    Metric(
        "loss",
        "nats per token",
        "cross-entropy of the worked solutions, or of the responses of warm_start.path by their weights",
        "falls",
        "flat or rising: lower warm_start.lr",
        when="warm_start.steps is above 0",
    ),
    Metric(
        "lr",
        "learning rate",
        "learning rate of the step",
        "follows the schedule",
        "",
        when="warm_start.steps is above 0",
    ),
    Metric(
        "grad_norm",
        "L2 norm",
        "norm of the gradient before clipping",
        "steady",
        "growing: lower warm_start.lr",
        when="warm_start.steps is above 0",
    ),
]

_EVALUATION = [
    Metric("step", "steps", "training step whose weights were evaluated; 0: before the first"),
    Metric("label", "name", "before, step or after"),
    Metric("weight_version", "name", "weights that answered"),
    Metric("num_problems", "problems", "held-out problems"),
    Metric("num_samples", "samples", "responses to each problem"),
    Metric(
        "avg@<k>",
        "share",
        "right responses among k per problem, averaged over problems",
        "rises with reward/accuracy",
        "training accuracy alone rises: overfitting; more problems, or stop earlier",
    ),
    Metric(
        "pass@<k>",
        "share",
        "problems of which at least one of k responses is right, unbiased over the samples",
        "does not fall while avg rises",
        "falls: the policy loses variety; see entropy/mean; lower optimizer.lr",
    ),
    Metric(
        "maj@<k>",
        "share",
        "problems whose most frequent answer among k is right",
        "above avg",
        "below avg: answers scatter or share one mistake; read the samples",
    ),
    Metric("response/length_mean", "tokens", "mean number of sampled tokens of a response", "steady", "as in training"),
    Metric(
        "nll_mean",
        "nats per token",
        "mean -log-prob of the sampled tokens",
        "falls slowly",
        "near 0: the policy is deterministic",
    ),
    Metric(
        "truncated_share",
        "share",
        "responses that ended at the limit of tokens",
        "under 0.1",
        "raise rollout.max_new_tokens",
    ),
    Metric("timeouts", "responses", "responses whose grading ran out of time", "0", "raise verify.timeout_seconds"),
    Metric("seconds", "seconds", "duration of the evaluation", "", ""),
    *_health("nll"),
]

FILES = {METRICS: _STEP, WARM_START: _WARM_START, EVALUATION: _EVALUATION}


if __name__ == "__main__":
    # The page is written by the module that reads this table, so it is started by name instead of being imported here.
    runpy.run_module("dasd_megatron.observability.metric_pages", run_name="__main__")
