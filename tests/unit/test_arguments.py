"""Command lines that cannot be meant are one line, before anything is loaded."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest

from dasd_megatron.cli import main
from dasd_megatron.config import TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model

TINY = TinyModelConfig(
    hidden_size=32, num_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64
)
SERVE, SGLANG = ["serve", "--model-path", "model"], ["serve", "--engine", "sglang", "--model-path", "model"]
ROUTER = ["router", "--servers", "http://127.0.0.1:1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("made") / "model", TINY, 0)


@pytest.fixture(autouse=True)
def model(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in the working directory; without a key, which would be warned about."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DASD_API_KEY", raising=False)
    shutil.copytree(made, tmp_path / "model")
    return tmp_path / "model"


def refusal(arguments: list[str], capfd: pytest.CaptureFixture) -> tuple[int, str]:
    """Return the status of a command and the only line that it says."""
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err[:-1].isprintable() and len(err) < 500, (out, err)
    return status, err


@pytest.mark.parametrize("command", [SERVE, SGLANG, ROUTER], ids=["embedded", "sglang", "router"])
@pytest.mark.parametrize("port", ["999999", "65536", "-1", "abc", "", "1e3", "\x1b[2J"])
def test_ports(command: list[str], port: str, capfd: pytest.CaptureFixture) -> None:
    status, said = refusal([*command, "--port", port], capfd)
    assert status == 2 and "argument --port: " in said and "is no whole number from 0 to 65535 (dasd" in said


@pytest.mark.parametrize("command", [SERVE, SGLANG, ROUTER], ids=["embedded", "sglang", "router"])
def test_a_port_in_use(command: list[str], capfd: pytest.CaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, said = refusal([*command, "--port", str(port)], capfd)
    assert status == 1 and f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another port" in said


@pytest.mark.parametrize("command", [SERVE, SGLANG, ROUTER], ids=["embedded", "sglang", "router"])
@pytest.mark.parametrize("host", ["no.such.host.invalid", "999.1.1.1", "", "a b", "x" * 300, "a..b", "\x1b[2J"])
def test_addresses(command: list[str], host: str, capfd: pytest.CaptureFixture) -> None:
    status, said = refusal([*command, "--host", host, "--port", "0"], capfd)
    assert status == 1 and ("cannot listen on" in said or "the address to listen on is empty" in said)


@pytest.mark.parametrize(
    "options",
    [
        "--threads 0",
        "--tp-size 0",
        "--dp-size -1",
        "--mem-fraction-static 5",
        "--mem-fraction-static nan",
        "--max-total-tokens -1",
        "--context-length 0",
        "--startup-timeout nan",
        "--startup-timeout inf",
        "--max-running-requests 0",
    ],
)
def test_settings_of_sglang(options: str, capfd: pytest.CaptureFixture) -> None:
    name, value = options.split()
    status, said = refusal([*SGLANG, name, value], capfd)
    assert status == 2 and f"argument {name}: {value!r} is no " in said


@pytest.mark.parametrize("argument", ["--trust-remote-code", "--trust-rem", "--api-key=abc"])
def test_arguments_of_sglang_that_are_refused(argument: str, capfd: pytest.CaptureFixture) -> None:
    assert refusal([*SGLANG, "--", argument], capfd)[0] == 1


@pytest.mark.parametrize(
    "options",
    ["--startup-timeout -1", "--startup-timeout nan", "--metrics-port 65536", "--servers-per-node 0", "--first-port 0"],
)
def test_settings_of_the_router(options: str, capfd: pytest.CaptureFixture) -> None:
    name, value = options.split()
    status, said = refusal([*ROUTER, name, value], capfd)
    assert status == 2 and f"argument {name}: {value!r} is no " in said


COMMANDS = {
    "embedded": lambda path: ["serve", "--model-path", path, "--port", "0"],
    "sglang": lambda path: ["serve", "--engine", "sglang", "--model-path", path, "--port", "0"],
    "plan": lambda path: ["plan", "model=hf", f"model.path={path}"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json there; give a Hugging Face model directory"),
        (b"{", "config.json is damaged (not JSON"),
        (b"[]", "config.json is damaged (it is not an object)"),
        (b"\xff", "config.json is damaged"),
        (b"[" * 100_000, "config.json is damaged"),
        (b"{}", "config.json names no model_type"),
        (b'{"model_type": 7}', "config.json names no model_type"),
        (
            b'{"model_type": "nonesuch"}',
            "config.json names the model_type 'nonesuch', which transformers does not know",
        ),
    ],
)
def test_directories_that_are_no_model(command, config: bytes | None, message: str, capfd, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    if config is not None:
        (tmp_path / "other" / "config.json").write_bytes(config)
    status, said = refusal(command("other"), capfd)
    assert status == 1 and "other" in said and message in said


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_what_is_no_directory(command, capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file is a file; give a Hugging Face model directory" in refusal(command("file"), capfd)[1]
    assert re.search("nowhere(: no such file| is not there)", refusal(command("nowhere"), capfd)[1])


@pytest.mark.parametrize(("name", "kind"), [("model.safetensors", "weight"), ("tokenizer.json", "tokenizer")])
def test_a_directory_that_lacks_a_part_is_not_given_to_sglang(name: str, kind: str, capfd, model: Path) -> None:
    (model / name).unlink()
    assert f"model: there is no {kind} (" in refusal([*SGLANG, "--port", "0"], capfd)[1]


def test_doctor_takes_no_arguments(capfd: pytest.CaptureFixture) -> None:
    assert refusal(["doctor", "x"], capfd) == (
        2,
        "dasd: error: unrecognized arguments: x (dasd doctor --help lists the options)\n",
    )


def test_the_help_of_the_embedded_server_shows_no_internal_options(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    said = capfd.readouterr().out
    assert said.startswith("usage: dasd serve ") and "--deterministic" in said
    assert "--fd" not in said and "--exit-with-parent" not in said
