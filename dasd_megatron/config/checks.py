"""The one place where a configuration is checked.

:func:`validate` walks :data:`CHECKS`, the bounds and choices that stand at the fields first. Every refusal is a
:class:`ConfigError` whose message is one line: the field, what is wrong with it, and what to write instead. Of several
faults the one that is found first is named, so the order of the checks is part of what users see.
"""

from __future__ import annotations

import datetime
import glob
import importlib.util
import json
import math
import operator
import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from dasd_megatron.algorithms.methods import METHODS, NO_GATE
from dasd_megatron.config.checks_rollout import (
    check_embedded_server,
    check_functions,
    check_memory_release,
    check_offload,
    check_servers,
    check_sglang_arguments,
    check_step_timeout,
    check_top_k,
    check_unfinished,
    check_weight_format,
    check_weight_sync,
)
from dasd_megatron.config.fields import Limits, limits_of, walk_fields
from dasd_megatron.config.schedules import ScheduleConfig
from dasd_megatron.config.schema import Config, RunConfig
from dasd_megatron.config.schema_backend import BackendConfig
from dasd_megatron.config.schema_observability import WATCH_CONDITIONS, HealthConfig, LoggingConfig, WatchConfig
from dasd_megatron.config.schema_rollout import DataConfig, EvaluationConfig, RolloutConfig, VerifyConfig
from dasd_megatron.config.schema_training import (
    PRIVILEGED_SOURCES,
    SCHEDULED_SETTINGS,
    AlgorithmConfig,
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyLossConfig,
    PrecisionConfig,
    TeacherConfig,
    WarmStartConfig,
)
from dasd_megatron.errors import ConfigError, enumerate_names
from dasd_megatron.losses.surrogates import REJECTIONS, SURROGATES

RESERVED_TEMPLATE_NAMES = (
    *("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"),
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "conversation", "chat_template", "continue_final_message", "tokenize", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
)
"""Names that ``data.chat_template_kwargs`` may not have: what the renderer gives a chat template, the tokenizer's
special tokens, and arguments of transformers' apply_chat_template that are no variables of a template."""


def validate(config: Config) -> None:
    """Refuse values out of range and fields that contradict each other, without a look at the disk.

    Raises:
        ConfigError: the first fault that :data:`CHECKS` find.
    """
    for check in CHECKS:
        check(config)


def check_fields(config: Config) -> None:
    """Refuse values that their own fields do not accept.

    All fields are looked at for one kind of fault before the next kind. Of several faults of one kind the first in the
    order of ``dasd train --help`` is named.
    """
    fields = [(name, operator.attrgetter(name)(config), limits_of(field)) for name, field in walk_fields(Config)]
    for fault_of in (_choice_fault, _finite_fault, _range_fault, _above_fault, _below_fault):
        for name, value, limits in fields:
            fault = fault_of(value, limits)
            if fault is not None:
                raise ConfigError(f"{name}={value}: {fault}")


def _choice_fault(value: Any, limits: Limits) -> str | None:
    return f"write one of {', '.join(limits.choices)}" if limits.choices and value not in limits.choices else None


def _finite_fault(value: Any, limits: Limits) -> str | None:
    return "must be a finite number" if isinstance(value, float) and not math.isfinite(value) else None


def _range_fault(value: Any, limits: Limits) -> str | None:
    low, high = limits.low, limits.high
    if value is None or ((low is None or value >= low) and (high is None or value <= high)):
        return None
    if low is not None and high is not None:
        return f"must be between {low:g} and {high:g}"
    return f"must be at least {low:g}" if high is None else f"must be at most {high:g}"


def _above_fault(value: Any, limits: Limits) -> str | None:
    if value is None or limits.above is None or value > limits.above:
        return None
    return f"must be above {limits.above}"


def _below_fault(value: Any, limits: Limits) -> str | None:
    if value is None or limits.below is None or value < limits.below:
        return None
    return f"must be below {limits.below}"


def check_model_path(model: ModelConfig) -> None:
    """Refuse model=hf without a path."""
    if model.path == "":
        raise ConfigError(
            "model.path is required with model=hf: give a Hugging Face directory or a Megatron checkpoint"
        )


