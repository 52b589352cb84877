"""Weights in memory that the servers, on the same machine, open: files in /dev/shm on the CPU, CUDA IPC handles on a
GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dasd_megatron.config import RolloutConfig
from dasd_megatron.models.weight_export import ExportBucket
from dasd_megatron.rollout.client import ClientFactory, make_client
from dasd_megatron.rollout.pool import ServerPool
from dasd_megatron.rollout.weight_payload import SharedBuffer, pack
from dasd_megatron.training.weight_sync.send import BucketSender, BucketSync


class TensorSender(BucketSender):
    """Sender that tells the servers where a bucket lies, in memory of global rank 0. Both buffers are there from the
    first bucket of a sync to its end or failure."""

    def __init__(
        self,
        config: RolloutConfig,
        sizes: Mapping[str, int],
        pool: ServerPool,
        *,
        stage: int | None,
        make_client: ClientFactory = make_client,
    ) -> None:
        super().__init__(config, sizes, pool, stage=stage, make_client=make_client)
        self._shared: dict[int, SharedBuffer] = {}

    @property
    def joined(self) -> bool:
        """True always, since nothing needs to be joined."""
        return True

    def buffer(self, index: int, size: int) -> torch.Tensor:
        """Return memory for a bucket, on the CPU shared with the servers."""
        if self.device.type == "cuda":
            return super().buffer(index, size)
        if index not in self._shared or self._shared[index].bytes.numel() < size:
            if index in self._shared:
                self._shared.pop(index).close()
            self._shared[index] = SharedBuffer(size)
        return self._shared[index].bytes

    def start(self, buckets: Sequence[ExportBucket], flat: torch.Tensor | None) -> None:
        """Hand a bucket to the servers."""
        if self.client is None or flat is None:
            return
        (bucket,) = buckets
        # A server answers once it has copied the bucket; on a GPU, torch waits for that where it lets the memory go.
        payloads = [[pack(flat, bucket.tensors) for _ in range(size)] for size in self.sizes]
        self.answers = self.run(self.client.update_weights_from_tensor(payloads))

    def end(self, version: str) -> None:
        """Give the shared memory back and let the servers name the version."""
        self.drop()
        super().end(version)

    def drop(self) -> None:
        """Give the shared memory back."""
        while self._shared:
            self._shared.popitem()[1].close()
        if self.buffers:
            self.buffers.clear()
            torch.cuda.ipc_collect()


class TensorSync(BucketSync):
    """Weight sync through memory of this machine."""

    sender_class = TensorSender
