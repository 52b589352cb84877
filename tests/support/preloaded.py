"""Start processes of the package in milliseconds: fork them from a process that has imported everything already.

A tiny training run computes for two seconds and imports torch, Megatron-Core and transformers in each of its processes
for twenty. :func:`fork_children` changes how this process starts ``python -m`` with a module of the package, and the
scripts of the tests: a *template*, which has imported all of it and has done nothing else, forks the new process.

The new process is a real one, and a child of the process that starts it: with a pid, a parent, a session, a command
line, standard streams, inherited signal masks, signals and an exit status of its own. The template forks it through an
intermediate process that ends at once, and the process that starts it is a "child subreaper" meanwhile, so that the
kernel makes it the parent. Each new process gets a template of its own before it begins, so what it starts (the
workers of a launcher, the rollout server of a worker) is forked too. A template ends with the process it belongs to.

What a forked process does not show is the start of Python itself: what is imported when, warnings at import, and what
libraries read from the environment while they are imported. ``@pytest.mark.real_start`` starts real interpreters, and
so does whatever this module cannot imitate (see :func:`_imitable`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import io
import os
import pickle
import pkgutil
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil

ROOT = Path(__file__).parents[2]
_SCRIPTS = (ROOT / "tests" / "support" / "workers", ROOT / "benchmarks")
_MODULES = ("torch.distributed.run", "dasd_megatron.", "tests.support.")
# Left to be imported by whoever needs them: they want a GPU, or another environment.
_NOT_PRELOADED = ("dasd_megatron.losses.triton_kernels", "dasd_megatron.rollout.sglang", "dasd_megatron.__main__")
_OTHERS = (
    "torch.distributed.run",
    "torch.distributed.launcher.api",
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "uvicorn.protocols.http.h11_impl",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
)
# Variables of Python that a forked process follows. Any other one has to be the template's.
_FOLLOWED = {"PYTHONPATH", "PYTHONFAULTHANDLER", "PYTHONUNBUFFERED", "PYTHONWARNINGS"}
_ROOM_BYTES = 6000
_NAME = "preloaded"

# Of linux/prctl.h.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Command(NamedTuple):
    """The command that a process is to run, and what it inherits. ``targets``: the numbers under which it gets its
    descriptors."""

    arguments: list[str]
    environment: dict[bytes, bytes]
    directory: bytes
    targets: list[int]
    new_session: bool
    process_group: int
    umask: int
    blocked_signals: set[int]
    ignored_signals: set[int]


class _Program(NamedTuple):
    """The part of a command line that names what Python runs."""

    module: str | None
    script: str | None
    arguments: list[str]
    unbuffered: bool


def _program(command: list[str]) -> _Program | None:
    """Parse ``python [-u] -m MODULE ...`` or ``python [-u] SCRIPT ...``; None for anything else."""
    words = command[1:]
    unbuffered = bool(words) and words[0] == "-u"
    words = words[unbuffered:]
    if len(words) > 1 and words[0] == "-m" and words[1].startswith(_MODULES):
        return _Program(words[1], None, words[2:], unbuffered)
    if words and words[0].endswith(".py") and Path(words[0]).resolve().parent in _SCRIPTS:
        return _Program(None, words[0], words[1:], unbuffered)
    return None


def _imitable(command: list[str], environment: dict[bytes, bytes]) -> bool:
    """Return whether a process forked from the template cannot be told from one that was started."""
    if _program(command) is None:
        return False
    for name in {*environment, *os.environb}:
        text = name.decode(errors="replace")
        follows_template = text.startswith(("PYTHON", "LC_", "LD_")) or text in ("LANG", "TZ")
        if follows_template and text not in _FOLLOWED and environment.get(name) != _TEMPLATE_ENVIRONMENT.get(name):
            return False
    return True


_TEMPLATE_ENVIRONMENT = dict(os.environb)


# From here on, the code runs in the process that starts others.


class _Template:
    """A connection to the template of this process. ``owner``: the pid of this process."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lock, self.owner = connection, threading.Lock(), os.getpid()

    def start(self, command: Command, descriptors: list[int]) -> int:
        """Return the pid of the new process, which is a child of this one."""
        with self._lock:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                _send(self._connection, command, descriptors)
                answer, _ = _receive(self._connection)
            finally:
                libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if not isinstance(answer, int):
            raise OSError(f"the template of preloaded processes: {answer}")
        return answer


