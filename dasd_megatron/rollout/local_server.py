"""Start, watch and stop a rollout server as a child process: the embedded one, or SGLang in an environment of its
own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

import dasd_megatron
from dasd_megatron import access, stopping
from dasd_megatron.config import RolloutConfig
from dasd_megatron.errors import printable_lines
from dasd_megatron.rollout.answers import FailedTryError
from dasd_megatron.rollout.exchange import fetch
from dasd_megatron.rollout.sockets import ListenError, bind

POLL_SECONDS = 0.1
TERMINATE_SECONDS = 10.0
TAIL_LINES = 20
TAIL_LINES_WITH_STACKS = 200
TAIL_BYTES = 256 * 1024
LINE_CHARS = 400
HEALTH_SECONDS = 10.0
STACKS_SIGNAL = signal.SIGUSR2
"""Lets the processes of a server write the Python stacks of their threads into its log: start_server.py and the entry
point of the embedded server register it."""
STACKS_SECONDS = 0.5
"""Time that a process has to write its stacks."""
SGLANG_STARTER = Path(__file__).parent / "sglang" / "start_server.py"
ROUTER_STARTER = SGLANG_STARTER.with_name("start_router.py")
# Without a GPU, SGLang takes its kernels in plain PyTorch, and does without the tricks that hide the launches of one
# batch behind another.
_SGLANG_CPU_ARGUMENTS = [
    "--device",
    "cpu",
    "--attention-backend",
    "torch_native",
    "--disable-overlap-schedule",
    "--sleep-on-idle",
]
# These variables speak of this environment and of this rank, and would mislead SGLang.
_NOT_FOR_SGLANG = {"PYTHONPATH", "PYTHONHOME", "MASTER_ADDR", "MASTER_PORT"} | {
    prefix + name for prefix in ("", "LOCAL_", "GROUP_", "ROLE_") for name in ("RANK", "WORLD_SIZE")
}


class ServerStartError(RuntimeError):
    """The server did not become healthy. The message holds the end of its log."""


class PortInUseError(ServerStartError):
    """``rollout.port`` cannot be listened on."""


class LocalServer:
    """A rollout server that this process starts; it ends with this process, however that ends.

    model_path: Hugging Face directory; weight_version: the version that it is served under; rollout: the engine, where
    it listens, its resources and time limits; log_path: the file that its output is appended to.
    """

    def __init__(self, model_path: str | Path, weight_version: str, rollout: RolloutConfig, log_path: str | Path):
        self.model_path = str(model_path)
        self.weight_version = weight_version
        self.rollout = rollout
        self.log_path = Path(log_path)
        self._port = rollout.port
        self._port_holder: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Base address, known once :meth:`start` was called. It stays the same over a :meth:`restart`; outside Linux it
        does unless another process took the port."""
        if self._port == 0:
            raise ServerStartError("the rollout server has no address yet: call start() first")
        host = f"[{self.rollout.host}]" if ":" in self.rollout.host else self.rollout.host
        return f"http://{host}:{self._port}"

    @property
    def pid(self) -> int | None:
        """The process that was started, or None; it may have started others."""
        return None if self._process is None else self._process.pid

    def alive(self) -> bool:
        """Return whether the process is running, which says nothing of its health."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and return once it is healthy.

        Raises:
            PortInUseError: ``rollout.port`` is taken; nothing has been started.
            ServerStartError: the process ended, or was not healthy within ``rollout.startup_timeout_seconds``; with the
                end of its log. Nothing is left running.
        """
        if self.alive():
            raise ServerStartError(f"the rollout server is already running at {self.url}")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        sock = self._bind()
        # The server finds the key in its environment, which is this one's.
        access.warn_if_open(self.rollout.host, "the rollout server")
        self._port = sock.getsockname()[1]
        self._hold_port()
        embedded = self.rollout.engine == "embedded"
        command = (
            self._embedded_command(sock.fileno())
            if embedded
            else sglang_command(self.rollout, self.model_path, self._port)
        )
        if not embedded:
            command += ["--weight-version", self.weight_version]
            sock.close()
        # The embedded server gets the socket that is bound here, so that the port cannot be lost between choosing and
        # using it; this copy is closed at once, so that connections are refused, not left waiting, when the child dies.
        with sock, self.log_path.open("ab") as log:
            try:
                process = self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(sock.fileno(),) if embedded else (),
                    env=self._environment(),
                    start_new_session=True,  # an interrupt at the terminal is the trainer's to handle
                )
            except OSError as error:
                raise ServerStartError(
                    f"rollout.sglang.python: {command[0]} cannot be started ({error.strerror}); give the interpreter "
                    "of the environment that has SGLang (make sglang-cpu builds .venv-sglang)"
                ) from error
        try:
            self._wait_until_healthy(process)
            if not embedded:
                self._check_listener(process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process and all that it started, and free the port. Its input is closed and SIGTERM sent, and SIGKILL
        after 10 s. Nothing happens where it is not running."""
        self._end_process()
        if self._port_holder is not None:
            self._port_holder.close()
            self._port_holder = None

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        family = _session_members(process)
        if process.stdin is not None:
            process.stdin.close()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TERMINATE_SECONDS)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.kill()
        process.wait()
        psutil.wait_procs(family, timeout=TERMINATE_SECONDS)

    def restart(self, model_path: str | Path, weight_version: str) -> None:
        """Stop what is left of the process and start it again with these weights; raises as :meth:`start`."""
        self._end_process()
        self.model_path, self.weight_version = str(model_path), weight_version
        self.start()

    def _embedded_command(self, descriptor: int) -> list[str]:
        rollout = self.rollout
        command = [sys.executable, "-m", "dasd_megatron.rollout.server", "--model-path", self.model_path]
        command += ["--weight-version", self.weight_version, "--fd", str(descriptor), "--dtype", rollout.dtype]
        command += ["--threads", str(rollout.threads), "--max-batch-size", str(rollout.max_batch_size)]
        if rollout.device != "auto":
            command += ["--device", rollout.device]
        if rollout.cache_gib is not None:
            command += ["--cache-gib", str(rollout.cache_gib)]
        return command + ["--exit-with-parent"] + (["--deterministic"] if rollout.deterministic else [])

    def _bind(self) -> socket.socket:
        try:
            return bind(self.rollout.host, self._port)
        except ListenError as error:
            if self.rollout.port == 0 and self._port != 0:
                return bind(self.rollout.host, 0)
            raise PortInUseError(
                f"rollout.port: {error}. Set rollout.port=0 for any free port, or check "
                f"rollout.host={self.rollout.host[:100]}"
            ) from error

    def _hold_port(self) -> None:
        """Keep the port from being given to others while nobody listens on it.

        SGLang binds it half a minute after its start, and a server that died is started again at the same address. On
        Linux a second socket does that, which is bound and does not listen: the server's own may be bound beside it.
        """
        if self._port_holder is None and sys.platform == "linux":
            self._port_holder = bind(self.rollout.host, self._port)

    def _environment(self) -> dict[str, str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.rollout.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve the trainer on shared cores
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        if self.rollout.engine == "embedded":
            package_root = str(Path(dasd_megatron.__file__).resolve().parent.parent)
            paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            return environment | {"PYTHONPATH": os.pathsep.join(paths)}
        return for_sglang(environment)

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        limit = self.rollout.startup_timeout_seconds
        deadline = time.monotonic() + limit
        asked, outcome = 0, "nothing"
        while time.monotonic() < deadline:
            stopping.raise_if_requested()
            if process.poll() is not None:
                raise ServerStartError(f"the rollout server ended with status {process.returncode}. {self.log_tail()}")
            asked += 1
            try:
                status = fetch(self.url, "/health", api_key=None, seconds=HEALTH_SECONDS).status
            except FailedTryError as error:
                # It does not listen before the model is loaded.
                outcome = f"no answer ({error})"
            else:
                if status == 200:
                    return
                outcome = f"status {status}"
            time.sleep(POLL_SECONDS)
        # Whether the processes wait, compute or are stopped tells a hang from a machine that is too busy. The requests
        # do too: they are few where the machine stood still.
        processes = _describe_processes(process)
        _write_stacks(process)
        raise ServerStartError(
            f"the rollout server was not healthy within rollout.startup_timeout_seconds={limit:g}: {asked} requests "
            f"for /health, the last with {outcome}. Its processes: {processes}. {self.log_tail(TAIL_LINES_WITH_STACKS)}"
        )

    def _check_listener(self, process: subprocess.Popen[bytes]) -> None:
        """Refuse a server that answers and is not the one that was started.

        SGLang binds its port late in its start, and by then the port may be another's. What the server says of itself
        proves nothing, since another run may have given it newer weights already.
        """
        for member in [psutil.Process(process.pid), *_session_members(process)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                connections = member.net_connections("inet")
                if any(found.status == psutil.CONN_LISTEN and found.laddr.port == self._port for found in connections):
                    return
        raise ServerStartError(f"another server answers at {self.url}: choose another rollout.port. {self.log_tail()}")

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """Return the log's last lines, under the path of the file. Long lines are cut, and all are printable."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = log.read(TAIL_BYTES).decode(errors="replace")
        # Each import within an import is five frames of Python's own in a stack.
        told = [line for line in text.splitlines() if not line.startswith('  File "<frozen importlib')]
        tail = [line if len(line) <= LINE_CHARS else f"{line[:LINE_CHARS]} ..." for line in told[-lines:]]
        return f"The end of {self.log_path}:\n" + printable_lines("\n".join(tail))


def _session_members(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the other processes of the session that ``process`` leads, or led: those that SGLang starts outlive it
    when it is killed."""
    members = []
    for member in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if member.pid != process.pid and os.getsid(member.pid) == process.pid:
                members.append(member)
    return members


def _describe_processes(process: subprocess.Popen[bytes]) -> str:
    """Return name, state and seconds of CPU time of ``process`` and the other processes of its session."""
    found = []
    for member in [psutil.Process(process.pid), *_session_members(process)]:
        with contextlib.suppress(psutil.NoSuchProcess), member.oneshot():
            times = member.cpu_times()
            found.append(f"{member.pid} {member.name()} {member.status()}, {times.user + times.system:.1f} s of CPU")
    return "; ".join(found) or "none"


def _write_stacks(process: subprocess.Popen[bytes]) -> None:
    """Let ``process`` and the other processes of its session write their Python stacks into the log. Those that cannot
    yet are ended by the signal."""
    for member in [psutil.Process(process.pid), *_session_members(process)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(STACKS_SIGNAL)
        # Two that write at once would mix their lines.
        time.sleep(STACKS_SECONDS)


def for_sglang(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` without the variables that are this Python's alone, since SGLang has another one, and
    without what torchrun says of the trainer's ranks: SGLang's own rendezvous would wait for torchrun's agent."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _NOT_FOR_SGLANG and not name.startswith("TORCHELASTIC_")
    }


def sglang_command(rollout: RolloutConfig, model_path: str, port: int) -> list[str]:
    """Return the command line of a real SGLang server, without its weight version."""
    settings = rollout.sglang
    command = [settings.python or sys.executable, str(SGLANG_STARTER), settings.backend]
    command += ["--model-path", model_path, "--host", rollout.host, "--port", str(port), "--dtype", rollout.dtype]
    command += ["--max-running-requests", str(rollout.max_batch_size), "--skip-server-warmup"]
    if settings.backend == "cpu":
        command += _SGLANG_CPU_ARGUMENTS
    if rollout.deterministic:
        command += ["--enable-deterministic-inference"]
    if rollout.release_memory and settings.backend == "cuda":
        command += ["--enable-memory-saver"]
    options = {
        "--tp-size": settings.tensor_parallel_size,
        "--dp-size": settings.data_parallel_size,
        "--mem-fraction-static": settings.mem_fraction_static,
        "--max-total-tokens": settings.max_total_tokens,
        "--context-length": settings.context_length,
        "--quantization": settings.quantization,
    }
    for name, value in options.items():
        if value is not None:
            command += [name, str(value)]
    return command + list(settings.arguments)
