"""The order in which training problems come, as a pure function of a position, so that one integer resumes it."""

from __future__ import annotations

from functools import lru_cache


class DataOrder:
    """An endless sequence of problem indices, epoch after epoch, each epoch a permutation of ``range(num_problems)``.

    The sequence depends on the arguments alone. Each epoch's permutation is seeded by the pair (seed, epoch), so runs
    of neighbouring seeds share no order. A run's whole state is the position of its next problem, an integer from 0.

    Args:
        num_problems: size of the problem set, at least 1.
        seed: a non-negative integer.
        shuffle: false gives file order in every epoch.
    """

    def __init__(self, num_problems: int, seed: int, shuffle: bool = True) -> None:
        if num_problems < 1:
            raise ValueError(f"num_problems is {num_problems}; an order needs at least one problem")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        self.num_problems = num_problems
        self.seed = seed
        self.shuffle = shuffle
        # A batch touches one epoch, or two at a boundary, and so an epoch's order is not made for each batch.
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)

    def indices(self, position: int, count: int) -> list[int]:
        """Return the elements from ``position`` to before ``position + count`` of the sequence.

        They may come from any number of epochs.
        """
        if position < 0 or count < 0:
            raise ValueError(f"position {position} and count {count} must not be negative")
        taken: list[int] = []
        while len(taken) < count:
            epoch, offset = divmod(position + len(taken), self.num_problems)
            taken.extend(self._epoch_order(epoch)[offset : offset + count - len(taken)])
        return taken

    def _make_epoch_order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_problems))
        # Imported here, because commands that only check a configuration need no numbers.
        import numpy as np

        order: list[int] = np.random.default_rng((self.seed, epoch)).permutation(self.num_problems).tolist()
        return order
