"""Start, watch and stop the embedded rollout server as a child process of the trainer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

import dasd_megatron
from dasd_megatron.config import RolloutConfig
from dasd_megatron.rollout.server import ServerError, bind

POLL_SECONDS = 0.1
TERMINATE_SECONDS = 10.0
TAIL_LINES = 20


class ServerStartError(RuntimeError):
    """The embedded server did not become healthy. The message holds the end of its log."""


class PortInUseError(ServerStartError):
    """``rollout.port`` cannot be listened on."""


class EmbeddedServer:
    """The embedded rollout server in its own process; it ends with this process, however that ends.

    model_path: Hugging Face directory; weight_version: the version that it is served under; rollout: where to listen, threads, dtype,
    batch size and time limits; log_path: the file that its output is appended to.
    """

    def __init__(self, model_path: str | Path, weight_version: str, rollout: RolloutConfig, log_path: str | Path):
        self.model_path = str(model_path)
        self.weight_version = weight_version
        self.rollout = rollout
        self.log_path = Path(log_path)
        self._port = rollout.port
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Base address, known once :meth:`start` was called. It survives :meth:`restart` unless another process took the port."""
        if self._port == 0:
            raise ServerStartError("the embedded server has no address yet: call start() first")
        host = f"[{self.rollout.host}]" if ":" in self.rollout.host else self.rollout.host
        return f"http://{host}:{self._port}"

    def alive(self) -> bool:
        """Whether the process is running; says nothing of its health."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and return once it is healthy.

        Raises PortInUseError before anything is started when ``rollout.port`` is taken, and ServerStartError with the end of the
        log when the process ends or is not healthy within ``rollout.startup_timeout_seconds``; nothing is left running then.
        """
        if self.alive():
            raise ServerStartError(f"the embedded server is already running at {self.url}")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        sock = self._bind()
        self._port = sock.getsockname()[1]
        command = [sys.executable, "-m", "dasd_megatron.rollout.server"]
        command += ["--model-path", self.model_path, "--weight-version", self.weight_version, "--fd", str(sock.fileno())]
        command += [
            "--dtype",
            self.rollout.dtype,
            "--threads",
            str(self.rollout.threads),
            "--max-batch-size",
            str(self.rollout.max_batch_size),
        ]
        command += ["--exit-with-parent"] + (["--deterministic"] if self.rollout.deterministic else [])
        # The child's socket is bound here, so that the port cannot be lost between choosing and using it; this copy is closed at once, so
        # that connections are refused, not left waiting, when the child dies.
        with sock, self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(sock.fileno(),),
                env=self._environment(),
                start_new_session=True,  # an interrupt at the terminal is the trainer's to handle
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process: its input is closed and SIGTERM sent, SIGKILL after 10 s. Nothing happens when it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        process.stdin.close()
        process.terminate()
        try:
            process.wait(TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def restart(self, model_path: str | Path, weight_version: str) -> None:
        """Stop what is left of the process and start it again with these weights; raises as :meth:`start`."""
        self.stop()
        self.model_path, self.weight_version = str(model_path), weight_version
        self.start()

    def _bind(self) -> socket.socket:
        try:
            return bind(self.rollout.host, self._port)
        except ServerError as error:
            if self.rollout.port == 0 and self._port != 0:
                return bind(self.rollout.host, 0)
            raise PortInUseError(
                f"rollout.port: {error}. Set rollout.port=0 for any free port, or check rollout.host={self.rollout.host}"
            ) from error

    def _environment(self) -> dict[str, str]:
        package_root = str(Path(dasd_megatron.__file__).resolve().parent.parent)
        paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(self.rollout.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve the trainer on shared cores
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }

    def _wait_until_healthy(self) -> None:
        limit = self.rollout.startup_timeout_seconds
        deadline = time.monotonic() + limit
        with httpx.Client(timeout=2.0, trust_env=False) as http:
            while time.monotonic() < deadline:
                if not self.alive():
                    raise ServerStartError(f"the embedded rollout server ended with status {self._process.returncode}. {self._log_tail()}")
                try:
                    if http.get(f"{self.url}/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass  # it does not listen before the model is loaded
                time.sleep(POLL_SECONDS)
        raise ServerStartError(
            f"the embedded rollout server was not healthy within rollout.startup_timeout_seconds={limit:g}. {self._log_tail()}"
        )

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return f"The end of {self.log_path}:\n" + "\n".join(lines)
