"""The launch of a run by ``dasd train``, without an outer torchrun: this node's processes, the meeting with other
nodes, and signals on their way to the workers."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from dasd_megatron import backend, stopping
from dasd_megatron.config import Config, RunConfig
from dasd_megatron.errors import ConfigError, first_line
from dasd_megatron.reading import read_bytes

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

WORKER = "dasd_megatron.training.worker"
LAUNCHER_PID = "DASD_LAUNCHER_PID"

# The agent ends workers when one of them has failed, or when all have saved and said so: no more patience is needed.
_AGENT_PATIENCE_SECONDS = 5
_RENDEZVOUS_SECONDS = 120
_SHARED_FILES_SECONDS = 60.0
_HEARD_SECONDS = 5.0
_POLL_SECONDS = 0.2
# Between the launch and the first worker, a run that is asked to stop has this long to be seen.
_NO_WORKER_SECONDS = 5.0
_KILL_SECONDS = 10.0


class LaunchError(RuntimeError):
    """The nodes of a run did not come together. The message is one line."""


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, each with ``processes`` processes, and this machine's place among them. ``endpoint``: host
    and port of the first, where there are several."""

    processes: int
    count: int = 1
    rank: int = 0
    endpoint: tuple[str, int] | None = None
    run_id: str = "dasd"


def read_nodes(run: RunConfig, world_size: int, environment: Mapping[str, str]) -> Nodes:
    """Read torchrun's own variables PET_NNODES, PET_NODE_RANK, PET_RDZV_ENDPOINT and PET_RDZV_ID; one node without
    them.

    Raises:
        ConfigError: they contradict each other or the configuration.
    """
    count = _read_number(environment, "PET_NNODES", 1)
    if count < 1:
        raise ConfigError(f"PET_NNODES={count}: write the number of nodes, at least 1")
    rank = _read_number(environment, "PET_NODE_RANK", 0 if count == 1 else None)
    if not 0 <= rank < count:
        raise ConfigError(
            f"PET_NODE_RANK={rank} is not one of PET_NNODES={count} nodes: number them from 0 to {count - 1}"
        )
    if world_size % count:
        raise ConfigError(
            f"the parallel sizes make {world_size} processes, which do not divide into PET_NNODES={count} nodes: "
            f"choose sizes whose product is a multiple of {count}"
        )
    processes = world_size // count
    if environment.get("PET_NPROC_PER_NODE", str(processes)) != str(processes):
        raise ConfigError(
            f"PET_NPROC_PER_NODE={environment['PET_NPROC_PER_NODE']}, but the parallel sizes make {world_size} "
            f"processes on {count} nodes: write {processes}, or leave it out"
        )
    if count == 1:
        return Nodes(processes)
    endpoint = environment.get("PET_RDZV_ENDPOINT", "")
    parts = re.fullmatch(r"\[?([^\[\]\s]+?)\]?:(\d+)", endpoint)
    if parts is None or not 0 < int(parts[2]) < 65536:
        raise ConfigError(
            f"PET_RDZV_ENDPOINT={endpoint!r}: PET_NNODES={count} needs the first node's address, like node01:29500"
        )
    if run.dir is None:
        raise ConfigError(
            f"run.dir is required with PET_NNODES={count}: write the same directory, on a shared file system, on "
            "every node"
        )
    return Nodes(processes, count, rank, (parts[1], int(parts[2])), environment.get("PET_RDZV_ID", "dasd"))


def _read_number(environment: Mapping[str, str], name: str, default: int | None) -> int:
    text = environment.get(name)
    if text is not None and not text.isdecimal():
        raise ConfigError(f"{name}={text!r}: write a whole number")
    if text is not None:
        return int(text)
    if default is None:
        raise ConfigError(
            f"{name} is required with PET_NNODES={environment['PET_NNODES']}: write this node's number, 0 on the first"
        )
    return default


def launch(config: Config, root: Path, nodes: Nodes, prepare: Callable[[], None]) -> int:
    """Run ``prepare`` on the first node, then this node's workers under torch's elastic agent; returns the exit status.

    When one worker ends with an error the agent ends the node's others, so no rank waits for a dead one. SIGTERM,
    SIGUSR1 and SIGINT go to the workers, which save and end with status 75.

    Raises:
        LaunchError: the nodes did not come together. Whatever ``prepare`` raises, on the first node.
    """
    signals = _SignalForwarder(config.checkpoint.grace_seconds)
    signals.start()
    # The store is kept until the end: the first node's holds the server that the agents and workers use too.
    if nodes.endpoint is None:
        prepare()
        _store, endpoint = _open_store_on_loopback()
    else:
        _store, endpoint = _prepare_together(config, root, nodes, nodes.endpoint, prepare), nodes.endpoint
    signals.launched.set()
    return _run_workers(config, root, nodes, endpoint)


