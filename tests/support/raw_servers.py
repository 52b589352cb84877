"""Servers that answer with bytes as they are, to say what no HTTP library would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class RawServer:
    """url: base address; heads: what each request began with; sent: number of bytes written."""

    url: str = ""
    heads: list[str] = field(default_factory=list)
    sent: int = 0


@asynccontextmanager
async def raw_server(pieces: Iterator[bytes], pause: float = 0.0) -> AsyncIterator[RawServer]:
    """Run a server that answers its requests with ``pieces``, ``pause`` seconds apart, and then closes them."""
    state = RawServer()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            state.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                state.sent += len(piece)
                await asyncio.sleep(pause)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # The client gave up, which most tests want.
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    state.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield state
    finally:
        server.close()
