"""The lines that ``dasd plan`` prints."""

from __future__ import annotations

import textwrap

from dasd_megatron.config import Config
from dasd_megatron.planning.assumptions import FIGURES, Assumptions
from dasd_megatron.planning.estimate import Architecture, total_parameters
from dasd_megatron.planning.layout import longest_teacher_prompt
from dasd_megatron.planning.lengths import Lengths
from dasd_megatron.planning.plan import Plan, StageMemory, overhead_bytes
from dasd_megatron.planning.rollouts import Servers, kv_room
from dasd_megatron.planning.search import Search
from dasd_megatron.planning.step_time import StepTime
from dasd_megatron.planning.storage import Storage, checkpoints_at_once, evaluations_of

Rows = list[tuple[str, str]]


def gigabytes(value: float) -> str:
    """Return bytes as text in units of 10^9."""
    return f"{value / 1e9:,.2f} GB"


def seconds(value: float) -> str:
    """Return seconds as text of three digits."""
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def memory_rows(config: Config, arch: Architecture, found: Plan, assumed: Assumptions, gpus_per_node: int) -> Rows:
    """Return what the fullest GPU of training holds and sends."""
    full, state, limit = found.fullest, found.fullest.state, assumed.gpu_memory
    chosen, other = ("fused", "materialised") if config.loss.fused_linear else ("materialised", "fused")
    loss = {"fused": found.loss_fused, "materialised": found.loss_materialised}
    optimizer = gigabytes(state.optimizer) + (" sharded over replicas" if config.optimizer.distributed else "")
    verdict = "fits" if full.total <= limit else "DOES NOT FIT"
    traffic = found.traffic
    # A rollout engine on the same GPUs keeps its weights there, and keys and values in what is left.
    tensor = min(config.parallel.tensor_model_parallel_size, gpus_per_node)
    room = {
        kind: max(0.0, kv_room(config, arch, tensor, assumed, resident)) for kind, resident in _residents(config, full)
    }
    return [
        ("parameters", f"{total_parameters(arch):,} in all, {state.parameters:,} on this rank"),
        ("weights", f"{gigabytes(state.weights)} {config.precision.params_dtype}"),
        ("gradients", f"{gigabytes(state.gradients)} fp32"),
        ("optimizer state", optimizer),
        ("copies of weights, teacher states", gigabytes(full.snapshots)),
        (
            "activations",
            f"{gigabytes(full.activations)}, recompute {config.precision.recompute}, {found.rows} sequences a "
            "micro-batch",
        ),
        ("longest sequences", _length_text(config)),
        ("logits and loss on the last stage", f"{gigabytes(loss[chosen])} {chosen} ({gigabytes(loss[other])} {other})"),
        ("total, with reserve", f"{gigabytes(full.total)} of {gigabytes(limit)}: {verdict}"),
        ("bubble", f"{found.bubble:.1%} of a stage's time, {found.micro_batches} micro-batches a minibatch"),
        (
            "sent by a rank in a longest step",
            f"TP {gigabytes(traffic.tensor)}, CP {gigabytes(traffic.context)}, PP "
            f"{gigabytes(traffic.pipeline)}, DP {gigabytes(traffic.data)}",
        ),
        ("weight sync", f"{gigabytes(traffic.weight_sync)} a step"),
        (
            "rollouts on the same GPUs",
            f"{room['none']:,.0f} tokens of KV beside the training state, {room['state']:,.0f} with "
            f"backend.offload=state, {room['all']:,.0f} with all",
        ),
        *_offload_rows(config, full),
    ]


def _residents(config: Config, full: StageMemory) -> list[tuple[str, float]]:
    """Return the bytes of the trainer on a GPU while servers sample, for each ``backend.offload``."""
    return [
        ("none", full.total),
        ("state", full.state.weights + overhead_bytes(config)),
        ("all", overhead_bytes(config)),
    ]


def _offload_rows(config: Config, full: StageMemory) -> Rows:
    """Return the peak of each phase and the host memory, where memory goes to the host."""
    if config.backend.offload == "none":
        return []
    phases = full.phases
    host = full.state.optimizer + full.copies + (full.state.weights if config.backend.offload == "all" else 0)
    return [
        (
            "peak of each phase",
            f"sampling {gigabytes(phases.sampling)}, weight sync {gigabytes(phases.sending)}, scoring "
            f"{gigabytes(phases.scoring)}, backward {gigabytes(phases.backward)}, optimizer step "
            f"{gigabytes(phases.optimizer)}",
        ),
        ("host memory of each GPU", f"{gigabytes(host)}, and as much again while a checkpoint is written"),
    ]


def _length_text(config: Config) -> str:
    response, prompt = config.rollout.max_new_tokens, config.rollout.max_prompt_tokens
    text = f"{prompt + response:,} tokens"
    longest = longest_teacher_prompt(config)
    return text if longest == prompt else f"{text}, {longest + response:,} behind the teacher's prompt"


def storage_rows(config: Config, storage: Storage) -> Rows:
    """Return what the run keeps on disk."""
    exports = "" if config.checkpoint.export_every == 0 else f", of which every {config.checkpoint.export_every} steps"
    rows = [
        (
            "checkpoints",
            f"{gigabytes(storage.checkpoint)} each, {gigabytes(storage.checkpoints)} with "
            f"{checkpoints_at_once(config)} at once, the one that is written included",
        ),
        ("exported models", gigabytes(storage.exports) + exports),
    ]
    if storage.weights:
        rows.append(("weights for the servers", gigabytes(storage.weights)))
    return [*rows, ("all of these", gigabytes(storage.total))]


