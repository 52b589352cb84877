"""A run finds its servers by a Slurm host list or a router, and refuses those of another model."""

from __future__ import annotations

import asyncio
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from dasd_megatron.config import RolloutConfig
from dasd_megatron.rollout import discovery
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.rollout.discovery import (
    DiscoveryError,
    WrongModelError,
    check_log_probs,
    check_models,
    check_updated,
    expand_host_list,
    find_servers,
    node_servers,
    probe_log_probs,
    router_servers,
)
from dasd_megatron.rollout.pool import Event, Status
from dasd_megatron.rollout.transport import RequestRefusedError, RolloutServerError

MODEL = Qwen3Config(
    architectures=["Qwen3ForCausalLM"],
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


class Answers:
    """An HTTP server: ``given`` has the next answers of each path, status and JSON or bytes, of which the last one
    stays."""

    def __init__(self) -> None:
        self.given: dict[str, list[tuple[int, Any]]] = {}
        self.bodies: list[dict[str, Any]] = []
        answers = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answers.bodies.append(json.loads(body or b"{}"))
                queue = answers.given.get(self.path, [(404, {"detail": "Not Found"})])
                status, answer = queue.pop(0) if len(queue) > 1 else queue[0]
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _serve

            def log_message(self, *_: object) -> None: ...

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def answers() -> Iterator[Answers]:
    server = Answers()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a shell script in scontrol's place."""

    def install(script: str) -> None:
        path = tmp_path / "bin" / "scontrol"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")

    return install


def test_nodes_and_ports() -> None:
    assert node_servers(["a", "b"], 30000, 2) == [
        "http://a:30000",
        "http://a:30001",
        "http://b:30000",
        "http://b:30001",
    ]


def test_servers_of_a_host_list(scontrol) -> None:
    scontrol('[ "$*" = "show hostnames gpu[01-02]" ] && printf "gpu01\\ngpu02\\n"')
    rollout = RolloutConfig(engine="external", nodes="gpu[01-02]", port=30000, servers_per_node=2)
    assert find_servers(rollout) == [f"http://gpu0{node}:{port}" for node in (1, 2) for port in (30000, 30001)]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo slurm_load_ctl_conf error >&2; exit 1", "slurm_load_ctl_conf error"),
        ("echo 'Invalid hostlist: gpu[3-1]' >&2", "Invalid hostlist"),
        ("echo 'gpu]'", "'gpu]'"),
        ("true", "nothing"),
        ("printf 'a\\na\\n'", "twice"),
        ("sleep 5", "0.2 s"),
    ],
)
def test_a_host_list_that_cannot_be_expanded(script: str, said: str, scontrol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "SCONTROL_SECONDS", 0.2 if "sleep" in script else 10.0)
    scontrol(script)
    with pytest.raises(DiscoveryError) as error:
        expand_host_list("gpu[01-02]")
    assert said in str(error.value) and "rollout.nodes=gpu[01-02]" in str(error.value) and "\n" not in str(error.value)


