"""Forward and backward time of ``vocab_parallel_token_stats`` relative to Megatron's vocab-parallel cross-entropy.

Run it as it is: ``python benchmarks/token_stats.py [--tokens 1024]``. It starts two gloo processes with one thread each (tensor parallel 2,
float32, vocabulary 151,936), alternates the variants, and prints the median over the rounds of the slower rank's wall-clock and CPU
time; on a machine with other work, the CPU time is the steadier of the two. The cross-entropy overwrites its logits, so each of its calls
gets a copy, made outside the clock.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2


def _variants(width: int, tokens: int, vocab_size: int, rank: int) -> dict[str, Callable[[], Callable[[], None]]]:
    """Name -> a function that prepares one call, untimed, and returns it."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from dasd_megatron.losses import vocab_parallel_token_stats

    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(tokens, width, generator=generator).mul_(3.0)
    teacher = torch.randn(tokens, width, generator=generator).mul_(3.0)
    targets = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))

    def cross_entropy() -> Callable[[], None]:
        own = logits.clone().requires_grad_()
        return lambda: vocab_parallel_cross_entropy(own, targets).sum().backward()

    def token_stats(divergence: str | None, inplace: bool = False) -> Callable[[], None]:
        own = (logits.clone() if inplace else logits.detach()).requires_grad_()

        def call() -> None:
            extra = {} if divergence is None else {"teacher_logits": teacher, "divergence": divergence}
            stats = vocab_parallel_token_stats(own, targets, group=dist.group.WORLD, inplace_backward=inplace, **extra)
            loss = stats.log_prob.sum() + 0.1 * stats.entropy.sum()
            (loss if divergence is None else loss + stats.divergence.sum()).backward()

        return call

    return {
        "Megatron cross-entropy": cross_entropy,
        "log-prob + entropy": functools.partial(token_stats, None),
        "log-prob + entropy, in place": functools.partial(token_stats, None, True),
        "+ teacher, reverse KL": functools.partial(token_stats, "reverse_kl"),
        "+ teacher, forward KL": functools.partial(token_stats, "forward_kl"),
        "+ teacher, JSD": functools.partial(token_stats, "jsd"),
    }


def _worker(rank: int, port: int, tokens: int, vocab_size: int, rounds: int) -> None:
    from dasd_megatron.backend import cpu
    from dasd_megatron.config import BackendConfig

    cpu.install(BackendConfig(threads=1))
    store = dist.TCPStore("127.0.0.1", port, WORLD_SIZE, rank == 0, datetime.timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=datetime.timedelta(seconds=60))
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=WORLD_SIZE)
    variants = _variants(vocab_size // WORLD_SIZE, tokens, vocab_size, rank)
    seconds: dict[str, list[list[float]]] = {name: [] for name in variants}
    for round_index in range(rounds + 1):
        for name, prepare in variants.items():
            call = prepare()
            dist.barrier()
            wall, cpu_time = time.perf_counter(), time.process_time()
            call()
            elapsed = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu_time], dtype=torch.float64)
            del call
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            if round_index:  # the first round warms up
                seconds[name].append(elapsed.tolist())
    if rank == 0:
        medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in seconds.items()}
        base_wall, base_cpu = medians["Megatron cross-entropy"]
        print(f"T={tokens} V={vocab_size} float32, TP={WORLD_SIZE} gloo, one thread each, median of {rounds} alternated rounds")
        print(f"{'forward + backward':32}{'wall ms':>10}{'ratio':>8}{'CPU ms':>10}{'ratio':>8}")
        for name, (wall, cpu_time) in medians.items():
            print(f"{name:32}{wall * 1e3:10.1f}{wall / base_wall:8.2f}{cpu_time * 1e3:10.1f}{cpu_time / base_cpu:8.2f}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="tokens (default: 256)")
    parser.add_argument("--vocab-size", type=int, default=151_936, help="vocabulary; a multiple of 2 (default: 151936)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    args = parser.parse_args()
    probe = dist.TCPStore("127.0.0.1", 0, 1, True)
    port = probe.port
    del probe
    mp.spawn(_worker, args=(port, args.tokens, args.vocab_size, args.rounds), nprocs=WORLD_SIZE)


if __name__ == "__main__":
    main()
