"""Threads in the place of ranks: what is collective over all of them, without processes or sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 20.0


class ThreadRanks:
    """``size`` ranks. Torch's collectives of Python objects, and the largest of their numbers, are between the threads
    of :meth:`run`; a single rank needs none."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size = size
        self._local = threading.local()
        self._barrier = threading.Barrier(size, timeout=TIMEOUT_SECONDS)
        self._slots: list[Any] = [None] * size
        monkeypatch.setattr(dist, "get_rank", lambda group=None: self._rank())
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: size)
        monkeypatch.setattr(dist, "all_gather_object", self._all_gather)
        monkeypatch.setattr(dist, "broadcast_object_list", self._broadcast)
        monkeypatch.setattr(dist, "all_reduce", self._largest)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Call ``work(rank)`` on every rank at once; what each returned or raised."""
        outcomes: list[Any] = [None] * self.size

        def be_rank(rank: int) -> None:
            self._local.rank = rank
            try:
                outcomes[rank] = work(rank)
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=be_rank, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * TIMEOUT_SECONDS)
            assert not thread.is_alive(), "a rank waits for the others"
        return outcomes

    def _rank(self) -> int:
        """The rank of this thread; 0 outside of :meth:`run`, which is all there is of a single rank."""
        return getattr(self._local, "rank", 0)

    def exchange(self, value: Any) -> list[Any]:
        """Give ``value`` to all ranks; what each of them gave, by rank."""
        self._slots[self._rank()] = value
        self._barrier.wait()
        everything = list(self._slots)
        self._barrier.wait()
        return everything

    def _all_gather(self, gathered: list[Any], value: Any, group: Any = None) -> None:
        gathered[:] = self.exchange(value)

    def _largest(self, tensor: torch.Tensor, op: Any, group: Any = None) -> None:
        assert op == dist.ReduceOp.MAX, "no other reduction is known to these ranks"
        tensor.fill_(max(self.exchange(tensor.item())))

    def _broadcast(self, box: list[Any], src: int, group: Any = None) -> None:
        box[:] = self.exchange(list(box))[src]
