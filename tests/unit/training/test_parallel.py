"""Errors of lost ranks, and flags that the ranks exchange."""

from __future__ import annotations

from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist

from dasd_megatron import backend
from dasd_megatron.stopping import StopRequested
from dasd_megatron.training import parallel
from dasd_megatron.training.decisions import Signals
from dasd_megatron.training.parallel import (
    LostPeerError,
    PeerError,
    flags_of_all_ranks,
    naming_lost_peers,
    on_selected_rank,
    true_on_any,
)
from tests.support.thread_ranks import ThreadRanks


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 20000ms for recv "
        "operation to complete",
        "Application timeout caused pair closure",
        "Connection closed by peer [10.77.0.11]:41922",
        "Connection reset by peer",
        "Broken pipe",
    ],
)
def test_a_lost_rank_is_one_line(message: str) -> None:
    with (
        pytest.raises(LostPeerError, match="within backend.timeout_seconds=20.*continue with resume=auto"),
        naming_lost_peers(20.0),
    ):
        raise RuntimeError(message)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), PeerError("disk full: Broken pipe"), ValueError("Broken pipe")]
)
def test_other_errors_stay(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming_lost_peers(20.0):
        raise error
    assert caught.value is error


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of each all-reduce, of which the other ranks have true in the second place alone."""
    reduced: list[list[int]] = []

    def all_reduce(numbers: torch.Tensor, op: dist.ReduceOp) -> None:
        assert op == dist.ReduceOp.MAX
        reduced.append(numbers.tolist())
        if numbers.ndim:
            numbers[1] = 1

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(backend, "current", lambda: SimpleNamespace(device=lambda: torch.device("cpu")))
    return reduced


def test_a_flag_is_true_everywhere_if_it_is_true_on_any_rank(reductions: list[list[int]]) -> None:
    flags = flags_of_all_ranks(Signals(stop=True, pause=False))
    assert flags == Signals(stop=True, writing=True, end=False, pause=False)
    assert reductions == [[1, 0, 0, 0, 0]]


def test_a_single_flag_takes_one_number(reductions: list[int]) -> None:
    assert true_on_any(True) is True and true_on_any(False) is False
    assert reductions == [1, 0]


@pytest.mark.parametrize("sizes", [(5, 0, 4), (1, 3, 4), (0, 1, 0), (0, 0, 0)])
def test_the_median_is_that_of_all_replicas(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {torch.seed()}")
    ranks = ThreadRanks(len(sizes), monkeypatch)

    def all_reduce(tensor: torch.Tensor, op: dist.ReduceOp, group: object) -> None:
        tensor.copy_(torch.stack(ranks.exchange(tensor.clone())).sum(0))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(parallel, "parallel_state", SimpleNamespace(get_data_parallel_group=lambda: None))
    # Equal values and 0 are among them.
    parts = [torch.randn(size).exp().mul(4).round().div(4) for size in sizes]
    found = ranks.run(lambda rank: parallel.median_of_replicas(parts[rank]))
    values = torch.cat(parts).double().numpy()
    assert found == [float(numpy.median(values)) if len(values) else None] * len(sizes)


def test_a_failure_on_the_selected_rank_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("disk full")

    outcomes = ThreadRanks(3, monkeypatch).run(lambda rank: on_selected_rank(rank == 1, fail, (OSError,)))
    assert [str(outcome) for outcome in outcomes] == ["OSError: disk full"] * 3
    assert all(isinstance(outcome, PeerError) for outcome in outcomes)


def test_a_failure_comes_before_a_request_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> None:
        if rank == 0:
            raise StopRequested("a signal")
        if rank == 1:
            raise OSError("disk full")

    ranks = ThreadRanks(3, monkeypatch)
    outcomes = ranks.run(lambda rank: on_selected_rank(True, lambda: work(rank), (OSError,)))
    assert all(isinstance(outcome, PeerError) for outcome in outcomes)
    outcomes = ranks.run(lambda rank: on_selected_rank(rank == 0, lambda: work(rank), (OSError,)))
    assert all(isinstance(outcome, StopRequested) for outcome in outcomes)
