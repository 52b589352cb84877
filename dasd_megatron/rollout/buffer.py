"""Bookkeeping of the groups that a step collects, without a server or a clock.

A prompt is known by its position in the endless order of training problems. It is drawn once. From then on it is in
one place until a step takes it: pending (its rollouts have to be started, or started again), in flight, ready, or
refused by the filter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dasd_megatron.rollout_files import read_samples
from dasd_megatron.samples import ReplayError, Sample, version_step


@dataclass(slots=True)
class Group:
    """The graded responses to one prompt.

    ``version``: training steps behind the oldest weights that a token of theirs is from.
    """

    position: int
    version: int
    samples: list[Sample]


def make_group(samples: list[Sample]) -> Group:
    """Return the group of all responses to one prompt.

    Raises ValueError for weight versions that are not a training run's.
    """
    names = {str(name) for sample in samples for name, _ in sample.weight_versions}
    return Group(samples[0].position, min(map(version_step, names)), samples)


def read_groups(path: Path) -> list[Group]:
    """Read the groups of a file of :func:`~dasd_megatron.rollout_files.save_samples`, each group's samples in a row.

    Raises:
        ReplayError: names what is wrong with the file.
    """
    grouped = itertools.groupby(read_samples(path), key=lambda sample: sample.position)
    try:
        return [make_group(list(samples)) for _, samples in grouped]
    except ValueError as error:
        raise ReplayError(f"{path}: {error}") from error


@dataclass
class Counts:
    """Groups since the last step was taken: ``drawn`` newly, ``filtered`` out, ``restarted`` unfinished or too old."""

    drawn: int = 0
    filtered: int = 0
    restarted: int = 0


@dataclass
class BufferState:
    """The part of a buffer that is saved: the position of the next prompt to draw, prompts to start again, groups that
    no step has taken yet, and the counts for the next step until now."""

    position: int = 0
    pending: list[int] = field(default_factory=list)
    ready: list[Group] = field(default_factory=list)
    refused: list[Group] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


class GroupBuffer:
    """Buffer that collects ``groups`` groups for each step.

    Args:
        over_sampling: so many times the groups that are missing are started, at least 1.
        filter_limit: after ``filter_limit * groups`` refused groups in one step, refused ones count as ready, since
            the step might never end otherwise.
        wait_for_all: a step is complete only when nothing is in flight, so that its groups do not depend on time.
        max_staleness: how many steps older than the step's weights a group's oldest token may be.
    """

    def __init__(
        self,
        groups: int,
        *,
        over_sampling: float,
        filter_limit: float,
        wait_for_all: bool,
        max_staleness: int,
        state: BufferState,
    ):
        self.groups = groups
        self.over_sampling = over_sampling
        self.filter_limit = filter_limit
        self.wait_for_all = wait_for_all
        self.max_staleness = max_staleness
        self.position = state.position
        self.pending = sorted(state.pending)
        self.ready = list(state.ready)
        self.in_flight: dict[int, int] = {}
        """The version that the rollouts of a position began under, by position."""
        self.refused = list(state.refused)
        self.counts = dataclasses.replace(state.counts)

    def state(self) -> BufferState:
        """Return what has to be saved; what is in flight counts as pending, since it would have to be started again."""
        pending = sorted([*self.pending, *self.in_flight])
        return BufferState(
            self.position, pending, list(self.ready), list(self.refused), dataclasses.replace(self.counts)
        )

    def start(self, steps: int, version: int) -> list[int]:
        """Put positions in flight under the weights ``version``, for ``steps`` steps' groups, and return them.

        These are none while enough groups are ready or in flight, and else ``over_sampling`` times the missing ones.
        Prompts that wait to be started again come first.
        """
        missing = steps * self.groups - len(self.in_flight) - len(self._usable())
        if missing <= 0:
            return []
        count = math.ceil(missing * self.over_sampling)
        again, self.pending = self.pending[:count], self.pending[count:]
        new = range(self.position, self.position + count - len(again))
        self.position = new.stop
        self.counts.drawn += len(new)
        self.in_flight |= dict.fromkeys([*again, *new], version)
        return [*again, *new]

    def finish(self, group: Group, keep: bool) -> None:
        """Take in a group that is complete and graded; the filter has said whether to ``keep`` it."""
        del self.in_flight[group.position]
        (self.ready if keep else self.refused).append(group)
        self.counts.filtered += not keep

    def give_back(self, positions: Iterable[int]) -> None:
        """Make positions pending whose rollouts were broken off in flight."""
        positions = list(positions)
        for position in positions:
            del self.in_flight[position]
        self._restart(positions)

    def can_take(self) -> bool:
        """Return whether the groups of a step are there."""
        if self.wait_for_all and self.in_flight:
            return False
        return len(self._usable()) >= self.groups

    def take(self) -> tuple[list[Group], Counts]:
        """Take the groups of a step out: the earliest that are ready, in the order of their prompts.

        Returns them, and the counts since the last step.
        """
        chosen = self._usable()[: self.groups]
        taken = {group.position for group in chosen}
        self.ready = [group for group in self.ready if group.position not in taken]
        counts, self.counts, self.refused = self.counts, Counts(), []
        return sorted(chosen, key=lambda group: group.position), counts

    def age(self, version: int) -> list[int]:
        """Make groups pending that are too old for a step that trains the weights ``version``.

        Returns the positions in flight that are too old. They have to be broken off and given back.
        """
        oldest = version - self.max_staleness
        late = [group for group in self.ready if group.version < oldest]
        self.ready = [group for group in self.ready if group.version >= oldest]
        self.refused = [group for group in self.refused if group.version >= oldest]
        self._restart([group.position for group in late])
        return [position for position, began in self.in_flight.items() if began < oldest]

    def start_over(self) -> None:
        """Make all that is ready or refused pending: it was sampled from a policy that is given up."""
        groups = [*self.ready, *self.refused]
        self.ready, self.refused = [], []
        self._restart([group.position for group in groups])

    def _restart(self, positions: list[int]) -> None:
        self.counts.restarted += len(positions)
        self.pending = sorted([*self.pending, *positions])

    def _usable(self) -> list[Group]:
        """Return ready groups by position, and behind them the refused ones once there are too many of these."""
        usable = sorted(self.ready, key=lambda group: group.position)
        if self.counts.filtered >= self.filter_limit * self.groups:
            usable += sorted(self.refused, key=lambda group: group.position)
        return usable
