"""Several hosts on one machine: network namespaces on a bridge, whose links can be cut and restored.

All of it, the processes on the hosts too, lives in a PID namespace whose first process ends with standard input, so
that nothing outlives the test, however that ends; the bridge is in a network namespace of its own, and nothing of this
machine's network changes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

_SPACE = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
INTERFACE = "eth0"

# Run by the first process of the space: a bridge, and for each host a namespace with a link to it.
_START = r"""
set -eu
mkdir -p /run/netns
mount -t tmpfs none /run/netns
ip link set lo up
ip link add bridge type bridge
ip link set bridge up
for host in "$@"; do
    name=${host%%=*}
    ip netns add "$name"
    ip link add "link-$name" type veth peer name eth0 netns "$name"
    ip link set "link-$name" master bridge up
    ip -n "$name" address add "${host#*=}/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
done
echo ready
cat > /dev/null
"""


class Hosts:
    """Hosts by name; see :func:`hosts`. ``addresses``: of each on the bridge."""

    def __init__(self, first: int, addresses: Mapping[str, str]) -> None:
        self._inside = ["nsenter", "--target", str(first), "--net", "--mount", "--pid", "--"]
        self.addresses = dict(addresses)

    def start(self, host: str, command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen:
        """Start a process on a host, its output in a file."""
        with log.open("ab") as file:
            return subprocess.Popen(
                [*self._inside, "ip", "netns", "exec", host, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, **environment},
            )

    def run(self, host: str, *command: str) -> str:
        """Run a command on a host and return what it prints."""
        return subprocess.run(
            [*self._inside, "ip", "netns", "exec", host, *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    def cut(self, host: str) -> None:
        """Pull the host's cable: packets are lost, and nobody is told."""
        self._link(host, "down")

    def restore(self, host: str) -> None:
        self._link(host, "up")

    def _link(self, host: str, state: str) -> None:
        subprocess.run([*self._inside, "ip", "link", "set", f"link-{host}", state], check=True, timeout=30)


@contextlib.contextmanager
def hosts(*names: str) -> Iterator[Hosts]:
    """Hosts of these names, all linked; the test is skipped where they cannot be had."""
    missing = [program for program in ("unshare", "nsenter", "ip") if shutil.which(program) is None]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} here, for hosts in network namespaces: apt-get install util-linux iproute2"
        )
    if os.geteuid() != 0:
        pytest.skip("hosts in network namespaces need root")
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=10)}
    command = [*_SPACE, "sh", "-c", _START, "hosts", *(f"{name}={address}" for name, address in addresses.items())]
    space = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if space.stdout.readline() != "ready\n":
            pytest.skip(f"no network namespaces here: {space.communicate(timeout=30)[1].strip()}")
        (first,) = psutil.Process(space.pid).children()
        yield Hosts(first.pid, addresses)
    finally:
        # With its first process the space ends, and all in it.
        with contextlib.suppress(BrokenPipeError):
            space.stdin.close()
        try:
            space.wait(10)
        finally:
            space.kill()
            space.wait()
            space.stdout.close()
            space.stderr.close()


def wait_until(event: str, condition, seconds: float, *alive: subprocess.Popen, log: Path | None = None) -> None:
    """Return once ``condition()`` is true; fails after ``seconds``, and when a process that is needed for it has
    ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [process.args for process in alive if process.poll() is not None]
        text = "" if log is None else log.read_text(errors="replace")[-4000:]
        assert not ended, f"{event}: {ended} has ended\n{text}"
        assert time.monotonic() < deadline, f"{event}: not within {seconds} s\n{text}"
        time.sleep(0.05)
