"""An API key from end to end: servers of both engines, router, trainer; and what a run leaves behind tells it to
nobody."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import secrets
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from dasd_megatron.access import VARIABLE
from dasd_megatron.cli import main
from dasd_megatron.config import RolloutConfig, SGLangConfig, is_loopback, load_config
from dasd_megatron.files import file_sha256
from dasd_megatron.models.hf_weights import MANIFEST_FILE
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.local_server import LocalServer
from tests.support.runs import NO_EVALUATION, SMALL, command, finish, rows, start
from tests.support.servers import routing, sglang_python

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

KEY = secrets.token_hex(16)
GENERATE = {"input_ids": [[5, 6]], "sampling_params": {"max_new_tokens": 2, "temperature": 0.0}}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", load_config([*SMALL]).model.tiny, 1)


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[LocalServer]:
    with LocalServer(model, "start", RolloutConfig(threads=1), tmp_path / "server.log") as server:
        yield server


@contextlib.contextmanager
def nobody_is_told() -> Iterator[None]:
    """Look again and again at the command lines of all processes of the machine, as `ps` does, and at where the test's
    launchers and embedded servers listen: on the loopback interface alone. (Where gloo does, in workers, the name of
    the host decides.)"""
    seen, done = [], threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            family = {child.pid for child in psutil.Process().children(recursive=True)}
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    words = process.cmdline()
                    seen.extend(word for word in words if KEY in word)
                    if process.pid in family and {"dasd_megatron.cli", "dasd_megatron.rollout.server"} & set(words):
                        ports = [
                            connection.laddr
                            for connection in process.net_connections("inet")
                            if connection.status == psutil.CONN_LISTEN
                        ]
                        seen.extend((words, port) for port in ports if not is_loopback(port.ip))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()
    assert not seen


def check_server(url: str, *, unauthorized: str) -> None:
    """It takes the key alone, but for asking after its health, which SGLang leaves open."""
    for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}, {"Authorization": "Bearer"}):
        with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as http:
            answers = [http.get("/model_info"), http.get("/server_info"), http.post("/generate", json=GENERATE)]
            answers += [
                http.post(path, json={})
                for path in ("/begin_weight_update", "/init_weights_update_group", "/pause_generation")
            ]
            assert [answer.status_code for answer in answers] == [401] * len(answers)
            assert all(answer.json()["error"].startswith(unauthorized) for answer in answers)
            assert http.get("/health").status_code == 200
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30, trust_env=False) as http:
        assert http.get("/model_info").status_code == 200
        assert len(http.post("/generate", json=GENERATE).json()[0]["output_ids"]) == 2


def test_a_run_with_a_key_leaves_no_trace_of_it(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_server(server.url, unauthorized="Unauthorized: this server asks for its API key")
    run = tmp_path / "run"
    overrides = [f"run.dir={run}", "run.steps=2", *NO_EVALUATION, "checkpoint.every=1", "logging.tensorboard=true"]
    external = ["rollout=external", f"rollout.servers=[{server.url}]", "rollout.weight_sync=distributed"]
    with nobody_is_told():
        status, output = finish(start(*overrides, *external))
    assert status == 0, output[-4000:]
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2]
    # A run without a key and one with another, of the same server, are told so at once; so are servers of its own.
    for wrong, named in ((None, "asks for an API key"), (secrets.token_hex(16), "does not take the API key")):
        monkeypatch.delenv(VARIABLE) if wrong is None else monkeypatch.setenv(VARIABLE, wrong)
        status, refused = finish(start(f"run.dir={tmp_path / 'refused'}", "run.steps=2", *external), timeout=60)
        assert status == 1 and len(refused.strip().splitlines()) == 1, refused
        assert server.url in refused and named in refused and VARIABLE in refused and (wrong or KEY) not in refused
        assert not (tmp_path / "refused").exists()
        output += refused
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {
        ".jsonl",
        ".yaml",
        ".json",
        ".html",
        ".log",
        ".safetensors",
        ".distcp",
        ".pt",
    }
    assert KEY not in output
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    # Nobody else may read what a run writes, wherever in it.
    for path in [run, *run.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    monkeypatch.setenv(VARIABLE, KEY)
    check_a_checkpoint_with_code_is_refused(run, [*overrides, *external], tmp_path / "code-has-run")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.mark,)


def check_a_checkpoint_with_code_is_refused(run: Path, overrides: list[str], mark: Path) -> None:
    for path in run.glob("checkpoints/step_*/.metadata"):
        path.write_bytes(pickle.dumps(Evil(mark)))
        manifest = path.with_name(MANIFEST_FILE)
        if manifest.exists():  # whoever plants code can count its hash
            record = json.loads(manifest.read_text())
            record["files"][".metadata"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            manifest.write_text(json.dumps(record))
    status, output = finish(start(*overrides, "run.steps=3", "resume=auto"))
    assert status == 1 and "it names posix.mkdir" in output and "Traceback" not in output, output[-4000:]
    assert not mark.exists()


def test_a_key_in_the_configuration_and_one_that_is_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    mask = os.umask(0o022)
    # `dasd train` blocks signals, which every process that is started after it would inherit.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        arguments = ["train", *SMALL, f"run.dir={tmp_path / 'run'}", "run.steps=1"]
        assert main([*arguments, f"run.name={KEY}"]) == 1
        monkeypatch.setenv(VARIABLE, "")
        assert main(arguments) == 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.umask(mask)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "config" in lines[0] and "openssl rand" in lines[1] and KEY not in "".join(lines)
    assert not (tmp_path / "run").exists()


# Its short forms in `make test` are the tests above, with the embedded server.
@pytest.mark.drill
def test_real_sglang_and_its_router_take_the_key_and_tell_nobody(
    model: Path, server: LocalServer, tmp_path: Path
) -> None:
    settings = SGLangConfig(backend="cpu", python=sglang_python(), max_total_tokens=4096)
    rollout = dataclasses.replace(
        RolloutConfig(threads=1), engine="sglang", sglang=settings, startup_timeout_seconds=120
    )
    log = tmp_path / "router.log"
    with nobody_is_told(), LocalServer(model, "start", rollout, tmp_path / "sglang.log") as sglang:
        check_server(sglang.url, unauthorized="Unauthorized")
        with routing(log, "--servers", sglang.url, server.url) as (_, url):
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
                assert http.get("/workers").status_code == http.post("/generate", json=GENERATE).status_code == 401
                http.headers["Authorization"] = f"Bearer {KEY}"
                assert http.get("/workers").json()["total"] == 2
                for _ in range(2):
                    assert len(http.post("/generate", json=GENERATE).json()[0]["output_ids"]) == 2
            refused = [*command(f"run.dir={tmp_path / 'run'}"), "rollout=external", f"rollout.router={url}"]
            with pytest.MonkeyPatch.context() as without:
                without.delenv(VARIABLE)
                assert url in refused_with(refused) and not (tmp_path / "run").exists()
    assert (
        KEY not in (tmp_path / "sglang.log").read_text() and "api_key': '***'" in (tmp_path / "sglang.log").read_text()
    )
    assert KEY not in log.read_text()


def refused_with(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and VARIABLE in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr
