"""What this machine offers a run, and what it lacks: the checks of ``dasd doctor``.

Whatever imports torch runs in one short-lived child process. So a broken installation shows as a row and not as a
traceback, this process loads nothing heavy, and no CUDA context is left behind.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import psutil
from packaging.requirements import Requirement
from packaging.version import Version
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

OK, INFO, WARN, FAIL = "ok", "info", "warn", "fail"
DISTRIBUTION = "dasd-megatron"
PROBE_TIMEOUT_SECONDS = 180.0
GIB = 2**30

# Versions that the test-suite has run with; the ranges that are accepted stand in the package's own requirements.
TESTED = {
    "torch": "2.13",
    "megatron-core": "0.16.1",
    "mbridge": "0.15.1",
    "transformers": "4.57",
    "hydra-core": "1.3",
    "math-verify": "0.9.0",
}
TESTED_PYTHON = ("3.11",)

_PROBE = r"""
import json, sys, warnings
warnings.simplefilter("ignore")

def report(name, check):
    try:
        answer = {"ok": check()}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print("DASD-PROBE", json.dumps({"name": name, **answer}), flush=True)

def torch_facts():
    import torch
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {"version": torch.__version__, "cuda_build": torch.version.cuda, "cpu": torch.backends.cpu.get_cpu_capability(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None}

def cuda_devices():
    import torch
    if not torch.cuda.is_available():
        return []
    names = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        names.append(f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}")
    return names

def gloo():
    import datetime, torch
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=datetime.timedelta(seconds=30))
    value = torch.ones(1)
    dist.all_reduce(value)
    dist.destroy_process_group()
    return value.item() == 1.0

def cpu_stack():
    from dasd_megatron.backend import cpu
    from dasd_megatron.config import BackendConfig
    cpu.install(BackendConfig())
    import megatron.core.models.gpt, mbridge, transformers
    return cpu.kernels("auto")

def cuda_kernels():
    from dasd_megatron.backend import cuda
    from dasd_megatron.config import BackendConfig
    cuda.install(BackendConfig(kind="cuda"))
    return cuda.kernels("auto")

CHECKS = {"torch": torch_facts, "cuda": cuda_devices, "gloo": gloo, "cpu_stack": cpu_stack, "cuda_kernels": cuda_kernels}
for name in sys.argv[1:]:
    report(name, CHECKS[name])
