"""The embedded server's end of a weight update, over a process group or from memory of this machine."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from dasd_megatron.errors import first_line
from dasd_megatron.models.weight_export import bucket_bytes, split_bucket
from dasd_megatron.rollout.embedded.schema import brief
from dasd_megatron.rollout.weight_group import join_weight_group
from dasd_megatron.rollout.weight_payload import PayloadError, unpack

JOIN_TIMEOUT_SECONDS = 120.0
MAX_JOINS = 4
"""Groups that may be waiting for their members at once."""
MAX_GROUPS = 16
MAX_WORLD_SIZE = 4096
MAX_DIMENSIONS = 16
WIDEST_ITEM_BYTES = 8
"""A bucket may take as much memory as the whole model would in float64."""

Outcome = TypeVar("Outcome")


class ReceiveError(RuntimeError):
    """An update that cannot go on; the served weights are unchanged."""


class WeightReceiver:
    """Groups that this server has joined, and the update that is under way.

    Weights arrive in a copy of the served model, which takes its place when the update ends. Until then the server goes
    on with the old ones. Methods block. :meth:`join` and :meth:`leave` may be called from any thread; the others are
    called one at a time.

    model: returns the served model, whose parameters may have been released; shapes: those of its parameters, by name.
    """

    def __init__(self, model: Callable[[], PreTrainedModel], shapes: Mapping[str, torch.Size]):
        self._model, self._shapes = model, dict(shapes)
        self._most_bytes = WIDEST_ITEM_BYTES * sum(shape.numel() for shape in self._shapes.values())
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._joining: set[str] = set()
        self._next: PreTrainedModel | None = None
        self._missing: set[str] = set()
        self._handed_over: Future | None = None
        """Outcome of the last update that was complete. Its model takes memory until its turn comes."""
        self._lock = threading.Lock()

    def join(self, address: str, port: int, rank: int, world_size: int, name: str, backend: str) -> None:
        """Join a process group whose rank 0 listens at ``address`` and ``port``; raises ReceiveError."""
        if backend != "gloo":
            raise ReceiveError(f"backend {brief(backend)} is not supported by the embedded rollout server; gloo is")
        if not 1 <= port <= 65535:
            raise ReceiveError(f"master_port must be in [1, 65535], got {brief(port)}")
        if not 1 <= rank < world_size <= MAX_WORLD_SIZE:
            raise ReceiveError(
                f"rank_offset must be in [1, world_size) and world_size at most {MAX_WORLD_SIZE}, got {brief(rank)} "
                f"and {brief(world_size)}"
            )
        with self._reserve(name):
            try:
                group = join_weight_group(
                    address,
                    port,
                    rank=rank,
                    world_size=world_size,
                    name=name,
                    backend=backend,
                    timeout_seconds=JOIN_TIMEOUT_SECONDS,
                )
            # torch raises many kinds of errors here. Each of them means that there is no group.
            except Exception as error:
                raise ReceiveError(f"Failed to initialize custom process group: {first_line(error)}.") from error
            self._groups[name] = group

    @contextlib.contextmanager
    def _reserve(self, name: str) -> Iterator[None]:
        """Keep a group's name and its place among the pending ones for the body; raises ReceiveError."""
        with self._lock:
            if name in self._groups or name in self._joining:
                raise ReceiveError(f"the group {brief(name)} exists already")
            if len(self._joining) >= MAX_JOINS:
                raise ReceiveError(
                    f"{MAX_JOINS} groups wait for their members already; each ends after {JOIN_TIMEOUT_SECONDS:g} s "
                    "at the latest"
                )
            if len(self._groups) + len(self._joining) >= MAX_GROUPS:
                raise ReceiveError(f"this server is in {MAX_GROUPS} groups already; destroy one of them first")
            self._joining.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._joining.discard(name)

    def leave(self, name: str) -> None:
        """Leave a process group; raises ReceiveError where there is none of this name."""
        group = self._groups.pop(name, None)
        if group is None:
            raise ReceiveError("The group to be destroyed does not exist.")
        try:
            dist.destroy_process_group(group)
        except (RuntimeError, ValueError) as error:
            raise ReceiveError(f"The group could not be destroyed: {first_line(error)}") from error

    def begin(self) -> None:
        """Open an update; raises ReceiveError while another is open, as SGLang refuses it."""
        if self._next is not None:
            raise ReceiveError("a weight-update session is already open; call end_weight_update() first")
        if self._handed_over is not None and not self._handed_over.done():
            raise ReceiveError("the weights of the last update still wait for the requests before them")
        model = self._model()
        # Parameters are not copied, since all of them will be sent.
        empty = {
            id(parameter): torch.nn.Parameter(parameter.new_empty(self._shapes[name]), requires_grad=False)
            for name, parameter in model.named_parameters()
        }
        self._next = copy.deepcopy(model, empty)
        self._missing = set(self._shapes)

    def receive(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        load_format: str | None,
    ) -> None:
        """Take part in one broadcast of a bucket and copy its tensors into the model to come; raises ReceiveError."""
        if self._next is None:
            raise ReceiveError("no weight update is open: call /begin_weight_update first")
        process_group = self._groups.get(group)
        if process_group is None:
            raise ReceiveError(
                f"Group {brief(group)} not in {brief(list(self._groups))}. Please call `init_weights_update_group` "
                "first."
            )
        _check_format(load_format)
        found = self._read_bucket(names, dtypes, shapes)
        flat = torch.empty(bucket_bytes(found, shapes), dtype=torch.uint8)
        with self._give_up_on_errors("the broadcast failed"):
            dist.broadcast(flat, src=0, group=process_group)
        with self._give_up_on_errors("the bucket cannot be read"):
            tensors = split_bucket(flat, found, shapes)
        self._copy(zip(names, tensors, strict=True))

    def _read_bucket(
        self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> list[torch.dtype]:
        """Return the dtypes of a bucket that can be received; raises ReceiveError.

        Whether its tensors fit is looked at only after the broadcast, in which the sender waits for this server.
        """
        if not len(names) == len(dtypes) == len(shapes):
            raise ReceiveError(f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes in one bucket")
        found = [_weight_dtype(name) for name in dtypes]
        total = 0
        for name, dtype, shape in zip(names, found, shapes, strict=True):
            # Python's integers do not overflow, as those of a tensor's size do.
            total += dtype.itemsize * math.prod(shape)
            if min(shape, default=1) < 0 or total > self._most_bytes or len(shape) > MAX_DIMENSIONS:
                raise ReceiveError(
                    f"{brief(name)} of shape {brief(shape)} makes a bucket larger than the served model in float64"
                )
        return found

    def load(self, payloads: Sequence[bytes], load_format: str | None) -> None:
        """Copy a bucket out of the sender's memory into the model to come; raises ReceiveError.

        payloads: one for each process of the server, of which there is one; :func:`weight_payload.unpack` reads it.
        """
        if self._next is None:
            raise ReceiveError(
                "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
            )
        _check_format(load_format)
        if len(payloads) != 1:
            raise ReceiveError(f"{len(payloads)} payloads for the one process of the embedded rollout server")
        try:
            tensors = unpack(payloads[0])
        except PayloadError as error:
            raise ReceiveError(str(error)) from error
        self._copy(tensors)

    def _copy(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy tensors into the model to come; the update is given up where they do not fit."""
        assert self._next is not None, "no update is open"
        parameters = dict(self._next.named_parameters())
        for name, tensor in tensors:
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != tensor.shape:
                self._next = None
                has = "no such parameter" if parameter is None else f"shape {tuple(parameter.shape)}"
                what = f"{brief(name, quote=False)} of shape {tuple(tensor.shape)}"
                raise ReceiveError(f"{what} does not fit: the served model has {has}")
            with torch.no_grad(), self._give_up_on_errors(f"{brief(name, quote=False)} cannot be copied"):
                parameter.data.copy_(tensor)
            self._missing.discard(name)

    @contextlib.contextmanager
    def _give_up_on_errors(self, failure: str) -> Iterator[None]:
        """Give the update up where the body fails."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self._next = None
            raise ReceiveError(f"{failure}: {first_line(error)}") from error

    def end(self, hand_over: Callable[[PreTrainedModel], Future[Outcome]]) -> Future[Outcome]:
        """Close the update and return the outcome of ``hand_over``, which is given the complete new model.

        Raises ReceiveError.
        """
        model, self._next = self._next, None
        if model is None:
            raise ReceiveError("no weight update is open: call /begin_weight_update first")
        if self._missing:
            names = ", ".join(sorted(self._missing)[:3])
            raise ReceiveError(
                f"{len(self._missing)} parameters were not sent ({names}); the served weights are unchanged"
            )
        outcome = hand_over(model)
        self._handed_over = outcome
        return outcome


def _check_format(load_format: str | None) -> None:
    if load_format != "flattened_bucket":
        raise ReceiveError(
            f"load_format={brief(load_format)} is not supported by the embedded rollout server; flattened_bucket is"
        )


def _weight_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ReceiveError(f"{brief(name)} is no dtype of weights")
    return dtype
