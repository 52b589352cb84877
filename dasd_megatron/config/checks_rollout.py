"""Checks of rollouts: the servers, what becomes of unfinished responses, and how the servers get their weights.

Each function refuses a contradiction by a :class:`ConfigError` whose message is one line.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from urllib.parse import urlsplit

from dasd_megatron.config.fields import FUNCTION_PATH
from dasd_megatron.config.schema_backend import BackendConfig
from dasd_megatron.config.schema_rollout import RolloutConfig, SGLangConfig, VerifyConfig
from dasd_megatron.errors import ConfigError
from dasd_megatron.weight_ways import WEIGHT_WAYS


def check_servers(rollout: RolloutConfig) -> None:
    """Refuse external servers that are named in no way or in two, or in a way that cannot be meant."""
    named = {"rollout.servers": rollout.servers, "rollout.nodes": rollout.nodes, "rollout.router": rollout.router}
    given = [name for name, value in named.items() if value]
    if rollout.engine == "external" and not given and rollout.replay is None:
        raise ConfigError(
            "rollout.engine=external needs rollout.servers=[http://host:port,...], rollout.nodes or rollout.router, "
            "or write rollout.engine=embedded"
        )
    if rollout.engine != "external" and given:
        raise ConfigError(
            f"{given[0]} is set but rollout.engine={rollout.engine} starts its own: write rollout.engine=external, or "
            "leave it out"
        )
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are set: name the servers in one way, and leave the others out")
    for address in rollout.servers:
        _check_address("rollout.servers", address)
    if rollout.router:
        _check_address("rollout.router", rollout.router)
    if len(set(rollout.servers)) < len(rollout.servers):
        raise ConfigError("rollout.servers names one server twice: name each once")
    if rollout.nodes and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._,\[\]-]*", rollout.nodes):
        raise ConfigError(f"rollout.nodes={rollout.nodes!r} is not a Slurm host list: write it like gpu[01-04,07]")
    if rollout.nodes and not 1 <= rollout.port <= 65536 - rollout.servers_per_node:
        raise ConfigError(
            f"rollout.nodes: rollout.port={rollout.port} is not the first of "
            f"rollout.servers_per_node={rollout.servers_per_node} ports: write the first one that the servers of a "
            "node listen on, like rollout.port=30000"
        )
    if rollout.servers_per_node > 1 and not rollout.nodes:
        raise ConfigError(
            f"rollout.servers_per_node={rollout.servers_per_node} is for rollout.nodes: set these, or leave it out"
        )


def check_embedded_server(rollout: RolloutConfig) -> None:
    """Refuse settings of the embedded server where another one serves."""
    if rollout.engine == "embedded":
        return
    for name, given in (("device", rollout.device != "auto"), ("cache_gib", rollout.cache_gib is not None)):
        if given:
            raise ConfigError(
                f"rollout.{name}={getattr(rollout, name)} is for the embedded server, and rollout.engine="
                f"{rollout.engine}: leave it out, or write rollout.engine=embedded"
            )


def _check_address(field: str, address: str) -> None:
    if "@" in address:
        raise ConfigError(
            f"{field}: an address with a user or password would stand in config.yaml and in logs: leave that out"
        )
    if not re.fullmatch(r"https?://[^/\s]+", address) or not _has_host(address):
        raise ConfigError(
            f"{field}: {address!r} is not an address: write it like http://10.0.0.1:30000, without a path"
        )


def _has_host(address: str) -> bool:
    """Return whether an address has a host, and no port above 65535."""
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def check_sglang_arguments(sglang: SGLangConfig) -> None:
    """Refuse SGLang's arguments that would show a key to everybody, or run the code of a model."""
    if any(_names_option(argument, "--api-key", "--admin-api-key") for argument in sglang.arguments):
        raise ConfigError(
            "rollout.sglang.arguments: a key there would stand in config.yaml and in the list of processes: set "
            "DASD_API_KEY instead"
        )
    if any(_names_option(argument, "--trust-remote-code") for argument in sglang.arguments):
        raise ConfigError(
            "rollout.sglang.arguments: --trust-remote-code would run the code of a model: leave it out, since the "
            "models that can be trained need none"
        )