def test_without_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DiscoveryError, match="no scontrol here.*rollout.servers"):
        expand_host_list("gpu01")


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        ("gpu[01-04,07]", ["gpu01", "gpu02", "gpu03", "gpu04", "gpu07"]),
        ("login,n[9-11]x[1-2]", ["login", "n9x1", "n9x2", "n10x1", "n10x2", "n11x1", "n11x2"]),
        ("gpu[01-", None),
        ("gpu[03-01]", None),
    ],
)
def test_real_scontrol(hosts: str, names: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("scontrol") is None:
        pytest.skip("no scontrol: Slurm's client commands are not installed (Debian: slurm-client)")
    # It wants one, wherever it runs, and asks nobody.
    (tmp_path / "slurm.conf").write_text("ClusterName=test\nSlurmctldHost=localhost\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    if names is None:
        with pytest.raises(DiscoveryError, match="like gpu"):
            expand_host_list(hosts)
    else:
        assert expand_host_list(hosts) == names


def listing(*urls: str) -> dict[str, Any]:
    return {"workers": [{"url": url, "is_healthy": True} for url in urls], "total": len(urls)}


def test_servers_of_a_router(answers: Answers) -> None:
    answers.given["/workers"] = [(200, listing("http://b:2/", "http://a:1"))]
    assert find_servers(RolloutConfig(engine="external", router=answers.url)) == ["http://a:1", "http://b:2"]


def test_replicas_of_one_server_are_one(answers: Answers) -> None:
    answers.given["/workers"] = [(200, listing("http://a:1@0", "http://a:1@1"))]
    assert router_servers(answers.url, 5) == ["http://a:1"]


def test_a_router_that_knows_its_servers_later(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "POLL_SECONDS", 0.05)
    answers.given["/workers"] = [(200, listing()), (200, listing()), (200, listing("http://a:1"))]
    assert router_servers(answers.url, 5) == ["http://a:1"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, {"detail": "Not Found"}), "no sglang-router"),
        ((200, b"<html>"), "no sglang-router"),
        ((200, {"workers": ["a"]}), "no sglang-router"),
        ((200, listing("grpc://a:1")), "grpc://a:1"),
        ((200, listing("http://a:1/\x1b[2J")), r"lists 'http://a:1/\x1b[2J', which is no address"),
        ((200, listing("http://key@evil:1")), "which is no address"),
        ((200, listing("http://a:1/?x y")), "which is no address"),
        ((200, {"workers": [{"url": None}]}), "no sglang-router"),
        ((200, {"workers": [{"url": [1]}]}), "no sglang-router"),
        ((200, b'{"workers":' + b"[" * 1000 + b"]" * 1000 + b"}"), "no sglang-router"),
        ((302, b""), "redirects are not followed"),
        ((200, listing()), "lists no server within rollout.startup_timeout_seconds=0.3"),
    ],
)
def test_what_is_no_router(
    answer: tuple[int, Any], said: str, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "POLL_SECONDS", 0.05)
    answers.given["/workers"] = [answer]
    with pytest.raises(DiscoveryError) as error:
        router_servers(answers.url, 0.3)
    assert said in str(error.value) and f"rollout.router={answers.url}" in str(error.value)


def test_a_router_that_is_not_there() -> None:
    with pytest.raises(DiscoveryError, match="does not answer.*ClientConnectorError"):
        router_servers("http://127.0.0.1:9", 0.2)


def client(*urls: str) -> RolloutClient:
    return RolloutClient(urls, connect_timeout=1, request_timeout=5, max_retries=1, backoff=0.01, max_in_flight=8)


def described(answers: Answers, model: dict[str, Any], settings: dict[str, Any]) -> None:
    answers.given.update({"/model_info": [(200, model)], "/server_info": [(200, settings)]})


def models_differ(*urls: str) -> str:
    with pytest.raises(WrongModelError) as error:
        asyncio.run(check_models(client(*urls), MODEL))
    return str(error.value)


def test_the_run_s_model_is_accepted(answers: Answers, tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path)
    said = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "is_generation": True,
        "model_path": str(tmp_path),
    }
    described(answers, said, {"model_path": str(tmp_path), "vocab_size": 100})
    asyncio.run(check_models(client(answers.url), MODEL))
    # A server of whose model nothing is known has nothing that differs.
    described(answers, {}, {})
    asyncio.run(check_models(client(answers.url), MODEL))


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            {},
            "architectures is ['LlamaForCausalLM'] there and ['Qwen3ForCausalLM'] in the run",
        ),
        ({"model_type": "llama"}, {}, "model_type is 'llama' there"),
        ({"is_generation": False}, {}, "does not generate"),
        ({"model_type": "qwen3"}, {"vocab_size": 101}, "vocab_size is 101 there and 100 in the run"),
    ],
)
def test_what_a_server_says_of_another_model(
    answers: Answers, model: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    described(answers, model, settings)
    message = models_differ("http://127.0.0.1:9", answers.url)  # one that is not there does not hide it
    assert said in message and answers.url in message and "start it with the model of the run" in message


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "rope_theta"]
)
def test_what_the_directory_of_a_server_says(name: str, answers: Answers, tmp_path: Path) -> None:
    values = MODEL.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(values | {name: values[name] * 2}))
    # After an update from disk /model_info names the directory of the update; what it was started from counts.
    described(answers, {"model_type": "qwen3", "model_path": "/updated"}, {"model_path": str(tmp_path)})
    assert f"{name} is {values[name] * 2} there and {values[name]} in the run" in models_differ(answers.url)


@pytest.mark.parametrize("path", ["/dev/zero", "/a\0b", "/" + "x" * 5000, 7, ["/"], {}, None])
def test_a_directory_that_is_none_says_nothing(path: Any, answers: Answers) -> None:
    described(answers, {"model_path": path}, {"model_path": path})
    asyncio.run(check_models(client(answers.url), MODEL))


