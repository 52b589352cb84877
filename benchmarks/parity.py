"""Parallel layouts against one process: the same rollouts, the same losses, gradients, token statistics and weights.

    python benchmarks/parity.py                            # every layout, objective and dropout check
    python benchmarks/parity.py --only dp2 --only packing  # some layouts

A model of eight layers with random weights takes three training steps of two updates (scoring of student, teacher and
starting model, routing, optimizer) on rollouts that were drawn once, by the trainer's own step. Then its weights are
exported, and every token of the first step is scored once more. Differences are maxima over the steps, tokens or
weights, float32. Dropout is compared in supervised updates, which are the ones that can have it.

The processes of a layout are forked from one that has imported everything. Writes ``benchmarks/results/parity.json``
unless told otherwise. With ``--only``, the results of other layouts in it stay if seed and versions are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import gc
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import random
import secrets
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import write_record

from dasd_megatron import backend
from dasd_megatron.config import Config, TinyModelConfig, load_config

STEPS = 3
GROUPS, SAMPLES = 4, 4
ARCHITECTURE = TinyModelConfig(
    hidden_size=32, num_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48
)
COMMON = [
    "experiment=quickstart",
    "parallel=single",
    "evaluation=none",
    f"run.steps={STEPS}",
    f"batch.groups={GROUPS}",
    f"batch.samples_per_group={SAMPLES}",
    "batch.micro_batch_size=4",
    "batch.minibatches=2",
    "loss.kl_coef=0.1",
    "loss.dual_clip=3.0",
    "teacher.privileged=[solution,peer]",
    # Rounding must not grow into a difference: with a tiny epsilon Adam's first step is the sign of each gradient,
    # which rounding decides where a gradient is nearly zero.
    "optimizer.lr=3e-4",
    "optimizer.min_lr=3e-4",
    "optimizer.warmup_steps=0",
    "optimizer.adam_eps=1e-4",
    "logging.save_rollouts_every=0",
    "verify.workers=0",
]
# Half as many updates as the others make, and twice as far.
ONE_UPDATE = ["batch.minibatches=1", "batch.epochs=1", "optimizer.lr=6e-4", "optimizer.min_lr=6e-4"]
OBJECTIVES = {
    "sampled": ["algorithm.objective=sampled", "teacher.weights=ema"],
    "distributional": [
        "algorithm.objective=distributional",
        "algorithm.divergence_weight=1.0",
        "teacher.weights=trust_region",
        "teacher.trust_region_mix=0.3",
    ],
    # Scoring and update in one forward pass; one process makes two of them.
    "one pass": [
        *ONE_UPDATE,
        "algorithm.objective=sampled",
        "teacher.weights=ema",
        "loss.importance_sampling=token",
        "loss.surrogate=gspo",
        "loss.dual_clip=null",
        "loss.aggregation=seq_mean_token_mean",
    ],
    "one pass, distributional": [
        *ONE_UPDATE,
        "algorithm.objective=distributional",
        "algorithm.divergence_weight=1.0",
        "teacher.weights=live",
    ],
    # What needs whole responses, and counts of all replicas. The bounds are far from most ratios, so that rounding does
    # not put one on the other side.
    "by response": [
        "algorithm.objective=sampled",
        "teacher.weights=live",
        "loss.surrogate=gspo",
        "loss.dual_clip=null",
        "loss.clip_low=0.5",
        "loss.clip_high=0.5",
        "loss.aggregation=seq_mean_token_mean",
        "loss.rejection=geometric",
        "loss.rejection_low=0.2",
        "loss.rejection_high=1.5",
    ],
}
TP2, PP2, PP4, VPP2, DP2, SP = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=4",
    "parallel.virtual_pipeline_model_parallel_size=2",
    "parallel.data_parallel_size=2",
    "parallel.sequence_parallel=true",
)
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=3000"]
PACKING = ["batch.packing=true", "batch.micro_batch_size=8", "batch.micro_batch_tokens=200"]
ONE_PASS_ALONE = "one process, one pass"
LAYOUTS: dict[str, list[str]] = {
    "recompute full": ["precision.recompute=full"],
    "recompute selective": ["precision.recompute=selective", "precision.recompute_modules=[core_attn,mlp]"],
    "packing": PACKING,
    ONE_PASS_ALONE: [],
    "materialised logits": ["loss.fused_linear=false"],
    "TP2": [TP2],
    "TP2 SP": [TP2, SP],
    "TP2 SP, packing, small blocks": [TP2, SP, *PACKING, "loss.block_tokens=7", "loss.block_columns=30"],
    "PP2": [PP2],
    "PP2 VPP2": [PP2, VPP2],
    "PP2, 5 + 3 layers, packing": [PP2, "parallel.first_pipeline_num_layers=5", *PACKING],
    "DP2, distributed optimizer": [DP2],
    "DP2, distributed optimizer, overlap": [DP2, *OVERLAP],
    "DP2, replicated optimizer, packing": [DP2, "optimizer.distributed=false", *PACKING],
    "PP4": [PP4],
    "PP4, 1 + 3 + 3 + 1 layers": [PP4, "parallel.first_pipeline_num_layers=1", "parallel.last_pipeline_num_layers=1"],
    "PP4 VPP2": [PP4, VPP2],
    "TP2 PP2": [TP2, PP2],
    "TP2 SP PP2 VPP2, recompute full, packing": [TP2, SP, PP2, VPP2, "precision.recompute=full", *PACKING],
    "TP2 PP2 DP2": [TP2, PP2, DP2],
    "TP2 SP PP2 DP2, overlap, packing": [TP2, SP, PP2, DP2, *OVERLAP, *PACKING],
}
# (layout, what it has to equal); the processes of both are as many, or the second is one.
DROPOUT: dict[str, tuple[list[str], list[str]]] = {
    "recompute full": (["precision.recompute=full"], []),
    "recompute selective": (["precision.recompute=selective"], []),
    "TP2": ([TP2], []),
    "TP2, recompute full": ([TP2, "precision.recompute=full"], []),
    "TP2 SP, recompute full": ([TP2, SP, "precision.recompute=full"], [TP2, SP]),
    "PP2, recompute full": ([PP2, "precision.recompute=full"], [PP2]),
}
CP2 = "parallel.context_parallel_size=2"
# Context parallelism needs Transformer Engine's attention on GPUs. Here another one stands in for it, so that all the
# rest is compared: sequences cut and padded, positions, statistics brought together, gradients and optimizer over ranks
# that share sequences.
CONTEXT_LAYOUTS = {
    "CP2": [CP2],
    "CP2, packing": [CP2, *PACKING],
    "TP2 SP CP2": [TP2, SP, CP2],
    "TP2 SP CP2, packing": [TP2, SP, CP2, *PACKING],
    "CP2 PP2 DP2, overlap, packing": [CP2, PP2, DP2, *OVERLAP, *PACKING],
}
LAYOUTS |= {f"{name}, gathering attention": overrides for name, overrides in CONTEXT_LAYOUTS.items()}
# What is left out elsewhere, since every layout takes its seconds.
FEW_LAYOUTS = (
    "DP2, distributed optimizer, overlap",
    "TP2 SP PP2 VPP2, recompute full, packing",
    "CP2, packing, gathering attention",
)
FEW_LAYOUTS_OF = {
    "by response": FEW_LAYOUTS,
    "one pass": (*FEW_LAYOUTS, "packing", "materialised logits", "TP2 SP, packing, small blocks", "PP2"),
    "one pass, distributional": FEW_LAYOUTS,
}


def is_compared(objective: str, layout: str) -> bool:
    """Return whether a layout is compared for an objective."""
    if objective.endswith("distributional") and layout == "materialised logits":
        # The distributional objective works on hidden states.
        return False
    if layout == ONE_PASS_ALONE:
        return objective in ALONE_OVERRIDES
    return objective not in FEW_LAYOUTS_OF or layout in FEW_LAYOUTS_OF[objective]


ALONE = "one process"
# What layouts are compared with, where that is not the same objective's own in one process.
ALONE_OVERRIDES = {name: ["loss.share_pass=never"] for name in ("one pass", "one pass, distributional")}
METRICS = {"loss": "update/loss", "gradient norm": "update/grad_norm"}
ROUTING = (
    "entropy/mean",
    "credit/delta_mean",
    "credit/omega_mean",
    "update/kl_to_start",
    "reward/std",
    "response/length_mean",
)


def draw_rollouts(folder: Path, seed: int) -> None:
    """A model whose tokens differ in certainty, and rollouts of every length for it, with rewards and masks by chance.

    Some have no teacher: half of the problems have no solution, and of these not all have a right response. The second
    minibatch of step 2 has none at all.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from dasd_megatron.models.tiny import make_tiny_model
    from dasd_megatron.rollout_files import rollouts_path, save_samples
    from dasd_megatron.samples import Sample

    make_tiny_model(folder / "model", ARCHITECTURE, seed)
    path = folder / "model" / "model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    # Routing by the entropy of a model that is equally uncertain everywhere would magnify rounding.
    weights = {
        name: tensor * (10.0 if tensor.dim() > 1 else 1.0) + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(4, 90) for _ in range(draw.randint(least, most))]

    for step in range(1, STEPS + 1):
        samples = []
        for group in range(GROUPS):
            prompt = tokens(3, 20)
            problem = "".join(draw.choice("0123456789+-") for _ in range(8))
            all_wrong = group == 3 or (group == 2 and step == 2)
            for sample in range(SAMPLES):
                response = tokens(3, 40)
                mask = None if draw.random() < 0.7 else [1, *(int(draw.random() < 0.7) for _ in response[1:])]
                log_probs = [-4.0 if mask is None or mask[place] else 0.0 for place in range(len(response))]
                samples.append(
                    Sample(
                        group,
                        sample,
                        group,
                        f"p{group}",
                        problem,
                        "1",
                        f"{problem} is 1" if group < 2 else "",
                        prompt,
                        response,
                        log_probs,
                        "".join(draw.choice("0123456789+-") for _ in response),
                        "stop",
                        [["step_000000", len(response)]],
                        float(draw.random() < 0.5 and not all_wrong),
                        None,
                        False,
                        mask,
                    )
                )
        save_samples(rollouts_path(folder / "rollouts", step), samples)


