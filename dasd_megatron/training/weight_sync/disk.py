"""Weights in a Hugging Face directory that the servers read; they need the same file system as the trainer."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from dasd_megatron.training.export import Policy
from dasd_megatron.training.weight_sync.base import WeightSync


class DiskSync(WeightSync):
    """Weight sync over the disk: each version is written to the run's directory of weights, and the servers load it."""

    def send(self, policy: Policy) -> None:
        """Write the weights; raises ExportError on every rank."""
        self.directory.write(policy)

    def deliver(self) -> None:
        """Let every server load the newest weights."""
        asyncio.run(self.catch_up(self.receivers.urls))

    async def catch_up(self, urls: Sequence[str]) -> None:
        """Let these servers load the newest weights, in one try: a server that fails is asked again by the next step,
        and does not hold up the others."""
        weights = self.directory.newest
        limits = dataclasses.replace(
            self.config, request_timeout_seconds=self.config.weight_sync_timeout_seconds, max_retries=0
        )
        async with self.make_client(limits, urls, self.receivers.pool) as client:
            await client.update_weights_from_disk(str(weights.path.absolute()), weights.version)

    def disconnect(self) -> None:
        """Do nothing, since nothing is connected between two requests."""
