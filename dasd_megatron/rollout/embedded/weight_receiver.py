"""The embedded server's end of a weight update, over a process group or from memory of this machine."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from dasd_megatron.rollout.weight_group import bucket_bytes, join_weight_group, split_bucket
from dasd_megatron.rollout.weight_payload import PayloadError, unpack

JOIN_TIMEOUT_SECONDS = 120.0


class ReceiveError(RuntimeError):
    """An update that cannot go on; the served weights are unchanged."""


class WeightReceiver:
    """Groups that this server has joined, and the update that is under way.

    Weights arrive in a copy of the served model, which takes its place when the update ends. Until then the server goes
    on with the old ones. Methods block and may be called from any thread, one at a time.

    model: returns the served model, whose parameters may have been released; shapes: those of its parameters, by name.
    """

    def __init__(self, model: Callable[[], PreTrainedModel], shapes: Mapping[str, torch.Size]):
        self._model, self._shapes = model, dict(shapes)
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._next: PreTrainedModel | None = None
        self._missing: set[str] = set()
        self._lock = threading.Lock()

    def join(self, address: str, port: int, rank: int, world_size: int, name: str, backend: str) -> None:
        """Join a process group whose rank 0 listens at ``address`` and ``port``; raises ReceiveError."""
        if backend != "gloo":
            raise ReceiveError(f"backend {backend!r} is not supported by the embedded rollout server; gloo is")
        if name in self._groups:
            raise ReceiveError(f"the group {name!r} exists already")
        with self._lock:
            try:
                self._groups[name] = join_weight_group(
                    address,
                    port,
                    rank=rank,
                    world_size=world_size,
                    name=name,
                    backend=backend,
                    timeout_seconds=JOIN_TIMEOUT_SECONDS,
                )
            except (RuntimeError, ValueError) as error:
                raise ReceiveError(f"Failed to initialize custom process group: {error}.") from error

    def leave(self, name: str) -> None:
        """Leave a process group; raises ReceiveError where there is none of this name."""
        if name not in self._groups:
            raise ReceiveError("The group to be destroyed does not exist.")
        dist.destroy_process_group(self._groups.pop(name))

    def begin(self) -> None:
        """Open an update; raises ReceiveError while another is open, as SGLang refuses it."""
        if self._next is not None:
            raise ReceiveError("a weight-update session is already open; call end_weight_update() first")
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
        if group not in self._groups:
            raise ReceiveError(
                f"Group {group} not in {list(self._groups)}. Please call `init_weights_update_group` first."
            )
        if load_format != "flattened_bucket":
            raise ReceiveError(
                f"load_format={load_format!r} is not supported by the embedded rollout server; flattened_bucket is"
            )
        found = [getattr(torch, name) for name in dtypes]
        flat = torch.empty(bucket_bytes(found, shapes), dtype=torch.uint8)
        with self._lock, self._give_up_on_errors():
            dist.broadcast(flat, src=0, group=self._groups[group])
        self._copy(zip(names, split_bucket(flat, found, shapes), strict=True))

    def load(self, payloads: Sequence[bytes], load_format: str | None) -> None:
        """Copy a bucket out of the sender's memory into the model to come; raises ReceiveError.

        payloads: one for each process of the server, of which there is one; :func:`weight_payload.unpack` reads it.
        """
        if self._next is None:
            raise ReceiveError(
                "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
            )
        if load_format != "flattened_bucket":
            raise ReceiveError(
                f"load_format={load_format!r} is not supported by the embedded rollout server; flattened_bucket is"
            )
        if len(payloads) != 1:
            raise ReceiveError(f"{len(payloads)} payloads for the one process of the embedded rollout server")
        try:
            tensors = unpack(payloads[0])
        except PayloadError as error:
            raise ReceiveError(str(error)) from error
        with self._lock:
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
                raise ReceiveError(f"{name} of shape {tuple(tensor.shape)} does not fit: the served model has {has}")
            with torch.no_grad():
                parameter.data.copy_(tensor)
            self._missing.discard(name)

    @contextlib.contextmanager
    def _give_up_on_errors(self) -> Iterator[None]:
        """Give the update up where the broadcast in the body fails."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self._next = None
            raise ReceiveError(f"the broadcast failed: {error}") from error

    def end(self) -> PreTrainedModel:
        """Close the update and return the complete new model; raises ReceiveError."""
        model, self._next = self._next, None
        if model is None:
            raise ReceiveError("no weight update is open: call /begin_weight_update first")
        if self._missing:
            names = ", ".join(sorted(self._missing)[:3])
            raise ReceiveError(
                f"{len(self._missing)} parameters were not sent ({names}); the served weights are unchanged"
            )
        return model