def check_run_name(run: RunConfig) -> None:
    """Refuse names that cannot name a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", run.name):
        raise ConfigError(
            f"run.name={run.name!r}: use letters, digits, '.', '_' and '-' only, and no '.' in front, since it "
            "names a folder"
        )


def check_parallel(parallel: ParallelConfig) -> None:
    """Refuse features of tensor and pipeline parallelism where there is only one rank of it."""
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1: raise it, or write false"
        )
    if parallel.virtual_pipeline_model_parallel_size is not None and parallel.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "parallel.virtual_pipeline_model_parallel_size needs parallel.pipeline_model_parallel_size > 1: raise "
            "it, or write null"
        )


def check_backend(backend: BackendConfig) -> None:
    """Refuse Transformer Engine's layers on the CPU."""
    if backend.kind == "cpu" and backend.transformer_impl == "transformer_engine":
        raise ConfigError(
            "backend.transformer_impl=transformer_engine needs a GPU: set backend.kind=cuda, or write auto"
        )


def check_fp8(precision: PrecisionConfig, backend: BackendConfig) -> None:
    """Refuse FP8 without what it needs; the backend checks later that the GPU can do it."""
    name = f"precision.fp8={precision.fp8}"
    bf16_layers = precision.bf16_first_layers + precision.bf16_last_layers
    if precision.fp8 == "none":
        if bf16_layers:
            raise ConfigError(
                "precision.bf16_first_layers and bf16_last_layers say which layers FP8 leaves out, and "
                "precision.fp8=none uses none: choose a recipe, or leave them out"
            )
        return
    if backend.kind != "cuda" or backend.transformer_impl == "local":
        raise ConfigError(
            f"{name} needs a GPU and Transformer Engine: write backend.kind=cuda "
            "backend.transformer_impl=transformer_engine, or precision.fp8=none"
        )
    if precision.params_dtype != "bf16":
        raise ConfigError(
            f"{name} needs precision.params_dtype=bf16 for all that is not FP8: write it, or precision.fp8=none"
        )
    if precision.fp8 == "delayed" and bf16_layers:
        raise ConfigError(
            f"{name} scales all layers together: write 0 for precision.bf16_first_layers and "
            "precision.bf16_last_layers, or tensorwise"
        )


def check_context_parallel(parallel: ParallelConfig, backend: BackendConfig) -> None:
    """Refuse context parallelism without Transformer Engine's attention on GPUs."""
    if parallel.context_parallel_size > 1 and (backend.kind == "cpu" or backend.transformer_impl == "local"):
        raise ConfigError(
            f"parallel.context_parallel_size={parallel.context_parallel_size} needs Transformer Engine's attention on "
            "GPUs: set backend.kind=cuda and backend.transformer_impl=transformer_engine, or write 1"
        )


def check_pipeline_ends(parallel: ParallelConfig) -> None:
    """Refuse layer counts of the first and the last stage without pipeline parallelism."""
    for name in ("first_pipeline_num_layers", "last_pipeline_num_layers"):
        if getattr(parallel, name) is not None and parallel.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"parallel.{name} needs parallel.pipeline_model_parallel_size > 1: raise it, or write null"
            )


def check_overlap(parallel: ParallelConfig, optimizer: OptimizerConfig) -> None:
    """Refuse overlapped communication without what it builds on."""
    if parallel.overlap_param_gather and not (optimizer.distributed and parallel.overlap_grad_reduce):
        raise ConfigError(
            "parallel.overlap_param_gather=true needs optimizer.distributed=true and "
            "parallel.overlap_grad_reduce=true: set them, or write false"
        )
    if parallel.bucket_size is not None and not parallel.overlap_grad_reduce:
        raise ConfigError(
            f"parallel.bucket_size={parallel.bucket_size} is for parallel.overlap_grad_reduce=true: set that, or "
            "write null"
        )


def check_recompute(precision: PrecisionConfig) -> None:
    """Refuse to recompute modules other than the attention core and the MLP."""
    modules = precision.recompute_modules
    if not modules or set(modules) - {"core_attn", "mlp"}:
        raise ConfigError(f"precision.recompute_modules={modules}: write [mlp], [core_attn] or [mlp,core_attn]")


