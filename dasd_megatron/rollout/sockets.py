"""Addresses that servers of this package listen on."""

from __future__ import annotations

import socket

from dasd_megatron.errors import printable


class ListenError(RuntimeError):
    """An address that cannot be listened on. The message is one line: what is wrong and what to do."""


def bind(host: str, port: int) -> socket.socket:
    """Bind a TCP socket that does not listen yet, so that clients are refused until the server serves.

    Raises ListenError.
    """
    if not host:
        raise ListenError("the address to listen on is empty: write 127.0.0.1, or 0.0.0.0 for all of this machine")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    # A port above 65535 overflows, and names with odd characters or none between two dots have no encoding.
    except (OSError, OverflowError, ValueError, TypeError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or printable(str(error), 200)
        where = printable(f"{host[:100]}:{port}")
        raise ListenError(f"cannot listen on {where}: {reason}; choose another port or address") from error
    return sock
