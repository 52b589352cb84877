"""A process of its own in which templates are tried, with bounds of time, memory and output.

The sandbox of Jinja keeps a template from files and other modules, and not from loops that never end, or from texts as
large as the memory. Python cannot break off such an expression in its own process, so the trial ends with its process.
A template that has ended for a message here ends for it everywhere: a render depends on nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dasd_megatron.data.rendering import ChatTemplate, MessageTemplate, RenderError, TemplateError
from dasd_megatron.errors import first_line

_KINDS: dict[str, type[ChatTemplate | MessageTemplate]] = {
    kind.__name__: kind for kind in (ChatTemplate, MessageTemplate)
}
_BATCH_BYTES = 2**20
"""Bytes of a request at which no more values are added to it: it takes memory that the template needs."""
# Variables that a process with another's template is better off without, like DASD_API_KEY and HF_TOKEN.
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
# On a machine without a free core, a second of computing may take this long.
_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class RenderLimits:
    """Bounds of a trial.

    seconds: CPU time of one render. seconds_at_first, seconds_each: CPU time of all renders, as a start and an addition
    for each. memory_bytes: beyond what the process has at its start.
    """

    seconds: float = 1.0
    seconds_at_first: float = 10.0
    seconds_each: float = 0.02
    memory_bytes: int = 2**28


class RenderProcess:
    """Context manager of a process that tries templates. A trial that breaks the limits ends it, and the next trial
    starts another."""

    def __init__(self, limits: RenderLimits = RenderLimits()) -> None:
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: BinaryIO | None = None
        self._unread = b""

    def __enter__(self) -> RenderProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def inspect(self, template: ChatTemplate | MessageTemplate) -> dict[str, list[str]]:
        """Return what the template's own ``inspect`` does.

        Raises:
            RenderError: it fails, or breaks the limits.
            TemplateError: the process cannot be started.
        """
        [reply] = self._ask(template, "inspect", ["null"])
        found: dict[str, list[str]] = reply["found"]
        return found

    def digests(self, template: ChatTemplate | MessageTemplate, values: Sequence[Any]) -> list[str]:
        """Return the :func:`text_digest` of the text that the template's ``render`` makes of each of ``values``. Raises
        as :meth:`inspect`; the error has the place of the first values that fail."""
        digests: list[str] = []
        try:
            for batch in _batches(values):
                digests.extend(reply["digest"] for reply in self._ask(template, "render", batch))
        except RenderError as error:
            error.index += len(digests)
            raise
        return digests

    def _ask(self, template: ChatTemplate | MessageTemplate, do: str, jobs: Sequence[str]) -> list[dict[str, Any]]:
        """Return the answers to jobs in JSON."""
        process = self._running()
        assert process.stdin is not None
        fields = {item.name: getattr(template, item.name) for item in dataclasses.fields(template)}
        request = json.dumps({"kind": type(template).__name__, "fields": fields, "do": do})
        replies: list[dict[str, Any]] = []
        try:
            process.stdin.write(f"{request}\n[{','.join(jobs)}]\n".encode())
            process.stdin.flush()
            for _ in jobs:
                reply = json.loads(self._read_line(process))
                if "fault" in reply:
                    # The process leaves the batch's other jobs undone.
                    raise RenderError(reply["fault"])
                replies.append(reply)
        except BrokenPipeError:
            raise self._failure() from None
        except RenderError as error:
            error.index = len(replies)
            raise
        return replies

    def _read_line(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while b"\n" not in self._unread:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(process.stdout.fileno(), 2**16) if ready else b""
            if not part:
                raise self._failure()
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        # The clock of a place where it is another hour, and often another day, shows whether a text depends on it.
        environment = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
        environment |= {"TZ": "XXX12:34", "PYTHONHASHSEED": "random"}
        program = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {0} import serve; serve(sys.argv[2])"
        arguments = [json.dumps([*map(str, sys.path)]), json.dumps(dataclasses.asdict(self.limits))]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _stop
        try:
            self._process = subprocess.Popen(
                # A file json.py in the working directory is not what is to be imported.
                [sys.executable, "-P", "-c", program.format(__name__), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
            )
        except OSError as error:
            raise TemplateError(f"templates cannot be tried: {sys.executable} does not start ({error})") from error
        self._unread = b""
        if self._read_line(self._process) != b"ready":
            raise self._failure()
        return self._process

    def _failure(self) -> Exception:
        """End the process and return the error that says why it gives no answer."""
        assert self._process is not None and self._errors is not None
        process, errors = self._process, self._errors
        # A process that has ended by itself has done so by now.
        status = process.poll()
        if status is None:
            try:
                status = process.wait(1.0)
            except subprocess.TimeoutExpired:
                status = None
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()[-1:]
        self._stop()
        if status in (-signal.SIGPROF, None):
            return RenderError(f"it does not end within {self.limits.seconds:g} s of computing")
        if status < 0:
            return RenderError(f"it ends the process that tries it ({signal.Signals(-status).name})")
        why = first_line(ValueError(*said))
        return TemplateError(f"templates cannot be tried: their process ended with status {status} ({why})")

    def _stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        # Both ends are closed, whatever has not been written yet.
        process.communicate()
        if self._errors is not None:
            self._errors.close()


def _batches(values: Sequence[Any]) -> Iterator[list[str]]:
    """Yield the values in JSON, as many at a time as one request should hold."""
    batch: list[str] = []
    size = 0
    for value in values:
        batch.append(json.dumps(value))
        size += len(batch[-1])
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text; surrogates that stand alone count as they are."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def serve(limits: str) -> None:
    """Answer the requests of a :class:`RenderProcess` on standard input, in its process.

    The kernel ends the process at a limit of time, in the midst of whatever it computes.
    """
    bounds = RenderLimits(**json.loads(limits))
    # The one who started this process handles Ctrl-C, and ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _lower(resource.RLIMIT_AS, used + bounds.memory_bytes)
    _lower(resource.RLIMIT_CORE, 0)
    budget = bounds.seconds_at_first
    _send("ready")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        template = _KINDS[request["kind"]](**request["fields"])
        for job in json.loads(next(sys.stdin.buffer)):
            started = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, max(min(bounds.seconds, budget), 1e-3))
            reply = _try(template, request["do"], job)
            signal.setitimer(signal.ITIMER_PROF, 0)
            budget += bounds.seconds_each - (time.process_time() - started)
            _send(json.dumps(reply))
            if "fault" in reply:
                break


def _try(template: ChatTemplate | MessageTemplate, do: str, values: Any) -> dict[str, Any]:
    try:
        return {"found": template.inspect()} if do == "inspect" else {"digest": text_digest(template.render(values))}
    except RenderError as error:
        return {"fault": str(error)}


def _send(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (bound, hard))
