"""Connections to the embedded server: their number, and the time that each may take to say and to hear something."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
MAX_HEADER_BYTES = 16 << 10
HEADER_SECONDS = 15.0
"""Time from the begin of a connection, or of a later request, to the end of the request's headers."""
REQUEST_SECONDS = 90.0
"""Time from the headers to the end of the body. It is longer than the one after which a handler answers with 408."""
STALL_SECONDS = 60.0
"""Time in which a client has to read some of its answer."""


class LimitedConnection(H11Protocol):
    """uvicorn's connection with limits. A client that breaks them loses it without an answer."""

    _arriving: asyncio.TimerHandle | None = None
    _expected: str | None = None
    """Part of a request that the client has to send now."""
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Refuse the connection where there are too many, and expect a request on it."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._expect("headers")

    def data_received(self, data: bytes) -> None:
        """Expect the rest of a request that has begun, until all of it is there."""
        super().data_received(data)
        if self.conn.their_state is h11.SEND_BODY:
            self._expect("body")
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._expect("headers")
        else:
            self._expect(None)

    def _expect(self, part: str | None) -> None:
        """Start the clock for a part of a request, unless it runs already, and stop the one before it."""
        if part == self._expected:
            return
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None
        self._expected = part
        if part is not None:
            seconds = HEADER_SECONDS if part == "headers" else REQUEST_SECONDS
            self._arriving = self.loop.call_later(seconds, self.transport.abort)

    def pause_writing(self) -> None:
        """Give the client time to read what has piled up."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on writing to a client that reads."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._expect(None)
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)
