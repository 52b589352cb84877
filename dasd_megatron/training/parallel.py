"""The process group, Megatron's parallel state and the few collectives that the loop itself uses."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from dasd_megatron import backend, stopping
from dasd_megatron.config import Config, ParallelConfig
from dasd_megatron.errors import ConfigError, first_line
from dasd_megatron.stopping import StopRequested

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_LOOK_SECONDS = 1.0

T = TypeVar("T")
Flags = TypeVar("Flags", bound="DataclassInstance")
"""A dataclass whose fields are all bool."""


class PeerError(RuntimeError):
    """Work that every rank was waiting for failed on one of them; raised on all, with that rank's message."""

    on_all_ranks = True


class LostPeerError(RuntimeError):
    """Another rank could not be reached within the limit of a collective, or ended. The message is one line."""


_GLOO = re.compile(r"gloo/|Timed out waiting|pair closure|Connection (closed|reset|timed out|refused)|Broken pipe")


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a library raises ``error`` because a rank cannot be reached. NCCL's errors have classes of their
    own; gloo's are recognised by their text."""
    own = type(error).__module__.startswith("dasd_megatron.")
    return not own and (isinstance(error, dist.DistError) or _GLOO.search(str(error)) is not None)


@contextlib.contextmanager
def naming_lost_peers(timeout_seconds: float) -> Iterator[None]:
    """Turn what the libraries raise when a rank cannot be reached into :class:`LostPeerError`. ``timeout_seconds`` is
    the limit of each collective."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise LostPeerError(
            f"the other processes could not be reached within backend.timeout_seconds={timeout_seconds:g}, or one has "
            f"ended ({first_line(error)}): look at its node and at the network between them, then continue with "
            "resume=auto"
        ) from error


def initialize(config: Config) -> None:
    """Start the process group from torchrun's environment and split it into TP x CP x PP x DP; seeds all generators
    from ``run.seed``.

    Raises:
        ConfigError: the number of processes is not the product of the parallel sizes, or the layout asks of Transformer
            Engine what it cannot do, or needs it where it is not installed.
    """
    _check_transformer_engine(config)
    backend.current().init_process_group(config.backend.timeout_seconds)
    split_world(config.parallel, config.backend.timeout_seconds, config.run.seed)


def _check_transformer_engine(config: Config) -> None:
    """Refuse what asks of Transformer Engine what it cannot do, or needs it where it is not installed."""
    parallel = config.parallel
    transformer_engine = backend.current().uses_transformer_engine(config.backend.transformer_impl)
    if config.batch.packing and transformer_engine and config.precision.params_dtype == "fp32":
        raise ConfigError(
            "batch.packing=true in fp32: Transformer Engine's attention takes packed sequences in half precision "
            "alone; write precision=bf16, or backend.transformer_impl=local"
        )
    if parallel.context_parallel_size > 1 and not transformer_engine:
        raise ConfigError(
            f"parallel.context_parallel_size={parallel.context_parallel_size} needs Transformer Engine, which is not "
            "installed: install it, or write 1"
        )


def split_world(parallel: ParallelConfig, timeout_seconds: float, seed: int) -> None:
    """Split an initialised process group into TP x CP x PP x DP and seed all generators, as :func:`initialize` does.
    ``timeout_seconds`` is the limit of each collective."""
    expected = parallel.world_size
    if dist.get_world_size() != expected:
        raise ConfigError(
            f"parallel: TP x CP x PP x DP = {expected}, but {dist.get_world_size()} processes run; set "
            f"parallel.data_parallel_size={dist.get_world_size() // parallel.replica_size or 1} or start {expected} "
            "processes"
        )
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        # Megatron-Core makes a timedelta of it, so a fraction of a minute is fine.
        distributed_timeout_minutes=timeout_seconds / 60,
    )
    # Each stage has a seed of its own: with one for all, the first layer of every stage would drop the same hidden
    # states, and so on.
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def is_replica_source() -> bool:
    """Return whether this is the rank that gets the rollouts of its data-parallel replica: the first of those that
    share its tensors and layers, and of those that share its sequences."""
    groups = (parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group())
    return all(dist.get_rank() == dist.get_process_group_ranks(group)[0] for group in groups)


def _groups_of_replica() -> list[dist.ProcessGroup]:
    """Return the groups of several ranks over which what a replica's source has reaches all of the replica, one after
    the other."""
    # Context-parallel ranks come first: then the first rank of every model-parallel group has it.
    groups = [parallel_state.get_context_parallel_group(), parallel_state.get_model_parallel_group()]
    return [group for group in groups if dist.get_world_size(group) > 1]


class Part(NamedTuple):
    """Message to a data-parallel replica: flat arrays by name, and a few small facts."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def scatter_to_replicas(parts: list[Part] | None) -> Part:
    """Return global rank 0's part for this data-parallel replica, on every rank of it.

    ``parts`` has one for each replica on rank 0, and is None elsewhere. Each array travels as it is: from rank 0
    straight to the source of its replica, through host memory, so that rank 0's device holds nobody's; and within a
    replica by one broadcast over its tensor- and pipeline-parallel ranks, and one over its context-parallel ranks.

    Collective over all ranks: a scatter of facts, names, types and lengths as Python objects, and the arrays.
    """
    head: list[Any] = [None]
    part: Part | None = None
    groups = _groups_of_replica()
    if is_replica_source():
        group = parallel_state.get_data_parallel_group()
        heads = None if parts is None else [_Head.of(part) for part in parts]
        dist.scatter_object_list(head, heads, src=0, group=group)
        part = head[0].empty() if parts is None else parts[0]
        _pass_on(part, parts, dist.get_process_group_ranks(group))
    for group in groups:
        dist.broadcast_object_list(head, src=dist.get_process_group_ranks(group)[0], group=group)
    part = part or head[0].empty()
    if groups:
        part = Part({name: _broadcast(array, groups) for name, array in part.arrays.items()}, part.facts)
    return part


