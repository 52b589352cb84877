"""Places of real SGLang and its router, and a proxy that makes servers fail."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sglang_python() -> str:
    """The interpreter of SGLang's environment; a test that needs it is skipped where there is none."""
    path = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
    if not path.is_file():
        pytest.skip(f"no SGLang: {path} is missing (make sglang-cpu builds it; SGLANG_PYTHON names another)")
    return str(path)


def router_python() -> str:
    """The interpreter of SGLang's environment where that has sglang-router too; a test that needs it is skipped where
    it has not."""
    python = sglang_python()
    if subprocess.run([python, "-c", "import sglang_router"], capture_output=True, timeout=60).returncode:
        pytest.skip(
            f"no sglang-router: {python} does not have it (make sglang-cpu installs it; SGLANG_PYTHON names another)"
        )
    return python


@contextlib.contextmanager
def routing(log: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """``dasd router`` at a free port, once it is ready; its address."""
    command = [
        sys.executable,
        "-m",
        "dasd_megatron.cli",
        "router",
        "--python",
        router_python(),
        "--port",
        "0",
        *arguments,
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while "\nrouting http" not in "\n" + log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process, log.read_text().split("routing ")[-1].split(" ")[0]
    finally:
        process.terminate()
        process.wait(30)


class FaultyProxy:
    """In front of a real server; ``fault(path, count)`` says what to do with the count-th request of that path: "500",
    "garbage",
    "short" (a row is missing), "shift" (other log-probs), "hang", or None to pass it on."""

    def __init__(self, upstream: str, fault: Callable[[str, int], str | None]) -> None:
        counts: dict[str, int] = {}
        lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    counts[self.path] = counts.get(self.path, 0) + 1
                    action = fault(self.path, counts[self.path])
                if action == "hang":
                    time.sleep(8)
                    self.close_connection = True
                    return
                if action == "500":
                    status, answer = 500, b'{"error": {"message": "injected"}}'
                elif action == "garbage":
                    status, answer = 200, b"<html>not json"
                else:
                    request = urllib.request.Request(upstream + self.path, data=body or None, method=self.command)
                    request.add_header("Content-Type", "application/json")
                    try:
                        with urllib.request.urlopen(request, timeout=30) as response:
                            status, answer = response.status, response.read()
                    except urllib.error.HTTPError as error:
                        status, answer = error.code, error.read()
                    except (OSError, http.client.HTTPException):  # the server is gone
                        self.close_connection = True
                        return
                    if action == "shift":
                        changed = json.loads(answer)
                        for row in changed:
                            for entry in row["meta_info"]["output_token_logprobs"]:
                                entry[0] -= 1.5
                        answer = json.dumps(changed).encode()
                    if action == "short":
                        answer = json.dumps(json.loads(answer)[:-1]).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has given up
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            do_GET = do_POST = _serve

            def log_message(self, *_: object) -> None: ...

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()