def check_health(health: HealthConfig) -> None:
    """Refuse phrases without a word, and positions that do not ascend."""
    for name in ("epistemic_words", "correction_phrases"):
        for phrase in getattr(health, name):
            if not re.search(r"\w", phrase):
                raise ConfigError(f"health.{name}: {phrase!r} holds no word: leave it out")
    bins = health.position_bins
    if bins != sorted(set(bins)) or any(edge < 1 for edge in bins):
        raise ConfigError(f"health.position_bins={bins}: write ascending positions of at least 1, like [16,64,256]")


def check_watch(watch: WatchConfig) -> None:
    """Refuse conditions that are not watched for."""
    for name in ("act_on", "ignore"):
        for condition in getattr(watch, name):
            if condition not in WATCH_CONDITIONS:
                raise ConfigError(
                    f"watch.{name}: {condition!r} is not watched for: write some of {', '.join(WATCH_CONDITIONS)}"
                )


def check_batch(batch: BatchConfig, parallel: ParallelConfig) -> None:
    """Refuse batches that replicas, minibatches or pipeline stages cannot share evenly."""
    share = parallel.data_parallel_size * batch.minibatches
    if batch.groups % share:
        raise ConfigError(
            f"batch.groups={batch.groups} does not divide into {parallel.data_parallel_size} replicas x "
            f"{batch.minibatches} minibatches: write a multiple of {share}"
        )
    sequences = batch.groups // share * batch.samples_per_group
    if parallel.virtual_pipeline_model_parallel_size is not None and sequences < parallel.pipeline_model_parallel_size:
        raise ConfigError(
            "batch.groups: interleaved pipelining needs at least as many sequences in a minibatch as pipeline stages"
        )


DIVERGENCE_SETTINGS = ("divergence_pull_cap", "divergence_entry_clip", "divergence_top_k")
"""Settings of algorithm, null by default, that the distributional objective alone reads."""


def check_algorithm(algorithm: AlgorithmConfig, batch: BatchConfig, loss: PolicyLossConfig) -> None:
    """Refuse methods whose signal is always 0, and objectives that they or the loss cannot serve."""
    if batch.samples_per_group == 1 and algorithm.verifier_weight > 0:
        raise ConfigError(
            "batch.samples_per_group=1 leaves the verifier advantage always 0: write 2 or more, or "
            "algorithm.verifier_weight=0"
        )
    has_direction = METHODS[algorithm.name].has_direction
    if algorithm.verifier_weight == 0 and not has_direction:
        raise ConfigError(
            f"algorithm.name={algorithm.name} with algorithm.verifier_weight=0 trains on nothing: write "
            "algorithm.verifier_weight=1"
        )
    distributional = algorithm.is_distributional
    teacher_weight = "divergence_weight" if distributional else "beta"
    rises = teacher_weight in algorithm.schedules and algorithm.schedules[teacher_weight].final > 0
    if algorithm.verifier_weight == 0 and getattr(algorithm, teacher_weight) == 0 and not rises:
        raise ConfigError(
            f"algorithm.name={algorithm.name} with algorithm.verifier_weight=0 and algorithm.{teacher_weight}=0 "
            "trains on nothing: raise one of them"
        )
    if distributional and not has_direction:
        directed = enumerate_names((method.name for method in METHODS.values() if method.has_direction), "or")
        raise ConfigError(
            f"algorithm.objective=distributional has no direction under algorithm.name={algorithm.name}: "
            f"write {directed}, or objective=sampled"
        )
    for name in DIVERGENCE_SETTINGS:
        if not distributional and getattr(algorithm, name) is not None:
            raise ConfigError(
                f"algorithm.{name} is about a divergence, which algorithm.objective=sampled does not have: write "
                "null, or objective=distributional"
            )
    if algorithm.push_gate != NO_GATE and not METHODS[algorithm.name].pushes_away:
        pushing = enumerate_names((method.name for method in METHODS.values() if method.pushes_away), "or")
        raise ConfigError(
            f"algorithm.push_gate={algorithm.push_gate} has no pushes to scale under algorithm.name={algorithm.name}: "
            f"write {pushing}, or push_gate={NO_GATE}"
        )
    if distributional and not loss.fused_linear:
        raise ConfigError(
            "algorithm.objective=distributional re-projects the teacher's hidden states: write "
            "loss.fused_linear=true, or objective=sampled"
        )


