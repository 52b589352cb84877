"""``dasd router``: sglang-router in the foreground, before rollout servers that run already."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from dasd_megatron import access
from dasd_megatron.config import RolloutConfig, check_servers
from dasd_megatron.rollout.discovery import find_servers
from dasd_megatron.rollout.local_server import ROUTER_STARTER, TERMINATE_SECONDS, ServerStartError, for_sglang
from dasd_megatron.rollout.sockets import ListenError, bind

DEFAULT_PYTHON = ".venv-sglang/bin/python"
POLL_SECONDS = 0.2
# The router's own, cache_aware, sees no text in a request of token ids, and sends nearly all of them to one server.
DEFAULT_POLICY = "round_robin"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dasd router",
        description="Put sglang-router before rollout servers that run already. Arguments after -- are the router's own.",
    )
    parser.add_argument("--servers", nargs="+", default=[], metavar="URL", help="addresses like http://10.0.0.1:30000")
    parser.add_argument("--nodes", metavar="HOSTS", help="instead of --servers, a Slurm host list like gpu[01-04]")
    parser.add_argument(
        "--first-port", type=int, default=30000, help="--nodes only: first port of each node's servers (default: 30000)"
    )
    parser.add_argument(
        "--servers-per-node", type=int, default=1, help="--nodes only: at consecutive ports (default: 1)"
    )
    parser.add_argument(
        "--python",
        help=f"interpreter that has sglang-router (default: {DEFAULT_PYTHON} where it is there, or this one)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=31000, help="default: 31000; 0: any free one")
    parser.add_argument(
        "--metrics-port", type=int, default=0, help="of the router's Prometheus metrics (default: any free one)"
    )
    parser.add_argument("--policy", default=DEFAULT_POLICY, help=f"who gets a request (default: {DEFAULT_POLICY})")
    parser.add_argument(
        "--startup-timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="for all servers to answer it (default: 1800)",
    )
    return parser


def serve_router(arguments: list[str]) -> None:
    """Run the router until SIGTERM or an interrupt; its log goes to standard output.

    Raises:
        ConfigError, DiscoveryError: the servers are not named, or cannot be found out.
        ServerStartError: it did not start, did not get an answer from every server in time, or ended by itself.
    """
    index = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser()
    options = parser.parse_args(arguments[:index])
    if not options.servers and not options.nodes:
        parser.error("give --servers or --nodes")
    rollout = RolloutConfig(
        engine="external",
        servers=options.servers,
        nodes=options.nodes,
        port=options.first_port,
        servers_per_node=options.servers_per_node,
    )
    check_servers(rollout)
    access.warn_if_open(options.host, "the router")
    servers = find_servers(rollout)
    port, metrics_port = _free_port(options.host, options.port), _free_port(options.host, options.metrics_port)
    python = options.python or (DEFAULT_PYTHON if Path(DEFAULT_PYTHON).is_file() else sys.executable)
    command = router_command(
        python,
        servers,
        host=options.host,
        port=port,
        metrics_port=metrics_port,
        policy=options.policy,
        startup_timeout=options.startup_timeout,
    )
    command += arguments[index + 1 :]
    _run(command, f"http://{options.host}:{port}", servers, options.startup_timeout)


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
    """The command line of sglang-router before ``servers``; the router's own further arguments may follow."""
    command = [python, str(ROUTER_STARTER), "--host", host, "--port", str(port), "--policy", policy]
    command += ["--prometheus-host", host, "--prometheus-port", str(metrics_port)]
    command += ["--worker-startup-timeout-secs", str(int(startup_timeout) + 1), "--worker-startup-check-interval", "1"]
    command += ["--health-check-interval-secs", "10", "--shutdown-grace-period-secs", str(int(TERMINATE_SECONDS / 2))]
    return [*command, "--worker-urls", *servers]


def _free_port(host: str, port: int) -> int:
    try:
        with bind(host, port) as sock:
            return sock.getsockname()[1]
    except ListenError as error:
        raise ServerStartError(str(error)) from error


def _run(command: list[str], url: str, servers: list[str], startup_timeout: float) -> None:
    stopping = threading.Event()

    def stop(*_: object) -> None:
        if not stopping.is_set():
            stopping.set()
            raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        # In a session of its own: an interrupt at the terminal is this process's to handle.
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


def _wait_until_ready(process: subprocess.Popen, url: str, servers: list[str], timeout: float) -> None:
    """Return once the router lists every server as healthy."""
    deadline = time.monotonic() + timeout
    missing = servers
    with httpx.Client(timeout=10.0, trust_env=False, headers=access.headers(access.api_key())) as http:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerStartError(f"sglang-router ended with status {process.returncode}; its log is above")
            try:
                listed = {
                    worker["url"] for worker in http.get(f"{url}/workers").json()["workers"] if worker["is_healthy"]
                }
            except httpx.TransportError:
                pass  # it does not listen yet
            else:
                missing = [server for server in servers if server not in listed]
                if not missing:
                    return
            time.sleep(POLL_SECONDS)
    raise ServerStartError(
        f"sglang-router got no answer from {', '.join(missing)} within --startup-timeout {timeout:g}; see that these "
        "servers run"
    )