"""


class Check(NamedTuple):
    """One row. ``status``: ok; info (an optional part is missing, nothing to do); warn (look at it); fail (the CPU path
    cannot run)."""

    section: str
    item: str
    value: str
    status: str
    hint: str


def doctor_report() -> list[Check]:
    """All checks, in reading order. Takes some seconds: a child process imports torch, Megatron-Core, mbridge and
    transformers.

    A check never raises for what it finds; what is wrong becomes a row with status warn or fail and a hint.
    """
    answers = _probe("torch", "cuda", "gloo", "cpu_stack")
    if answers["cuda"].get("ok"):
        # Both backends do not go into one process.
        answers |= _probe("cuda_kernels")
    return [*_packages(), *_cpu_backend(answers), *_cuda_backend(answers), *_machine(), *_network(), *_optional()]


def exit_status(checks: list[Check]) -> int:
    """0 when the CPU path can run, 1 when a check failed."""
    return int(any(check.status == FAIL for check in checks))


def diagnose(arguments: list[str]) -> None:
    """Run ``dasd doctor``.

    Raises:
        SystemExit: with status 1, where a check failed.
    """
    status = print_doctor()
    if status:
        raise SystemExit(status)


def print_doctor(stream: TextIO | None = None) -> int:
    """Print :func:`doctor_report` as tables, then a verdict; returns the exit status of ``dasd doctor``."""
    stream = stream if stream is not None else sys.stdout
    terminal = stream.isatty()
    console = Console(file=stream, highlight=False, force_terminal=terminal, width=None if terminal else 120)
    checks = doctor_report()
    styles = {OK: "green", INFO: "dim", WARN: "yellow", FAIL: "bold red"}
    for section in dict.fromkeys(check.section for check in checks):
        table = Table(
            box=box.SIMPLE, title=section, title_justify="left", title_style="bold", show_header=False, pad_edge=False
        )
        for options in ({"min_width": 4, "no_wrap": True}, {"min_width": 24, "no_wrap": True}, {"overflow": "fold"}):
            table.add_column(**options)
        for check in (check for check in checks if check.section == section):
            value = Text(check.value)
            if check.hint:
                value.append(f"\n→ {check.hint}", style="dim" if check.status in (OK, INFO) else styles[check.status])
            table.add_row(Text(check.status, style=styles[check.status]), check.item, value)
        console.print(table)
    status = exit_status(checks)
    if status:
        failed = ", ".join(check.item for check in checks if check.status == FAIL)
        console.print(
            Text(f"The CPU path cannot run here: {failed}. The arrows above say what to do.", style=styles[FAIL])
        )
    else:
        warned = sum(check.status == WARN for check in checks)
        console.print(
            Text("The CPU path can run here." + (f" Warnings: {warned}." if warned else ""), style=styles[OK])
        )
    return status


def _probe(*names: str) -> dict[str, dict[str, Any]]:
    """A child's answers to these checks: {"ok": value} or {"error": text}."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        child = subprocess.run(
            [sys.executable, "-c", _PROBE, *names],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_SECONDS,
            check=False,
        )
        output, death = (
            child.stdout,
            f"the process that imports it died with status {child.returncode}: {child.stderr.strip()[-300:]}",
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        death = f"no answer within {PROBE_TIMEOUT_SECONDS:.0f} s"
    rows = [
        json.loads(line.removeprefix("DASD-PROBE ")) for line in output.splitlines() if line.startswith("DASD-PROBE ")
    ]
    answers = {row["name"]: row for row in rows}
    return {name: answers.get(name, {"error": death}) for name in names}


def _packages() -> list[Check]:
    section = "Packages"
    python = platform.python_version()
    supported = sys.version_info >= (3, 11)
    hint = "" if supported else "use Python 3.11 or newer"
    if supported and not python.startswith(TESTED_PYTHON):
        hint = f"tested with {', '.join(TESTED_PYTHON)}"
    checks = [
        Check(section, "python", f"{python} ({sys.executable})", FAIL if not supported else WARN if hint else OK, hint)
    ]
    try:
        own = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        checks.append(
            Check(
                section,
                DISTRIBUTION,
                "not installed, so its requirements are not known",
                FAIL,
                "pip install -e . in the repository",
            )
        )
        return checks
    checks.append(Check(section, DISTRIBUTION, own.version, OK, ""))
    for text in own.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            checks.append(_required(section, requirement))
    if importlib.util.find_spec("torchvision") is not None:
        hint = (
            "transformers imports it where present, and it must fit torch's version exactly; pip uninstall "
            "torchvision if imports fail"
        )
        checks.append(Check(section, "torchvision", "installed, not needed", WARN, hint))
    return checks


def _required(section: str, requirement: Requirement) -> Check:
    wanted = str(requirement.specifier) or "any version"
    tested = f", tested with {TESTED[requirement.name]}" if requirement.name in TESTED else ""
    version = _version(requirement.name)
    if version is None:
        return Check(
            section, requirement.name, f"missing (needs {wanted}{tested})", FAIL, f'pip install "{requirement}"'
        )
    value = f"{version} (needs {wanted}{tested})"
    # A local part (+cpu, +cu130) names the build, not another version.
    if not requirement.specifier.contains(Version(version).public, prereleases=True):
        return Check(section, requirement.name, value, FAIL, f'pip install "{requirement}"')
    return Check(section, requirement.name, value, OK, "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_backend(answers: dict[str, dict[str, Any]]) -> list[Check]:
    section = "CPU backend"
    facts = answers["torch"]
    if "error" in facts:
        return [Check(section, "torch", facts["error"], FAIL, "reinstall torch: pip install --force-reinstall torch")]
    checks = [Check(section, "torch", f"{facts['ok']['version']}, vector instructions {facts['ok']['cpu']}", OK, "")]
    hint = "gloo resolves this machine's host name; set GLOO_SOCKET_IFNAME=lo, or add the host name to /etc/hosts"
    checks.append(_answered(section, "gloo all-reduce", answers["gloo"], "works", hint))
    hint = "install what the message names, or pip install -e . again"
    checks.append(
        _answered(
            section, "megatron-core, mbridge, transformers", answers["cpu_stack"], "import under the CPU backend", hint
        )
    )
    return checks + _kernels(section, answers["cpu_stack"])


def _kernels(section: str, answer: dict[str, Any]) -> list[Check]:
    """What a training step would run on; nothing where the stack does not import."""
    return [Check(section, f"{part} by", kernel, OK, "") for part, kernel in answer.get("ok", {}).items()]


def _answered(section: str, item: str, answer: dict[str, Any], value: str, hint: str) -> Check:
    if "error" in answer:
        return Check(section, item, answer["error"], FAIL, hint)
    return Check(section, item, value, OK, "")


def _cuda_backend(answers: dict[str, dict[str, Any]]) -> list[Check]:
    section = "CUDA backend"
    driver = _nvidia_driver()
    facts, devices = answers["torch"].get("ok"), answers["cuda"].get("ok")
    checks = []
    if driver is None:
        checks.append(
            Check(
                section,
                "driver",
                "nvidia-smi is not there",
                INFO,
                "no NVIDIA driver: backend.kind=cpu is what runs here",
            )
        )
    else:
        checks.append(Check(section, "driver", *driver))
    if facts is not None:
        build = f"CUDA {facts['cuda_build']}" if facts["cuda_build"] else "CPU only"
        lacks = driver is not None and driver[1] == OK and not facts["cuda_build"]
        hint = (
            "this machine has an NVIDIA driver: install a CUDA build of torch to use backend.kind=cuda" if lacks else ""
        )
        checks.append(
            Check(section, "torch build", build, WARN if lacks else OK if facts["cuda_build"] else INFO, hint)
        )
        if facts["cuda_build"]:
            missing = facts["nccl"] is None
            hint = "backend.kind=cuda needs NCCL: install torch's Linux CUDA build" if missing else ""
            checks.append(
                Check(section, "NCCL", facts["nccl"] or "not built into torch", WARN if missing else OK, hint)
            )
    if "error" in answers["cuda"]:
        checks.append(
            Check(
                section,
                "devices",
                answers["cuda"]["error"],
                WARN,
                "the driver and torch's CUDA build must fit each other",
            )
        )
    elif not devices:
        lost = bool(facts and facts["cuda_build"]) and driver is not None and driver[1] == OK
        hint = (
            "the driver answers, but torch sees no device: look at CUDA_VISIBLE_DEVICES and the driver's version"
            if lost
            else ""
        )
        checks.append(Check(section, "devices", "none", WARN if lost else INFO, hint))
    else:
        checks += [Check(section, f"device {index}", name, OK, "") for index, name in enumerate(devices)]
        if "error" in answers["cuda_kernels"]:
            checks.append(
                Check(
                    section,
                    "megatron-core",
                    answers["cuda_kernels"]["error"],
                    WARN,
                    "backend.kind=cuda cannot run before",
                )
            )
        checks += _kernels(section, answers["cuda_kernels"])
        free = _shared_memory()
        if free is not None and free < GIB:
            hint = "NCCL shares memory there: start the container with --ipc=host or --shm-size=8g"
            checks.append(Check(section, "/dev/shm", f"{free / GIB:.2f} GiB free", WARN, hint))
    return checks


def _shared_memory() -> int | None:
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None


def _nvidia_driver() -> tuple[str, str, str] | None:
    """(value, status, hint) from nvidia-smi, which asks the driver without a CUDA context; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version,name,memory.total,memory.free", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}", WARN, "the driver does not answer: look at dmesg, or reload it"
    if answer.returncode != 0:
        return (
            f"nvidia-smi: {(answer.stderr or answer.stdout).strip()[-200:]}",
            WARN,
            "the driver does not answer: look at dmesg, or reload it",
        )
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    if not rows or any(len(row) != 4 for row in rows):
        return f"nvidia-smi answered {answer.stdout.strip()[:200]!r}", WARN, ""
    gpus = "; ".join(f"{name}, {free} of {total} free" for _, name, total, free in rows)
    return f"{rows[0][0]}: {gpus}", OK, ""


def _machine() -> list[Check]:
    section = "Machine"
    cores = _cores()
    few = cores < 2
    hint = "the quickstart's trainer runs in two processes and wants two cores" if few else ""
    checks = [
        Check(section, "system", f"{platform.system()} {platform.release()}, {platform.machine()}", OK, ""),
        Check(section, "cores", f"{cores:g} usable of {os.cpu_count()}", WARN if few else OK, hint),
    ]
    free = _free_memory()
    hint = (
        "the quickstart's three processes want about 4 GiB; stop other programs, or expect swapping"
        if free < 4 * GIB
        else ""
    )
    checks.append(Check(section, "free memory", f"{free / GIB:.1f} GiB", WARN if hint else OK, hint))
    for item, folder, need in (
        ("disk, current directory", Path.cwd(), 2),
        ("disk, temporary files", Path(tempfile.gettempdir()), 1),
    ):
        checks.append(_disk(section, item, folder, need))
    return checks


def _disk(section: str, item: str, folder: Path, need_gib: float) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check(
            section,
            item,
            f"{folder}: {error.strerror or error}",
            WARN,
            "make it writable, or work in another directory (run.dir, TMPDIR)",
        )
    hint = f"free some space: less than {need_gib:g} GiB is left" if free < need_gib * GIB else ""
    return Check(section, item, f"{free / GIB:.1f} GiB free at {folder}", WARN if hint else OK, hint)


def _cores() -> float:
    """Cores that this process may use: its affinity, and a container's quota."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def _free_memory() -> int:
    """Bytes that can still be allocated: the machine's, and a container's limit (cgroup v2, then v1)."""
    free = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        bound, taken = _read(limit), _read(used)
        if bound.isdigit() and taken.isdigit():
            free = min(free, max(0, int(bound) - int(taken)))
    return free


def _read(path: str) -> str:
    """A small system file's text; "" where this system has no such file."""
    file = Path(path)
    return file.read_text().strip() if file.is_file() and os.access(file, os.R_OK) else ""


def _network() -> list[Check]:
    section = "Network"
    checks = []
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname(), timeout=5) as client:
                accepted, _ = server.accept()
                with accepted:
                    client.sendall(b"x")
                    accepted.settimeout(5)
                    if accepted.recv(1) != b"x":
                        raise OSError("the byte sent did not arrive")
        checks.append(Check(section, "loopback", "a server on 127.0.0.1 can be opened and reached", OK, ""))
    except OSError as error:
        hint = (
            "the rollout server and torchrun talk over 127.0.0.1: bring the interface lo up, or loosen the firewall "
            "or sandbox"
        )
        checks.append(Check(section, "loopback", f"127.0.0.1: {error}", FAIL, hint))
    for port, use in ((29500, "torchrun's default"), (30000, "SGLang's default")):
        try:
            with socket.create_server(("127.0.0.1", port)):
                checks.append(Check(section, f"port {port}", f"free ({use})", OK, ""))
        except OSError as error:
            checks.append(
                Check(
                    section,
                    f"port {port}",
                    f"{error.strerror or error} ({use})",
                    INFO,
                    "only matters where a command names this port",
                )
            )
    return checks


def _apex() -> Check:
    """PyPI's ``apex`` is another package; NVIDIA's has apex/optimizers and the extension amp_C. Found without importing
    either."""
    section, item = "Optional parts", "apex (NVIDIA's)"
    hint = (
        "fused optimizers and norms: build from github.com/NVIDIA/apex, or use NVIDIA's PyTorch image; PyPI's apex "
        "is another package"
    )
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Check(section, item, "missing", INFO, hint)
    if not any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        return Check(
            section,
            item,
            "another package of that name is installed, not NVIDIA's",
            WARN,
            f"pip uninstall apex. {hint}",
        )
    if importlib.util.find_spec("amp_C") is None:
        return Check(
            section, item, "installed without its CUDA extensions (amp_C)", WARN, "build it with --cpp_ext --cuda_ext"
        )
    return Check(section, item, _version("apex") or "installed", OK, "")


def _optional() -> list[Check]:
    section = "Optional parts"

    def part(item: str, module: str, distribution: str, use: str, how: str) -> Check:
        if importlib.util.find_spec(module) is None:
            return Check(section, item, "missing", INFO, f"{use}: {how}")
        return Check(section, item, _version(distribution) or "installed", OK, "")

    own = 'pip install -e ".[{}]" in the repository'.format
    parts: list[Callable[[], Check]] = [
        lambda: part(
            "transformer-engine",
            "transformer_engine",
            "transformer-engine",
            "FP8, context parallelism, fused layers on GPUs",
            own("cuda"),
        ),
        _apex,
        lambda: part(
            "flash-attn",
            "flash_attn",
            "flash-attn",
            "attention kernels of Transformer Engine",
            "pip install flash-attn --no-build-isolation",
        ),
        lambda: part("triton", "triton", "triton", "kernels on GPUs", "comes with CUDA builds of torch"),
        lambda: part(
            "sglang",
            "sglang",
            "sglang",
            "rollouts at scale",
            own("sglang") + "; best in a virtual environment of its own, reached by rollout.servers",
        ),
        lambda: part(
            "nemo-skills",
            "nemo_skills",
            "nemo-skills",
            "benchmark suites",
            "pip install git+https://github.com/NVIDIA/NeMo-Skills, in its own environment",
        ),
        lambda: part(
            "tensorboard", "tensorboard", "tensorboard", "logging.tensorboard=true", "pip install tensorboard"
        ),
        lambda: part("wandb", "wandb", "wandb", "logging.wandb", own("wandb")),
        lambda: part("mlflow", "mlflow", "mlflow-skinny", "logging.mlflow", own("mlflow")),
    ]
    checks = [check() for check in parts]
    for program, use in (("git", "records the revision with each run"), ("torchrun", "starts the training processes")):
        # torchrun stands beside the interpreter, whether or not its environment is on PATH.
        found = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
        checks.append(Check(section, program, found or "missing", OK if found else INFO, "" if found else use))
    return checks
