"""Both backends have what the interface asks for, and one is chosen by name."""

from __future__ import annotations

import faulthandler
import inspect
import mmap
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dasd_megatron import backend
from dasd_megatron.backend import Backend, cpu, cuda
from dasd_megatron.backend.blocks import loss_block_tokens
from dasd_megatron.config import BackendConfig
from dasd_megatron.errors import ConfigError

FUNCTIONS = {name: function for name, function in vars(Backend).items() if inspect.isfunction(function)}


@pytest.mark.parametrize("module", [cpu, cuda], ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not name.startswith("_")])
def test_a_backend_has_the_functions_of_the_interface(module: object, name: str) -> None:
    wanted = inspect.signature(FUNCTIONS[name])
    found = inspect.signature(getattr(module, name))
    assert [*found.parameters.values()] == [*wanted.parameters.values()][1:]
    assert found.return_annotation == wanted.return_annotation


def test_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_selected", None)
    with pytest.raises(ConfigError, match="backend.kind='tpu' is unknown: write cpu or cuda"):
        backend.select(BackendConfig(kind="tpu"))
    with pytest.raises(RuntimeError, match="no backend selected"):
        backend.current()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_processes_wait_without_spinning(kind: str) -> None:
    environment = backend.process_environment(BackendConfig(kind=kind, threads=3))
    assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("3", "PASSIVE")
    assert ("MALLOC_TRIM_THRESHOLD_" in environment) is (kind == "cpu")


@pytest.mark.parametrize(("module", "name"), [(cpu, "gloo"), (cuda, "nccl")], ids=["cpu", "cuda"])
def test_collectives_are_those_of_the_device(module: Backend, name: str) -> None:
    assert module.collective_backend() == name


def test_a_machine_with_too_few_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "2\n")

    monkeypatch.setattr(subprocess, "run", answer)
    backend.check_devices(BackendConfig(kind="cpu"), 8)
    assert not commands
    backend.check_devices(BackendConfig(kind="cuda"), 2)
    with pytest.raises(ConfigError, match="need 4 GPUs on this machine and torch sees 2; lower them"):
        backend.check_devices(BackendConfig(kind="cuda"), 4)
    assert {command[0] for command in commands} == {sys.executable}


def test_a_rollout_server_on_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["0\n", "1\n", "0\n"]
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, answers.pop(0)))
    refused = "^rollout.device=cuda, but torch sees no GPU: .* or set rollout.device=cpu$"
    with pytest.raises(ConfigError, match=refused):
        backend.check_devices(BackendConfig(kind="cpu"), 2, "cuda")
    backend.check_devices(BackendConfig(kind="cpu"), 2, "cuda")
    with pytest.raises(ConfigError, match=refused):
        backend.check_devices(BackendConfig(kind="cuda"), 0, "cuda")
    backend.check_devices(BackendConfig(kind="cpu"), 2, "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=refused):
        cuda.serving_device()


@pytest.mark.parametrize(("trainers", "gpus", "expected"), [(None, 2, 0), (1, 1, 0), (1, 2, 1), (4, 4, 0), (3, 4, 3)])
def test_a_server_gets_a_gpu_of_its_own_where_there_is_one(
    trainers: int | None, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    if trainers is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(trainers))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert cuda.serving_device() == torch.device("cuda", expected)
    assert cpu.serving_device() == torch.device("cpu") and cpu.free_memory(torch.device("cpu")) > 0


def test_the_meta_device_takes_no_memory_after_the_cpu_backend() -> None:
    """A context that is used for the first time after the backend has prepared torch."""
    program = (
        "import torch; from dasd_megatron import backend; from dasd_megatron.config import BackendConfig\n"
        "backend.select(BackendConfig(kind='cpu'))\n"
        "with torch.device('meta'):\n"
        "    made = [torch.empty(2), torch.zeros(2), torch.arange(2), torch.nn.Linear(2, 2).weight]\n"
        "print({tensor.device.type for tensor in made}, torch.empty(2, device='cuda').device.type)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split("\n")[-2] == "{'meta'} cpu"


@pytest.mark.parametrize(
    ("gigabytes", "columns", "tokens"), [(141, 8192, 16384), (80, 8192, 8192), (24, 8192, 2048), (80, 151_936, 512)]
)
def test_a_block_of_the_loss_takes_a_small_share_of_a_gpu(gigabytes: int, columns: int, tokens: int) -> None:
    assert loss_block_tokens("cuda", gigabytes * 1e9, columns) == tokens
    assert tokens * columns * 4 <= gigabytes * 1e9 / 256 < 2 * tokens * columns * 4


def test_blocks_of_the_loss_are_the_cpus_own_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.loss_block_tokens(8192) == loss_block_tokens("cpu", 1e12, 8192) == 1024
    # However small the memory, a block is not cut to nothing.
    assert loss_block_tokens("cuda", 1e6, 8192) == 128
    monkeypatch.setattr(cuda, "device", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=150 * 10**9))
    assert cuda.loss_block_tokens(8192) == 16384
    assert cuda.kept_logits_bytes() == 150 * 10**9 // 64 and cpu.kept_logits_bytes() == 0


def test_host_memory_for_a_gpu_is_pinned_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    status = 0

    def register(address: int, size: int, _flags: int) -> int:
        calls.append(("register", address, size))
        return status

    cudart = SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=lambda address: calls.append(("unregister", address, 0))
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = cuda.host_memory(10_001)
    memory.fill_(7)
    address = memory.data_ptr()
    copied = cuda.readable_when_forked(memory)
    assert memory.shape == (10_001,) and calls == [("register", address, 10_001)] and address % mmap.PAGESIZE == 0
    # A process that is forked now has the copy and not the pinned memory.
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os._exit(int(copied[-1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os._exit(int(memory[-1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV
    del memory
    assert calls[1:] == [("unregister", address, 0)]
    status = 2
    with pytest.raises(MemoryError, match=r"^0.00 GB of host memory could not be pinned \(cudaHostRegister says 2\)$"):
        cuda.host_memory(1000)
