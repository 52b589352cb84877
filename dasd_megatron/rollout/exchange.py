"""One exchange with a server over HTTP: a request, and its answer within bounds of size and time.

Answers are asked for as they are, without compression: a megabyte of gzip may hold gigabytes. aiohttp bounds the number
and the length of an answer's headers. Redirects are not followed, since the API key would go along to wherever they
point.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson

from dasd_megatron import access
from dasd_megatron.errors import printable
from dasd_megatron.rollout.answers import PLAIN_ANSWER_BYTES, Answer, FailedTryError, show

KEEP_ALIVE_SECONDS = 4.0
"""SGLang closes connections that were idle for 5 s; a request must not meet that."""
READ_BUFFER_BYTES = 2**20
"""The buffer of one connection; answers with long rows have megabytes."""

_JSON_HEADERS = {"Content-Type": "application/json"}


def open_session(api_key: str | None, connect_timeout: float, connections: int) -> aiohttp.ClientSession:
    """Return a session of the running event loop.

    api_key: sent with every request; connect_timeout: seconds; connections: the most that are open at once.
    """
    return aiohttp.ClientSession(
        headers={**access.headers(api_key), "Accept-Encoding": "identity"},
        auto_decompress=False,
        # The whole request has a limit elsewhere.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout),
        connector=aiohttp.TCPConnector(limit=connections, keepalive_timeout=KEEP_ALIVE_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=READ_BUFFER_BYTES,
        trust_env=False,  # rollout servers are inside the cluster: no proxy, no .netrc
    )


@contextlib.asynccontextmanager
async def failed_try(path: str, seconds: float) -> AsyncIterator[None]:
    """Give the body ``seconds`` for a request for ``path``, from the connection to the last byte of its answer.

    Raises FailedTryError where that is not enough, and for connections that are refused, reset or closed and for broken
    HTTP.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except aiohttp.ClientError as error:
        raise FailedTryError(f"{path} failed: {type(error).__name__}: {printable(str(error), 300)}") from error
    except TimeoutError as error:
        raise FailedTryError(f"{path} gave no answer within {seconds:g} s") from error


async def exchange(http: aiohttp.ClientSession, method: str, url: str, path: str, body: Any, most_bytes: int) -> Answer:
    """Make one request and read its whole answer; goes into :func:`failed_try`.

    body: goes as JSON, unless it is None; most_bytes: of the answer's body.

    Raises FailedTryError for an answer that is too long, compressed or a redirect, and aiohttp.ClientError.
    """
    content: dict[str, Any] = {} if body is None else {"data": orjson.dumps(body), "headers": _JSON_HEADERS}
    async with http.request(method, url + path, allow_redirects=False, **content) as response:
        _check_head(response, path, most_bytes)
        parts, received = [], 0
        async for part in response.content.iter_any():
            received += len(part)
            if received > most_bytes:
                raise _too_long(path, most_bytes)
            parts.append(part)
        return Answer(path, response.status, b"".join(parts), response.headers)


def _check_head(response: aiohttp.ClientResponse, path: str, most_bytes: int) -> None:
    if 300 <= response.status < 400:
        place = show(response.headers.get("Location"))
        raise FailedTryError(
            f"{path} answered {response.status} with {place} as the new place, and redirects are not followed, since "
            "the API key would go along: give the server's own address"
        )
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise FailedTryError(f"{path} answered in the encoding {show(encoding)}, and compression was not asked for")
    if response.content_length is not None and response.content_length > most_bytes:
        raise _too_long(path, most_bytes)


def _too_long(path: str, most_bytes: int) -> FailedTryError:
    return FailedTryError(f"{path} answered more than {most_bytes:,} bytes, the most that what was asked for can need")


def fetch(url: str, path: str, *, api_key: str | None, seconds: float) -> Answer:
    """Get ``path`` from a server, outside of any event loop; raises FailedTryError as :func:`exchange`."""

    async def ask() -> Answer:
        async with open_session(api_key, seconds, connections=1) as http, failed_try(path, seconds):
            return await exchange(http, "GET", url, path, None, PLAIN_ANSWER_BYTES)

    return asyncio.run(ask())
