"""Cost of a training step beside its model: phases of whole steps, and the update against a bare Megatron loop.

    python benchmarks/step.py loop experiment=quickstart evaluation=none run.steps=8 warm_start.steps=0
    python benchmarks/step.py loop --config-dir examples/smollm2_arithmetic experiment=chain_sum evaluation=none \\
        run.steps=8
    python benchmarks/step.py update --model models/smollm2 precision=bf16 backend.threads=2
    python benchmarks/step.py update --preset qwen3_0.6b backend.kind=cuda precision=bf16 precision.fp8=tensorwise

``loop`` runs ``dasd train`` with these overrides and reports, as medians over the steps after the first two, the
seconds of each phase and the share of a step spent outside rollouts and the model's forward and backward passes.
``--replay PROMPT,RESPONSE`` makes random rollouts of these lengths first and replays them, so that no server is needed.

``update`` compares, in alternating rounds on the same micro-batches and the same model in one process, our policy
update with a Megatron loop: the model's own cross-entropy on its logits, Megatron's schedule, the same optimizer. It
reports tokens per second, the share of the GPU's peak (``--peak`` TFLOP/s), peak memory, and for a GPU what ``dasd
plan`` predicts.

``--preset`` writes a model of that preset's sizes with random weights. Results go to
``benchmarks/results/step_NAME.json`` with ``--name``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import describe
from record import write_record

from dasd_megatron import backend
from dasd_megatron.config import Config, load_config, read_config

if TYPE_CHECKING:
    from dasd_megatron.models.gpt import ShardedModel
    from dasd_megatron.training.batching import MicroBatch
    from dasd_megatron.training.optimizer import OptimizerState

RESULTS = Path(__file__).parent / "results"
PHASES = ("rollout", "verify", "score", "route", "update", "sync", "checkpoint")
# A configuration needs these fields; a measurement of the update does not read them.
_UPDATE = (
    "run.name=step",
    "run.steps=1",
    "optimizer.lr=1e-6",
    "evaluation=none",
    "data.train.generator=chain_sum",
    "data.heldout.generator=chain_sum",
    "data.train.size=8",
    "data.heldout.size=1",
    "rollout.replay=/",
    "rollout.max_prompt_tokens=64",
    "rollout.max_new_tokens=64",
    "batch.groups=4",
    "batch.samples_per_group=4",
    "loss.kl_coef=0.0",
    "model.tiny.max_position_embeddings=1000000",
)


def random_model(preset: str, path: Path, dtype: str) -> Path:
    """Write a Hugging Face directory of the preset's sizes, with random weights and a tokenizer of characters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dasd_megatron.models.tiny import character_tokenizer

    config = load_config([*_UPDATE, f"model={preset}"])
    hf_config = AutoConfig.for_model(**config.model.architecture)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            hf_config, torch_dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], trust_remote_code=False
        )
    model.save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


