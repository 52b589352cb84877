"""The rows of ``dasd doctor``: what this machine offers a run, what it lacks, and what to do about it.

A check never raises for what it finds. What is wrong becomes a row with status warn or fail and a hint.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from dasd_megatron import machine
from dasd_megatron.commands.doctor_probe import Answers

OK, INFO, WARN, FAIL = "ok", "info", "warn", "fail"
DISTRIBUTION = "dasd-megatron"
GIB = 2**30

# The test suite has run with these versions; the ranges that are accepted stand in the package's own requirements.
TESTED = {
    "torch": "2.13",
    "megatron-core": "0.16.1",
    "mbridge": "0.15.1",
    "transformers": "4.57",
    "hydra-core": "1.3",
    "math-verify": "0.9.0",
}
TESTED_PYTHON = ("3.11",)


class Check(NamedTuple):
    """One row. ``status``: ok; info (an optional part is missing, nothing to do); warn (look at it); fail (the CPU path
    cannot run)."""

    section: str
    item: str
    value: str
    status: str
    hint: str


def package_rows() -> list[Check]:
    """Return the versions of Python, of this package and of all that it requires."""
    section = "Packages"
    python = platform.python_version()
    supported = sys.version_info >= (3, 11)
    hint = "" if supported else "use Python 3.11 or newer"
    if supported and not python.startswith(TESTED_PYTHON):
        hint = f"tested with {', '.join(TESTED_PYTHON)}"
    status = FAIL if not supported else WARN if hint else OK
    checks = [Check(section, "python", f"{python} ({sys.executable})", status, hint)]
    try:
        own = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        value, hint = "not installed, so its requirements are not known", "pip install -e . in the repository"
        return [*checks, Check(section, DISTRIBUTION, value, FAIL, hint)]
    checks.append(Check(section, DISTRIBUTION, own.version, OK, ""))
    for text in own.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            checks.append(_requirement_row(section, requirement))
    if importlib.util.find_spec("torchvision") is not None:
        hint = (
            "transformers imports it where present, and it must fit torch's version exactly; pip uninstall "
            "torchvision if imports fail"
        )
        checks.append(Check(section, "torchvision", "installed, not needed", WARN, hint))
    return checks


def _requirement_row(section: str, requirement: Requirement) -> Check:
    name, hint = requirement.name, f'pip install "{requirement}"'
    wanted = str(requirement.specifier) or "any version"
    tested = f", tested with {TESTED[name]}" if name in TESTED else ""
    version = _version(name)
    if version is None:
        return Check(section, name, f"missing (needs {wanted}{tested})", FAIL, hint)
    value = f"{version} (needs {wanted}{tested})"
    # A local part (+cpu, +cu130) names the build, not another version.
    if not requirement.specifier.contains(Version(version).public, prereleases=True):
        return Check(section, name, value, FAIL, hint)
    return Check(section, name, value, OK, "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_rows(answers: Answers) -> list[Check]:
    """Return the rows of the CPU backend, from the answers to ``torch``, ``gloo`` and ``cpu_stack``."""
    section = "CPU backend"
    facts = answers["torch"]
    if "error" in facts:
        return [Check(section, "torch", facts["error"], FAIL, "reinstall torch: pip install --force-reinstall torch")]
    checks = [Check(section, "torch", f"{facts['ok']['version']}, vector instructions {facts['ok']['cpu']}", OK, "")]
    hint = "gloo resolves this machine's host name; set GLOO_SOCKET_IFNAME=lo, or add the host name to /etc/hosts"
    checks.append(_answer_row(section, "gloo all-reduce", answers["gloo"], "works", hint))
    item, value = "megatron-core, mbridge, transformers", "import under the CPU backend"
    hint = "install what the message names, or pip install -e . again"
    checks.append(_answer_row(section, item, answers["cpu_stack"], value, hint))
    return checks + _kernel_rows(section, answers["cpu_stack"])


def _kernel_rows(section: str, answer: dict[str, Any]) -> list[Check]:
    """Return what a training step would run on, or nothing where the stack does not import."""
    return [Check(section, f"{part} by", kernel, OK, "") for part, kernel in answer.get("ok", {}).items()]


def _answer_row(section: str, item: str, answer: dict[str, Any], value: str, hint: str) -> Check:
    if "error" in answer:
        return Check(section, item, answer["error"], FAIL, hint)
    return Check(section, item, value, OK, "")


def cuda_rows(answers: Answers) -> list[Check]:
    """Return the rows of the CUDA backend, from the driver and the answers to ``torch``, ``cuda`` and, where there are
    devices, ``cuda_kernels``."""
    section = "CUDA backend"
    driver = _nvidia_driver()
    answering = driver is not None and driver[1] == OK
    facts, devices = answers["torch"].get("ok"), answers["cuda"].get("ok")
    if driver is None:
        hint = "no NVIDIA driver: backend.kind=cpu is what runs here"
        checks = [Check(section, "driver", "nvidia-smi is not there", INFO, hint)]
    else:
        checks = [Check(section, "driver", *driver)]
    if facts is not None:
        checks += _build_rows(section, facts, answering)
    if "error" in answers["cuda"]:
        hint = "the driver and torch's CUDA build must fit each other"
        checks.append(Check(section, "devices", answers["cuda"]["error"], WARN, hint))
    elif devices:
        checks += _device_rows(section, devices, answers["cuda_kernels"])
    elif facts and facts["cuda_build"] and answering:
        hint = "the driver answers, but torch sees no device: look at CUDA_VISIBLE_DEVICES and the driver's version"
        checks.append(Check(section, "devices", "none", WARN, hint))
    else:
        checks.append(Check(section, "devices", "none", INFO, ""))
    return checks


def _build_rows(section: str, facts: dict[str, Any], driver_answers: bool) -> list[Check]:
    if not facts["cuda_build"]:
        hint = "this machine has an NVIDIA driver: install a CUDA build of torch to use backend.kind=cuda"
        row = ("CPU only", WARN, hint) if driver_answers else ("CPU only", INFO, "")
        return [Check(section, "torch build", *row)]
    build = Check(section, "torch build", f"CUDA {facts['cuda_build']}", OK, "")
    if facts["nccl"] is None:
        hint = "backend.kind=cuda needs NCCL: install torch's Linux CUDA build"
        return [build, Check(section, "NCCL", "not built into torch", WARN, hint)]
    return [build, Check(section, "NCCL", facts["nccl"], OK, "")]


def _device_rows(section: str, devices: list[str], kernels: dict[str, Any]) -> list[Check]:
    checks = [Check(section, f"device {index}", name, OK, "") for index, name in enumerate(devices)]
    if "error" in kernels:
        checks.append(Check(section, "megatron-core", kernels["error"], WARN, "backend.kind=cuda cannot run before"))
    checks += _kernel_rows(section, kernels)
    free = _shared_memory()
    if free is not None and free < GIB:
        hint = "NCCL shares memory there: start the container with --ipc=host or --shm-size=8g"
        checks.append(Check(section, "/dev/shm", f"{free / GIB:.2f} GiB free", WARN, hint))
    return checks


def _shared_memory() -> int | None:
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None


def _nvidia_driver() -> tuple[str, str, str] | None:
    """Return (value, status, hint) from nvidia-smi, which asks the driver without a CUDA context, or None where there
    is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version,name,memory.total,memory.free", "--format=csv,noheader"]
    silent = "the driver does not answer: look at dmesg, or reload it"
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}", WARN, silent
    if answer.returncode != 0:
        return f"nvidia-smi: {(answer.stderr or answer.stdout).strip()[-200:]}", WARN, silent
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    if not rows or any(len(row) != 4 for row in rows):
        return f"nvidia-smi answered {answer.stdout.strip()[:200]!r}", WARN, ""
    gpus = "; ".join(f"{name}, {free} of {total} free" for _, name, total, free in rows)
    return f"{rows[0][0]}: {gpus}", OK, ""