def _names_option(argument: str, *options: str) -> bool:
    """Return True where SGLang takes ``argument`` for one of ``options``, of which the beginning is enough."""
    name = argument.partition("=")[0]
    return len(name) > len("--a") and any(option.startswith(name) for option in options)


def check_functions(verify: VerifyConfig, rollout: RolloutConfig) -> None:
    """Refuse functions of the user's own that are not named as module:function; they are imported later."""
    functions = {
        "verify.reward": verify.reward,
        "verify.measures": verify.measures,
        "rollout.filter": rollout.filter,
        "rollout.function": rollout.function,
    }
    for name, path in functions.items():
        if path is not None and not FUNCTION_PATH.fullmatch(path):
            raise ConfigError(f"{name}={path}: write module:function, like my_package.my_module:my_function")


def check_unfinished(rollout: RolloutConfig) -> None:
    """Refuse ways with unfinished rollouts that never occur, and rollouts that nothing would use."""
    if rollout.unfinished == "retract" and not rollout.max_staleness:
        raise ConfigError(
            "rollout.unfinished=retract lets rollouts go on under newer weights than they began with: write "
            "rollout.max_staleness=1 or more, or unfinished=abort"
        )
    on_policy = rollout.max_staleness == 0
    if rollout.over_sampling > 1 and on_policy and rollout.unfinished == "finish" and rollout.filter is None:
        raise ConfigError(
            f"rollout.over_sampling={rollout.over_sampling:g} waits for more rollouts than a step uses: write "
            "rollout.unfinished=abort, name a rollout.filter, or write 1"
        )
    if rollout.unfinished == "abort" and on_policy and rollout.over_sampling == 1:
        raise ConfigError(
            "rollout.unfinished=abort has nothing to break off when a step waits for every prompt it starts: write "
            "rollout.over_sampling above 1, or unfinished=finish"
        )


def check_memory_release(rollout: RolloutConfig) -> None:
    """Refuse to take memory from servers that are at work while the trainer computes."""
    if rollout.release_memory and rollout.unfinished != "finish":
        raise ConfigError(
            f"rollout.release_memory=true needs servers that are idle, and rollout.unfinished={rollout.unfinished} "
            "leaves them at work: write finish"
        )
    if rollout.release_memory and rollout.max_staleness:
        raise ConfigError(
            "rollout.release_memory=true leaves nothing to sample ahead with, as rollout.max_staleness="
            f"{rollout.max_staleness} wants: write 0"
        )


def check_offload(rollout: RolloutConfig, backend: BackendConfig) -> None:
    """Refuse to move the trainer's memory away where no server takes turns with the trainer."""
    if backend.offload == "none":
        return
    name = f"backend.offload={backend.offload}"
    if rollout.max_staleness:
        raise ConfigError(
            f"{name} moves the trainer's state away while servers sample, and with rollout.max_staleness="
            f"{rollout.max_staleness} the trainer computes meanwhile: write backend.offload=none, or max_staleness=0"
        )
    if rollout.replay is not None:
        raise ConfigError(f"{name} gives memory to servers, and rollout.replay has none: write backend.offload=none")
    if not rollout.release_memory:
        raise ConfigError(
            f"{name} leaves the trainer without its memory until the servers give theirs back, and "
            "rollout.release_memory=false keeps it with them: write rollout.release_memory=true, or "
            "backend.offload=none"
        )


def check_top_k(rollout: RolloutConfig) -> None:
    """Refuse 0, which could mean off or no token."""
    if rollout.top_k == 0:
        raise ConfigError("rollout.top_k=0: write -1 for off, or at least 1")


def check_step_timeout(rollout: RolloutConfig, backend: BackendConfig) -> None:
    """Refuse collectives that would end before rank 0 has the rollouts for which the other ranks wait in them."""
    if backend.timeout_seconds <= rollout.step_timeout_seconds + rollout.startup_timeout_seconds:
        raise ConfigError(
            "backend.timeout_seconds must exceed rollout.step_timeout_seconds + rollout.startup_timeout_seconds "
            f"({rollout.step_timeout_seconds + rollout.startup_timeout_seconds:g}), since other ranks wait meanwhile: "
            "raise it"
        )