class _Head(NamedTuple):
    """Facts of a :class:`Part`, and type and length of each of its arrays by name."""

    facts: dict[str, Any]
    shapes: dict[str, tuple[np.dtype, int]]

    @classmethod
    def of(cls, part: Part) -> _Head:
        return cls(part.facts, {name: (array.dtype, len(array)) for name, array in part.arrays.items()})

    def empty(self) -> Part:
        """Return a part of this head with room for the arrays."""
        return Part({name: np.empty(length, dtype) for name, (dtype, length) in self.shapes.items()}, self.facts)


def _host_tensors(part: Part) -> list[torch.Tensor]:
    """Return the arrays as tensors of bytes that share their memory, without those of no bytes."""
    return [torch.from_numpy(array.view(np.uint8)) for array in part.arrays.values() if len(array)]


def _pass_on(part: Part, parts: list[Part] | None, sources: Sequence[int]) -> None:
    """Send the other replicas' ``parts`` from rank 0 to their ``sources``, and fill ``part`` on these."""
    if parts is None:
        for tensor in _host_tensors(part):
            dist.recv(tensor, 0)
        return
    others = zip(parts[1:], sources[1:], strict=True)
    sent = [dist.isend(tensor, rank) for other, rank in others for tensor in _host_tensors(other)]
    for work in sent:
        if work is not None:
            work.wait()


def _broadcast(array: np.ndarray, groups: Sequence[dist.ProcessGroup]) -> np.ndarray:
    """Return the array of the first rank of each of ``groups``, one group after the other."""
    if not len(array):
        return array
    tensor = torch.from_numpy(array.view(np.uint8)).to(backend.current().device())
    for group in groups:
        dist.broadcast(tensor, dist.get_process_group_ranks(group)[0], group=group)
    return tensor.cpu().numpy().view(array.dtype)


def broadcast_from_rank0(value: T | None) -> T:
    """Return global rank 0's Python object on every rank. Collective over all ranks."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_replicas(value: T) -> list[T]:
    """Return the Python objects of all data-parallel replicas, in replica order, on every rank. Collective over
    replicas."""
    gathered: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
    dist.all_gather_object(gathered, value, group=parallel_state.get_data_parallel_group())
    return gathered


def gather_world(value: T) -> list[T]:
    """Return the Python objects of all ranks, in rank order, on every rank. Collective over all ranks."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def flags_of_all_ranks(flags: Flags) -> Flags:
    """Return a record of flags of which each is true where it is true on any rank; one all-reduce of as many
    numbers."""
    names = [field.name for field in dataclasses.fields(flags)]
    numbers = torch.tensor([int(getattr(flags, name)) for name in names], device=backend.current().device())
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return dataclasses.replace(flags, **dict(zip(names, map(bool, numbers.tolist()), strict=True)))


