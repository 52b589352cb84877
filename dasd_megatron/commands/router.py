"""``dasd router``: sglang-router in the foreground, before rollout servers that run already."""

from __future__ import annotations

import sys
from pathlib import Path

from dasd_megatron import access
from dasd_megatron.arguments import Parser, at_least, port, seconds
from dasd_megatron.config import RolloutConfig, check_servers
from dasd_megatron.rollout.discovery import find_servers
from dasd_megatron.rollout.local_server import ServerStartError
from dasd_megatron.rollout.sglang_router import DEFAULT_POLICY, router_command, run_router
from dasd_megatron.rollout.sockets import ListenError, bind

DEFAULT_PYTHON = ".venv-sglang/bin/python"


def _parser() -> Parser:
    parser = Parser(
        prog="dasd router",
        description="Put sglang-router before rollout servers that run already. Arguments after -- are the router's "
        "own.",
    )
    parser.add_argument("--servers", nargs="+", default=[], metavar="URL", help="addresses like http://10.0.0.1:30000")
    parser.add_argument("--nodes", metavar="HOSTS", help="instead of --servers, a Slurm host list like gpu[01-04]")
    parser.add_argument(
        "--first-port",
        type=at_least(1, 65535),
        default=30000,
        help="--nodes only: first port of each node's servers (default: 30000)",
    )
    parser.add_argument(
        "--servers-per-node", type=at_least(1, 64), default=1, help="--nodes only: at consecutive ports (default: 1)"
    )
    parser.add_argument(
        "--python",
        help=f"interpreter that has sglang-router (default: {DEFAULT_PYTHON} where it is there, or this one)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=port, default=31000, help="default: 31000; 0: any free one")
    parser.add_argument(
        "--metrics-port", type=port, default=0, help="of the router's Prometheus metrics (default: any free one)"
    )
    parser.add_argument("--policy", default=DEFAULT_POLICY, help=f"who gets a request (default: {DEFAULT_POLICY})")
    parser.add_argument(
        "--startup-timeout",
        type=seconds,
        default=1800.0,
        metavar="SECONDS",
        help="for all servers to answer it (default: 1800)",
    )
    return parser


def route(arguments: list[str]) -> None:
    """Run ``dasd router``.

    Raises:
        ConfigError, DiscoveryError: the servers are not named, or cannot be found out.
        ServerStartError: the router cannot listen; see also :func:`run_router`.
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
    servers = find_servers(rollout)
    own_port, metrics_port = _free_port(options.host, options.port), _free_port(options.host, options.metrics_port)
    access.warn_if_open(options.host, "the router")
    python = options.python or (DEFAULT_PYTHON if Path(DEFAULT_PYTHON).is_file() else sys.executable)
    command = router_command(
        python,
        servers,
        host=options.host,
        port=own_port,
        metrics_port=metrics_port,
        policy=options.policy,
        startup_timeout=options.startup_timeout,
    )
    command += arguments[index + 1 :]
    run_router(command, f"http://{options.host}:{own_port}", servers, options.startup_timeout)


def _free_port(host: str, port: int) -> int:
    try:
        with bind(host, port) as sock:
            return sock.getsockname()[1]
    except ListenError as error:
        raise ServerStartError(str(error)) from error
