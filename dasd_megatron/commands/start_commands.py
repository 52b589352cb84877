"""The commands that start a run on a cluster: of the rollout servers, the router, and the trainer on each node."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from dasd_megatron.access import VARIABLE
from dasd_megatron.config import Config, PrecisionConfig, RolloutConfig, is_loopback
from dasd_megatron.errors import ConfigError
from dasd_megatron.planning.estimate import Architecture
from dasd_megatron.planning.rollouts import fewest_server_gpus
from dasd_megatron.rollout.discovery import DiscoveryError, expand_host_list, node_servers
from dasd_megatron.rollout.local_server import sglang_command
from dasd_megatron.rollout.sglang_router import router_command

RENDEZVOUS_PORT = 29500
_ANY_ADDRESS = "0.0.0.0"


@dataclass(frozen=True)
class Cluster:
    """The machines of a run. ``gpu_bytes``: memory of one GPU. ``server_tp``: GPUs of one SGLang server, or None for as
    few as hold the weights well."""

    hosts: list[str]
    gpus_per_node: int
    gpu_bytes: float
    server_tp: int | None


def start_commands(
    config: Config, cluster: Cluster, arch: Architecture, overrides: Sequence[str], config_dir: str | None
) -> dict[str, list[str]]:
    """Return the lines to type, by their title.

    Raises:
        ConfigError: the servers of a node need more GPUs than it has.
    """
    rollout, model = config.rollout, config.model.path or "MODEL"
    commands: dict[str, list[str]] = {}
    if rollout.replay is not None:
        commands["rollouts"] = [f"from {rollout.replay}"]
    elif rollout.engine == "external":
        tensor = cluster.server_tp or fewest_server_gpus(arch, config, cluster.gpu_bytes, cluster.gpus_per_node)
        servers = _server_urls(rollout)
        commands |= _server_commands(rollout, config.precision, cluster.gpus_per_node, servers, model, tensor)
        if rollout.router:
            commands["router, on its node"] = _router_lines(rollout.router, servers)
    elif rollout.engine == "sglang":
        command = sglang_command(rollout, "RUN/weights/step_000000", rollout.port or 30000)
        commands["rollout server, started by dasd train on the first node"] = [shlex.join(command)]
    else:
        commands["rollout server, started by dasd train"] = ["the embedded one"]
    title = f"training, {config.parallel.world_size // len(cluster.hosts)} processes from one command on each node"
    commands[title] = _train_lines(config, cluster.hosts, _train_arguments(config, model, overrides, config_dir))
    if rollout.engine == "external":
        commands["key"] = [f"the same {VARIABLE} in the environment of all of these, for servers that others can reach"]
    return commands


def _train_arguments(config: Config, model: str, overrides: Sequence[str], config_dir: str | None) -> list[str]:
    """Return the arguments of ``dasd train``: the given ones, and the fields that every node has to name."""
    arguments = [*(["--config-dir", config_dir] if config_dir else []), *overrides]
    given = {override.lstrip("+").split("=")[0] for override in arguments}
    for name, value in {"model.path": model, "run.dir": f"runs/{config.run.name}/1", "resume": "auto"}.items():
        if name not in given and not (name == "model.path" and not config.model.architecture):
            arguments.append(f"{name}={value}")
    for name, source in {"train": config.data.train, "heldout": config.data.heldout}.items():
        if source.path == f"{name}.jsonl" and f"data.{name}.path" not in given:
            arguments.append(f"data.{name}.path={source.path}")
    return arguments


def _train_lines(config: Config, hosts: Sequence[str], arguments: Sequence[str]) -> list[str]:
    train = f"dasd train {shlex.join(arguments)}"
    if len(hosts) == 1:
        return [train]
    return [
        f"{host}: PET_NNODES={len(hosts)} PET_NODE_RANK={index} PET_RDZV_ENDPOINT={hosts[0]}:{RENDEZVOUS_PORT} "
        f"PET_RDZV_ID={config.run.name} {train}"
        for index, host in enumerate(hosts)
    ]


def _server_urls(rollout: RolloutConfig) -> list[str]:
    if rollout.nodes:
        try:
            return node_servers(expand_host_list(rollout.nodes), rollout.port, rollout.servers_per_node)
        except DiscoveryError:
            return node_servers([f"each-of-{rollout.nodes}"], rollout.port, rollout.servers_per_node)
    # The servers behind a router are known to the router alone.
    return list(rollout.servers) or ["http://ROLLOUT_NODE:30000"]


def _listen_address(host: str) -> str:
    """Return the address to listen on for clients that know a server as ``host``."""
    return host if is_loopback(host) else _ANY_ADDRESS


def _server_commands(
    rollout: RolloutConfig,
    precision: PrecisionConfig,
    gpus_per_node: int,
    servers: Sequence[str],
    model: str,
    tensor: int,
) -> dict[str, list[str]]:
    lines = []
    on_gpu = rollout.sglang.backend == "cuda"
    dtype = "float32" if precision.params_dtype == "fp32" else "bfloat16"
    slots: dict[str, int] = {}
    for url in servers:
        address = urlsplit(url)
        host, port = address.hostname or "", str(address.port or 80)
        slot = slots.get(host, 0)
        slots[host] = slot + 1
        if on_gpu and (slot + 1) * tensor > gpus_per_node:
            raise ConfigError(
                f"{slot + 1} servers of {tensor} GPUs do not fit on {host} with --gpus-per-node "
                f"{gpus_per_node}: name fewer servers there, or lower --server-tp"
            )
        command = ["dasd", "serve", "--engine", "sglang", "--model-path", model]
        command += ["--host", _listen_address(host), "--port", port]
        command += ["--backend", rollout.sglang.backend, "--dtype", dtype, "--tp-size", str(tensor)]
        command += ["--max-running-requests", str(rollout.max_batch_size)]
        devices = ",".join(map(str, range(slot * tensor, (slot + 1) * tensor)))
        lines.append(f"{host}: {f'CUDA_VISIBLE_DEVICES={devices} ' if on_gpu else ''}{shlex.join(command)}")
    first = urlsplit(servers[0])
    same = dataclasses.replace(
        rollout,
        engine="sglang",
        host=_listen_address(first.hostname or ""),
        dtype=dtype,
        deterministic=False,
        sglang=dataclasses.replace(rollout.sglang, tensor_parallel_size=tensor),
    )
    started = shlex.join(sglang_command(same, model, first.port or 80))
    return {"rollout servers": lines, "of which the first starts": [started]}


def _router_lines(router: str, servers: Sequence[str]) -> list[str]:
    address = urlsplit(router)
    listen, port = _listen_address(address.hostname or ""), address.port or 80
    command = ["dasd", "router", "--servers", *servers, "--host", listen, "--port", str(port)]
    return [
        shlex.join(command),
        f"which starts {shlex.join(router_command(sys.executable, servers, host=listen, port=port))}",
    ]
