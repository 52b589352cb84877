"""Rollout servers within the test's process, which the real client talks to without a socket."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import Qwen3Config

from dasd_megatron.config import RolloutConfig
from dasd_megatron.models.weight_export import ExportBucket, ExportEntry, split_bucket
from dasd_megatron.models.weight_formats import PLAIN, HfTensor, WeightFormat
from dasd_megatron.rollout.answers import Answer
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.rollout.local_server import ServerStartError
from dasd_megatron.rollout.pool import ServerPool
from dasd_megatron.training.weight_sync.send import BucketSender

MODEL = Qwen3Config(architectures=["Qwen3ForCausalLM"], vocab_size=100, hidden_size=32)


class FakeServer:
    """One server: the weights that it holds, and what it was asked.

    down: it refuses connections. failing: the paths that it answers with 500. As SGLang, it goes down when it is asked
    to take back memory that it has not released.
    """

    def __init__(self, version: str = "old", architecture: str = "Qwen3ForCausalLM") -> None:
        self.version, self.architecture = version, architecture
        self.down = False
        self.failing: set[str] = set()
        self.asked: list[str] = []
        self.released: set[str] = set()
        self.log_prob = -1.0
        self.checksums: list[dict[str, str]] = [{}]
        """By name of tensor, for each of its processes."""

    def count(self, path: str) -> int:
        """Return how often it was asked for ``path``."""
        return self.asked.count(path)

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON; raises what aiohttp does where nobody listens."""
        if self.down:
            raise aiohttp.ClientConnectionError("connection refused")
        self.asked.append(path)
        if path in self.failing:
            return 500, {"error": {"message": "injected"}}
        match path:
            case "/model_info":
                return 200, {"weight_version": self.version, "architectures": [self.architecture]}
            case "/update_weights_from_disk":
                self.version = body["weight_version"]
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/release_memory_occupation":
                self.released |= set(body["tags"])
            case "/resume_memory_occupation":
                if not set(body["tags"]) <= self.released:
                    self.down = True
                    raise aiohttp.ServerDisconnectedError
                self.released -= set(body["tags"])
            case "/weights_checker":
                ranks = [
                    {"parallelism_info": [{"tp_rank": rank}], "checksums": checksums}
                    for rank, checksums in enumerate(self.checksums)
                ]
                return 200, {"success": True, "ranks": ranks}
            case "/generate":
                triples = [[self.log_prob, token, None] for token in body["input_ids"][0]]
                return 200, [{"meta_info": {"input_token_logprobs": triples}}]
        return 200, {"success": True}


class FakeClient(RolloutClient):
    """The real client, whose requests go to :class:`FakeServer` objects."""

    servers: dict[str, FakeServer]

    async def _exchange(
        self, http: aiohttp.ClientSession, method: str, url: str, path: str, body: Any, most_bytes: int
    ) -> Answer:
        status, content = self.servers[url].answer(path, json.loads(json.dumps(body)))
        return Answer(path, status, json.dumps(content).encode())


class FakeServers:
    """The servers of a test by address, what makes their clients, and what starts one of the trainer's own."""

    def __init__(self, **servers: FakeServer) -> None:
        self.by_url = {f"http://{name}:1": server for name, server in servers.items()}
        self.starts: list[tuple[str, str]] = []
        """Folder and version of every start of the trainer's own server."""
        self.failing_starts = 0
        """Number of the next starts that fail."""

    @property
    def urls(self) -> list[str]:
        return list(self.by_url)

    def make_client(self, config: RolloutConfig, urls: Sequence[str], pool: ServerPool | None = None) -> RolloutClient:
        client = FakeClient(
            urls,
            connect_timeout=config.connect_timeout_seconds,
            request_timeout=config.request_timeout_seconds,
            max_retries=config.max_retries,
            backoff=0.0,
            max_in_flight=config.max_in_flight,
            pool=pool,
        )
        client.servers = self.by_url
        return client

    def make_server(
        self, model_path: str | Path, weight_version: str, rollout: RolloutConfig, log_path: str | Path
    ) -> FakeOwnServer:
        return FakeOwnServer(self, model_path, weight_version)


class FakeOwnServer:
    """A server that the trainer starts, in the place of a LocalServer."""

    url = "http://own:1"

    def __init__(self, servers: FakeServers, model_path: str | Path, weight_version: str) -> None:
        self._servers, self._weights = servers, (model_path, weight_version)

    def start(self) -> None:
        path, version = self._weights
        self._servers.starts.append((Path(path).name, version))
        if self._servers.failing_starts:
            self._servers.failing_starts -= 1
            raise ServerStartError("the rollout server ended with status 1")
        self._servers.by_url[self.url] = FakeServer(version)

    def restart(self, model_path: str | Path, weight_version: str) -> None:
        self._weights = (model_path, weight_version)
        self.start()

    def stop(self) -> None:
        if self.url in self._servers.by_url:
            self._servers.by_url[self.url].down = True


class FakeSender(BucketSender):
    """Gives its buckets to fake servers one by one; notes them, and how often it was dropped."""

    made: list[FakeSender]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.buckets: list[tuple[bytes, tuple[HfTensor, ...]]] = []
        self.drops = 0
        type(self).made.append(self)

    @property
    def joined(self) -> bool:
        return True

    def start(self, buckets: Sequence[ExportBucket], flat: torch.Tensor | None) -> None:
        for bucket in buckets:
            self.buckets.append((bytes(flat.tolist()), bucket.tensors))
            self.answers = self.run(self.client.update_weights_from_tensor([["bucket"] for _ in self.urls]))

    def drop(self) -> None:
        self.drops += 1


class FakeBridge:
    """In the place of a model's bridge, on the only rank: ``tensors`` pass by in order, and ``passed`` counts them."""

    export_stage = 0

    def __init__(self, *tensors: tuple[str, torch.Tensor]) -> None:
        self.tensors, self.passed, self.hf_config = tensors, 0, MODEL

        self.hf_shapes = {name: tensor.shape for name, tensor in tensors}

    def export_plan(self, _chunks: Any) -> list[ExportEntry]:
        return [
            ExportEntry(0, 0, name, name, tuple(tensor.shape), tensor.dtype, None, (hf_tensor(name, tensor),))
            for name, tensor in self.tensors
        ]

    def collect_bucket(self, _chunks: Any, bucket: ExportBucket, flat: torch.Tensor | None, *, to_stage: int) -> None:
        assert to_stage == bucket.stage == 0
        if flat is None:
            return
        known = dict(reversed(self.tensors))
        for tensor, place in zip(bucket.tensors, split_tensors(bucket, flat), strict=True):
            self.passed += 1
            place.copy_(known[tensor.name])

    def export_weights(
        self, _chunks: Any, only: Collection[str] | None = None, form: WeightFormat = PLAIN
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.tensors:
            if only is None or name in only:
                self.passed += 1
                yield from form.convert(name, tensor)


def hf_tensor(name: str, tensor: torch.Tensor) -> HfTensor:
    return HfTensor(name, tensor.dtype, tuple(tensor.shape))


def split_tensors(bucket: ExportBucket, flat: torch.Tensor) -> list[torch.Tensor]:
    return split_bucket(flat, [tensor.dtype for tensor in bucket.tensors], [tensor.shape for tensor in bucket.tensors])


class FakeModel:
    """A policy that has a bridge and nothing else."""

    def __init__(self, *tensors: tuple[str, torch.Tensor]) -> None:
        names = itertools.count()
        self.bridge = FakeBridge(*(tensors or [(f"t{next(names)}", torch.arange(4.0))]))
        self.chunks: list[Any] = []