def check_schedules(algorithm: AlgorithmConfig) -> None:
    """Refuse final values that no step reaches or that the setting does not take, and schedules of settings that
    nothing reads."""
    method = METHODS[algorithm.name]
    is_read = {
        "beta": method.has_direction and not algorithm.is_distributional,
        "rho": method.routes_by_entropy,
        "divergence_weight": algorithm.is_distributional,
        "rlsd_lambda": method.blends_verifier,
    }
    for name in SCHEDULED_SETTINGS:
        schedule: ScheduleConfig = getattr(algorithm, f"{name}_schedule")
        if not schedule.changes and schedule.final:
            raise ConfigError(
                f"algorithm.{name}_schedule.final={schedule.final:g} does nothing under style={schedule.style}: write "
                "style=linear or cosine"
            )
    for name, schedule in algorithm.schedules.items():
        if name in ("rho", "rlsd_lambda") and schedule.final > 1:
            raise ConfigError(f"algorithm.{name}_schedule.final={schedule.final}: must be between 0 and 1")
        if not is_read[name]:
            raise ConfigError(
                f"algorithm.{name}_schedule.style={schedule.style} does nothing, since algorithm.name={algorithm.name} "
                f"with algorithm.objective={algorithm.objective} does not read algorithm.{name}: write constant"
            )


def check_teacher(teacher: TeacherConfig, verify: VerifyConfig, batch: BatchConfig) -> None:
    """Refuse lists of privileged texts that are empty, or that name a source twice or one that is not there."""
    given, known = teacher.privileged, ", ".join(PRIVILEGED_SOURCES)
    if not isinstance(given, list) or not given:
        raise ConfigError(f"teacher.privileged={given}: write a list of some of {known}, like [solution]")
    for source in given:
        if source not in PRIVILEGED_SOURCES:
            raise ConfigError(f"teacher.privileged: {source!r} is no source of a text: write some of {known}")
        if given.count(source) > 1:
            raise ConfigError(f"teacher.privileged names {source} twice: write each source once")
    if given == ["peer"] and batch.samples_per_group == 1:
        raise ConfigError(
            "teacher.privileged=[peer] shows other responses of the group, and batch.samples_per_group=1 leaves none: "
            "write 2 or more, or a further source"
        )
    if "feedback" in given and verify.reward is None:
        raise ConfigError(
            "teacher.privileged has feedback, which verify.reward gives beside the number: name a function that "
            "returns (number, text), or leave feedback out"
        )


def check_teacher_weights(teacher: TeacherConfig, loss: PolicyLossConfig) -> None:
    """Refuse a mixture of two models where logits are materialised."""
    if teacher.weights == "trust_region" and not loss.fused_linear:
        raise ConfigError(
            "teacher.weights=trust_region mixes two models by their hidden states: write loss.fused_linear=true, or "
            "other weights"
        )


def check_policy_loss(loss: PolicyLossConfig) -> None:
    """Refuse settings that the surrogate or the rejection does not take, and a veto above the bound on tokens."""
    if loss.dual_clip is not None and not SURROGATES[loss.surrogate].takes_dual_clip:
        takers = enumerate_names((name for name, record in SURROGATES.items() if record.takes_dual_clip), "or")
        raise ConfigError(
            f"loss.dual_clip={loss.dual_clip:g} does nothing under loss.surrogate={loss.surrogate}: write null, or "
            f"surrogate={takers}"
        )
    if loss.rejection not in REJECTIONS:
        for name in ("rejection_low", "rejection_high"):
            if getattr(loss, name) is not None:
                raise ConfigError(
                    f"loss.{name}={getattr(loss, name):g} does nothing under loss.rejection={loss.rejection}: write "
                    f"loss.rejection={enumerate_names(REJECTIONS, 'or')}, or null"
                )
        return
    bounds = REJECTIONS[loss.rejection].bounds
    low = bounds.low if loss.rejection_low is None else loss.rejection_low
    high = bounds.high if loss.rejection_high is None else loss.rejection_high
    if low == high:
        raise ConfigError(
            f"loss.rejection_low={low:g} and loss.rejection_high={high:g} reject nearly everything: lower the one or "
            "raise the other"
        )
    if REJECTIONS[loss.rejection].is_by_token and loss.rejection_veto is not None and loss.rejection_veto > low:
        raise ConfigError(
            f"loss.rejection_veto={loss.rejection_veto:g} leaves out whole responses for tokens that "
            f"loss.rejection_low={low:g} keeps: write at most {low:g}"
        )


