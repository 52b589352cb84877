"""The command line of a real SGLang server, and what is said of a server that does not start."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dasd_megatron.config import RolloutConfig, SGLangConfig
from dasd_megatron.rollout import local_server
from dasd_megatron.rollout.embedded.server import parse_args
from dasd_megatron.rollout.local_server import LocalServer, ServerStartError, sglang_command


@pytest.mark.parametrize(
    ("backend", "release", "given"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_memory_that_is_to_be_released_is_saved_on_gpus(backend: str, release: bool, given: bool) -> None:
    rollout = RolloutConfig(
        max_new_tokens=8, max_prompt_tokens=8, release_memory=release, sglang=SGLangConfig(backend=backend)
    )
    assert ("--enable-memory-saver" in sglang_command(rollout, "model", 1)) is given


def test_the_script_that_starts_sglang_is_there() -> None:
    rollout = RolloutConfig(max_new_tokens=8, max_prompt_tokens=8, sglang=SGLangConfig(python="python"))
    python, script, *_ = sglang_command(rollout, "model", 1)
    assert python == "python" and Path(script).is_file()


def test_the_embedded_server_gets_its_device_and_memory(tmp_path: Path) -> None:
    def options(**settings: Any) -> list[str]:
        rollout = RolloutConfig(max_new_tokens=8, max_prompt_tokens=8, dtype="bfloat16", **settings)
        words = LocalServer("model", "v1", rollout, tmp_path / "log")._embedded_command(7)
        parsed = parse_args(words[words.index("dasd_megatron.rollout.server") + 1 :])
        return [parsed.device, parsed.cache_gib, parsed.dtype]

    assert options() == ["cpu", None, "bfloat16"]
    assert options(device="cuda", cache_gib=2.5) == ["cuda", 2.5, "bfloat16"]


@pytest.fixture
def deaf_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalServer:
    """A server that starts, has a process of its own, and never listens."""
    waits = "import faulthandler, signal, time; faulthandler.register(signal.SIGUSR2)\n" + (
        "def wait_for_ever():\n    print('begun', flush=True)\n    time.sleep(600)\n"
    )
    code = waits + (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {waits + 'wait_for_ever()'!r}])\n"
        "print('x' * 5000, flush=True); wait_for_ever()\n"
    )
    monkeypatch.setattr(LocalServer, "_embedded_command", lambda *_: [sys.executable, "-c", code])
    rollout = RolloutConfig(max_new_tokens=8, max_prompt_tokens=8, startup_timeout_seconds=0.2)
    server = LocalServer("model", "v1", rollout, tmp_path / "log")
    describe = local_server._describe_processes

    def describe_once_both_wait(process: subprocess.Popen[bytes]) -> str:
        deadline = time.monotonic() + 60
        while server.log_path.read_text().count("begun") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return describe(process)

    monkeypatch.setattr(local_server, "_describe_processes", describe_once_both_wait)
    return server


def test_a_start_that_takes_too_long_says_what_the_server_and_its_processes_were_doing(
    deaf_server: LocalServer,
) -> None:
    with pytest.raises(ServerStartError) as caught:
        deaf_server.start()
    text = str(caught.value)
    assert re.search(
        # On a busy machine the time is over before the client for the requests has been made.
        r"startup_timeout_seconds=0\.2: (0 requests for /health, the last with nothing|"
        r"[1-9]\d* requests for /health, the last with no answer \(/health failed: ClientConnectorError: .*\))\. "
        r"Its processes: \d+ \S+ \w+, [\d.]+ s of CPU; \d+ \S+ \w+, [\d.]+ s of CPU\. The end of ",
        text,
    ), text
    assert text.count("in wait_for_ever") == 2
    assert not deaf_server.alive()


def test_the_end_of_a_log_is_bounded(deaf_server: LocalServer) -> None:
    deaf_server.log_path.write_text("first\n" + "y" * 500_000 + "\n" + "last\n" * 3)
    tail = deaf_server.log_tail()
    assert tail.endswith("last\nlast\nlast") and len(tail) < 1000
    deaf_server.log_path.write_text(
        '  File "model.py", line 1\n' + '  File "<frozen importlib._bootstrap>", line 2\n' * 99
    )
    assert deaf_server.log_tail().endswith('log:\n  File "model.py", line 1')
    deaf_server.log_path.write_bytes(b"\xff" * 3)
    assert deaf_server.log_tail().endswith("\ufffd\ufffd\ufffd")


def test_the_end_of_a_log_is_printable(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(10 * 2**30)  # The hole takes no room on disk, and would take ten gigabytes of memory.
        file.seek(0, 2)
        file.write(b"\n" + b"".join(b"  line %d \x1b[2J\xff\r\n" % index for index in range(30)))
    tail = LocalServer("model", "1", RolloutConfig(), log).log_tail()
    head, *lines = tail.split("\n")
    assert head == f"The end of {log}:" and lines == [f"  line {index}  [2J\ufffd" for index in range(10, 30)]
