"""Time and memory of the token statistics, as ratios to named peers in the same run.

    python benchmarks/loss.py              # all parts; about 25 minutes on two cores
    python benchmarks/loss.py --parts 1    # one of them; what the results file has of the others stays

Part 1, vocabulary-parallel logits: two gloo processes of one thread each (TP=2), float32, forward and backward, against
Megatron-Core's ``vocab_parallel_cross_entropy`` and against straightforward autograd.

Part 2, from hidden states: ``linear_token_stats`` against the matrix product followed by
``vocab_parallel_token_stats``, one process, all cores.

Part 3, the divergence's options from hidden states: clipped entries and the k most probable entries beside the full
divergences, one process, all cores.

Variants alternate. Times are medians over the rounds of the slowest process. Memory is the peak beyond the inputs,
measured in processes of its own. Variants that overwrite their logits, as the cross-entropy does, get a copy for each
call, made outside the clock.

Writes ``benchmarks/results/loss.json`` unless told otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import describe, peak_bytes
from record import write_record
from torch.distributed.nn.functional import all_reduce

from dasd_megatron.config import BackendConfig

WORLD_SIZE = 2
BASELINE = "Megatron cross-entropy"
OPTIONS_BASELINE = "log-prob + entropy"
Prepare = Callable[[], Callable[[], None]]


def naive_statistics(
    logits: torch.Tensor, teacher: torch.Tensor, owned: torch.Tensor, local: torch.Tensor
) -> torch.Tensor:
    """Return the sum of log-prob, entropy and reverse KL by their formulas, differentiated by autograd."""

    def log_softmax(values: torch.Tensor) -> torch.Tensor:
        maximum = values.detach().amax(-1)
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        shifted = values - maximum[:, None]
        return shifted - all_reduce(shifted.exp().sum(-1)).log()[:, None]

    log_p = log_softmax(logits)
    with torch.no_grad():
        log_q = log_softmax(teacher)
    p = log_p.exp()
    log_prob = all_reduce(torch.where(owned, log_p.gather(1, local[:, None])[:, 0], 0.0))
    entropy = -all_reduce((p * log_p).sum(-1))
    return (log_prob + 0.1 * entropy + all_reduce((p * (log_p - log_q)).sum(-1))).sum()


def vocab_parallel_variants(tokens: int, vocab_size: int, rank: int) -> dict[str, Prepare]:
    """Return by name a function that prepares one call, untimed, and returns it."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from dasd_megatron.losses import vocab_parallel_token_stats

    warnings.filterwarnings("ignore", message=r"torch\.distributed\.nn\.functional\.all_reduce is deprecated")
    width = vocab_size // WORLD_SIZE
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(tokens, width, generator=generator).mul_(3.0)
    teacher = torch.randn(tokens, width, generator=generator).mul_(3.0)
    targets = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    owned = (targets >= rank * width) & (targets < (rank + 1) * width)
    local = torch.where(owned, targets - rank * width, 0)

    def cross_entropy() -> Callable[[], None]:
        own = logits.clone().requires_grad_()
        return lambda: vocab_parallel_cross_entropy(own, targets).sum().backward()

    def autograd() -> Callable[[], None]:
        own = logits.detach().requires_grad_()
        return lambda: naive_statistics(own, teacher, owned, local).backward()

    def token_stats(divergence: str | None, inplace: bool = False) -> Callable[[], None]:
        own = (logits.clone() if inplace else logits.detach()).requires_grad_()

        def call() -> None:
            extra = {} if divergence is None else {"teacher_logits": teacher, "divergence": divergence}
            stats = vocab_parallel_token_stats(own, targets, group=dist.group.WORLD, inplace_backward=inplace, **extra)
            loss = stats.log_prob.sum() + 0.1 * stats.entropy.sum()
            (loss if divergence is None else loss + stats.divergence.sum()).backward()

        return call

    return {
        BASELINE: cross_entropy,
        "log-prob + entropy": functools.partial(token_stats, None),
        "log-prob + entropy, in place": functools.partial(token_stats, None, True),
        "+ teacher, reverse KL": functools.partial(token_stats, "reverse_kl"),
        "+ teacher, reverse KL, in place": functools.partial(token_stats, "reverse_kl", True),
        "+ teacher, forward KL": functools.partial(token_stats, "forward_kl"),
        "+ teacher, JSD": functools.partial(token_stats, "jsd"),
        "+ teacher, JSD, in place": functools.partial(token_stats, "jsd", True),
        "autograd: log-prob + entropy + reverse KL": autograd,
    }


def measure(variants: dict[str, Prepare], rounds: int, slowest: Callable[[list[float]], list[float]]) -> dict[str, Any]:
    """Return the [wall, CPU] seconds of each alternated round by variant; with ``rounds`` 0, the peak memory of a
    call."""
    if rounds == 0:
        return {name: peak_bytes(prepare()) for name, prepare in variants.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in variants}
    for round_index in range(rounds + 1):
        for name, prepare in variants.items():
            call = prepare()
            # All processes start together.
            slowest([0.0, 0.0])
            wall, cpu_time = time.perf_counter(), time.process_time()
            call()
            elapsed = slowest([time.perf_counter() - wall, time.process_time() - cpu_time])
            del call
            # The first round warms up.
            if round_index:
                seconds[name].append(elapsed)
    return seconds


def in_processes(
    worker: Callable[..., None], count: int, arguments: tuple[Any, ...], rounds: int, scratch: Path
) -> dict[str, Any]:
    """Run ``worker(rank, port, *arguments, rounds, path)`` in fresh processes twice, for memory and for time; rank 0
    writes its result."""
    results = {}
    for name, number in (("peaks", 0), ("seconds", rounds)):
        probe = dist.TCPStore("127.0.0.1", 0, 1, True)
        port = probe.port
        del probe
        mp.spawn(worker, args=(port, *arguments, number, str(scratch)), nprocs=count)
        results[name] = json.loads(scratch.read_text())
        scratch.unlink()
    return results


def _worker(rank: int, port: int, tokens: int, vocab_size: int, rounds: int, output: str) -> None:
    from dasd_megatron.backend import cpu

    cpu.install(BackendConfig(threads=1))
    limit = datetime.timedelta(seconds=120)
    store = dist.TCPStore("127.0.0.1", port, WORLD_SIZE, rank == 0, limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=limit)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=WORLD_SIZE)

    def slowest(values: list[float]) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return reduced.tolist()

    measured = measure(vocab_parallel_variants(tokens, vocab_size, rank), rounds, slowest)
    if rank == 0:
        Path(output).write_text(json.dumps(measured))
    dist.destroy_process_group()


def measure_vocab_parallel(tokens: int, vocab_size: int, rounds: int, output: Path) -> dict[str, Any]:
    measured = in_processes(_worker, WORLD_SIZE, (tokens, vocab_size), rounds, output.with_suffix(".part"))
    print(
        f"\nT={tokens} V={vocab_size} float32, TP={WORLD_SIZE} gloo, one thread each, median of {rounds} alternated "
        "rounds"
    )
    return table(measured, BASELINE, "local logits", tokens * vocab_size // WORLD_SIZE * 4)


def _linear_worker(_: int, port: int, tokens: int, vocab_size: int, hidden_size: int, rounds: int, output: str) -> None:
    from dasd_megatron.losses import linear_token_stats, vocab_parallel_token_stats

    torch.set_num_threads(os.cpu_count())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator).mul_(hidden_size**-0.5)
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)

    def prepare(fused: bool, inplace: bool = False, keep_bytes: int = 0) -> Callable[[], None]:
        states, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_()

        def call() -> None:
            if fused:
                stats = linear_token_stats(states, head, targets, keep_bytes=keep_bytes)
            else:
                stats = vocab_parallel_token_stats(states @ head.t(), targets, inplace_backward=inplace)
            (stats.log_prob.sum() + 0.1 * stats.entropy.sum()).backward()

        return call

    variants = {
        "materialised logits": functools.partial(prepare, False),
        "materialised logits, gradient in place": functools.partial(prepare, False, True),
        "linear_token_stats": functools.partial(prepare, True),
        "linear_token_stats, logits of half the tokens kept": functools.partial(
            prepare, True, keep_bytes=tokens * vocab_size * 2
        ),
        "linear_token_stats, all logits kept": functools.partial(prepare, True, keep_bytes=tokens * vocab_size * 4),
    }
    Path(output).write_text(json.dumps(measure(variants, rounds, lambda values: values)))


def measure_linear(tokens: int, vocab_size: int, hidden_size: int, rounds: int, output: Path) -> dict[str, Any]:
    measured = in_processes(_linear_worker, 1, (tokens, vocab_size, hidden_size), rounds, output.with_suffix(".part"))
    print(
        f"\nT={tokens} V={vocab_size} h={hidden_size} float32, {os.cpu_count()} threads, median of {rounds} "
        "alternated rounds"
    )
    return table(measured, "materialised logits", "materialised peak", measured["peaks"]["materialised logits"])


