"""The servers of a run with ``rollout.engine=external``: their addresses, and checks that they serve its model.

The addresses come from the configuration, from a Slurm host list or from a router. A server of another model is refused
before the first step: by what it says of itself (:func:`check_models`), by weights that it does not take
(:func:`check_updated`), and by its log-probs of a prompt under the run's weights (:func:`check_log_probs`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dasd_megatron import access
from dasd_megatron.access import AccessError
from dasd_megatron.config import RolloutConfig
from dasd_megatron.errors import printable
from dasd_megatron.reading import UnreadableError, read_json
from dasd_megatron.rollout.answers import Answer, FailedTryError, read_json_object, show
from dasd_megatron.rollout.client import RolloutClient, make_client
from dasd_megatron.rollout.exchange import fetch
from dasd_megatron.rollout.pool import Event, Status
from dasd_megatron.rollout.transport import (
    DENIED_STATUS,
    AccessDeniedError,
    RequestRefusedError,
    RolloutServerError,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCONTROL_SECONDS = 30.0
POLL_SECONDS = 0.5
ROUTER_SECONDS = 10.0
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SERVER_ADDRESS = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[A-Za-z0-9._/-]*)?")
_MOST_CONFIG_BYTES = 10 * 2**20
# The shapes of the weights and the result of a forward pass depend on these fields of config.json.
_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "rope_theta",
    "rms_norm_eps",
)
_FIX = "start it with the model of the run, or leave it out"


class DiscoveryError(RuntimeError):
    """The servers of the run cannot be found out. The message is one line that says why and what to do."""


class WrongModelError(RuntimeError):
    """A server does not serve the model of the run. The message names it, what differs and what to do."""


def find_servers(rollout: RolloutConfig) -> list[str]:
    """Return the base addresses of the servers that ``rollout.servers``, ``rollout.nodes`` or ``rollout.router`` name;
    none where all are unset.

    Raises:
        DiscoveryError: they cannot be found out; for a router that lists no server, after
            ``rollout.startup_timeout_seconds``.
    """
    if rollout.nodes:
        return node_servers(expand_host_list(rollout.nodes), rollout.port, rollout.servers_per_node)
    if rollout.router:
        return router_servers(rollout.router, rollout.startup_timeout_seconds)
    return list(rollout.servers)


def check_access(rollout: RolloutConfig) -> None:
    """Refuse a run whose external servers, or router, do not take its API key, before anything else is done.

    Servers that do not answer yet are asked again when the run needs them.

    Raises:
        AccessError: a server refuses the key, or asks for one.
        DiscoveryError: ``rollout.nodes`` cannot be expanded.
    """
    urls = [rollout.router] if rollout.router else find_servers(rollout)
    if not urls:
        return
    # A router is asked like a server, and each address once.
    client = make_client(dataclasses.replace(rollout, max_retries=0, backoff_seconds=0.0, router=None), urls)

    async def check() -> None:
        async with client:
            await client.check_access("/workers" if rollout.router else "/model_info")

    try:
        asyncio.run(check())
    except AccessDeniedError as error:
        raise AccessError(f"{error.url}: {error.failure}; {error.fix}") from error


def expand_host_list(hosts: str) -> list[str]:
    """Return the host names of a Slurm host list like ``gpu[01-04,07]``, in its order, by ``scontrol``; raises
    DiscoveryError."""
    command = shutil.which("scontrol")
    if command is None:
        raise DiscoveryError(
            f"rollout.nodes={hosts}: there is no scontrol here to expand it; start the trainer where Slurm's commands "
            "are, or name the servers one by one in rollout.servers"
        )
    try:
        done = subprocess.run(
            [command, "show", "hostnames", hosts], capture_output=True, text=True, timeout=SCONTROL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = (
            f"no answer within {SCONTROL_SECONDS:g} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)
        )
        raise DiscoveryError(
            f"rollout.nodes={hosts}: scontrol show hostnames failed ({reason}); name the servers in rollout.servers"
        ) from error
    names = done.stdout.split("\n")[:-1]
    # scontrol ends with status 0 for lists that it cannot read, and takes "gpu[01-04" for the host "gpu]".
    if done.returncode or not names or not all(map(_HOST_NAME.fullmatch, names)):
        said = printable(f"{done.stderr} {done.stdout}", 300) or "nothing"
        raise DiscoveryError(
            f"rollout.nodes={hosts}: scontrol show hostnames ended with status {done.returncode} and said {said!r}; "
            "write a Slurm host list like gpu[01-04,07]"
        )
    if len(set(names)) < len(names):
        raise DiscoveryError(f"rollout.nodes={hosts} names one node twice: name each once")
    return names


def node_servers(nodes: Sequence[str], first_port: int, servers_per_node: int) -> list[str]:
    """Return the addresses of ``servers_per_node`` servers on each node, at consecutive ports."""
    return [f"http://{node}:{first_port + index}" for node in nodes for index in range(servers_per_node)]


def router_servers(router: str, timeout_seconds: float) -> list[str]:
    """Return the addresses of the servers that the sglang-router at ``router`` lists, sorted, once there is one.

    It lists only servers that have answered it, so it has to be started when they are up (``dasd router`` waits for
    them).

    Raises:
        DiscoveryError: it lists no server in time, or at once where ``router`` is no router.
        AccessError: it refuses the API key, or asks for one.
    """
    deadline, key = time.monotonic() + timeout_seconds, access.api_key()
    while True:
        try:
            response = fetch(router, "/workers", api_key=key, seconds=ROUTER_SECONDS)
        except FailedTryError as error:
            waiting_for = f"it does not answer ({error})"
        else:
            if response.status in DENIED_STATUS:
                raise AccessError(f"rollout.router={router}: {'; '.join(access.refusal(response.status, key))}")
            found = _read_listed_servers(router, response)
            if found:
                return found
            waiting_for = "it lists no server"
        if time.monotonic() + POLL_SECONDS >= deadline:
            raise DiscoveryError(
                f"rollout.router={router}: {waiting_for} within "
                f"rollout.startup_timeout_seconds={timeout_seconds:g}; start the servers, then the router (dasd "
                "router), and look at its log"
            )
        time.sleep(POLL_SECONDS)


def _read_listed_servers(router: str, response: Answer) -> list[str]:
    """Return the servers of a router's answer, sorted; raises DiscoveryError."""
    try:
        workers: Any = read_json_object(response)["workers"]
        # With --dp-aware it lists the replicas of a server one by one, as address@rank.
        urls = sorted({re.sub(r"@\d+$", "", worker["url"]).rstrip("/") for worker in workers})
    except (FailedTryError, KeyError, TypeError) as error:
        raise DiscoveryError(
            f"rollout.router={router}: /workers answered {response.status} and no list of servers, so this is no "
            "sglang-router; give a router's address, or write the servers' own in rollout.servers"
        ) from error
    for url in urls:
        if not _SERVER_ADDRESS.fullmatch(url):
            raise DiscoveryError(
                f"rollout.router={router} lists {show(url)}, which is no address like http://10.0.0.1:30000: start "
                "that server with it, and without gRPC"
            )
    return urls


