"""Connections to the embedded server: clients that say nothing, too much, or never listen."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

import pytest
import uvicorn

from dasd_megatron.rollout.embedded import connections
from dasd_megatron.rollout.embedded.connections import MAX_HEADER_BYTES, LimitedConnection

ANSWER = b"x" * 4_000_000


async def app(scope, receive, send):
    """Answer four megabytes in pieces to /large, and the length of the body to anything else."""
    body = b""
    while scope["path"] != "/large":
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    answer = ANSWER if scope["path"] == "/large" else b"%d" % len(body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    for start in range(0, len(answer), 100_000):
        more = start + 100_000 < len(answer)
        await send({"type": "http.response.body", "body": answer[start : start + 100_000], "more_body": more})


@pytest.fixture
def server(monkeypatch):
    for name in ("HEADER_SECONDS", "REQUEST_SECONDS", "STALL_SECONDS"):
        monkeypatch.setattr(connections, name, 0.3)
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 5)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = uvicorn.Config(
            app,
            http=LimitedConnection,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=1,
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        made = uvicorn.Server(config)
        made.install_signal_handlers = lambda: None
        thread = threading.Thread(target=lambda: asyncio.run(made.serve(sockets=[sock])))
        thread.start()
        made.address = sock.getsockname()
        yield made
        made.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def connect(server):
    return socket.create_connection(server.address, timeout=10)


def ask(server, path=b"/"):
    """Make one whole request; return the answer's last bytes."""
    with connect(server) as client:
        client.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: client.recv(1 << 20), b""))[-len(ANSWER) :]


def ends(client):
    """Wait for the end of a connection; return what came before it."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(1 << 16):
            received += data
    return received


SLOW = {
    "nothing": [],
    "half a line": [b"GE"],
    "headers without end": [b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 1000],
    "a body without end": [b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n", *[b"x"] * 1000],
    "a chunked body without end": [
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        *[b"1\r\nx\r\n"] * 1000,
    ],
    "a second request without end": [b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGE"],
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_request_that_never_ends_is_given_up(server, kind):
    with connect(server) as client:
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for part in SLOW[kind]:
                client.sendall(part)
                # A byte now and then does not win more time.
                time.sleep(0.02)
                if time.monotonic() - start > 5:
                    break
        ends(client)
        assert 0.2 < time.monotonic() - start < 5
    assert ask(server).endswith(b"0")


def test_a_client_that_never_reads_is_given_up(server):
    with connect(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        deadline = time.monotonic() + 10
        time.sleep(0.2)
        while server.server_state.connections:
            assert time.monotonic() < deadline, "the connection is still open"
            time.sleep(0.05)
    assert ask(server, b"/large") == ANSWER


def test_headers_are_bounded(server):
    with connect(server) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: " + b"y" * (MAX_HEADER_BYTES + 1000))
        assert ends(client).startswith(b"HTTP/1.1 400")
    assert ask(server).endswith(b"0")


def test_too_many_connections_are_refused_and_those_before_go_on(server, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 20.0)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(5)]
        deadline = time.monotonic() + 10
        while len(server.server_state.connections) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for _ in range(20):
            with connect(server) as refused:
                assert ends(refused) == b""
        assert len(server.server_state.connections) == 5
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert ends(client).endswith(b"0")
