"""Connections to the embedded server: their number, and the time that each may take to say and to hear something."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
MAX_HEADER_BYTES = 16 << 10
REQUEST_SECONDS = 90.0
"""Time from a connection's first byte to the end of its request. It is longer than that of a body alone, which is
answered with 408."""
STALL_SECONDS = 60.0
"""Time in which a client has to read some of its answer."""


class LimitedConnection(H11Protocol):
    """uvicorn's connection with limits. A client that breaks them loses it without an answer."""

    _arriving: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Refuse the connection where there are too many, and expect a request on it."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._arriving = self.loop.call_later(REQUEST_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Expect the rest of a request that has begun, until all of it is there."""
        super().data_received(data)
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if begun or self.conn.their_state is h11.SEND_BODY:
            if self._arriving is None:
                self._arriving = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)
        elif self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

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
        for timer in (self._arriving, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
