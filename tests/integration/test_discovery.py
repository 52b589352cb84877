"""A real sglang-router before two embedded servers, and servers of another model, of both engines."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dasd_megatron.config import RolloutConfig, SGLangConfig, load_config
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.rollout.discovery import (
    DiscoveryError,
    WrongModelError,
    check_log_probs,
    check_models,
    check_updated,
    find_servers,
    probe_log_probs,
)
from dasd_megatron.rollout.local_server import LocalServer
from dasd_megatron.rollout.pool import Status
from dasd_megatron.rollout.transport import WeightVersionError
from tests.support.preloaded import started_by
from tests.support.runs import SMALL
from tests.support.servers import router_python, routing, sglang_python

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PROMPT = [5, 6, 7, 9, 30, 31, 32, 33]
ROLLOUT = RolloutConfig(threads=1, deterministic=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``run``, ``other`` of the same architecture, ``wide`` and ``shallow`` of other ones."""
    folder, tiny = tmp_path_factory.mktemp("models"), load_config([*SMALL]).model.tiny
    for name, seed, changes in [
        ("run", 1, {}),
        ("other", 2, {}),
        ("wide", 1, {"hidden_size": 64}),
        ("shallow", 1, {"num_layers": 2}),
    ]:
        make_tiny_model(folder / name, replace(tiny, **changes), seed)
    return {path.name: path for path in folder.iterdir()}


def client(*urls: str, router: str | None = None, max_retries: int = 2) -> RolloutClient:
    limits = {"connect_timeout": 2.0, "request_timeout": 20.0, "backoff": 0.05}
    return RolloutClient(urls, router=router, max_retries=max_retries, max_in_flight=16, **limits)


@pytest.fixture(scope="module")
def servers(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LocalServer]]:
    """Two servers, of whatever weights the test before has left."""
    folder = tmp_path_factory.mktemp("servers")
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(LocalServer(models["run"], "start", ROLLOUT, folder / f"log{index}"))
            for index in range(2)
        ]