def configure(folder: Path, *overrides: str) -> Config:
    others = [override for override in overrides if override != CP2]
    config = load_config(
        [*COMMON, "model=hf", f"model.path={folder / 'model'}", f"rollout.replay={folder / 'rollouts'}", *others]
    )
    if len(others) < len(overrides):
        # Past the check that refuses it on the CPU.
        config.parallel.context_parallel_size = 2
    return config


def gathering_attention() -> type:
    """Attention under context parallelism that gathers all keys and values and masks by place, as plainly as can be."""
    import torch
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from dasd_megatron.training.batching import sequence_parts

    class GatheringAttention(DotProductAttention):
        def __init__(self, config: Any, *arguments: Any, **others: Any) -> None:
            # Megatron's class refuses more than one.
            config = copy.copy(config)
            config.context_parallel_size = 1
            super().__init__(config, *arguments, **others)

        def forward(self, query: Any, key: Any, value: Any, *_: Any, packed_seq_params: Any = None, **__: Any) -> Any:
            group = parallel_state.get_context_parallel_group()
            size, rank = group.size(), group.rank()
            starts = [0, size * len(query)] if packed_seq_params is None else packed_seq_params.cu_seqlens_q.tolist()
            widths = [end - start for start, end in itertools.pairwise(starts)]
            mine = torch.from_numpy(sequence_parts(widths, rank, size))
            places = torch.cat([torch.from_numpy(sequence_parts(widths, shard, size)) for shard in range(size)])
            sequence = torch.bucketize(torch.arange(starts[-1]), torch.tensor(starts[1:]), right=True)
            mask = (mine[:, None] >= places) & (sequence[mine][:, None] == sequence[places])
            parts = [query, *(gather_from_sequence_parallel_region(states, group=group) for states in (key, value))]
            if packed_seq_params is not None:
                parts = [states[:, None] for states in parts]
            query, key, value = (states.permute(1, 2, 0, 3) for states in parts)
            context = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self.softmax_scale, enable_gqa=True
            )
            context = context.permute(2, 0, 1, 3).flatten(2)
            return context if packed_seq_params is None else context[:, 0]

    return GatheringAttention


