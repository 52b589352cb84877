from __future__ import annotations

import errno
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dasd_megatron import machine
from dasd_megatron.commands import doctor, doctor_checks, doctor_probe
from dasd_megatron.commands.doctor import doctor_report, exit_status, print_doctor
from dasd_megatron.commands.doctor_checks import FAIL, INFO, OK, WARN, Check

HEALTHY = {
    "torch": {"ok": {"version": "2.13.0+cpu", "cuda_build": None, "cpu": "AVX2", "nccl": None}},
    "cuda": {"ok": []},
    "gloo": {"ok": True},
    "cpu_stack": {"ok": {"layers": "local", "Adam": "torch.optim.AdamW"}},
}
CUDA_TORCH = {"ok": {"version": "2.13.0+cu130", "cuda_build": "13.0", "cpu": "AVX2", "nccl": "2.29.3"}}


@pytest.fixture(scope="module")
def real():
    return doctor_report()


def row(checks: list[Check], item: str) -> Check:
    (found,) = [check for check in checks if check.item == item]
    return found


def test_the_real_report_lists_every_part(real):
    assert list(dict.fromkeys(check.section for check in real)) == [
        "Packages",
        "CPU backend",
        "CUDA backend",
        "Machine",
        "Network",
        "Optional parts",
    ]
    items = {check.item for check in real}
    assert {
        "python",
        "torch",
        "megatron-core",
        "mbridge",
        "transformers",
        "gloo all-reduce",
        "driver",
        "devices",
        "cores",
        "free memory",
    } <= items
    assert {
        "loopback",
        "transformer-engine",
        "apex (NVIDIA's)",
        "sglang",
        "nemo-skills",
        "tensorboard",
        "wandb",
        "mlflow",
        "triton",
        "flash-attn",
    } <= items
    assert all(check.status in (OK, INFO, WARN, FAIL) and check.value for check in real)
    assert all(check.hint for check in real if check.status in (WARN, FAIL))
    assert all(check.hint for check in real if check.value == "missing"), "each missing part says how to get it"


def test_where_the_tests_run_the_cpu_path_runs(real):
    assert exit_status(real) == 0, [check for check in real if check.status == FAIL]
    assert row(real, "gloo all-reduce").value == "works"
    assert row(real, "megatron-core, mbridge, transformers").status == OK


def test_it_loads_nothing_heavy_into_its_own_process():
    code = (
        "import sys; from dasd_megatron.commands import doctor, doctor_checks; doctor_checks.package_rows(); "
        "doctor_checks.optional_rows(); doctor_checks.machine_rows(); "
        "print([m for m in ('torch', 'transformers', 'megatron', 'apex', 'numpy') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "[]"


def test_printing_gives_the_exit_status_and_plain_text(monkeypatch, real):
    broken = [
        Check("CPU backend", "gloo all-reduce", "RuntimeError: no route", FAIL, "set GLOO_SOCKET_IFNAME=lo"),
        *real[:3],
    ]
    monkeypatch.setattr(doctor, "doctor_report", lambda: broken)
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    assert print_doctor(stream) == 1
    text = stream.getvalue()
    assert (
        "The CPU path cannot run here: gloo all-reduce." in text
        and "→ set GLOO_SOCKET_IFNAME=lo" in text
        and "\x1b" not in text
    )
    monkeypatch.setattr(doctor, "doctor_report", lambda: [Check("Machine", "cores", "1", WARN, "more")])
    stream = io.StringIO()
    assert print_doctor(stream) == 0
    assert "The CPU path can run here. Warnings: 1." in stream.getvalue()


@pytest.mark.parametrize(
    ("requirement", "version", "status", "words"),
    [
        ("torch>=2.6", "2.13.0+cpu", OK, "2.13.0+cpu (needs >=2.6"),
        ("torch>=2.6", "2.5.1+cu121", FAIL, 'pip install "torch>=2.6"'),
        ("mbridge==0.15.1", "0.15.1+local", OK, "0.15.1"),
        ("transformers>=4.55,<5", "5.0.1", FAIL, "pip install"),
        ("einops>=0.7", None, FAIL, "missing"),
    ],
)
def test_versions_against_the_requirements(monkeypatch, requirement, version, status, words):
    monkeypatch.setattr(doctor_checks, "_version", lambda _: version)
    check = doctor_checks._requirement_row("Packages", Requirement(requirement))
    assert check.status == status and words in check.value + check.hint


def test_a_broken_torch_is_a_row_and_not_a_traceback():
    checks = doctor_checks.cpu_rows({**HEALTHY, "torch": {"error": "ImportError: libtorch_cpu.so: cannot open"}})
    assert [check.status for check in checks] == [FAIL] and "libtorch_cpu.so" in checks[0].value
    checks = doctor_checks.cpu_rows(
        {**HEALTHY, "cpu_stack": {"error": "ModuleNotFoundError: No module named 'einops'"}}
    )
    assert [check.status for check in checks] == [OK, OK, FAIL] and "einops" in checks[2].value


@pytest.mark.parametrize(
    ("program", "name", "words"),
    [
        (
            'import os; print(\'DASD-PROBE {"name": "torch", "ok": 1}\', flush=True); os._exit(9)',
            "gloo",
            "died with status 9",
        ),
        (
            'import time; print(\'DASD-PROBE {"name": "torch", "ok": 1}\', flush=True); time.sleep(60)',
            "gloo",
            "no answer within",
        ),
    ],
)
def test_a_probe_that_dies_or_hangs_keeps_what_it_said(monkeypatch, program, name, words):
    monkeypatch.setattr(doctor_probe, "PROGRAM", ("-c", program))
    monkeypatch.setattr(doctor_probe, "TIMEOUT_SECONDS", 2.0)
    answers = doctor_probe.read_answers(doctor_probe.start_probe("torch", "gloo"))
    assert answers["torch"]["ok"] == 1 and words in answers[name]["error"]


def test_cuda_rows(monkeypatch):
    monkeypatch.setattr(doctor_checks, "_shared_memory", lambda: 64 * 2**20)
    monkeypatch.setattr(doctor_checks, "_nvidia_driver", lambda: ("580.1: GPU, 80 GiB free", OK, ""))
    devices = {**HEALTHY, "torch": CUDA_TORCH, "cuda": {"ok": ["A, 80 GiB", "B, 80 GiB"]}}
    checks = doctor_checks.cuda_rows({**devices, "cuda_kernels": {"error": "ImportError: no amp_C"}})
    assert row(checks, "megatron-core").status == WARN and "amp_C" in row(checks, "megatron-core").value
    checks = doctor_checks.cuda_rows({**devices, "cuda_kernels": {"ok": {"Adam": "apex.optimizers.FusedAdam"}}})
    assert row(checks, "Adam by").value == "apex.optimizers.FusedAdam"
    assert row(checks, "device 1").value == "B, 80 GiB" and row(checks, "NCCL").value == "2.29.3"
    assert row(checks, "/dev/shm").status == WARN
    checks = doctor_checks.cuda_rows({**HEALTHY, "torch": CUDA_TORCH})
    assert row(checks, "devices").status == WARN and "CUDA_VISIBLE_DEVICES" in row(checks, "devices").hint
    checks = doctor_checks.cuda_rows(HEALTHY)
    assert row(checks, "torch build").status == WARN and "CUDA build of torch" in row(checks, "torch build").hint
    checks = doctor_checks.cuda_rows(
        {**HEALTHY, "torch": CUDA_TORCH, "cuda": {"error": "RuntimeError: CUDA driver too old"}}
    )
    assert row(checks, "devices").status == WARN
    monkeypatch.setattr(doctor_checks, "_nvidia_driver", lambda: None)
    assert {check.status for check in doctor_checks.cuda_rows(HEALTHY)} == {INFO}


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("echo '580.1, NVIDIA H200, 143771 MiB, 143000 MiB'", OK, "580.1: NVIDIA H200, 143000 MiB of 143771 MiB free"),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", WARN, "has failed"),
        ("echo nonsense", WARN, "nonsense"),
    ],
)
def test_what_nvidia_smi_says(monkeypatch, tmp_path, script, status, words):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    value, found, _ = doctor_checks._nvidia_driver()
    assert found == status and words in value