def random_rollouts(folder: Path, config: Config, prompt: int, response: int, vocab_size: int) -> None:
    """Write rollouts of all steps in the format of replay: random tokens, responses of half to the whole of
    ``response``."""
    from dasd_megatron.rollout_files import rollouts_path, save_samples
    from dasd_megatron.samples import Sample, version_name

    seed = secrets.randbelow(2**31)
    draw = random.Random(seed)
    print(f"random rollouts, seed {seed}")
    for step in range(1, config.run.steps + 1):
        samples = []
        for group in range(config.batch.groups):
            prompt_ids = [draw.randrange(10, 90) for _ in range(prompt)]
            for sample in range(config.batch.samples_per_group):
                response_ids = [draw.randrange(vocab_size) for _ in range(draw.randint(response // 2, response))]
                samples.append(
                    Sample(
                        group,
                        sample,
                        (step - 1) * config.batch.groups + group,
                        str(group),
                        "1 + 1",
                        "2",
                        "1 + 1 = 2",
                        prompt_ids,
                        response_ids,
                        [-12.0] * len(response_ids),
                        "",
                        "stop",
                        [[version_name(step - 1), len(response_ids)]],
                        float(draw.random() < 0.5),
                        "2",
                        False,
                    )
                )
        save_samples(rollouts_path(folder, step), samples)


def worker(root: Path) -> None:
    """Run one rank of ``loop``: training as it is, with the seconds inside Megatron's schedules in each step's
    metrics."""
    config = read_config(root / "config.yaml")
    backend.select(config.backend)
    import torch

    from dasd_megatron.training import loop as training_loop
    from dasd_megatron.training import passes
    from dasd_megatron.training.worker import run

    inside = 0.0
    schedule, step = passes.run_schedule, training_loop.train_step

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed_schedule(*arguments: Any, **options: Any) -> Any:
        nonlocal inside
        started = synchronised()
        result = schedule(*arguments, **options)
        inside += synchronised() - started
        return result

    def timed_step(trainer: Any) -> dict[str, Any]:
        nonlocal inside
        inside = 0.0
        metrics = step(trainer) | {"seconds/model": inside}
        if config.backend.kind == "cuda":
            metrics["memory/peak_bytes"] = torch.cuda.max_memory_allocated()
        return metrics

    passes.run_schedule, training_loop.train_step = timed_schedule, timed_step
    run(config, root, prepared=True)


def loop(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train, and return and print the seconds of each phase."""
    from dasd_megatron.models.hf_config import read_hf_config
    from dasd_megatron.run.prepare import prepare_run

    overrides = [*options.overrides, f"run.dir={scratch / 'run'}"]
    path = (
        random_model(
            options.preset, scratch / "model", load_config(options.overrides, options.config_dir).precision.params_dtype
        )
        if options.preset
        else None
    )
    path = path or options.model
    if path is not None:
        overrides += ["model=hf", f"model.path={path}"]
    if options.replay:
        (scratch / "rollouts").mkdir()
        overrides.append(f"rollout.replay={scratch / 'rollouts'}")
    config = load_config(overrides, options.config_dir)
    if options.replay:
        vocab_size = read_hf_config(config.model.path).vocab_size if config.model.path else 90
        random_rollouts(scratch / "rollouts", config, *map(int, options.replay.split(",")), vocab_size=vocab_size)
    prepare_run(config, scratch / "run")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={config.parallel.world_size}",
    ]
    environment = {**os.environ, **backend.process_environment(config.backend)}
    subprocess.run(
        [*command, __file__, "worker", str(scratch / "run")], env=environment, check=True, timeout=options.timeout
    )
    rows = [json.loads(line) for line in (scratch / "run" / "metrics.jsonl").read_text().splitlines()][2:]
    seconds = {name: statistics.median(row.get(f"seconds/{name}", 0.0) for row in rows) for name in (*PHASES, "model")}
    whole = [row["seconds/total"] + row["seconds/sync"] + row["seconds/checkpoint"] for row in rows]
    # The rest is grading, routing, batching, optimizer, weight sync, checkpoints and logs.
    outside = [
        1 - (row["seconds/rollout"] + row["seconds/model"]) / total for row, total in zip(rows, whole, strict=True)
    ]
    record = {
        "steps": len(rows),
        "seconds_of_a_step": statistics.median(whole),
        "seconds": seconds,
        "share_outside_model_and_rollouts": statistics.median(outside),
        "spread_of_share": [min(outside), max(outside)],
    }
    if "memory/peak_bytes" in rows[-1]:
        record["peak_bytes"] = rows[-1]["memory/peak_bytes"]
    print(f"\n| phase | seconds |\n|---|---|\n| whole step | {record['seconds_of_a_step']:.3f} |")
    for name in PHASES:
        print(f"| {name} | {seconds[name]:.3f} |")
    print(f"| forward and backward, in score and update | {seconds['model']:.3f} |")
    print(
        f"outside rollouts and model: {record['share_outside_model_and_rollouts']:.1%} ({min(outside):.1%} to "
        f"{max(outside):.1%})"
    )
    return record


def operations(hf_config: Any, lengths: list[int], *, backward: bool) -> float:
    """Return the floating-point operations of one pass over sequences of these lengths: two for each parameter of a
    matrix and token, and the products of causal attention; three times that with the backward pass."""
    from dasd_megatron.planning.estimate import Architecture, head_operations, layer_operations

    arch, tokens = Architecture.of(hf_config), sum(lengths)
    layer = layer_operations(arch, tokens, sum(length**2 for length in lengths))
    return (arch.layers * layer + head_operations(arch, tokens)) * (3 if backward else 1)


def random_batches(config: Config, model: ShardedModel) -> tuple[list[MicroBatch], list[list[int]]]:
    """Return the micro-batches of random prompts and responses, and the responses."""
    from dasd_megatron.training.batching import BatchLayout, make_micro_batches

    draw = random.Random(secrets.randbelow(2**31))
    prompt, response = config.rollout.max_prompt_tokens, config.rollout.max_new_tokens
    count = config.batch.groups * config.batch.samples_per_group
    prompts = [[draw.randrange(model.vocab_size) for _ in range(prompt)] for _ in range(count)]
    responses = [
        [draw.randrange(model.vocab_size) for _ in range(draw.randint(response // 2, response))] for _ in range(count)
    ]
    layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
    return make_micro_batches(prompts, responses, layout), responses


def make_bare_update(model: ShardedModel, optimizer: OptimizerState, batches: list[MicroBatch]) -> Callable[[], None]:
    """Return pre-training as Megatron does it: cross-entropy of the labels over the model's logits."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.utils import unwrap_model

    from dasd_megatron.models.gpt import HiddenStatesHead

    head = unwrap_model(model.chunks[-1])
    labels = {id(batch): torch.zeros_like(batch.tokens) for batch in batches}
    masks = {id(batch): torch.zeros(batch.tokens.shape, device=batch.tokens.device) for batch in batches}
    for batch in batches:
        labels[id(batch)][batch.rows, batch.columns] = batch.targets
        masks[id(batch)][batch.rows, batch.columns] = 1.0

    def loss(mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = (output.float() * mask).sum()
        return total, mask.sum().int(), {"loss": total.detach()}

    def forward_step(iterator: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(iterator)
        output = chunk(batch.tokens, batch.position_ids, None, labels=labels[id(batch)])
        return output, functools.partial(loss, masks[id(batch)])

    def bare_update() -> None:
        head.output_layer.__class__ = ColumnParallelLinear
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        optimizer.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=model.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=max(len(batch.tokens) for batch in batches),
            forward_only=False,
        )
        optimizer.step()
        if model.fused_linear:
            head.output_layer.__class__ = HiddenStatesHead

    return bare_update


def make_calls(
    config: Config, model: ShardedModel, optimizer: OptimizerState, batches: list[MicroBatch], response_tokens: int
) -> dict[str, Callable[[], None]]:
    """Return what is timed, by name."""
    import torch

    from dasd_megatron.training.passes import run_schedule, score
    from dasd_megatron.training.passes import update as policy_update
    from dasd_megatron.training.policy_loss import PolicyTargets

    device = backend.current().device()
    old_log_prob = torch.full((response_tokens,), -12.0, device=device)
    targets = PolicyTargets(
        old_log_prob,
        advantage=torch.randn(response_tokens, device=device),
        weight=torch.ones(response_tokens, device=device),
        lengths=torch.tensor([response_tokens], device=device),
    )

    def our_update() -> None:
        policy_update(model, optimizer, batches, targets, config.loss, temperature=1.0)

    def scoring() -> None:
        score(model, batches, config.loss, temperature=1.0)

    def last_stage(_batch: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # This loss costs nothing but reaches every parameter.
        loss = output.float().sum()
        return loss, torch.tensor(1, dtype=torch.int, device=device), loss.detach()

    def forward_and_backward_alone() -> None:
        run_schedule(model, batches, last_stage, forward_only=False)

    return {
        "ours": our_update,
        "bare Megatron": make_bare_update(model, optimizer, batches),
        "scoring": scoring,
        "layers, forward and backward": forward_and_backward_alone,
    }


def time_calls(
    calls: dict[str, Callable[[], None]], rounds: int, cuda: bool
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return by name the seconds of each alternated round after the first, and on a GPU the peak bytes of the last."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, int] = {}
    for round_index in range(rounds + 1):
        for name, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if round_index:
                seconds[name].append(time.perf_counter() - started)
            if cuda:
                peaks[name] = torch.cuda.max_memory_allocated()
    return seconds, peaks


def update(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Time updates, and return and print tokens a second, ratios and memory."""
    config = load_config([*_UPDATE, "parallel=single", *options.overrides], options.config_dir)
    backend.select(config.backend).check_precision(config.precision)
    import torch

    from dasd_megatron.models.gpt import build_model
    from dasd_megatron.training import parallel
    from dasd_megatron.training.optimizer import build_optimizer

    cuda = config.backend.kind == "cuda"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    path = (
        random_model(options.preset, scratch / "model", config.precision.params_dtype)
        if options.preset
        else options.model
    )
    parallel.initialize(config)
    model = build_model(config, path)
    optimizer = build_optimizer(config.optimizer, model, steps=10_000, updates_per_step=1)
    batches, responses = random_batches(config, model)
    lengths = [config.rollout.max_prompt_tokens + len(response) - 1 for response in responses]
    calls = make_calls(config, model, optimizer, batches, sum(map(len, responses)))
    seconds, peaks = time_calls(calls, options.rounds, cuda)
    ratios = [ours / bare for ours, bare in zip(seconds["ours"], seconds["bare Megatron"], strict=True)]
    record: dict[str, Any] = {
        "model": options.preset or str(path),
        "overrides": options.overrides,
        "sequences": len(responses),
        "tokens": sum(lengths),
        "padded_tokens": sum(batch.tokens.numel() for batch in batches),
        "micro_batches": len(batches),
        "rounds": options.rounds,
        "ratio_to_bare_megatron": statistics.median(ratios),
        "spread_of_ratio": [min(ratios), max(ratios)],
    }
    print(f"\n{sum(lengths):,} tokens in {len(batches)} micro-batches, medians of {options.rounds} rounds")
    record |= report_calls(model.bridge.hf_config, lengths, seconds, peaks, options.peak)
    print(f"ours / bare Megatron: {record['ratio_to_bare_megatron']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if cuda:
        record |= report_plan(config, model.bridge.hf_config, peaks["ours"])
    torch.distributed.destroy_process_group()
    return record


def report_calls(
    hf_config: Any, lengths: list[int], seconds: dict[str, list[float]], peaks: dict[str, int], peak_teraflops: float
) -> dict[str, Any]:
    """Print a row for each call, and return what is recorded of it. ``peaks`` is empty without a GPU."""
    entries: dict[str, Any] = {}
    tokens = sum(lengths)
    print("| | seconds | tokens/s |" + (" share of peak | peak GB |" if peaks else ""))
    print("|---|---|---|" + ("---|---|" if peaks else ""))
    for name, found in seconds.items():
        median = statistics.median(found)
        entry: dict[str, Any] = {
            "seconds": median,
            "spread": [min(found), max(found)],
            "tokens_per_second": tokens / median,
        }
        cells = f"| {name} | {median:.3f} | {tokens / median:,.0f} |"
        if peaks:
            work = operations(hf_config, lengths, backward=name != "scoring")
            entry["share_of_peak"] = work / median / (peak_teraflops * 1e12)
            entry["peak_bytes"] = peaks[name]
            cells += f" {entry['share_of_peak']:.1%} | {peaks[name] / 1e9:.2f} |"
        entries[name] = entry
        print(cells)
    return entries


def report_plan(config: Config, hf_config: Any, peak: int) -> dict[str, Any]:
    """Print the peak of our update beside what ``dasd plan`` predicts, and return the plan's bytes and the kernels."""
    import torch

    from dasd_megatron.planning.estimate import Architecture
    from dasd_megatron.planning.plan import OVERHEAD_BYTES, make_plan

    engine = backend.current().uses_transformer_engine(config.backend.transformer_impl)
    memory = torch.cuda.get_device_properties(backend.current().device()).total_memory
    plan = make_plan(config, Architecture.of(hf_config), transformer_engine=engine, gpu_bytes=memory)
    # The reserve of a plan is for memory that torch does not allocate.
    planned = plan.fullest.total - OVERHEAD_BYTES
    print(f"peak of our update: {peak / 1e9:.2f} GB; dasd plan, without its reserve: {planned / 1e9:.2f} GB")
    return {
        "planned_bytes": planned,
        "allocated_before_step": torch.cuda.memory_allocated(),
        "kernels": backend.current().kernels(config.backend.transformer_impl),
    }


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["loop", "update"])
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="as for dasd train")
    parser.add_argument("--config-dir", type=Path, help="a directory of further groups, as for dasd train")
    parser.add_argument("--model", type=Path, help="Hugging Face directory")
    parser.add_argument("--preset", help="a model group, like qwen3_0.6b, with random weights")
    parser.add_argument(
        "--replay", metavar="PROMPT,RESPONSE", help="loop only: random rollouts of these lengths, tokens"
    )
    parser.add_argument("--rounds", type=int, default=5, help="update only")
    parser.add_argument(
        "--peak", type=float, default=989.0, help="dense bf16 TFLOP/s of the GPU (default: an H100 SXM)"
    )
    parser.add_argument("--timeout", type=float, default=1800.0, help="limit of the run of loop, seconds")
    parser.add_argument("--name", help="write benchmarks/results/step_NAME.json")
    options = parser.parse_intermixed_args()
    if options.part == "update" and not (options.model or options.preset):
        parser.error("update needs --model DIR or --preset NAME")
    with tempfile.TemporaryDirectory() as scratch:
        record = {"loop": loop, "update": update}[options.part](options, Path(scratch))
    if options.name:
        path = RESULTS / f"step_{options.name}.json"
        write_record(path, {"machine": describe(), options.part: record})
        print(path)


if __name__ == "__main__":
    main()