@contextlib.contextmanager
def open_replaying(config: Config, folder: Path) -> Iterator[Any]:
    """A trainer without servers, grader and files of its own, that replays the rollouts in ``folder``."""
    from dasd_megatron.config import DataSourceConfig
    from dasd_megatron.data.prompts import Problem
    from dasd_megatron.data.templates import make_renderer
    from dasd_megatron.models.hf_config import load_tokenizer
    from dasd_megatron.observability.progress import ProgressDisplay
    from dasd_megatron.run.paths import RunPaths
    from dasd_megatron.training.checkpoint_search import TrainerState
    from dasd_megatron.training.rollout_plane import RolloutPlane, open_fleet
    from dasd_megatron.training.trainer import Trainer, build_learner, make_memory

    assert isinstance(config.data.train, DataSourceConfig)
    tokenizer, paths = load_tokenizer(config.model.path), RunPaths(folder)
    renderer = make_renderer(config.data, config.teacher, tokenizer)
    learner = build_learner(config, Path(config.model.path))
    memory = make_memory(config.backend.offload, learner)
    state, problems = TrainerState(), [Problem("p", "1", "1", "1")]
    with open(os.devnull, "w") as nowhere, ProgressDisplay(STEPS, start_step=0, stream=nowhere) as display:
        plane = RolloutPlane(
            config,
            fleet=open_fleet(config, paths, learner.model.bridge.hf_config),
            memory=memory,
            paths=paths,
            problems=problems,
            grader=None,
            renderer=renderer,
            tokenizer=tokenizer,
            vocab_size=learner.model.vocab_size,
            state=state.rollouts,
        )
        yield Trainer(
            config=config,
            paths=paths,
            tokenizer=tokenizer,
            renderer=renderer,
            grader=None,
            heldout_problems=problems,
            learner=learner,
            memory=memory,
            state=state,
            saver=None,
            rollout_writer=None,
            plane=plane,
            display=display,
            logger=None,
        )