async def check_models(client: RolloutClient, hf_config: PretrainedConfig) -> list[str]:
    """Compare what every server says of its model with the model of the run, before it is given weights.

    Both engines name the architecture, the embedded one the vocabulary size too. The rest is in the ``config.json`` of
    the directory that a server was started from, where this process can read it. The check protects servers: real
    SGLang 0.5.23 goes down when it is given weights of other shapes from disk.

    Returns:
        The addresses of the servers that have answered.

    Raises:
        WrongModelError: a server has another model.
        RolloutServerError: no server answers.
    """
    wrong = []
    answered = await client.descriptions()
    for url, info in answered.items():
        differences = _find_differences(info, hf_config)
        if differences:
            wrong.append(f"{url} serves another model ({show(info.get('model_path'))}): {', '.join(differences)}")
    if wrong:
        raise WrongModelError(f"{'; '.join(wrong)}; {_FIX}")
    return list(answered)


def _find_differences(info: Mapping[str, Any], hf_config: PretrainedConfig) -> list[str]:
    """Return the differences, in words, between what a server says and the model of the run."""
    if info.get("is_generation") is False:
        return ["it does not generate text"]
    said = {name: info.get(name) for name in ("architectures", "model_type", "vocab_size")}
    path = info.get("model_path")
    # A relative path starts from the server's working directory, which is unknown here.
    stored = _read_config(Path(path)) if isinstance(path, str) and path.startswith("/") else {}
    expected = {name: getattr(hf_config, name, None) for name in ("architectures", *_ARCHITECTURE)}
    found = {name: stored.get(name) for name in _ARCHITECTURE} | {
        name: value for name, value in said.items() if value is not None
    }
    return [
        f"{name} is {show(found[name])} there and {expected[name]!r} in the run"
        for name in expected
        if found.get(name) is not None and expected[name] is not None and found[name] != expected[name]
    ]


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a directory, empty where this machine does not have it: the server may be on another
    machine."""
    try:
        # The server names the directory, and what lies there need not be a model.
        config: dict[str, Any] = read_json(folder / "config.json", dict, advice="", limit=_MOST_CONFIG_BYTES)
    except UnreadableError:
        return {}
    return config


async def check_updated(client: RolloutClient) -> None:
    """Refuse a server that answers and has not taken the weights, after the first weight sync.

    Servers that do not answer are left to the pool.

    Raises:
        WrongModelError: with what the server said of the weights.
    """
    pool = client.pool
    without = {url: pool.reasons.get(url, "") for url in client.urls if pool.health[url].status is not Status.SERVING}
    gone = set(await client.probe(list(without)))
    wrong = [f"{url} has not taken the run's weights: {reason}" for url, reason in without.items() if url not in gone]
    if wrong:
        raise WrongModelError(f"{'; '.join(wrong)}; {_FIX}")


async def probe_log_probs(client: RolloutClient, input_ids: Sequence[int]) -> dict[str, list[float]]:
    """Return each serving server's log-probs of the prompt ``input_ids``, by address: natural, before temperature, of
    every token but the first.

    A server that fails is left out, and the pool hears of it.

    Raises:
        RequestRefusedError: a server refuses the prompt, as it does with a smaller vocabulary; with its words.
    """
    found = {}

    async def probe(url: str) -> None:
        try:
            found[url] = await client.prompt_log_probs(url, input_ids)
        except RequestRefusedError:
            raise
        except RolloutServerError as error:
            client.pool.record(url, Event.FAILED, reason=error.failure)

    await asyncio.gather(*map(probe, client.pool.with_status(Status.SERVING)))
    return found


def check_log_probs(found: Mapping[str, Sequence[float]], expected: Sequence[float], tolerance: float) -> None:
    """Compare the result of :func:`probe_log_probs` with the trainer's own log-probs of the same tokens.

    tolerance: largest mean difference, nats a token.

    Raises:
        WrongModelError: a server differs by more.
    """
    wrong = []
    for url, log_probs in found.items():
        difference = sum(abs(a - b) for a, b in zip(log_probs, expected, strict=True)) / len(expected)
        # The comparison is negated so that nan is refused.
        if not difference <= tolerance:
            wrong.append(
                f"{url} gives a prompt other log-probs than the trainer does, by {difference:.3g} nats a token (limit "
                f"{tolerance:g})"
            )
    if wrong:
        raise WrongModelError(
            f"{'; '.join(wrong)}: under the same weights it computes another model, with other layers, heads or "
            f"rotary embedding; {_FIX}"
        )
