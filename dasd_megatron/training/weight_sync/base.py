"""The interface of a way of bringing the policy's weights to the rollout servers.

The trainer drives each of them with the same loop, on every rank:

    while True:
        try:
            sync.send(policy)          # all ranks; the servers have the weights then, or rank 0 knows where they are
            on_selected_rank(rank0, sync.deliver, ...)
        except PeerError:
            ...                        # rank 0 recovers servers; the loop goes on while some are left, without send
                                       # where sync.can_catch_up says that the servers that are back need none
        else:
            break
    verify_weights(...)                # all ranks; whatever the way
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from dasd_megatron.config import RolloutConfig
from dasd_megatron.rollout.client import ClientFactory, make_client
from dasd_megatron.rollout.pool import ServerPool
from dasd_megatron.training.export import Policy, WeightDirectory


class WeightSyncError(RuntimeError):
    """The servers did not take the weights; what they serve now is unknown. ``url``: the server that it failed for,
    where that is known."""

    def __init__(self, failure: str, url: str | None = None):
        super().__init__(f"weight sync: {failure}")
        self.failure, self.url = failure, url


class Receivers(Protocol):
    """The servers that are to get weights, as a way sees them on global rank 0.

    urls: base addresses of all of them; pool: what is known of their health.
    """

    urls: list[str]
    pool: ServerPool

    def choose_receivers(self) -> list[str]:
        """Return the servers that are not known to be gone and serve the model of the run."""
        ...

    def tensor_parallel_sizes(self, urls: Sequence[str]) -> dict[str, int]:
        """Return the number of processes that share the model, by address, of those servers that answer."""
        ...

    def leave_out(self, urls: Sequence[str], error: WeightSyncError) -> bool:
        """Find out for which of ``urls`` a sync has failed, and leave these out of the next one.

        Returns whether trying again is of use: some are known to be gone, and others are left.
        """
        ...


class WeightSync(ABC):
    """One way of bringing the policy's weights to the servers. Every rank has one.

    config: the limits on time and memory, of which ``rollout.weight_sync_timeout_seconds`` bounds each request.
    receivers: the servers. directory: weights on disk, which servers of the trainer's own start from. make_client:
    makes the clients that talk to the servers.
    """

    def __init__(
        self,
        config: RolloutConfig,
        receivers: Receivers,
        directory: WeightDirectory,
        make_client: ClientFactory = make_client,
    ) -> None:
        self.config = config
        self.receivers = receivers
        self.directory = directory
        self.make_client = make_client

    @abstractmethod
    def send(self, policy: Policy) -> None:
        """Send the weights as far as that takes all ranks. Collective over all of them.

        Raises:
            PeerError: the servers did not take the weights; on every rank. Trying again can help.
            ExportError: the weights could not be written; on every rank. The run ends.
        """

    @abstractmethod
    def deliver(self) -> None:
        """Finish the sync on global rank 0, after :meth:`send` and before the servers serve the weights.

        Raises:
            RolloutServerError: no server took the weights.
        """

    @abstractmethod
    async def catch_up(self, urls: Sequence[str]) -> None:
        """Give servers that came back between two syncs what was sent last, where rank 0 can do that alone. Else they
        get their weights with everybody's next ones.

        Raises:
            RolloutServerError: none of them took the weights.
        """

    def can_catch_up(self, version: str | None) -> bool:
        """Return whether servers that came back get ``version`` without another :meth:`send`, on every rank the same.

        The trainer's own server starts from the directory, whatever the way. A way whose :meth:`catch_up` takes the
        weights from elsewhere overrides this.
        """
        return self.directory.holds(version)

    @abstractmethod
    def disconnect(self) -> None:
        """End what connects this process with the servers. After that of global rank 0 the next :meth:`send` connects
        all ranks anew."""


def raise_failure(failure: Exception | None) -> None:
    """Raise ``failure`` if there is one."""
    if failure is not None:
        raise failure