@pytest.mark.parametrize(
    ("layout", "status", "words"),
    [([], INFO, "missing"), (["apex"], WARN, "another package"), (["apex", "apex/optimizers"], WARN, "amp_C")],
)
def test_apex_is_only_nvidias(monkeypatch, tmp_path, layout, status, words):
    for folder in layout:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor_checks._apex_row("Optional parts")
    assert check.status == status and words in check.value and "NVIDIA" in check.hint + check.item
    if len(layout) == 2:
        (tmp_path / "amp_C.py").write_text("raise RuntimeError('must not be imported')\n")
        assert doctor_checks._apex_row("Optional parts").status == OK


def test_a_busy_port_and_a_broken_loopback(monkeypatch):
    real_server = socket.create_server

    def busy(address, **options):
        if address[1] == 30000:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        return real_server((address[0], 0), **options)

    monkeypatch.setattr(socket, "create_server", busy)
    checks = doctor_checks.network_rows()
    assert row(checks, "port 30000").status == INFO and "in use" in row(checks, "port 30000").value
    assert row(checks, "loopback").status == OK

    def refuse(*_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(socket, "create_connection", refuse)
    checks = doctor_checks.network_rows()
    assert row(checks, "loopback").status == FAIL and exit_status(checks) == 1


def test_container_limits_count(monkeypatch):
    files = {
        "/sys/fs/cgroup/cpu.max": "50000 100000",
        "/sys/fs/cgroup/memory.max": str(2 * 2**30),
        "/sys/fs/cgroup/memory.current": str(2**30),
    }
    monkeypatch.setattr(machine, "read_system_file", lambda path: files.get(path, ""))
    assert doctor_checks._cores() == 0.5
    assert machine.free_memory() <= 2**30
    assert {row(doctor_checks.machine_rows(), item).status for item in ("cores", "free memory")} == {WARN}
    files.update({"/sys/fs/cgroup/cpu.max": "max 100000", "/sys/fs/cgroup/memory.max": "max"})
    assert doctor_checks._cores() >= 1 and machine.free_memory() > 0


def test_a_disk_that_cannot_be_written(tmp_path):
    check = doctor_checks._disk_row("Machine", "disk", tmp_path / "absent", 1)
    assert check.status == WARN and "absent" in check.value and "run.dir" in check.hint
    assert doctor_checks._disk_row("Machine", "disk", Path(tmp_path), 10**9).status == WARN
    assert doctor_checks._disk_row("Machine", "disk", Path(tmp_path), 0).status == OK
