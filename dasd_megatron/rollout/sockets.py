"""Addresses that servers of this package listen on."""

from __future__ import annotations

import socket


class ListenError(RuntimeError):
    """An address that cannot be listened on. The message is one line: what is wrong and what to do."""


def bind(host: str, port: int) -> socket.socket:
    """Bind a TCP socket that does not listen yet, so that clients are refused until the server serves.

    Raises ListenError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ListenError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another port or address"
        ) from error
    return sock
