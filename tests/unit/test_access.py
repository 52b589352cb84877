"""The API key of rollout servers: what may be one, and who is told of servers that have none."""

from __future__ import annotations

import logging

import pytest

from dasd_megatron.access import VARIABLE, AccessError, api_key, headers, shows_key, warn_if_open
from dasd_megatron.config import is_loopback

KEY = "0123456789abcdef"


def test_a_key_is_read_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert api_key() is None and headers(None) == {}
    monkeypatch.setenv(VARIABLE, KEY)
    assert api_key() == KEY and headers(KEY) == {"Authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize("wrong", ["", "short", "0123456789 abcdef", "0123456789abcdéf", "0123456789abcdef\n"])
def test_what_cannot_be_a_key_is_refused_without_being_told(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, wrong)
    with pytest.raises(AccessError, match=f"{VARIABLE} has {len(wrong)} characters") as caught:
        api_key()
    assert not wrong or wrong not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (f"Bearer {KEY}", True),
        (f"bearer {KEY}", True),
        (KEY, False),
        (f"Basic {KEY}", False),
        (f"Bearer {KEY}0", False),
        (f"Bearer {KEY[:-1]}", False),
        ("Bearer ", False),
        ("", False),
        ("Bearer 0123456789abcdéf", False),
    ],
)
def test_only_the_key_itself_opens(header: str, accepted: bool) -> None:
    assert shows_key(header.encode(), KEY) is accepted


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("gpu01", False),
    ],
)
def test_a_server_that_others_can_reach_needs_a_key_or_says_so(
    host: str, own: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert is_loopback(host) is own
    monkeypatch.delenv(VARIABLE, raising=False)
    with caplog.at_level(logging.WARNING):
        warn_if_open(host, "the rollout server")
    assert (host in caplog.text and VARIABLE in caplog.text) is not own
    caplog.clear()
    monkeypatch.setenv(VARIABLE, KEY)
    warn_if_open(host, "the rollout server")
    assert not caplog.text