def train(config: Config, folder: Path) -> dict[str, Any]:
    """The training steps in this layout; the steps' metrics, and exported weights and token statistics after them."""
    from dasd_megatron.rollout_files import load_samples
    from dasd_megatron.training.batching import BatchLayout, make_micro_batches
    from dasd_megatron.training.passes import score
    from dasd_megatron.training.step import train_step

    with open_replaying(config, folder) as trainer:
        model = trainer.learner.model
        rows = [train_step(trainer) for _ in range(STEPS)]
    samples = load_samples(folder / "rollouts", 1, groups=GROUPS, samples_per_group=SAMPLES)
    batches = make_micro_batches(
        [sample.prompt_ids for sample in samples],
        [sample.response_ids for sample in samples],
        BatchLayout.of_this_rank(config.batch, config.parallel, config.precision),
    )
    scores = score(model, batches, config.loss, temperature=1.0)
    return {
        "rows": rows,
        "scores": [scores.log_prob, scores.entropy],
        "weights": {name: weight.clone() for name, weight in model.bridge.export_weights(model.chunks)},
    }


def train_with_dropout(config: Config, folder: Path) -> dict[str, Any]:
    """Three supervised updates that drop a fifth of the hidden states; weights that tensor-parallel ranks should share
    are compared."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from dasd_megatron.models.gpt import build_model
    from dasd_megatron.rollout_files import load_samples
    from dasd_megatron.training.batching import BatchLayout, make_micro_batches
    from dasd_megatron.training.optimizer import build_optimizer
    from dasd_megatron.training.passes import supervised_update

    model = build_model(config, config.model.path, hidden_dropout=0.2)
    optimizer = build_optimizer(config.optimizer, model, steps=3, updates_per_step=1)
    layout = BatchLayout.of_this_rank(config.batch, config.parallel, config.precision)
    rows = []
    for step in (1, 2, 3):
        samples = load_samples(folder / "rollouts", step, groups=GROUPS, samples_per_group=SAMPLES)
        prompts, responses = [sample.prompt_ids for sample in samples], [sample.response_ids for sample in samples]
        batches = make_micro_batches(prompts, responses, layout)
        result = supervised_update(model, optimizer, batches, config.loss)
        rows.append({"update/loss": result.means["loss"], "update/grad_norm": result.grad_norm})
    group = parallel_state.get_tensor_model_parallel_group()
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            copies = [torch.empty_like(parameter) for _ in range(dist.get_world_size(group))]
            dist.all_gather(copies, parameter.detach().contiguous(), group=group)
            assert all(torch.equal(copies[0], copy) for copy in copies), f"{name} differs between tensor-parallel ranks"
    return {
        "rows": rows,
        "weights": {name: weight.clone() for name, weight in model.bridge.export_weights(model.chunks)},
    }


def serve(rank: int, world_size: int, folder: Path, jobs: list[tuple[str, bool, Config]]) -> None:
    """One process of a world: all jobs that need this many, one after the other, each in groups of its own."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from dasd_megatron.models import gpt
    from dasd_megatron.training import parallel

    attention = gpt.CausalAttention
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    limit = datetime.timedelta(seconds=120)
    try:
        for index, (name, dropout, config) in enumerate(jobs):
            store = folder / f"store-{world_size}-{index}"
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit
            )
            parallel.split_world(config.parallel, config.backend.timeout_seconds, config.run.seed)
            gpt.CausalAttention = gathering_attention() if config.parallel.context_parallel_size > 1 else attention
            result = (train_with_dropout if dropout else train)(config, folder)
            if rank == 0:
                torch.save(result, folder / f"{name}.pt")
            dist.barrier()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
            # Models hold themselves by their hooks, and with them the groups and threads of this layout.
            gc.collect()
    except Exception:
        print(f"rank {rank} of {world_size}, {name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # Not through the interpreter's end, which would wait for the groups.
        os._exit(1)


def run_all(folder: Path, jobs: dict[str, tuple[bool, list[str]]]) -> None:
    """Run ``jobs`` in worlds of forked processes, the smallest first; each leaves ``folder/<name>.pt``."""
    worlds: dict[int, list[tuple[str, bool, Config]]] = {}
    for name, (dropout, overrides) in jobs.items():
        config = configure(folder, *overrides)
        worlds.setdefault(config.parallel.world_size, []).append((name, dropout, config))
    for world_size in sorted(worlds):
        fork_and_wait([(rank, world_size, folder, worlds[world_size]) for rank in range(world_size)])


def fork_and_wait(arguments: list[tuple], target: Any = serve) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=process_arguments) for process_arguments in arguments]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            for process in processes:
                process.join(0.1)
            if any(process.exitcode for process in processes):
                raise SystemExit("a process failed; see above")
    finally:
        for process in processes:
            process.kill()
            process.join()