_template: _Template | None = None
_enabled = False
_start_lock = threading.Lock()
_fork_exec = subprocess._fork_exec  # type: ignore[attr-defined]  # of the standard library, and private


def fork_children() -> None:
    """Fork what this process starts from now on, where that can be imitated."""
    global _enabled
    if sys.platform == "linux" and not os.environ.get("DASD_TEST_REAL_START"):
        _enabled = True
        subprocess._fork_exec = _fork_or_exec  # type: ignore[attr-defined]


@contextlib.contextmanager
def real_start() -> Iterator[None]:
    """Start real interpreters meanwhile; their children are real too."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def started_by(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the children of a process but its template."""
    return [child for child in psutil.Process(process.pid).children() if not is_template(child)]


def is_template(process: psutil.Process) -> bool:
    return [word.strip() for word in process.cmdline()[-1:]] == [_NAME]


def _fork_or_exec(*arguments: Any) -> int:
    """Stand in for ``_posixsubprocess.fork_exec``, whose arguments these are."""
    # Other versions of Python pass other arguments, and start real interpreters.
    if len(arguments) != 23:
        return _fork_exec(*arguments)
    (
        words, executables, close_fds, kept, directory, variables, stdin, _, _, stdout, _, stderr, _, error_pipe,
        _, new_session, process_group, gid, gids, uid, umask, preexec, _,
    ) = arguments  # fmt: skip
    plain = close_fds and gid is None and gids is None and uid is None and umask < 0 and preexec is None
    command = [os.fsdecode(word) for word in words]
    if not (_enabled and plain and command[0] == sys.executable and len(executables) == 1):
        return _fork_exec(*arguments)
    environment = dict(os.environb) if variables is None else dict(variable.split(b"=", 1) for variable in variables)
    if not _imitable(command, environment):
        return _fork_exec(*arguments)
    sources = [descriptor if descriptor >= 0 else number for number, descriptor in enumerate((stdin, stdout, stderr))]
    passed = [descriptor for descriptor in kept if descriptor != error_pipe]
    ignored = {number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN}
    request = Command(
        command,
        environment,
        os.path.join(os.getcwdb(), os.fsencode(directory or b"")),
        [0, 1, 2, *passed],
        new_session,
        process_group,
        _umask(),
        {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])},
        # Python ignores these two itself.
        {int(number) for number in ignored} - {signal.SIGPIPE, signal.SIGXFSZ},
    )
    return _own_template().start(request, [*sources, *passed])


