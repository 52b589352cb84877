"""A real Slurm with four nodes on this machine, for tests: munge, slurmctld and one slurmd for each node, which has its
own host name and eight GPUs in name.

All of it lives in a PID namespace whose first process ends with standard input, so that nothing outlives the test,
however that ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

NODES = 4
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "hostname", "curl")
_SPACE = ["unshare", "--pid", "--fork", "--kill-child", "--uts", "--mount", "--mount-proc"]

_SLURM_CONF = """
ClusterName=dasd
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A node is free again for a requeued job when the old credential has expired.
AuthInfo=socket={root}/run/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MailProg=/bin/true
KillWait=5
JobRequeue=1
GresTypes=gpu
{nodes}
PartitionName=main Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
    PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n[1-{count}] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
_NODE = (
    "NodeName=n{index} NodeHostname=n{index} NodeAddr=127.0.0.{index} Port={port} CPUs=8 RealMemory=8000 Gres=gpu:8 "
    "State=UNKNOWN"
)

# Run by the namespace's first process; the end of its standard input is the end of the cluster.
_START = r"""
set -eu
mount --bind "$ROOT/hosts" /etc/hosts
hostname controller
munged --socket="$ROOT/run/munge.socket" --key-file="$ROOT/munge/key" --log-file="$ROOT/munge/log" \
    --pid-file="$ROOT/run/munged.pid" --seed-file="$ROOT/munge/seed"
slurmctld -D -f "$SLURM_CONF" > "$ROOT/log/slurmctld.out" 2>&1 &
for index in $(seq 1 "$COUNT"); do
    unshare --uts bash -c 'hostname "n$1"; exec slurmd -D -f "$SLURM_CONF" -N "n$1"' slurmd "$index" \
        > "$ROOT/log/slurmd.$index.out" 2>&1 &
done
cat > /dev/null
"""


class SlurmCluster:
    """A running cluster; see :func:`slurm_cluster`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SLURM_JOB", "SBATCH_", "DASD_"))]:
            del self.environment[name]

    def command(self, *arguments: str, **environment: str) -> str:
        """Standard output of one of Slurm's commands; a failure is shown."""
        done = subprocess.run(
            arguments, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, **environment: str) -> int:
        return int(self.command("sbatch", "--parsable", *arguments, **environment).split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """Return what ``scontrol`` knows of a job, like ``JobState``, ``Restarts`` and ``ExitCode``."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "--oneliner", "show", "job", str(job))))

    def processes(self, job: int) -> list[psutil.Process]:
        """All processes that carry the job's number in their environment: batch shell, steps and whatever they have
        started."""
        return [process for process in psutil.process_iter() if _carries(process, f"SLURM_JOB_ID={job}")]

    def log(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in sorted((self.root / "log").iterdir())
        )


def _carries(process: psutil.Process, variable: str) -> bool:
    try:
        return variable.encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except (OSError, psutil.NoSuchProcess):
        return False


def require_slurm() -> None:
    """Skip the test where a cluster cannot be had."""
    # Debian has the daemons where only root's PATH leads.
    os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurmctld slurmd slurm-client munge curl")
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster of one's own needs root here")
    probe = subprocess.run([*_SPACE, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no namespaces here ({probe.stderr.strip()}), so no Slurm nodes with host names of their own")


@contextlib.contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Start a cluster of four idle nodes n1 to n4, partitions ``main`` and, before whose jobs those of main have to
    give way, ``high``."""
    require_slurm()
    # munge's socket has a path of at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="dasd-slurm-", dir="/tmp") as folder:
        root = Path(folder)
        _write_files(root)
        cluster = SlurmCluster(root)
        environment = {**cluster.environment, "ROOT": folder, "COUNT": str(NODES)}
        with (root / "log" / "start.out").open("wb") as log:
            process = subprocess.Popen(
                [*_SPACE, "bash", "-c", _START], env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        try:
            _wait_until_idle(cluster, process)
            yield cluster
        finally:
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _write_files(root: Path) -> None:
    for name in ("run", "state", "spool", "log", "munge", "dev"):
        (root / name).mkdir()
    # munge refuses a socket that others cannot reach, and a key that they can.
    root.chmod(0o755)
    (root / "munge").chmod(0o700)
    (root / "munge" / "key").touch(0o600)
    (root / "munge" / "key").write_bytes(secrets.token_bytes(128))
    controller, *ports = free_ports(NODES + 1)
    nodes = "\n".join(_NODE.format(index=index, port=port) for index, port in enumerate(ports, start=1))
    (root / "slurm.conf").write_text(_SLURM_CONF.format(root=root, port=controller, nodes=nodes, count=NODES))
    (root / "gres.conf").write_text(f"NodeName=n[1-{NODES}] Name=gpu File={root}/dev/gpu[0-7]\n")
    try:
        for index in range(8):
            os.mknod(root / "dev" / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no device files can be made here, so no Slurm nodes with GPUs")
    names = "".join(f"127.0.0.{index} n{index}\n" for index in range(1, NODES + 1))
    (root / "hosts").write_text(f"127.0.0.1 localhost controller\n{names}")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def _wait_until_idle(cluster: SlurmCluster, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            ["sinfo", "-h", "-p", "main", "-o", "%T %D"],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.stdout.split() == ["idle", str(NODES)]:
            return
        assert process.poll() is None and time.monotonic() < deadline, f"{done.stdout}{done.stderr}\n{cluster.log()}"
        time.sleep(0.3)
