"""One request, against servers that answer with anything: it ends in time, with an answer within its bound or with one
clear failure."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dasd_megatron.rollout.answers import Answer, FailedTryError
from dasd_megatron.rollout.exchange import exchange, failed_try, fetch, open_session
from tests.support.raw_servers import raw_server

HEAD = b"HTTP/1.1 200 OK\r\n"


async def ask(pieces: Iterator[bytes], *, most_bytes: int = 1000, seconds: float = 5.0, pause: float = 0.0) -> Answer:
    """Make one request to a server that writes ``pieces``, ``pause`` seconds apart, and closes the connection."""
    async with raw_server(pieces, pause) as server, open_session("k" * 16, seconds, connections=1) as http:
        try:
            async with failed_try("/path", seconds):
                return await exchange(http, "GET", server.url, "/path", None, most_bytes)
        finally:
            ask.sent, ask.heads = server.sent, server.heads


def endless(start: bytes, piece: bytes) -> Iterator[bytes]:
    yield start
    while True:
        yield piece


async def test_an_answer_is_read_whole_and_asked_for_uncompressed() -> None:
    answer = await ask(iter([HEAD + b"Content-Length: 4\r\nContent-Type: a/b\r\n\r\n", b"ab", b"cd"]))
    assert (answer.status, answer.content, answer.headers["content-type"]) == (200, b"abcd", "a/b")
    assert "accept-encoding: identity" in ask.heads[0].lower() and "gzip" not in ask.heads[0]


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(lambda: endless(HEAD + b"\r\n", b"x" * 2**16), id="until the connection closes"),
        pytest.param(lambda: endless(CHUNKED, b"10000\r\n" + b"x" * 2**16 + b"\r\n"), id="chunks"),
        pytest.param(lambda: endless(CHUNKED, b"1\r\nx\r\n" * 1000), id="tiny chunks"),
        pytest.param(lambda: endless(HEAD + b"Content-Length: 99999999999\r\n\r\n", b"x" * 2**16), id="length"),
        pytest.param(lambda: endless(b"HTTP/1.1 500 X\r\n\r\n", b"x" * 2**16), id="the words of a failure"),
    ],
)
async def test_an_endless_answer_is_given_up_at_its_bound(pieces) -> None:
    with pytest.raises(FailedTryError, match="^/path answered more than 1,000 bytes"):
        await ask(pieces())
    assert ask.sent < 32 * 2**20  # what was on its way


@pytest.mark.parametrize("extra", [0, 1])
async def test_the_bound_is_the_last_length_that_is_read(extra: int) -> None:
    pieces = iter([CHUNKED, b"3e8\r\n" + b"x" * 1000 + b"\r\n", b"1\r\nx\r\n" * extra, b"0\r\n\r\n"])
    if extra:
        with pytest.raises(FailedTryError, match="more than 1,000 bytes"):
            await ask(pieces)
    else:
        assert len((await ask(pieces)).content) == 1000


async def test_a_compressed_answer_is_refused_before_it_is_unpacked() -> None:
    bomb = gzip.compress(b" " * 2**24)
    head = HEAD + f"Content-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
    with pytest.raises(FailedTryError, match="^/path answered in the encoding 'gzip'"):
        await ask(iter([head, bomb]), most_bytes=2**30)


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
async def test_a_redirect_is_not_followed(status: int) -> None:
    """The key must not go to another host."""
    async with raw_server(iter([HEAD + b"Content-Length: 2\r\n\r\nok"])) as other:
        head = f"HTTP/1.1 {status} X\r\nLocation: {other.url}/stolen\x1b[31m\r\nContent-Length: 0\r\n\r\n".encode()
        with pytest.raises(
            FailedTryError, match=f"^/path answered {status} with .*redirects are not followed"
        ) as error:
            await ask(iter([head]))
        assert other.heads == [] and "\x1b" not in str(error.value)


TRICKLES = {
    "headers": lambda: endless(HEAD, b"a: b\r\n"),
    "one header": lambda: endless(HEAD + b"a: ", b"b"),
    "a body": lambda: endless(HEAD + b"Content-Length: 900\r\n\r\n", b"x"),
    "chunks": lambda: endless(CHUNKED, b"1\r\nx\r\n"),
    "interim answers": lambda: endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "nothing": lambda: endless(b"", b""),
}


@pytest.mark.parametrize("pieces", TRICKLES.values(), ids=TRICKLES.keys())
async def test_an_answer_that_trickles_has_the_limit_of_the_whole(pieces) -> None:
    with pytest.raises(FailedTryError, match="^/path gave no answer within 0.3 s"):
        await ask(pieces(), seconds=0.3, pause=0.02)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(lambda: endless(HEAD, b"a: b\r\n" * 100), id="endless headers"),
        pytest.param(lambda: endless(HEAD + b"a: ", b"b" * 2**16), id="an endless header"),
        pytest.param(lambda: endless(b"HTTP/1.1 200 ", b"b" * 2**16), id="an endless status line"),
        pytest.param(lambda: iter([CHUNKED, b"zz\r\n"]), id="no chunk"),
        pytest.param(lambda: endless(CHUNKED + b"0\r\n", b"a: b\r\n" * 100), id="endless trailers"),
        pytest.param(lambda: iter([b"SSH-2.0-OpenSSH\x1b[31m\r\n"]), id="no HTTP"),
        pytest.param(lambda: iter([]), id="nothing"),
        pytest.param(lambda: iter([HEAD + b"Content-Length: 9\r\n\r\nab"]), id="too short"),
        pytest.param(lambda: iter([HEAD + b"Content-Length: -9\r\n\r\nab"]), id="negative length"),
        pytest.param(lambda: iter([HEAD + b"Content-Length: " + b"9" * 400 + b"\r\n\r\nab"]), id="10^400 bytes"),
    ],
)
async def test_broken_http_is_one_clear_failure(pieces) -> None:
    with pytest.raises(FailedTryError, match=r"^/path (failed: \w+|answered more than)") as error:
        await ask(pieces())
    assert str(error.value).isprintable() and len(str(error.value)) < 500


LINES = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 999 \xff\xfe\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n",
        b"HTTP/1.0 200\r\n",
        b"HTTP/9.9 200 OK\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Content-Encoding: br\r\n",
        b"Content-Encoding: \xff\r\n",
        b"Content-Length: 3\r\n",
        b"Content-Length: 1_0\r\n",
        b"Content-Type: ;;;=\xff\r\n",
        b"Set-Cookie: \x7f=\xff;;=\r\n",
        b"Location: http://[::/\r\n",
        b"Connection: upgrade\r\n",
        b"\r\n",
        b"3\r\nabc\r\n",
        b"ffffffffffffffffffff\r\n",
        b"0\r\n\r\n",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(LINES | st.binary(max_size=40), max_size=8))
def test_any_bytes_are_an_answer_or_a_failure(pieces: list[bytes]) -> None:
    try:
        answer = asyncio.run(ask(iter(pieces), seconds=1.0))
    except FailedTryError as error:
        assert str(error).isprintable() and len(str(error)) < 500
    else:
        assert len(answer.content) <= 1000 and not 300 <= answer.status < 400


async def test_fetch_is_for_those_outside_of_an_event_loop() -> None:
    async with raw_server(iter([HEAD + b"Content-Length: 2\r\n\r\nok"])) as server:
        answer = await asyncio.to_thread(fetch, server.url, "/workers", api_key="k" * 16, seconds=5.0)
        assert answer == Answer("/workers", 200, b"ok", answer.headers)
        assert server.heads[0].startswith("GET /workers ") and f"Bearer {'k' * 16}" in server.heads[0]
    with pytest.raises(FailedTryError, match="^/workers failed: ClientConnectorError"):
        await asyncio.to_thread(fetch, "http://127.0.0.1:9", "/workers", api_key=None, seconds=5.0)