def machine_rows() -> list[Check]:
    """Return the rows of the processor, the memory and the disks."""
    section = "Machine"
    cores = _cores()
    few = cores < 2
    hint = "the quickstart's trainer runs in two processes and wants two cores" if few else ""
    checks = [
        Check(section, "system", f"{platform.system()} {platform.release()}, {platform.machine()}", OK, ""),
        Check(section, "cores", f"{cores:g} usable of {os.cpu_count()}", WARN if few else OK, hint),
    ]
    free = machine.free_memory()
    hint = "the quickstart's three processes want about 4 GiB; stop other programs, or expect swapping"
    scarce = free < 4 * GIB
    checks.append(
        Check(section, "free memory", f"{free / GIB:.1f} GiB", WARN if scarce else OK, hint if scarce else "")
    )
    checks.append(_disk_row(section, "disk, current directory", Path.cwd(), 2))
    checks.append(_disk_row(section, "disk, temporary files", Path(tempfile.gettempdir()), 1))
    return checks


def _disk_row(section: str, item: str, folder: Path, need_gib: float) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        hint = "make it writable, or work in another directory (run.dir, TMPDIR)"
        return Check(section, item, f"{folder}: {error.strerror or error}", WARN, hint)
    hint = f"free some space: less than {need_gib:g} GiB is left" if free < need_gib * GIB else ""
    return Check(section, item, f"{free / GIB:.1f} GiB free at {folder}", WARN if hint else OK, hint)