def _options_worker(
    _: int, port: int, tokens: int, vocab_size: int, hidden_size: int, rounds: int, output: str
) -> None:
    from dasd_megatron.losses import linear_token_stats, top_k_divergence

    torch.set_num_threads(os.cpu_count())
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator).mul_(hidden_size**-0.5)
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    top = linear_token_stats(teacher_hidden, weight, targets, top_k=100).top

    def update(divergence: str | None, entry_clip: float | None = None) -> Callable[[], None]:
        states, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        extra = {} if divergence is None else {"teacher_hidden": teacher_hidden, "divergence": divergence}

        def call() -> None:
            stats = linear_token_stats(states, head, targets, entry_clip=entry_clip, **extra)
            loss = stats.log_prob.sum() + 0.1 * stats.entropy.sum()
            (loss if divergence is None else loss + stats.divergence.sum()).backward()

        return call

    def update_by_entries() -> Callable[[], None]:
        states, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_()

        def call() -> None:
            stats = linear_token_stats(states, head, targets, entry_ids=top.ids)
            divergence = top_k_divergence(stats.top.log_prob, top.log_prob, divergence="forward_kl", tail=True)
            (stats.log_prob.sum() + 0.1 * stats.entropy.sum() + divergence.sum()).backward()

        return call

    def score(top_k: int | None) -> Callable[[], None]:
        return lambda: linear_token_stats(teacher_hidden, weight, targets, top_k=top_k)

    variants = {
        OPTIONS_BASELINE: functools.partial(update, None),
        "+ teacher, forward KL": functools.partial(update, "forward_kl"),
        "+ teacher, forward KL, clipped entries": functools.partial(update, "forward_kl", 0.05),
        "+ teacher, reverse KL, clipped entries": functools.partial(update, "reverse_kl", 0.05),
        "+ teacher, JSD": functools.partial(update, "jsd"),
        "+ teacher, JSD, clipped entries": functools.partial(update, "jsd", 0.05),
        "+ teacher's top 100 and the tail, forward KL": update_by_entries,
        "scoring, no gradient": functools.partial(score, None),
        "scoring with the top 100, no gradient": functools.partial(score, 100),
    }
    Path(output).write_text(json.dumps(measure(variants, rounds, lambda values: values)))


def measure_options(tokens: int, vocab_size: int, hidden_size: int, rounds: int, output: Path) -> dict[str, Any]:
    measured = in_processes(_options_worker, 1, (tokens, vocab_size, hidden_size), rounds, output.with_suffix(".part"))
    print(
        f"\nT={tokens} V={vocab_size} h={hidden_size} float32, {os.cpu_count()} threads, median of {rounds} "
        "alternated rounds"
    )
    return table(measured, OPTIONS_BASELINE, "logits", tokens * vocab_size * 4)


def table(measured: dict[str, Any], baseline: str, memory_unit: str, memory_bytes: int) -> dict[str, Any]:
    """Print medians and ratios to ``baseline``, and return them. Ratios are medians of the ratios within each round."""
    rows = {}
    reference = measured["seconds"][baseline]
    memory_heading = f"peak memory / {memory_unit}"
    print(
        f"{'forward + backward':44}{'wall ms':>10}{'ratio':>7}{'spread':>13}{'CPU ms':>10}{'ratio':>7}"
        f"{memory_heading:>34}"
    )
    for name, rounds in measured["seconds"].items():
        wall, cpu_time = ([row[column] for row in rounds] for column in (0, 1))
        ratios, cpu_ratios = ([row[c] / base[c] for row, base in zip(rounds, reference, strict=True)] for c in (0, 1))
        rows[name] = {
            "wall_seconds": statistics.median(wall),
            "cpu_seconds": statistics.median(cpu_time),
            "wall_ratio": statistics.median(ratios),
            "wall_ratio_range": [min(ratios), max(ratios)],
            "cpu_ratio": statistics.median(cpu_ratios),
            "peak_bytes": measured["peaks"][name],
            "peak_memory_ratio": measured["peaks"][name] / memory_bytes,
        }
        row = rows[name]
        print(
            f"{name:44}{1e3 * row['wall_seconds']:10.1f}{row['wall_ratio']:7.2f}{min(ratios):7.2f}-{max(ratios):5.2f}"
            f"{1e3 * row['cpu_seconds']:10.1f}{row['cpu_ratio']:7.2f}{row['peak_memory_ratio']:34.3f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of part 1 (default: 1024)")
    parser.add_argument("--linear-tokens", type=int, default=4096, help="tokens of part 2 (default: 4096)")
    parser.add_argument("--options-tokens", type=int, default=1024, help="tokens of part 3 (default: 1024)")
    parser.add_argument("--hidden-size", type=int, default=1024, help="hidden size of parts 2 and 3 (default: 1024)")
    parser.add_argument("--vocab-size", type=int, default=151_936, help="vocabulary; a multiple of 2 (default: 151936)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument(
        "--parts", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="parts to run (default: all)"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loss.json")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for part in args.parts:
        name, measure_part, tokens = {
            1: ("vocab_parallel", measure_vocab_parallel, args.tokens),
            2: ("linear", measure_linear, args.linear_tokens),
            3: ("options", measure_options, args.options_tokens),
        }[part]
        sizes = {"tokens": tokens} | ({} if part == 1 else {"hidden_size": args.hidden_size})
        measured = measure_part(**sizes, vocab_size=args.vocab_size, rounds=args.rounds, output=args.output)
        settings = {"vocab_size": args.vocab_size, "rounds": args.rounds, "dtype": "float32", **sizes}
        results[name] = {"machine": describe(), "settings": settings, "variants": measured}
        write_record(args.output, results)


if __name__ == "__main__":
    main()