def true_on_any(flag: bool) -> bool:
    """Return True on every rank if the flag is true on any; one all-reduce of one number."""
    number = torch.tensor(int(flag), device=backend.current().device())
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return bool(number)


def while_others_look(selected: bool, work: Callable[[], T]) -> Callable[[], T]:
    """Do ``work`` in a thread of the ``selected`` rank, and return a function that gives its result, or raises what it
    raised, there.

    All ranks look every second whether it is done, one gather of objects each time, so that no collective waits for all
    of it.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    if selected:
        # A rank that ends meanwhile ends this process, which must not wait for the thread.
        threading.Thread(target=run, name="long work", daemon=True).start()
    while True:
        if selected:
            concurrent.futures.wait([outcome], timeout=_LOOK_SECONDS)
        if any(gather_world(selected and outcome.done())):
            return outcome.result


def stop_if_requested() -> None:
    """Raise :class:`~dasd_megatron.stopping.StopRequested` on every rank if a signal has reached any; one all-reduce of
    one number."""
    if true_on_any(stopping.requested()):
        raise StopRequested("a signal asked the run to stop")


def broadcast_from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Fill ``tensor`` with the last pipeline stage's values on every stage, in place."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            tensor,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return tensor


def sum_over_sequence_parts(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce over the ranks that share each sequence (context parallelism), in place."""
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(tensor, group=parallel_state.get_context_parallel_group())
    return tensor


def largest_of_replicas(value: int) -> int:
    """Return the largest of the replicas' values. Collective over replicas."""
    if parallel_state.get_data_parallel_world_size() == 1:
        return value
    return int(reduce_over_replicas(torch.tensor(value, device=backend.current().device()), dist.ReduceOp.MAX))


def reduce_over_replicas(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """All-reduce over the data-parallel group, in place."""
    dist.all_reduce(tensor, op, group=parallel_state.get_data_parallel_group())
    return tensor


def median_of_replicas(values: torch.Tensor) -> float | None:
    """Return the median of all data-parallel replicas' values, on every rank; None where there are none.

    ``values``: float32 [n], at least 0, this replica's own. The values stay where they are: their median is found by
    halving the range of floats. Collectives over replicas: 32 all-reduces of one or two numbers.
    """
    total = int(reduce_over_replicas(torch.tensor(values.numel(), device=values.device)))
    if total == 0:
        return None
    # As integers, the bits of floats from 0 on have the order of the floats.
    keys = values.clamp_min(0.0).view(torch.int32)
    ranks = torch.tensor([(total - 1) // 2, total // 2], device=values.device)
    low, high = torch.zeros_like(ranks), torch.full_like(ranks, 2**31 - 1)
    for _ in range(31):
        middle = (low + high) // 2
        below = reduce_over_replicas((keys[:, None] <= middle).sum(0))
        low, high = torch.where(below > ranks, low, middle + 1), torch.where(below > ranks, middle, high)
    return float(low.int().view(torch.float32).double().mean())


def on_selected_rank(selected: bool, work: Callable[[], T], errors: tuple[type[Exception], ...]) -> T | None:
    """Run ``work`` where ``selected``; if it raises one of ``errors`` on any rank, raise :class:`PeerError` on all of
    them, and likewise :class:`~dasd_megatron.stopping.StopRequested`.

    Every rank must call it: a failure that stayed on one rank would leave the others waiting in their next collective.
    """
    result: T | None = None
    outcome: str | StopRequested | None = None
    if selected:
        try:
            result = work()
        except StopRequested as stop:
            outcome = stop
        except errors as error:
            outcome = f"{type(error).__name__}: {error}"
    outcomes = gather_world(outcome)
    failures = sorted({failure for failure in outcomes if isinstance(failure, str)})
    if failures:
        raise PeerError("; ".join(failures))
    for request in outcomes:
        if isinstance(request, StopRequested):
            raise request
    return result