def check_weight_sync(rollout: RolloutConfig, backend: BackendConfig) -> None:
    """Refuse ways of weight sync that these servers cannot take part in. Replay has no servers to check."""
    if rollout.replay is not None:
        return
    _check_shared_memory(rollout)
    _check_device_memory(rollout, backend)
    if backend.timeout_seconds <= 4 * rollout.weight_sync_timeout_seconds:
        raise ConfigError(
            "backend.timeout_seconds must exceed four times "
            f"rollout.weight_sync_timeout_seconds={rollout.weight_sync_timeout_seconds:g}, since other ranks wait "
            "while a group is made and a server found to be gone: raise the one or lower the other"
        )
    sglang = rollout.sglang
    if (
        rollout.verify_weights
        and rollout.engine == "sglang"
        and (sglang.quantization or sglang.tensor_parallel_size > 1)
    ):
        raise ConfigError(
            "rollout.verify_weights compares whole tensors of the trainer's own values: write 0, or "
            "rollout.sglang.quantization=null and rollout.sglang.tensor_parallel_size=1"
        )


def check_weight_format(rollout: RolloutConfig) -> None:
    """Refuse quantised weights for servers that do not take them. Replay has no servers to check."""
    if rollout.weight_format == "plain" or rollout.replay is not None:
        return
    chosen = f"rollout.weight_format={rollout.weight_format}"
    if rollout.engine == "embedded":
        raise ConfigError(
            f"{chosen} needs SGLang, and rollout.engine=embedded computes in rollout.dtype: write engine=sglang or "
            "external, or weight_format=plain"
        )
    if rollout.engine != "sglang":
        return
    if rollout.sglang.backend != "cuda":
        raise ConfigError(
            f"{chosen} needs SGLang's FP8 kernels for GPUs, not rollout.sglang.backend={rollout.sglang.backend}: write "
            "weight_format=plain"
        )
    if rollout.sglang.quantization is not None:
        raise ConfigError(
            f"{chosen} sends weights that are quantised already: leave rollout.sglang.quantization="
            f"{rollout.sglang.quantization} out"
        )
    if rollout.dtype != "bfloat16":
        raise ConfigError(f"{chosen}: SGLang computes with FP8 weights in half precision: write rollout.dtype=bfloat16")


def _check_shared_memory(rollout: RolloutConfig) -> None:
    """Refuse what needs the trainer's machine where servers are named that may run on another."""
    remote = [server for server in rollout.servers if not is_loopback(urlsplit(server).hostname or "")]
    remote += [name for name in (rollout.nodes, rollout.router) if name]
    if not remote:
        return
    way = WEIGHT_WAYS[rollout.weight_sync]
    if way.shares_memory:
        raise ConfigError(
            f"rollout.weight_sync={way.name} needs servers on the trainer's machine, not {remote[0]}: give "
            "rollout.servers like http://127.0.0.1:30000, or write distributed"
        )


def _check_device_memory(rollout: RolloutConfig, backend: BackendConfig) -> None:
    """Refuse weights that would go from the trainer's memory into servers of another kind, or behind one address."""
    way, on_gpu = WEIGHT_WAYS[rollout.weight_sync], backend.kind == "cuda"
    if rollout.engine == "embedded" and on_gpu and way.gpu_route is not None:
        raise ConfigError(
            f"rollout.weight_sync={way.name} {way.gpu_route} needs servers on GPUs: write rollout.engine=sglang or "
            "external, or disk"
        )
    if rollout.release_memory and on_gpu and way.needs_own_gpus:
        raise ConfigError(
            f"rollout.weight_sync={way.name} {way.gpu_route} takes no two processes on one GPU, and servers with "
            "rollout.release_memory=true share those of the trainer: write disk, on one machine tensor, or "
            "release_memory=false"
        )
    if rollout.engine != "sglang":
        return
    if way.shares_memory and on_gpu != (rollout.sglang.backend == "cuda"):
        raise ConfigError(
            f"rollout.weight_sync={way.name} shares memory of one kind: backend.kind={backend.kind} needs "
            f"rollout.sglang.backend={backend.kind}, or write disk"
        )
    if rollout.sglang.data_parallel_size > 1 and not way.reaches_replicas:
        raise ConfigError(
            f"rollout.weight_sync={way.name} does not reach the replicas behind rollout.sglang.data_parallel_size="
            f"{rollout.sglang.data_parallel_size}: write 1 and start more servers, or weight_sync=disk"
        )


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can be reached from its own machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