@pytest.fixture(scope="module")
def router(servers: list[LocalServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a router that takes the two servers in turn."""
    arguments = [
        "--servers",
        *(server.url for server in servers),
        "--policy",
        "round_robin",
        "--",
        "--log-level",
        "warn",
    ]
    # A server that is back is to be asked soon.
    arguments += ["--disable-circuit-breaker", "--health-check-interval-secs", "1"]
    with routing(tmp_path_factory.mktemp("router") / "log", *arguments) as (_, url):
        yield url


def update(over: RolloutClient, path: Path, version: str) -> None:
    async def all_servers() -> None:
        async with over:
            over.pool.expect(version)
            await over.pause_generation("abort")
            await over.update_weights_from_disk(str(path), version)
            await over.continue_generation()

    asyncio.run(all_servers())


def sample(over: RolloutClient, version: str) -> list[tuple[list[int], list[float]]]:
    prompts = [PROMPT[: 2 + row % 3] for row in range(12)]
    params = [{"temperature": 1.0, "max_new_tokens": 6, "sampling_seed": seed} for seed in range(len(prompts))]

    async def generate() -> list[tuple[list[int], list[float]]]:
        async with over:
            completions = await over.generate(prompts, params, weight_version=version, rows_per_request=1)
        return [(completion.output_ids.tolist(), completion.log_probs.tolist()) for completion in completions]

    return asyncio.run(generate())


def decoding_steps(server: LocalServer) -> int:
    return httpx.get(f"{server.url}/server_info", timeout=10).json()["internal_states"][0]["decoding_steps"]


def test_samples_go_through_the_router_and_weights_past_it(
    servers: list[LocalServer], router: str, models: dict[str, Path]
) -> None:
    urls = find_servers(RolloutConfig(engine="external", router=router, startup_timeout_seconds=20))
    assert urls == sorted(server.url for server in servers)
    samples = {}
    for name in ("run", "other"):
        update(client(*urls, router=router), models[name], name)
        assert [httpx.get(f"{url}/model_info", timeout=10).json()["weight_version"] for url in urls] == [name, name]
        steps = [decoding_steps(server) for server in servers]
        samples[name] = sample(client(*urls, router=router), name)
        assert all(decoding_steps(server) > step for server, step in zip(servers, steps, strict=True))
        assert samples[name] == sample(client(urls[0]), name)
    assert samples["run"] != samples["other"]


def test_a_server_behind_the_router_dies_and_comes_back_with_older_weights(
    servers: list[LocalServer], router: str, models: dict[str, Path]
) -> None:
    """While it is gone the router asks the other; then its samples are refused, a probe finds out which one it is, an
    update mends it."""
    urls = [server.url for server in servers]
    over = client(*urls, router=router, max_retries=0)
    update(over, models["other"], "v2")
    assert over.pool.with_status(Status.SERVING) == urls
    expected = sample(over, "v2")
    psutil.Process(servers[1].pid).kill()
    assert sample(over, "v2") == expected
    servers[1].restart(models["run"], "v1")
    deadline = time.monotonic() + 60
    while not all(worker["is_healthy"] for worker in httpx.get(f"{router}/workers", timeout=10).json()["workers"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with pytest.raises(WeightVersionError, match=f"{router}: expected weight version 'v2'.*under 'v1'"):
        sample(over, "v2")
    assert over.pool.with_status(Status.SUSPECT) == urls
    asyncio.run(over.probe(urls))
    assert over.pool.with_status(Status.STALE) == urls[1:] and over.pool.with_status(Status.SERVING) == urls[:1]
    assert "from weights 'v2' to 'v1'" in over.pool.reasons[urls[1]]
    update(over, models["other"], "v2")
    assert sample(over, "v2") == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_router_ends_with_its_command(number: int, servers: list[LocalServer], tmp_path: Path) -> None:
    with routing(tmp_path / "router", "--servers", servers[0].url) as (command, url):
        (router,) = started_by(command)
        assert httpx.get(f"{url}/readiness", timeout=5).status_code == 200
        command.send_signal(number)
        assert command.wait(30) == (-9 if number == signal.SIGKILL else 0)
        psutil.wait_procs([router], timeout=20)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/readiness", timeout=5)


def test_a_router_whose_server_does_not_answer() -> None:
    arguments = [
        "--python",
        router_python(),
        "--servers",
        "http://127.0.0.1:9",
        "--port",
        "0",
        "--startup-timeout",
        "3",
    ]
    command = [sys.executable, "-m", "dasd_megatron.cli", "router", *arguments, "--", "--log-level", "error"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "dasd: error: sglang-router got no answer from http://127.0.0.1:9 within --startup-timeout 3; see that these "
        "servers run"
    )


def test_a_server_s_address_is_no_router(servers: list[LocalServer]) -> None:
    with pytest.raises(DiscoveryError, match=f"{servers[0].url}: /workers answered 404 and no list of servers"):
        find_servers(RolloutConfig(engine="external", router=servers[0].url))


def expected_log_probs(path: Path) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        log_probs = model(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    return log_probs[torch.arange(len(PROMPT) - 1), torch.tensor(PROMPT[1:])].tolist()


def first_sync(over: RolloutClient, path: Path, version: str) -> dict[str, list[float]]:
    update(over, path, version)
    return asyncio.run(probe_log_probs(over, PROMPT))


def test_one_of_two_servers_has_another_model(
    servers: list[LocalServer], models: dict[str, Path], tmp_path: Path
) -> None:
    right, hf_config = servers[0], AutoConfig.from_pretrained(models["run"])
    with LocalServer(models["wide"], "v1", ROLLOUT, tmp_path / "log") as wrong:
        over = client(right.url, wrong.url)
        with pytest.raises(WrongModelError) as error:
            asyncio.run(check_models(over, hf_config))
        assert str(error.value) == (
            f"{wrong.url} serves another model ({str(models['wide'])!r}): hidden_size is 64 there and 32 in the run; "
            "start it with the model of the run, or leave it out"
        )
        asyncio.run(check_models(client(right.url), hf_config))
        # Unchecked, it does not take the weights.
        found = first_sync(over, models["other"], "v2")
        assert list(found) == [right.url]
        check_log_probs(found, expected_log_probs(models["other"]), 1e-5)
        with pytest.raises(WrongModelError, match=right.url):
            check_log_probs(found, expected_log_probs(models["run"]), 1e-5)
        with pytest.raises(
            WrongModelError, match=f"{wrong.url} has not taken the run's weights: .*hidden_size=32, the served one 64"
        ):
            asyncio.run(check_updated(over))


# Its short form in `make test` is the test above, with embedded servers.
@pytest.mark.drill
def test_real_sglang_that_takes_the_weights_of_a_deeper_model(models: dict[str, Path], tmp_path: Path) -> None:
    """It leaves out the layers that it has not, and says that all went well: what it computes gives it away."""
    sglang = SGLangConfig(backend="cpu", python=sglang_python(), max_total_tokens=4096)
    rollout = RolloutConfig(engine="sglang", threads=1, sglang=sglang, startup_timeout_seconds=200)
    with LocalServer(models["shallow"], "v1", rollout, tmp_path / "log") as server:
        over = client(server.url)
        check_log_probs(first_sync(over, models["shallow"], "v2"), expected_log_probs(models["shallow"]), 1e-4)
        found = first_sync(over, models["run"], "v3")
        asyncio.run(check_updated(over))
        with pytest.raises(WrongModelError, match="other layers"):
            check_log_probs(found, expected_log_probs(models["run"]), 1e-2)
        # By now /model_info names the directory of the update.
        with pytest.raises(
            WrongModelError, match=f"{server.url} serves another model .*num_hidden_layers is 2 there and 4 in the run"
        ):
            asyncio.run(check_models(over, AutoConfig.from_pretrained(models["run"])))
