"""The embedded server's process: how it starts, what it names when it cannot, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dasd_megatron.models.tiny import character_tokenizer
from dasd_megatron.rollout.local_server import LocalServer, PortInUseError, ServerStartError
from tests.support.rollout_contract import (
    PROMPTS,
    Target,
    forward_log_probs,
    output_log_probs,
    request_behind,
    rollout,
    seeded,
)

pytestmark = pytest.mark.integration


def test_another_architecture_with_learned_positions(tmp_path):
    """GPT-2: position table, layer norms with bias, no rotary embedding, end token named only by the model."""
    config = GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    character_tokenizer().save_pretrained(tmp_path / "gpt2")
    with LocalServer(tmp_path / "gpt2", "1", rollout(), tmp_path / "log") as server:
        target = Target("embedded", server.url, "")
        params = seeded(4, max_new_tokens=50, ignore_eos=True)
        params[2]["max_new_tokens"] = 63  # up to the last position
        answers = target.generate(input_ids=PROMPTS, sampling_params=params, return_logprob=True)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            expected = forward_log_probs(model, prompt + answer["output_ids"])[len(prompt) - 1 :]
            torch.testing.assert_close(
                torch.tensor(output_log_probs(answer), dtype=torch.float64), expected, atol=1e-4, rtol=0
            )


def test_requests_in_flight_at_shutdown_are_answered(models, tmp_path):
    server = LocalServer(models["a"], "v1", rollout(max_batch_size=64), tmp_path / "log")
    server.start()
    target = Target("embedded", server.url, models["a"])
    running, waiting = request_behind(target, 2)
    process = server._process
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    for answer in running.answer(15) + waiting.answer(15):
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    stopper.join(15)
    assert process.returncode is not None and process.returncode != -signal.SIGKILL, "the server must end by itself"
    assert not server.alive()
    with pytest.raises(httpx.ConnectError):
        target.request("GET", "/health")


def test_restart_serves_other_weights_at_the_same_address(models, tmp_path):
    with LocalServer(models["a"], "v1", rollout(), tmp_path / "log") as server:
        url = server.url
        os.kill(server._process.pid, signal.SIGKILL)
        server._process.wait(10)
        assert not server.alive()
        server.restart(models["b"], "v9")
        assert server.url == url
        assert Target("embedded", url, "").request("GET", "/model_info").json()["weight_version"] == "v9"


def test_the_server_ends_with_its_parent(models, tmp_path):
    code = (
        "import sys, time\n"
        "from dasd_megatron.config import RolloutConfig\n"
        "from dasd_megatron.rollout.local_server import LocalServer\n"
        f"server = LocalServer({models['a']!r}, '1', RolloutConfig(threads=1), {str(tmp_path / 'log')!r})\n"
        "server.start()\n"
        "print(server._process.pid, server.url, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        child, url = parent.stdout.readline().split()
    finally:
        parent.kill()
        parent.wait(10)
        parent.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").exists() and "rollout.server" in Path(f"/proc/{child}/cmdline").read_text():
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.1)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", timeout=2, trust_env=False)


def test_a_taken_port_is_named_before_anything_starts(models, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = LocalServer(models["a"], "v1", rollout(port=port), tmp_path / "log")
        with pytest.raises(
            PortInUseError, match=rf"^rollout\.port: cannot listen on 127\.0\.0\.1:{port}: .*rollout\.port=0"
        ):
            server.start()
        assert not (tmp_path / "log").exists() and not server.alive()


def run_server(*arguments):
    command = [sys.executable, "-m", "dasd_megatron.rollout.server", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def test_the_command_names_a_taken_port_in_one_line(models):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_server("--model-path", models["a"], "--port", str(port))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"dasd: error: cannot listen on 127.0.0.1:{port}")
    assert "Traceback" not in result.stderr


def test_the_command_names_a_bad_model_directory_in_one_line(models):
    result = run_server("--model-path", models["torn"], "--port", "0")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"dasd: error: cannot load a causal LM from {models['torn']}")
    assert "Traceback" not in result.stderr


def test_a_start_that_fails_shows_the_log(models, tmp_path):
    server = LocalServer(models["empty"], "v1", rollout(), tmp_path / "log")
    with pytest.raises(
        ServerStartError,
        match=r"(?s)ended with status 1\. The end of .*dasd: error: --model-path=.*no config\.json there",
    ):
        server.start()
    assert not server.alive()


def test_a_start_that_takes_too_long_is_given_up(models, tmp_path):
    server = LocalServer(models["a"], "v1", rollout(startup_timeout_seconds=0.2), tmp_path / "log")
    with pytest.raises(ServerStartError, match=r"rollout\.startup_timeout_seconds=0\.2"):
        server.start()
    assert not server.alive()