def check_warm_start(warm_start: WarmStartConfig, parallel: ParallelConfig) -> None:
    """Refuse a file of examples beside settings that leave it unread or that it leaves unread, and batches of the warm
    start that replicas or pipeline stages cannot share."""
    if warm_start.path is not None and not warm_start.steps:
        raise ConfigError(
            f"warm_start.path={warm_start.path} is not read with warm_start.steps=0: write how many steps to take, or "
            "leave it out"
        )
    if not warm_start.steps:
        return
    if warm_start.path is not None and warm_start.privileged_share is not None:
        raise ConfigError(
            f"warm_start.privileged_share={warm_start.privileged_share} says how often the training problems show "
            "their solution, and the rows of warm_start.path have prompts of their own: leave one of them out"
        )
    if warm_start.batch_size % parallel.data_parallel_size:
        raise ConfigError(
            f"warm_start.batch_size={warm_start.batch_size}: write a multiple of parallel.data_parallel_size"
        )
    sequences = warm_start.batch_size // parallel.data_parallel_size
    if parallel.virtual_pipeline_model_parallel_size is not None and sequences < parallel.pipeline_model_parallel_size:
        least = parallel.data_parallel_size * parallel.pipeline_model_parallel_size
        raise ConfigError(
            f"warm_start.batch_size={warm_start.batch_size}: interleaved pipelining needs at least as many "
            f"examples on each replica as pipeline stages: write at least {least}"
        )


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Refuse a least learning rate above the highest."""
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}: lower it")


def check_evaluation(evaluation: EvaluationConfig, rollout: RolloutConfig) -> None:
    """Refuse evaluation without servers, and more tries in Pass@k than there are samples."""
    if rollout.replay is not None and (evaluation.before or evaluation.after or evaluation.every):
        raise ConfigError(
            "rollout.replay starts no server to evaluate with: write evaluation.before=false evaluation.after=false "
            "evaluation.every=0"
        )
    for k in evaluation.ks:
        if not 1 <= k <= evaluation.samples:
            raise ConfigError(
                f"evaluation.ks: Pass@{k} needs 1 <= k <= evaluation.samples={evaluation.samples}: raise "
                "samples or drop it"
            )


def check_tiny_model(model: ModelConfig, rollout: RolloutConfig) -> None:
    """Refuse sequences that are longer than the model that is made in code can read."""
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if model.path is None and not model.architecture and model.tiny.max_position_embeddings < longest:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} exceed "
            f"model.tiny.max_position_embeddings={model.tiny.max_position_embeddings}: lower them or raise it"
        )


def check_nemo_skills(evaluation: EvaluationConfig) -> None:
    """Refuse NeMo-Skills without its interpreter."""
    if evaluation.nemo_skills != "none" and evaluation.nemo_skills_python is None:
        raise ConfigError(
            f"evaluation.nemo_skills={evaluation.nemo_skills} runs in an environment of its own: name its interpreter "
            "in evaluation.nemo_skills_python"
        )


def check_data(data: DataConfig, evaluation: EvaluationConfig) -> None:
    """Refuse problem sets that are named in no way or in two, and generated ones without a size."""
    for name, source in (("train", data.train), ("heldout", data.heldout)):
        if evaluation.benchmarks and source.path is None and source.generator is None:
            # The benchmarks are evaluated. A run that wants to train without data is refused when the data is read.
            continue
        if (source.path is None) == (source.generator is None):
            raise ConfigError(
                f"data.{name}: give either data.{name}.path or data.{name}.generator, and not both; dasd evaluate "
                "needs neither with evaluation.benchmarks=[...]"
            )
        if source.size is not None and source.size < 1:
            raise ConfigError(f"data.{name}.size={source.size}: must be at least 1")
        if source.generator is not None and source.size is None:
            raise ConfigError(
                f"data.{name}.size is required with data.{name}.generator: write how many problems to generate"
            )


def check_date(data: DataConfig) -> None:
    """Refuse a day that is none."""
    if data.date is None:
        return
    try:
        is_day = datetime.date.fromisoformat(data.date).isoformat() == data.date
    except ValueError:
        is_day = False
    if not is_day:
        raise ConfigError(f"data.date={data.date}: write a day as YYYY-MM-DD, like 2026-11-29")


def check_chat_template_kwargs(data: DataConfig) -> None:
    """Refuse variables that the chat template is given anyway, and values that are not plain JSON."""
    for name, value in data.chat_template_kwargs.items():
        field = f"data.chat_template_kwargs.{name}"
        if name in RESERVED_TEMPLATE_NAMES:
            raise ConfigError(f"{field}: the prompt's renderer gives it, or does not take it; leave it out")
        if not name.isidentifier():
            raise ConfigError(f"{field}: no name of a variable in a template; write one like enable_thinking")
        try:
            is_plain = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError):
            is_plain = False
        if not is_plain:
            raise ConfigError(
                f"{field}={value!r:.80}: write true, false, null, a finite number, a text, or lists and mappings of "
                "them"
            )


CHECKS: tuple[Callable[[Config], None], ...] = (
    lambda config: check_model_path(config.model),
    check_fields,
    lambda config: check_run_name(config.run),
    lambda config: check_parallel(config.parallel),
    lambda config: check_backend(config.backend),
    lambda config: check_fp8(config.precision, config.backend),
    lambda config: check_context_parallel(config.parallel, config.backend),
    lambda config: check_pipeline_ends(config.parallel),
    lambda config: check_overlap(config.parallel, config.optimizer),
    lambda config: check_recompute(config.precision),
    lambda config: check_health(config.health),
    lambda config: check_watch(config.watch),
    lambda config: check_batch(config.batch, config.parallel),
    lambda config: check_algorithm(config.algorithm, config.batch, config.loss),
    lambda config: check_schedules(config.algorithm),
    lambda config: check_teacher(config.teacher, config.verify, config.batch),
    lambda config: check_teacher_weights(config.teacher, config.loss),
    lambda config: check_policy_loss(config.loss),
    lambda config: check_warm_start(config.warm_start, config.parallel),
    lambda config: check_optimizer(config.optimizer),
    lambda config: check_servers(config.rollout),
    lambda config: check_embedded_server(config.rollout),
    lambda config: check_sglang_arguments(config.rollout.sglang),
    lambda config: check_functions(config.verify, config.rollout),
    lambda config: check_unfinished(config.rollout),
    lambda config: check_memory_release(config.rollout),
    lambda config: check_offload(config.rollout, config.backend),
    lambda config: check_top_k(config.rollout),
    lambda config: check_step_timeout(config.rollout, config.backend),
    lambda config: check_weight_sync(config.rollout, config.backend),
    lambda config: check_weight_format(config.rollout),
    lambda config: check_evaluation(config.evaluation, config.rollout),
    lambda config: check_tiny_model(config.model, config.rollout),
    lambda config: check_nemo_skills(config.evaluation),
    lambda config: check_data(config.data, config.evaluation),
    lambda config: check_date(config.data),
    lambda config: check_chat_template_kwargs(config.data),
)
"""All checks in their order, each with the sections that it reads."""


def check_paths(config: Config) -> None:
    """Refuse files and directories that do not exist here. Templates may be shipped ones: their renderer looks."""
    for name in (
        "model.path",
        "data.train.path",
        "data.heldout.path",
        "warm_start.path",
        "rollout.replay",
        "evaluation.nemo_skills_python",
    ):
        path = operator.attrgetter(name)(config)
        # Files of rows may be named by a pattern.
        is_pattern = name.startswith(("data.", "warm_start."))
        found = path is None or os.path.exists(path) or (is_pattern and glob.glob(path, recursive=True))
        if not found:
            raise ConfigError(f"{name}={path}: no such file or directory")
    if config.resume not in ("none", "auto") and not os.path.isdir(config.resume):
        raise ConfigError(f"resume={config.resume}: write none, auto or the path of a checkpoint directory")


def check_loggers(logging: LoggingConfig) -> None:
    """Refuse loggers whose library is not installed here, and an address with a password."""
    for wanted, named, module in (
        (logging.wandb != "none", f"logging.wandb={logging.wandb}", "wandb"),
        (logging.mlflow, "logging.mlflow=true", "mlflow"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f'{named}, but {module} is not installed: pip install "dasd-megatron[{module}]", or leave it out'
            )
    if logging.mlflow_uri is not None and urlsplit(logging.mlflow_uri).password is not None:
        raise ConfigError(
            "logging.mlflow_uri holds a password, which would be saved with the run: set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD instead"
        )