def _umask() -> int:
    """Return this process's mask of new files; ``os.umask`` would change it for other threads meanwhile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)


def _own_template() -> _Template:
    """Return this process's template; the first one is started, and all others are forked from it."""
    global _template
    with _start_lock:
        if _template is None or _template.owner != os.getpid():
            ours, theirs = socket.socketpair()
            # Not as the main module, whose place the programs of the processes take.
            program = "from tests.support.preloaded import main; main()"
            arguments = [sys.executable, "-c", program, str(theirs.fileno())]
            # What a test has put into the environment, like a key, is not to outlive it.
            environment = {
                **{os.fsdecode(name): os.fsdecode(value) for name, value in _TEMPLATE_ENVIRONMENT.items()},
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
                "TOKENIZERS_PARALLELISM": "false",
                "DASD_TEST_ROOM": " " * _ROOM_BYTES,
            }
            with theirs:
                # Its command line and environment are the room for those of the processes that are forked from it.
                subprocess.Popen(
                    [*arguments, _NAME + " " * _ROOM_BYTES],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            answer, _ = _receive(ours)
            if answer != "ready":
                raise OSError(f"the template of preloaded processes: {answer}")
            _template = _Template(ours)
        return _template


# A message is a length and a pickle, with descriptors beside the first byte.


def _send(connection: socket.socket, message: object, descriptors: list[int]) -> None:
    data = pickle.dumps(message)
    socket.send_fds(connection, [struct.pack("!I", len(data))], descriptors)
    connection.sendall(data)


def _receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """Return a message and its descriptors; ``(None, [])`` at the end."""
    header, descriptors, _, _ = socket.recv_fds(connection, 4, 64)
    if not header:
        return None, []
    header += _read(connection, 4 - len(header))
    return pickle.loads(_read(connection, struct.unpack("!I", header)[0])), descriptors


def _read(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise EOFError("the other side has ended")
        parts += part
    return bytes(parts)


# From here on, the code runs in the template, and in the processes forked from it.


def _preload() -> None:
    """Import what processes of the package use, with Megatron-Core as the CPU backend prepares torch for it."""
    import torch

    from dasd_megatron import backend
    from dasd_megatron.config import BackendConfig

    changed = (torch, torch.cuda, torch.Tensor, torch.nn.Module)
    before = [dict(vars(changed_object)) for changed_object in changed]
    backend.select(BackendConfig(kind="cpu"))
    after = [dict(vars(changed_object)) for changed_object in changed]
    import dasd_megatron

    for found in pkgutil.walk_packages(dasd_megatron.__path__, "dasd_megatron."):
        if not found.name.startswith(_NOT_PRELOADED):
            importlib.import_module(found.name)
    for name in _OTHERS:
        importlib.import_module(name)
    # A process that chooses the backend prepares torch for itself, as if nothing had been imported.
    for changed_object, old, new in zip(changed, before, after, strict=True):
        for name in new:
            if name in old and new[name] is not old[name]:
                setattr(changed_object, name, old[name])
            elif name not in old and isinstance(changed_object, type):
                # A method that a base class has too.
                delattr(changed_object, name)
    import dasd_megatron.backend.cpu as cpu

    cpu._installed = False
    backend._selected = None


def _serve(connection: socket.socket) -> Command:
    """Fork a process for each command that comes; returns in each of them, with its command, its own template beside
    it."""
    while True:
        command, descriptors = _receive(connection)
        if command is None:
            os._exit(0)
        reader, writer = os.pipe()
        middle = os.fork()
        if middle == 0:
            intermediate = os.getpid()
            if os.fork():
                os._exit(0)
            os.close(reader)
            # Who has a process's number may signal its group at once.
            if command.new_session:
                os.setsid()
            if command.process_group >= 0:
                os.setpgid(0, command.process_group)
            os.write(writer, struct.pack("!I", os.getpid()))
            os.close(writer)
            connection.close()
            # Programs compare their parent with the one that started them, or with the one at their start.
            while os.getppid() == intermediate:
                time.sleep(0.001)
            connection = _become(command, descriptors)
            if connection is None:
                return command
            continue
        os.close(writer)
        for descriptor in descriptors:
            os.close(descriptor)
        answer = os.read(reader, 4)
        os.close(reader)
        # Only when the intermediate process is gone has the new one its parent.
        os.waitpid(middle, 0)
        _send(connection, struct.unpack("!I", answer)[0] if answer else "it cannot fork", [])


def _become(command: Command, descriptors: list[int]) -> socket.socket | None:
    """Fork the new process's template, and give the process what it inherits. Returns None in the process, and in the
    template the connection to it."""
    global _template
    parent = os.getpid()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)
        for descriptor in (ours.detach(), *descriptors):
            os.close(descriptor)
        return theirs
    theirs.close()
    _place_descriptors(descriptors, command.targets)
    os.chdir(command.directory)
    os.umask(command.umask)
    _template = _Template(ours)
    return None


def _place_descriptors(descriptors: list[int], targets: list[int]) -> None:
    import fcntl

    beyond = max(targets) + 1
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, max(beyond, 64)) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, target in zip(moved, targets, strict=True):
        os.dup2(descriptor, target, inheritable=True)
        os.close(descriptor)