def _cores() -> float:
    """Return the cores that this process may use, by its affinity and a container's quota."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    quota = machine.read_system_file("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def network_rows() -> list[Check]:
    """Return the rows of the loopback interface and of the ports that commands use by default."""
    section = "Network"
    try:
        _send_over_loopback()
        checks = [Check(section, "loopback", "a server on 127.0.0.1 can be opened and reached", OK, "")]
    except OSError as error:
        hint = (
            "the rollout server and torchrun talk over 127.0.0.1: bring the interface lo up, or loosen the firewall "
            "or sandbox"
        )
        checks = [Check(section, "loopback", f"127.0.0.1: {error}", FAIL, hint)]
    for port, use in ((29500, "torchrun's default"), (30000, "SGLang's default")):
        try:
            with socket.create_server(("127.0.0.1", port)):
                checks.append(Check(section, f"port {port}", f"free ({use})", OK, ""))
        except OSError as error:
            value, hint = f"{error.strerror or error} ({use})", "only matters where a command names this port"
            checks.append(Check(section, f"port {port}", value, INFO, hint))
    return checks


def _send_over_loopback() -> None:
    """Raise OSError unless a byte that is sent to a server on 127.0.0.1 arrives."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            accepted, _ = server.accept()
            with accepted:
                client.sendall(b"x")
                accepted.settimeout(5)
                arrived = accepted.recv(1)
    if arrived != b"x":
        raise OSError("the byte sent did not arrive")


class _Part(NamedTuple):
    """A package that is not required. ``use`` and ``how`` make the hint where it is missing."""

    item: str
    module: str
    distribution: str
    use: str
    how: str


def _extra(name: str) -> str:
    return f'pip install -e ".[{name}]" in the repository'


_TRANSFORMER_ENGINE = _Part(
    "transformer-engine",
    "transformer_engine",
    "transformer-engine",
    "FP8, context parallelism, fused layers on GPUs",
    _extra("cuda"),
)
_PARTS = (
    _Part(
        "flash-attn",
        "flash_attn",
        "flash-attn",
        "attention kernels of Transformer Engine",
        "pip install flash-attn --no-build-isolation",
    ),
    _Part("triton", "triton", "triton", "kernels on GPUs", "comes with CUDA builds of torch"),
    _Part(
        "sglang",
        "sglang",
        "sglang",
        "rollouts at scale",
        f"{_extra('sglang')}; best in a virtual environment of its own, reached by rollout.servers",
    ),
    _Part(
        "nemo-skills",
        "nemo_skills",
        "nemo-skills",
        "benchmark suites",
        "pip install git+https://github.com/NVIDIA/NeMo-Skills, in its own environment",
    ),
    _Part("tensorboard", "tensorboard", "tensorboard", "logging.tensorboard=true", "pip install tensorboard"),
    _Part("wandb", "wandb", "wandb", "logging.wandb", _extra("wandb")),
    _Part("mlflow", "mlflow", "mlflow-skinny", "logging.mlflow", _extra("mlflow")),
)


def optional_rows() -> list[Check]:
    """Return the rows of packages and programs that a run can do without."""
    section = "Optional parts"
    checks = [_part_row(section, _TRANSFORMER_ENGINE), _apex_row(section)]
    checks += [_part_row(section, part) for part in _PARTS]
    for program, use in (("git", "records the revision with each run"), ("torchrun", "starts the training processes")):
        # torchrun stands beside the interpreter, whether or not its environment is on PATH.
        found = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
        checks.append(Check(section, program, found or "missing", OK if found else INFO, "" if found else use))
    return checks


def _part_row(section: str, part: _Part) -> Check:
    if importlib.util.find_spec(part.module) is None:
        return Check(section, part.item, "missing", INFO, f"{part.use}: {part.how}")
    return Check(section, part.item, _version(part.distribution) or "installed", OK, "")


def _apex_row(section: str) -> Check:
    """Return the row of NVIDIA's apex, which has apex/optimizers and the extension amp_C; PyPI's ``apex`` is another
    package. Neither is imported."""
    item = "apex (NVIDIA's)"
    hint = (
        "fused optimizers and norms: build from github.com/NVIDIA/apex, or use NVIDIA's PyTorch image; PyPI's apex "
        "is another package"
    )
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Check(section, item, "missing", INFO, hint)
    if not any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        value = "another package of that name is installed, not NVIDIA's"
        return Check(section, item, value, WARN, f"pip uninstall apex. {hint}")
    if importlib.util.find_spec("amp_C") is None:
        value = "installed without its CUDA extensions (amp_C)"
        return Check(section, item, value, WARN, "build it with --cpp_ext --cuda_ext")
    return Check(section, item, _version("apex") or "installed", OK, "")