def _open_store_on_loopback() -> tuple[TCPStore, tuple[str, int]]:
    """Open the meeting point of one machine's processes; returns it and its address. torch's own would listen on the
    network, where nobody is asked for a key, and its agent unpickles what it finds there."""
    import torch.distributed as dist

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        host, port = listener.getsockname()
        # The agent finds by the port that this process has the store already.
        store = dist.TCPStore(
            host,
            port,
            world_size=1,
            is_master=True,
            timeout=datetime.timedelta(seconds=_RENDEZVOUS_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
        )
    return store, (host, port)


def _prepare_together(
    config: Config, root: Path, nodes: Nodes, endpoint: tuple[str, int], prepare: Callable[[], None]
) -> TCPStore:
    """Meet the other nodes and let the first one prepare the run; returns the store that they met in."""
    import torch.distributed as dist

    host, port = endpoint
    where = f"PET_RDZV_ENDPOINT={host}:{port}"
    limit = config.backend.timeout_seconds
    deadline = time.monotonic() + limit
    first = nodes.rank == 0
    if not first:
        _wait_until_open(
            host, port, deadline, f"{where}: node 0 was not there within backend.timeout_seconds={limit:g}"
        )
    try:
        server = dist.TCPStore(
            host, port, nodes.count, first, datetime.timedelta(seconds=limit), wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"{where} cannot be used ({first_line(error)}): write the first node's address and a free port"
        ) from error
    store = dist.PrefixStore(f"dasd/{nodes.run_id}", server)
    if first:
        _announce(store, root, nodes, prepare, deadline)
        return server
    try:
        verdict = _ask_first_node(store, nodes, deadline)
    except dist.DistError as error:
        raise LaunchError(
            f"node 0 at {where} ended before it had prepared {root} ({first_line(error)}): look at its output"
        ) from error
    if verdict is None:
        raise LaunchError(
            f"node 0 at {where} did not prepare {root} within backend.timeout_seconds={limit:g}: look at its output"
        )
    if "error" in verdict:
        raise LaunchError(f"node 0: {verdict['error']}")
    patience = time.monotonic() + _SHARED_FILES_SECONDS
    while _config_digest(root) != verdict["config"]:
        if time.monotonic() > patience:
            raise LaunchError(
                f"run.dir={root} is not the directory that node 0 prepared: give one on a file system that all nodes "
                "share"
            )
        time.sleep(_POLL_SECONDS)
    return server


def _announce(store: Store, root: Path, nodes: Nodes, prepare: Callable[[], None], deadline: float) -> None:
    """Prepare the run once all nodes are there, and announce how it went."""
    error: Exception | None = None
    try:
        _check_all_joined(store, nodes, deadline)
        prepare()
        verdict = {"config": _config_digest(root)}
    except Exception as caught:
        error, verdict = caught, {"error": first_line(caught)}
    store.set("verdict", json.dumps(verdict))
    if error is not None:
        # The store ends with this process, so the others must have read the verdict before.
        _wait_for_keys(store, [f"heard{rank}" for rank in range(1, nodes.count)], time.monotonic() + _HEARD_SECONDS)
        raise error


def _ask_first_node(store: Store, nodes: Nodes, deadline: float) -> dict[str, str] | None:
    """Return what :func:`_announce` puts into the store; None after the deadline."""
    if store.add(f"joined{nodes.rank}", 1) > 1:
        raise LaunchError(
            f"PET_NODE_RANK={nodes.rank} has been given to two nodes: number them from 0 to {nodes.count - 1}"
        )
    store.set(f"node{nodes.rank}", json.dumps([nodes.count, nodes.processes]))
    if not _wait_for_keys(store, ["verdict"], deadline):
        return None
    verdict = json.loads(store.get("verdict"))
    store.set(f"heard{nodes.rank}", "1")
    return verdict


def _check_all_joined(store: Store, nodes: Nodes, deadline: float) -> None:
    """Refuse (LaunchError) nodes that do not come, or that were started for another number of nodes or processes."""
    names = [f"node{rank}" for rank in range(1, nodes.count)]
    if not _wait_for_keys(store, names, deadline):
        missing = [name.removeprefix("node") for name in names if not store.check([name])]
        raise LaunchError(
            f"nodes {', '.join(missing)} of PET_NNODES={nodes.count} did not come within backend.timeout_seconds"
        )
    for rank, name in enumerate(names, start=1):
        count, processes = json.loads(store.get(name))
        if (count, processes) != (nodes.count, nodes.processes):
            raise LaunchError(
                f"node {rank} was started for {count} nodes of {processes} processes, node 0 for {nodes.count} of "
                f"{nodes.processes}: start all nodes with the same PET_NNODES and the same overrides"
            )


def _wait_for_keys(store: Store, names: list[str], deadline: float) -> bool:
    """Wait until the keys are there; returns False after the deadline. The store is asked again and again, since no
    signal ends a wait inside it."""
    while not store.check(names):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _wait_until_open(host: str, port: int, deadline: float, message: str) -> None:
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(f"{message} ({error.strerror or error})") from error
        time.sleep(_POLL_SECONDS)


def _config_digest(root: Path) -> str | None:
    path = root / "config.yaml"
    return hashlib.sha256(read_bytes(path, advice="restore it")).hexdigest() if path.is_file() else None


def _run_workers(config: Config, root: Path, nodes: Nodes, endpoint: tuple[str, int]) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.update(backend.process_environment(config.backend), TOKENIZERS_PARALLELISM="false")
    os.environ[LAUNCHER_PID] = str(os.getpid())
    # The agent's own log only repeats what the workers have printed.
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    log_dir = os.environ.get("PET_LOG_DIR")
    # All signals but these two are the forwarder's: the agent would give the workers half a minute to save. Older torch
    # does not have these options. The forwarder gets its signals first there too, since every other thread blocks them.
    wanted: dict[str, Any] = {"signals_to_handle": "SIGHUP,SIGQUIT", "shutdown_timeout": _AGENT_PATIENCE_SECONDS}
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    launch_config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=nodes.processes,
        run_id=nodes.run_id,
        rdzv_backend="static",
        rdzv_endpoint="{}:{}".format(*endpoint),
        rdzv_configs={"timeout": _RENDEZVOUS_SECONDS, "rank": nodes.rank},
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
        # With torchrun's variable, the output of each process goes into a file of its own too.
        logs_specs=DefaultLogsSpecs(log_dir, tee=Std.ALL) if log_dir else None,
        log_line_prefix_template="[rank ${rank}] " if log_dir else None,
        **{name: value for name, value in wanted.items() if name in known},
    )
    try:
        elastic_launch(launch_config, sys.executable)("-m", WORKER, str(root))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(
                f"dasd: error: the process of rank {rank} was ended by {failure.signal_name()} (SIGKILL: out of "
                "memory?)",
                file=sys.stderr,
            )
        return max(1, abs(failure.exitcode))
    except SignalException as error:
        return 128 + error.sigval
    return 0


