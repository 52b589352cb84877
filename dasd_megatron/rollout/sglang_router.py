"""sglang-router as a child process before rollout servers that run already."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

from dasd_megatron import access
from dasd_megatron.rollout.answers import FailedTryError, read_json_object
from dasd_megatron.rollout.exchange import fetch
from dasd_megatron.rollout.local_server import ROUTER_STARTER, TERMINATE_SECONDS, ServerStartError, for_sglang

POLL_SECONDS = 0.2
REQUEST_SECONDS = 10.0
DEFAULT_POLICY = "round_robin"
"""The router's own default, cache_aware, sees no text in a request of token ids and sends nearly all of them to one
server."""


def router_command(
    python: str,
    servers: Sequence[str],
    *,
    host: str,
    port: int,
    metrics_port: int = 0,
    policy: str = DEFAULT_POLICY,
    startup_timeout: float = 1800.0,
) -> list[str]:
    """Return the command line of sglang-router before ``servers``; the router's own further arguments may follow."""
    command = [python, str(ROUTER_STARTER), "--host", host, "--port", str(port), "--policy", policy]
    command += ["--prometheus-host", host, "--prometheus-port", str(metrics_port)]
    command += ["--worker-startup-timeout-secs", str(int(startup_timeout) + 1), "--worker-startup-check-interval", "1"]
    command += ["--health-check-interval-secs", "10", "--shutdown-grace-period-secs", str(int(TERMINATE_SECONDS / 2))]
    return [*command, "--worker-urls", *servers]


def run_router(command: Sequence[str], url: str, servers: Sequence[str], startup_timeout: float) -> None:
    """Run the router until SIGTERM or an interrupt; its log goes to standard output.

    Raises:
        ServerStartError: it did not start, did not get an answer from every server within ``startup_timeout`` seconds,
            or ended by itself.
    """
    stopping = threading.Event()

    def stop(*_: object) -> None:
        if not stopping.is_set():
            stopping.set()
            raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        # The router gets a session of its own: an interrupt at the terminal is this process's to handle.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            env=for_sglang(os.environ),
            start_new_session=True,
        )
    except OSError as error:
        raise ServerStartError(f"--python: {command[0]} cannot be started ({error.strerror})") from error
    try:
        _wait_until_ready(process, url, servers, startup_timeout)
        print(f"routing {url} to {', '.join(servers)}", flush=True)
        raise ServerStartError(f"sglang-router has ended by itself, with status {process.wait()}; its log is above")
    finally:
        stopping.set()
        process.terminate()
        try:
            process.wait(TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, servers: Sequence[str], timeout: float) -> None:
    """Return once the router lists every server as healthy."""
    deadline = time.monotonic() + timeout
    missing = list(servers)
    key = access.api_key()
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerStartError(f"sglang-router ended with status {process.returncode}; its log is above")
        try:
            workers: Any = read_json_object(fetch(url, "/workers", api_key=key, seconds=REQUEST_SECONDS))["workers"]
            listed = {worker["url"] for worker in workers if worker["is_healthy"]}
        except (FailedTryError, KeyError, TypeError):
            pass  # The router does not listen yet, or is not ready.
        else:
            missing = [server for server in servers if server not in listed]
            if not missing:
                return
        time.sleep(POLL_SECONDS)
    raise ServerStartError(
        f"sglang-router got no answer from {', '.join(missing)} within --startup-timeout {timeout:g}; see that these "
        "servers run"
    )