def difference(found: dict[str, Any], expected: dict[str, Any], start: dict[str, Any]) -> dict[str, float]:
    """Return the differences of a layout's result from another's: absolute, but for the gradient norm, and of the
    weights beside how far they moved."""
    import torch

    assert found["weights"].keys() == expected["weights"].keys()
    result = {}
    for name, metric in METRICS.items():
        pairs = [(row[metric], other[metric]) for row, other in zip(found["rows"], expected["rows"], strict=True)]
        scale = [abs(other) if name == "gradient norm" else 1.0 for _, other in pairs]
        result[name] = max(abs(value - other) / size for (value, other), size in zip(pairs, scale, strict=True))
    if "scores" in expected:
        both = zip(found["scores"], expected["scores"], strict=True)
        result["token statistics"] = max(float((values - other).abs().max()) for values, other in both)
        rows = zip(found["rows"], expected["rows"], strict=True)
        result["routing"] = max(abs(row[name] - other[name]) for row, other in rows for name in ROUTING)
    moved = {name: tensor - start[name] for name, tensor in expected["weights"].items()}
    result["weights"] = max(
        float((found["weights"][name] - tensor).abs().max()) for name, tensor in expected["weights"].items()
    )
    result["weights moved"] = max(float(tensor.abs().max()) for tensor in moved.values())
    assert all(torch.isfinite(tensor).all() for tensor in found["weights"].values())
    return result