def time_rows(config: Config, time: StepTime, lengths: Lengths, longest: float, assumed: Assumptions) -> Rows:
    """Return the parts of a step. ``longest``: seconds of training if all sequences have the greatest length."""
    batch, training, served = config.batch, time.training, time.served
    rows = [
        (
            "a step's sequences",
            f"{batch.groups * batch.samples_per_group:,}: {lengths.prompt:,.0f} tokens of prompt and "
            f"{lengths.response:,.0f} of response on average",
        ),
        ("training", f"{seconds(training.total)}; {seconds(longest)} if all sequences are longest"),
        (
            "  its parts",
            f"scoring {seconds(training.scoring)}, update {seconds(training.update)}, bubble "
            f"{seconds(training.bubble)}, TP {seconds(training.tensor)}, CP {seconds(training.context)}, PP "
            f"{seconds(training.pipeline)}, DP {seconds(training.data)}",
        ),
    ]
    if not served.rollouts.tokens:
        return [*rows, ("rollouts", f"{_server_text(served.servers)}: NO ROOM for a sequence of the greatest length")]
    how = "rollouts beside training" if time.ahead else "rollouts and training in turn"
    tokens = batch.groups * batch.samples_per_group * lengths.response / time.seconds
    return [
        *rows,
        *_server_rows(config, time, assumed),
        ("a step", f"{seconds(time.seconds)}, {how}: bound by {time.bound}; {tokens:,.0f} response tokens a second"),
        ("the run", f"{_counted(config.run.steps, 'step')}, {config.run.steps * time.seconds / 3600:,.1f} h"),
    ]


def _server_rows(config: Config, time: StepTime, assumed: Assumptions) -> Rows:
    served, settings = time.served, config.evaluation
    rollouts, servers = served.rollouts, served.servers
    rate = rollouts.tokens / rollouts.seconds / servers.count
    evaluation = []
    if count := evaluations_of(config):
        problems = config.data.heldout.size or f"{assumed.heldout_problems:g} (assumed)"
        text = f"{seconds(time.evaluation)} a step: {count} times {seconds(served.evaluation)}"
        evaluation.append(("evaluation", f"{text}, {settings.samples} samples of {problems} problems"))
    return [
        (
            "rollouts",
            f"{seconds(rollouts.seconds)} on {_server_text(servers)}; in the last {seconds(rollouts.tail)} fewer than "
            "a quarter are left",
        ),
        (
            "  a server",
            f"{rate:,.0f} tokens a second, up to {rollouts.at_once} sequences at once, room for "
            f"{servers.kv_tokens:,.0f} tokens of KV",
        ),
        ("weight sync", f"{seconds(served.sync)} by {config.rollout.weight_sync}"),
        (
            "saving",
            f"{seconds(time.saving)} a step: every {config.checkpoint.every} steps training stands still for "
            f"{seconds(time.checkpoint.stall)}, and files take {seconds(time.checkpoint.writing)}",
        ),
        *evaluation,
    ]


def _server_text(servers: Servers) -> str:
    where = "the trainer's GPUs" if servers.shared else _counted(servers.nodes, "node")
    return f"{_counted(servers.count, 'server')} of {_counted(servers.gpus, 'GPU')} on {where}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def assumption_lines(assumed: Assumptions) -> list[str]:
    """Return the figures that the times rest on."""
    values = ", ".join(f"{name}={getattr(assumed, name):g}" for name in FIGURES)
    text = f"assumed (--device, --assume NAME=VALUE; docs/plan.md has their sources): {values}"
    return textwrap.wrap(text, 118, subsequent_indent="  ", break_on_hyphens=False)


def search_lines(search: Search, assumed: Assumptions) -> list[str]:
    """Return a table of the ten fastest layouts."""
    lines = [
        f"{len(search.fitting)} of {search.tried} layouts fit; seconds of a step by a model of {assumed.device} GPUs, "
        "not measured:",
        f"  {'TP':>3} {'PP':>3} {'VPP':>3} {'DP':>4}  {'recompute':<9}  {'memory':>9}  {'bubble':>6}  {'servers':>8}  "
        f"{'training':>8}  {'rollouts':>8}  {'step':>6}  bound",
    ]
    for found in search.fitting[:10]:
        parallel, time, servers = found.config.parallel, found.time, found.servers
        lines.append(
            f"  {parallel.tensor_model_parallel_size:>3} {parallel.pipeline_model_parallel_size:>3} "
            f"{parallel.virtual_pipeline_model_parallel_size or 1:>3} {parallel.data_parallel_size:>4}  "
            f"{found.config.precision.recompute:<9}  {gigabytes(found.plan.fullest.total):>9}  "
            f"{found.plan.bubble:>6.1%}  {f'{servers.count} x {servers.gpus}':>8}  {time.training.total:>8.1f}  "
            f"{time.served.rollouts.seconds:>8.1f}  {time.seconds:>6.1f}  {time.bound}"
        )
    return lines