def _show(command: Command) -> None:
    """Let ``ps`` and psutil show the command's words and environment for this process."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    places = [int(place) for place in fields[45:49]]
    variables = [name + b"=" + value for name, value in command.environment.items()]
    for (start, end), strings in (
        (places[:2], [os.fsencode(word) for word in command.arguments]),
        (places[2:], variables),
    ):
        data = b"\0".join(strings)[: end - start - 1]
        ctypes.memmove(start, data.ljust(end - start, b"\0"), end - start)


def _enter(command: Command, path: list[str]) -> None:
    """Make this process what Python is at the start of the command's program. ``path``: ``sys.path`` without what the
    environment and the program add."""
    program = _program(command.arguments)
    assert program is not None
    # The variables of the template have their place there.
    os.environb.clear()
    _show(command)
    os.environb.update(command.environment)
    name, value = program.module, os.environ.get("PYTHONPATH", "")
    first = os.getcwd() if name else str(Path(program.script or "").resolve().parent)
    sys.path[:] = [first, *(entry for entry in value.split(os.pathsep) if entry), *path]
    sys.argv = [name or program.script or "", *program.arguments]
    sys.orig_argv = list(command.arguments)
    importlib.invalidate_caches()
    if any((Path(entry) / "sitecustomize.py").is_file() for entry in value.split(os.pathsep) if entry):
        # Python runs it before it imports anything else; here everything has been imported.
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    unbuffered = program.unbuffered or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = sys.__stdout__ = _writer(1, "strict", os.isatty(1), unbuffered)
    sys.stderr = sys.__stderr__ = _writer(2, "backslashreplace", True, unbuffered)
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    # Of this process, as huggingface_hub and transformers read it when they are imported.
    import huggingface_hub.constants
    import numpy
    import transformers.utils.hub

    offline = any(
        os.environ.get(name, "") in ("1", "true", "ON") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    transformers.utils.hub._is_offline_mode = offline
    numpy.random.seed()
    for number in command.ignored_signals:
        signal.signal(number, signal.SIG_IGN)
    fork_children()
    signal.pthread_sigmask(signal.SIG_SETMASK, command.blocked_signals)


def _writer(descriptor: int, errors: str, line_buffering: bool, unbuffered: bool) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, "w", closefd=False)
    buffer: Any = raw if unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, errors=errors, line_buffering=line_buffering, write_through=unbuffered)


def _run(command: Command) -> None:
    program = _program(command.arguments)
    assert program is not None
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if program.module:
        # It has been imported; as the main module it is executed again, as ever.
        sys.modules.pop(program.module, None)
        runpy._run_module_as_main(program.module)  # type: ignore[attr-defined]  # what ``python -m`` calls
    else:
        assert program.script is not None
        main.__dict__.update(__file__=program.script, __builtins__=__builtins__)
        source = Path(program.script).read_bytes()
        exec(compile(source, program.script, "exec"), main.__dict__)


def _end(run: Any) -> NoReturn:
    """Run and end as the interpreter does, without taking apart what has been imported, which takes as long again."""
    status: Any = 0
    try:
        run()
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        traceback.print_exc()
        status = 1
        if isinstance(error, KeyboardInterrupt):
            _finish()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    if status is None:
        status = 0
    elif not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    _finish()
    os._exit(status & 0xFF)


def _finish() -> None:
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def main() -> None:
    """Be the first template, with a socket's descriptor as the first argument."""
    del os.environ["DASD_TEST_ROOM"]
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    # Without the folder it was started in, and what the environment names.
    path = sys.path[1:]
    for entry in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if os.path.abspath(entry) in path:
            path.remove(os.path.abspath(entry))
    try:
        _preload()
        threads = os.listdir("/proc/self/task")
        if len(threads) > 1:
            raise RuntimeError(f"{len(threads)} threads after the imports: a process that is forked would lack them")
    except BaseException:
        _send(connection, traceback.format_exc(), [])
        raise
    gc.collect()
    gc.freeze()
    _send(connection, "ready", [])
    command = _serve(connection)

    def run() -> None:
        _enter(command, path)
        _run(command)

    _end(run)
