"""Bodies of requests: limits of size, time and nesting, and what is JSON."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from dasd_megatron.rollout.embedded import bodies
from dasd_megatron.rollout.embedded.bodies import Bodies, parse_json, validation_message


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "Expecting value"),
        (b"{not json", "Expecting property name"),
        (b"\xff", "not UTF-8: invalid start byte at byte 0"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("[1]".encode("utf-16"), "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
        (b"[NaN]", "NaN is not JSON"),
        (b"-Infinity", "-Infinity is not JSON"),
        (b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b'{"a":' * 5000, "nested too deeply"),
        (b"[]," * (bodies.MAX_CONTAINERS + 1), "brackets and braces"),
        (b"9" * 5000, "Exceeds the limit (4300 digits)"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(raw, fault):
    with pytest.raises(ValueError) as caught:
        parse_json(raw)
    assert fault in str(caught.value) and "\n" not in str(caught.value)


def test_json_is_read_as_it_is():
    assert parse_json(b'{"a": [1, 2.5, "\\ud83d\\ude00", null], "a": "last"}') == {"a": "last"}
    assert parse_json(b"1" + b"0" * 400) == 10**400


@pytest.fixture
def client(monkeypatch):
    """A server that answers the length of its body, of which it takes 1000 bytes."""
    app = FastAPI()
    reader = Bodies()

    @app.post("/")
    async def length(request: bodies.Request) -> int:
        return await reader.parse(request, 1000, len)

    return TestClient(app)


def test_a_body_that_is_too_large_is_refused_however_it_comes(client):
    fits = json.dumps("x" * 998)
    assert client.post("/", content=fits).json() == 998
    assert client.post("/", content=iter([fits[:500].encode(), fits[500:].encode()])).json() == 998
    message = {"detail": "The body is larger than the 1000 bytes that / takes."}
    for content in (fits + " ", iter([b"x" * 600, b"x" * 600]), iter([b"x"] * 1001)):
        answer = client.post("/", content=content)
        assert (answer.status_code, answer.json()) == (413, message)
    # The length that is declared counts before anything is read.
    answer = client.post("/", content=b"1", headers={"content-length": "9" * 400})
    assert answer.status_code == 413


def test_an_encoded_body_is_not_read(client):
    bomb = gzip.compress(b" " * 1_000_000)
    for coding in ("gzip", "deflate", "br", "gzip, gzip", "x" * 5000):
        answer = client.post("/", content=bomb, headers={"content-encoding": coding})
        assert answer.status_code == 415 and "is not read" in answer.json()["detail"] and len(answer.text) < 300
    assert client.post("/", content=b"[]", headers={"content-encoding": "identity"}).json() == 0


def test_a_slow_body_is_given_up(client, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)

    async def slow():
        reader = Bodies()
        request = bodies.Request({"type": "http", "headers": [], "path": "/"}, receive)
        return await reader.parse(request, 1000, len)

    async def receive():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"[", "more_body": True}

    with pytest.raises(bodies.HTTPException) as caught:
        asyncio.run(slow())
    assert caught.value.status_code == 408 and "within 0.05 seconds" in caught.value.detail


def test_bodies_of_all_requests_together_are_bounded(monkeypatch):
    monkeypatch.setattr(bodies, "MAX_BUFFERED_BYTES", 1500)
    reader = Bodies()
    go = asyncio.Event()

    def request(size):
        parts = [b'"' + b"x" * (size - 2), b'"']

        async def receive():
            if len(parts) == 1:
                await go.wait()
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        return bodies.Request({"type": "http", "headers": [], "path": "/"}, receive)

    async def run():
        first = asyncio.create_task(reader.parse(request(1000), 1000, len))
        await asyncio.sleep(0.01)
        with pytest.raises(bodies.HTTPException) as caught:
            await reader.parse(request(1000), 1000, len)
        assert caught.value.status_code == 503
        go.set()
        assert await first == 998
        assert await reader.parse(request(1000), 1000, len) == 998, "what was counted is given back"

    asyncio.run(run())


def test_a_validation_error_repeats_no_input_and_no_path():
    secret = "x" * 5000
    errors = [{"loc": ("body", secret, i), "msg": "wrong " * 500, "input": secret} for i in range(50)]
    message = validation_message(errors)
    assert message.startswith("50 validation errors: body.xxx") and message.endswith("; and 47 more")
    assert len(message) < 1500 and secret not in message
    assert validation_message([{"loc": ("query", "timeout"), "msg": "too long"}]) == (
        "1 validation error: query.timeout: too long"
    )


EXPANSION = """
from pathlib import Path
from dasd_megatron.rollout.embedded import bodies
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
size = bodies.MAX_GENERATE_BYTES
worst = [b"[" + b'"ab",' * (size // 5 - 1) + b"1]", b"[" + b'{"a":1},' * (bodies.MAX_CONTAINERS - 2) + b"1]"]
before = peak()
for raw in worst:
    bodies.parse_json(raw)
print((peak() - before) / size)
"""


def test_the_memory_of_a_parsed_body_is_bounded():
    """A body takes at most 25 times its own bytes, and one is parsed at a time."""
    child = subprocess.run([sys.executable, "-c", EXPANSION], capture_output=True, text=True, timeout=120, check=True)
    assert 1 < float(child.stdout) < 25