def measure(only: list[str], seed: int) -> dict[str, Any]:
    """Results by objective, or "dropout", and layout."""
    import torch
    from safetensors.torch import load_file

    jobs: dict[str, tuple[bool, list[str]]] = {}
    chosen = [name for name in LAYOUTS if not only or name in only]
    layouts = {objective: [name for name in chosen if is_compared(objective, name)] for objective in OBJECTIVES}
    for objective, overrides in OBJECTIVES.items():
        jobs[f"{objective}/{ALONE}"] = (False, [*overrides, *ALONE_OVERRIDES.get(objective, [])])
        for name in layouts[objective]:
            jobs[f"{objective}/{name}"] = (False, [*overrides, *LAYOUTS[name]])
    compared = {
        name: case for name, case in DROPOUT.items() if not only or "dropout" in only or f"dropout/{name}" in only
    }
    for name, (layout, other) in compared.items():
        jobs[f"dropout/{name}"] = (True, layout)
        jobs[f"dropout/={' '.join(other)}"] = (True, other)
    if compared:
        jobs |= {"dropout/=": (True, []), "dropout/another seed": (True, ["run.seed=2"])}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fork_and_wait([(folder, seed)], draw_rollouts)
        for group in {name.split("/")[0] for name in jobs}:
            (folder / group).mkdir()
        run_all(folder, jobs)
        start = load_file(folder / "model" / "model.safetensors")

        def load(name: str) -> dict[str, Any]:
            return torch.load(folder / f"{name}.pt", weights_only=True)

        results: dict[str, Any] = {}
        for objective in OBJECTIVES:
            expected = load(f"{objective}/{ALONE}")
            results[objective] = {
                name: difference(load(f"{objective}/{name}"), expected, start) for name in layouts[objective]
            }
        results["dropout"] = {
            name: difference(load(f"dropout/{name}"), load(f"dropout/={' '.join(other)}"), start)
            for name, (_, other) in compared.items()
        }
        # What the comparisons would show if something else were computed.
        results["controls"] = {
            "another objective": difference(load(f"distributional/{ALONE}"), load(f"sampled/{ALONE}"), start)
        }
        if compared:
            results["controls"]["another dropout"] = difference(load("dropout/another seed"), load("dropout/="), start)
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown, one table for each objective and one for dropout."""
    parts = []
    for objective, rows in results.items():
        if not rows:
            continue
        columns = [column for column in next(iter(rows.values())) if all(column in row for row in rows.values())]
        parts.append(f"| {objective} | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
        parts += [
            f"| {name} | " + " | ".join(f"{row[column]:.1e}" for column in columns) + " |" for name, row in rows.items()
        ]
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Parallel layouts against one process.")
    known = [*LAYOUTS, "dropout", *(f"dropout/{name}" for name in DROPOUT)]
    parser.add_argument("--only", action="append", default=[], metavar="LAYOUT", help=f"one of {'; '.join(known)}")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "parity.json")
    options = parser.parse_args()
    unknown = set(options.only) - set(known)
    if unknown:
        parser.error(f"no such layout: {', '.join(sorted(unknown))}")
    print(f"seed {options.seed}", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    record: dict[str, Any] = {"seed": options.seed, "versions": versions}
    if options.only and options.output.exists():
        kept = json.loads(options.output.read_text())
        if all(kept[name] == value for name, value in record.items()):
            record = kept
    results = measure(options.only, options.seed)
    for group, rows in results.items():
        record[group] = record.get(group, {}) | rows
    write_record(options.output, record, indent=1)
    print(table({group: record[group] for group in results}))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    backend.select(load_config([*COMMON]).backend)
    import dasd_megatron.training.loop  # noqa: F401  what the forked processes share

    main()