def test_a_servers_description_is_shown_cut_and_on_one_line(answers: Answers) -> None:
    deep: Any = "\x1b[2J\n"
    for _ in range(500):
        deep = [deep] * 2 if len(str(deep)) < 2000 else [deep]
    described(answers, {"architectures": deep, "model_path": "\x1b[2J\n" + "x" * 5000}, {})
    message = models_differ(answers.url)
    assert message.isprintable() and len(message) < 1000


@pytest.mark.parametrize("size", [0, -1, True, "2", 1e9, 10**9, None, [2]])
def test_a_number_of_processes_that_none_can_be(size: Any, answers: Answers) -> None:
    described(answers, {}, {"tp_size": size})
    with pytest.raises(RolloutServerError, match=r"/server_info says tp_size="):
        asyncio.run(client(answers.url).tensor_parallel_sizes())
    described(answers, {}, {"tp_size": 8})
    assert asyncio.run(client(answers.url).tensor_parallel_sizes()) == {answers.url: 8}


def test_a_relative_directory_is_the_server_s(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL.to_dict() | {"hidden_size": 64}))
    monkeypatch.chdir(tmp_path)
    described(answers, {}, {"model_path": "model"})
    asyncio.run(check_models(client(answers.url), MODEL))


def test_no_server_to_check() -> None:
    with pytest.raises(RolloutServerError, match="127.0.0.1:9"):
        asyncio.run(check_models(client("http://127.0.0.1:9"), MODEL))


def test_who_answers_without_the_weights_is_refused(answers: Answers) -> None:
    answers.given.update({"/server_info": [(200, {})], "/model_info": [(200, {"weight_version": "old"})]})
    servers = client(answers.url, "http://127.0.0.1:9")
    servers.pool.expect("new")
    servers.pool.record("http://127.0.0.1:9", Event.UPDATE_FAILED, reason="refused connection")
    servers.pool.record(answers.url, Event.ANSWERED, "new")
    asyncio.run(check_updated(servers))  # one that is gone is none of its business
    servers.pool.record(answers.url, Event.UPDATE_FAILED, reason="its config has hidden_size=64")
    with pytest.raises(WrongModelError) as error:
        asyncio.run(check_updated(servers))
    assert f"{answers.url} has not taken the run's weights: its config has hidden_size=64" in str(error.value)
    assert "127.0.0.1:9" not in str(error.value).replace(answers.url, "")


def prompt_answer(ids: list[int], values: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            "meta_info": {
                "input_token_logprobs": [[value, token, None] for value, token in zip(values, ids, strict=True)]
            }
        }
    ]


def test_log_probs_of_a_prompt(answers: Answers) -> None:
    answers.given["/generate"] = [(200, prompt_answer([5, 6, 7], [None, -1.5, -2.5]))]
    servers = client(answers.url, "http://127.0.0.1:9")
    for url in servers.urls:
        servers.pool.record(url, Event.ANSWERED, "v")
    found = asyncio.run(probe_log_probs(servers, [5, 6, 7]))
    assert found == {answers.url: [-1.5, -2.5]} and servers.pool.health["http://127.0.0.1:9"].status is Status.SUSPECT
    (body,) = answers.bodies
    assert (body["input_ids"], body["return_logprob"], body["logprob_start_len"]) == ([[5, 6, 7]], True, 0)
    check_log_probs(found, [-1.5, -2.4], 0.06)
    for expected in ([-1.5, -2.3], [-1.5, float("nan")]):
        with pytest.raises(WrongModelError, match=f"{answers.url}.*nats a token .limit 0.06.*start it with the model"):
            check_log_probs(found, expected, 0.06)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        [{"meta_info": {}}],
        prompt_answer([5, 6], [None, -1.0]),
        prompt_answer([5, 6, 8], [None, -1.0, -1.0]),
        prompt_answer([5, 6, 7], [None, None, -1.0]),
        prompt_answer([5, 6, 7], [None, 0.5, -1.0]),
    ],
)
def test_garbage_is_not_taken_for_log_probs(answer: Any, answers: Answers) -> None:
    answers.given["/generate"] = [(200, answer)]
    with pytest.raises(RolloutServerError, match="garbage.*2 tries"):
        asyncio.run(client(answers.url).prompt_log_probs(answers.url, [5, 6, 7]))


def test_a_refused_prompt_is_told(answers: Answers) -> None:
    answers.given["/generate"] = [(400, {"error": {"message": "out-of-vocabulary token id 99"}})]
    servers = client(answers.url)
    servers.pool.record(answers.url, Event.ANSWERED, "v")
    with pytest.raises(RequestRefusedError, match="out-of-vocabulary token id 99"):
        asyncio.run(probe_log_probs(servers, [99]))
