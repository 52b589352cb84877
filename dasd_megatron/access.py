"""The API key of rollout servers, which stands in the environment variable ``DASD_API_KEY`` and nowhere else.

Servers and routers that are started with the key refuse requests without it, and the trainer's client sends it. The key
stays out of command lines, which everybody on a machine can list, and out of everything that a run writes.
"""

from __future__ import annotations

import hmac
import logging
import os
import re

from dasd_megatron.config import is_loopback

VARIABLE = "DASD_API_KEY"
LEAST_CHARACTERS = 16

logger = logging.getLogger(__name__)


class AccessError(RuntimeError):
    """A key that cannot be one, or that a server does not take. The message is one line, without the key."""


def api_key() -> str | None:
    """Return the key in the environment, or None where there is none.

    Raises:
        AccessError: the key is empty, short or not ASCII.
    """
    key = os.environ.get(VARIABLE)
    if key is None:
        return None
    # An empty key comes from a missing file or a failed command. To go on without a key would open the servers.
    if len(key) < LEAST_CHARACTERS or not re.fullmatch(r"[!-~]+", key):
        raise AccessError(
            f"{VARIABLE} has {len(key)} characters and has to be {LEAST_CHARACTERS} or more of ASCII that are no "
            "spaces: make one with `openssl rand -hex 32`, or unset it"
        )
    return key


def headers(key: str | None) -> dict[str, str]:
    """Return the HTTP headers by which a request shows the key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def shows_key(authorization: bytes, key: str) -> bool:
    """Return whether the value of an Authorization header is ``key`` as a bearer token.

    The comparison takes equally long for every wrong token of one length, so that its time does not betray the key.
    """
    scheme, _, token = authorization.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(token, key.encode())


def refusal(status: int, key: str | None) -> tuple[str, str]:
    """Return what happened and what to do, when a server has answered ``status`` (401 or 403) to a request with
    ``key``."""
    if key is None:
        return f"it asks for an API key ({status})", f"set {VARIABLE} to the one that it was started with"
    return (
        f"it does not take the API key in {VARIABLE} ({status})",
        "set that to the one that the server was started with",
    )


def warn_if_open(host: str, listener: str) -> None:
    """Warn that ``listener`` is about to listen beyond this machine without a key, if that is so."""
    if not is_loopback(host) and api_key() is None:
        logger.warning(
            "%s listens on %s without an API key: whoever reaches that address can use it and replace its weights; "
            "set %s on it and on the trainer, or listen on 127.0.0.1",
            listener,
            host,
            VARIABLE,
        )
