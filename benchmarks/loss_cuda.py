"""Time of the token statistics on a GPU: kernels against the speed of a copy, and from hidden states against PyTorch
and the bare matrix product.

    python benchmarks/loss_cuda.py             # needs one CUDA device, Triton, and 30 GiB of its memory

Part 1, V=151,936, T=8192, bfloat16, one process: bytes that the forward and the backward kernel have to move, per
second, as a share of what a device-to-device copy of the same logits reaches in the same run.

Part 2, h=4096: ``linear_token_stats`` against materialised logits with PyTorch's cross-entropy and entropy, and against
its matrix products alone.

Figures are medians of alternated rounds, by CUDA events.

Writes ``benchmarks/results/loss_cuda_<device>.json`` unless told otherwise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe
from record import write_record

from dasd_megatron.losses import linear_token_stats, vocab_parallel_token_stats

Call = Callable[[], object]


def milliseconds(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Return the median time of each call. The first two rounds compile and warm up, and do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_index in range(rounds + 2):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if round_index >= 2:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mebibytes(call: Call) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_kernels(tokens: int, vocab_size: int, rounds: int) -> dict[str, Any]:
    logits = torch.randn(tokens, vocab_size, device="cuda", dtype=torch.bfloat16).mul_(3)
    teacher = torch.randn(tokens, vocab_size, device="cuda", dtype=torch.bfloat16).mul_(3)
    targets = torch.randint(0, vocab_size, (tokens,), device="cuda")
    copy = torch.empty_like(logits)
    size = logits.nbytes
    # Bytes moved: forward reads the logits; backward reads them and writes their gradient; a teacher is read as well.
    moved: dict[str, int] = {"copy": 2 * size}
    calls: dict[str, Call] = {"copy": lambda: copy.copy_(logits)}
    for divergence in (None, "reverse_kl", "forward_kl", "jsd"):
        extra = {} if divergence is None else {"teacher_logits": teacher, "divergence": divergence}
        name = divergence or "log-prob + entropy"
        reads = 1 if divergence is None else 2
        leaf = logits.detach().requires_grad_()
        stats = vocab_parallel_token_stats(leaf, targets, **extra)
        loss = (
            stats.log_prob.sum() + 0.1 * stats.entropy.sum() + (0.0 if divergence is None else stats.divergence.sum())
        )

        def forward(extra: dict[str, Any] = extra) -> None:
            vocab_parallel_token_stats(logits, targets, **extra)

        def backward(leaf: torch.Tensor = leaf, loss: torch.Tensor = loss) -> None:
            torch.autograd.grad(loss, leaf, retain_graph=True)

        calls[f"{name}, forward"], calls[f"{name}, backward"] = forward, backward
        # The mixture's sums are a second pass.
        moved[f"{name}, forward"] = reads * size * (2 if divergence == "jsd" else 1)
        moved[f"{name}, backward"] = (reads + 1) * size
    times = milliseconds(calls, rounds)
    bandwidth = {name: moved[name] / times[name] / 1e6 for name in calls}
    print(f"\nT={tokens} V={vocab_size} bfloat16")
    print(f"{'':32}{'ms':>10}{'GB/s':>10}{'of a copy':>11}")
    for name in calls:
        print(f"{name:32}{times[name]:10.3f}{bandwidth[name]:10.0f}{bandwidth[name] / bandwidth['copy']:11.1%}")
    return {
        name: {"ms": times[name], "gb_per_s": bandwidth[name], "of_copy": bandwidth[name] / bandwidth["copy"]}
        for name in calls
    }


def measure_linear(tokens: int, vocab_size: int, hidden_size: int, rounds: int) -> dict[str, Any]:
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (
        torch.randn(vocab_size, hidden_size, device="cuda", dtype=torch.bfloat16)
        .mul_(hidden_size**-0.5)
        .requires_grad_()
    )
    targets = torch.randint(0, vocab_size, (tokens,), device="cuda")

    def pytorch() -> None:
        log_p = (hidden @ weight.t()).float().log_softmax(-1)
        log_prob, entropy = log_p.gather(1, targets[:, None]), -(log_p.exp() * log_p).sum(-1)
        torch.autograd.grad(log_prob.sum() + 0.1 * entropy.sum(), (hidden, weight))

    def stats(fused: bool) -> None:
        found = (
            linear_token_stats(hidden, weight, targets)
            if fused
            else vocab_parallel_token_stats(hidden @ weight.t(), targets)
        )
        torch.autograd.grad(found.log_prob.sum() + 0.1 * found.entropy.sum(), (hidden, weight))

    @torch.no_grad()
    def products() -> None:
        logits = hidden @ weight.t()
        logits @ weight
        logits.t() @ hidden

    calls: dict[str, Call] = {
        "matrix products alone": products,
        "PyTorch, materialised": pytorch,
        "vocab_parallel_token_stats": lambda: stats(False),
        "linear_token_stats": lambda: stats(True),
    }
    times, peaks = milliseconds(calls, rounds), {name: peak_mebibytes(call) for name, call in calls.items()}
    base = times["matrix products alone"]
    print(f"\nT={tokens} V={vocab_size} h={hidden_size} bfloat16, forward + backward")
    print(f"{'':32}{'ms':>10}{'ratio':>10}{'peak MiB':>11}")
    for name in calls:
        print(f"{name:32}{times[name]:10.2f}{times[name] / base:10.2f}{peaks[name]:11.0f}")
    return {name: {"ms": times[name], "to_products": times[name] / base, "peak_mib": peaks[name]} for name in calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; benchmarks/loss.py measures on CPU")
    machine = describe()
    output = args.output or Path(__file__).parent / "results" / f"loss_cuda_{machine['gpu'].replace(' ', '_')}.json"
    print(machine["gpu"])
    results = {
        "machine": machine,
        "kernels": measure_kernels(args.tokens, args.vocab_size, args.rounds),
        "linear": measure_linear(args.tokens, args.vocab_size, args.hidden_size, args.rounds),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_record(output, results)


if __name__ == "__main__":
    main()