class _SignalForwarder(threading.Thread):
    """A thread that waits for the signals, which every other thread blocks, and hands them to this node's workers.

    ``launched`` is set when the workers are about to be started; until then a signal ends this process at once, since
    nothing is lost.
    """

    def __init__(self, grace_seconds: float) -> None:
        super().__init__(name="signals", daemon=True)
        self.grace_seconds = grace_seconds
        self.launched = threading.Event()
        self._signalled: set[int] = set()
        # Every thread and process that is started from here on inherits this.
        signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)

    def run(self) -> None:
        first = signal.sigwait(stopping.SIGNALS)
        began = time.monotonic()
        self._print(f"{signal.Signals(first).name}: the run is to stop; what is done is saved")
        while True:
            seconds = time.monotonic() - began
            self._signal_workers()
            if not self._signalled and (not self.launched.is_set() or seconds > _NO_WORKER_SECONDS):
                self._print("stopped before training began")
                os._exit(stopping.EXIT_STATUS)
            if seconds > self.grace_seconds + _KILL_SECONDS:
                self._print(f"not ended within checkpoint.grace_seconds={self.grace_seconds:g}")
                self._end_at_once(stopping.EXIT_STATUS)
            again = signal.sigtimedwait(stopping.SIGNALS, _POLL_SECONDS)
            if again is not None and not stopping.is_repeat(again.si_signo, time.monotonic() - began):
                self._print(f"a second {signal.Signals(again.si_signo).name}: ended at once")
                self._end_at_once(128 + again.si_signo)

    @staticmethod
    def _print(text: str) -> None:
        print(f"dasd: {text}", file=sys.stderr, flush=True)

    @staticmethod
    def _workers() -> list[psutil.Process]:
        workers = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if WORKER in child.cmdline():
                    workers.append(child)
        return workers

    def _signal_workers(self) -> None:
        """Send SIGTERM to the workers that have not got it; some may be started later."""
        for worker in self._workers():
            if worker.pid not in self._signalled:
                self._signalled.add(worker.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal.SIGTERM)

    def _end_at_once(self, status: int) -> None:
        for worker in self._workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        os._exit(status)
