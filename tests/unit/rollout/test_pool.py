"""The health of servers as a state machine, every transition of it, and whom a request goes to."""

from __future__ import annotations

import itertools
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dasd_megatron.rollout.pool import DEAD_AFTER, Event, Health, ServerPool, Status, transition

A, B, C = "http://a:1", "http://b:1", "http://c:1"


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize(
    ("event", "version", "expected"),
    [
        (Event.ANSWERED, "v2", Status.SERVING),
        (Event.ANSWERED, "v1", Status.STALE),
        (Event.ANSWERED, None, Status.STALE),
        (Event.CLOSING, None, Status.DRAINING),
        (Event.UPDATE_FAILED, None, Status.DEAD),
    ],
)
def test_from_every_status(status: Status, event: Event, version: str | None, expected: Status) -> None:
    after = transition(Health(status, 1, "v0"), event, current="v2", version=version)
    assert after.status is expected
    if event is Event.ANSWERED:
        assert (after.failures, after.version) == (0, version)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (Status.STARTING, Status.SUSPECT),
        (Status.SERVING, Status.SUSPECT),
        (Status.SUSPECT, Status.SUSPECT),
        (Status.STALE, Status.STALE),
        (Status.DRAINING, Status.DEAD),
        (Status.DEAD, Status.DEAD),
    ],
)
def test_a_failure(status: Status, expected: Status) -> None:
    assert transition(Health(status), Event.FAILED, current="v").status is expected


def test_failures_in_a_row_kill_and_an_answer_between_them_spares() -> None:
    health = Health(Status.SERVING)
    for _ in range(DEAD_AFTER - 1):
        health = transition(health, Event.FAILED, current="v")
    assert health.status is Status.SUSPECT
    assert transition(health, Event.FAILED, current="v").status is Status.DEAD
    health = transition(health, Event.ANSWERED, current="v", version="v")
    assert transition(health, Event.FAILED, current="v").status is Status.SUSPECT


def test_any_version_serves_where_none_counts() -> None:
    assert transition(Health(), Event.ANSWERED, current=None, version="whatever").status is Status.SERVING


@given(st.lists(st.tuples(st.sampled_from(list(Event)), st.sampled_from([None, "v1", "v2"]))))
def test_nothing_serves_without_having_answered_under_the_current_weights(
    events: list[tuple[Event, str | None]],
) -> None:
    health = Health()
    for event, version in events:
        health = transition(health, event, current="v2", version=version)
        if health.status is Status.SERVING:
            assert (event, version) == (Event.ANSWERED, "v2")


def pool(**statuses: Status) -> ServerPool:
    found = ServerPool([A, B, C])
    found.current = "v"
    for url, status in zip((A, B, C), (statuses.get(name, Status.SERVING) for name in "abc"), strict=True):
        found.health[url] = Health(status, 0, "v")
    return found


def test_requests_spread_by_load() -> None:
    servers = pool()
    chosen = []
    for _ in range(6):
        chosen.append(servers.choose())
        servers.begin(chosen[-1])
    assert sorted(chosen) == sorted([A, B, C] * 2)
    servers.end(B)
    assert servers.choose() == B


def test_the_best_status_is_taken() -> None:
    ranks = [Status.SERVING, Status.SUSPECT, Status.DEAD]
    for order in itertools.permutations(ranks):
        servers = pool(**dict(zip("abc", order, strict=True)))
        assert servers.choose() == (A, B, C)[order.index(Status.SERVING)]
    assert pool(a=Status.DEAD, b=Status.STARTING, c=Status.DEAD).choose() == B
    assert pool(a=Status.STALE, b=Status.STALE, c=Status.DRAINING).choose() == C
    assert pool(a=Status.STALE, b=Status.STALE, c=Status.STALE).choose() is None


def test_who_has_failed_a_request_gets_it_last() -> None:
    assert pool(a=Status.SERVING, b=Status.DEAD, c=Status.SUSPECT).choose({A}) == C
    assert pool(a=Status.SUSPECT, b=Status.STALE, c=Status.STALE).choose({A}) == A


def test_other_weights_make_stale_until_an_update() -> None:
    servers = pool(c=Status.DEAD)
    servers.expect("w")
    assert servers.with_status(Status.STALE) == [A, B] and servers.with_status(Status.DEAD) == [C]
    servers.record(A, Event.ANSWERED, "w")
    servers.record(B, Event.ANSWERED, "v")
    assert servers.with_status(Status.SERVING) == [A] and servers.with_status(Status.STALE) == [B]


def test_changes_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    servers = pool()
    with caplog.at_level(logging.INFO):
        for _ in range(DEAD_AFTER + 2):
            servers.record(A, Event.FAILED, reason="refused")
        servers.record(A, Event.ANSWERED, "v")
    assert [record.getMessage() for record in caplog.records] == [
        f"rollout server {A}: serving -> suspect (refused)",
        f"rollout server {A}: suspect -> dead (refused)",
        f"rollout server {A}: dead -> serving (answered)",
    ]


def test_weights_that_change_without_an_update_are_told(caplog: pytest.LogCaptureFixture) -> None:
    servers = ServerPool([A])
    servers.expect("v1")
    servers.record(A, Event.ANSWERED, "v1")
    servers.expect("v2")
    servers.record(A, Event.ANSWERED, "v2")
    assert not caplog.records
    servers.record(A, Event.ANSWERED, "v1")
    assert servers.health[A].status is Status.STALE and servers.choose() is None
    servers.record(A, Event.ANSWERED, "v0")  # stale already, and older still
    servers.record(A, Event.ANSWERED, "v0")
    assert [record.getMessage() for record in caplog.records] == [
        f"rollout server {A}: serving -> stale (went from weights 'v2' to 'v1', which this run has not given it now: "
        "it was restarted, or something else updates it)",
        f"rollout server {A}: stale -> stale (went from weights 'v1' to 'v0', which this run has not given it now: it "
        "was restarted, or something else updates it)",
    ]
    servers.record(A, Event.ANSWERED, "v2")
    assert servers.health[A].status is Status.SERVING


def test_weights_that_change_where_any_counts_are_told(caplog: pytest.LogCaptureFixture) -> None:
    servers = ServerPool([A])
    servers.record(A, Event.ANSWERED, "a")
    servers.record(A, Event.ANSWERED, "b")
    assert servers.health[A].status is Status.SERVING
    assert ["from weights 'a' to 'b'" in record.getMessage() for record in caplog.records] == [True]


def test_doubt_spares_no_server_and_kills_none() -> None:
    servers = pool(b=Status.STALE, c=Status.DEAD)
    for _ in range(DEAD_AFTER + 1):
        servers.doubt("the router failed")
        assert [servers.health[url].status for url in (A, B, C)] == [Status.SUSPECT, Status.STALE, Status.DEAD]
    servers.record(A, Event.ANSWERED, "v")
    assert servers.with_status(Status.SERVING) == [A]


def test_the_last_reason_is_kept() -> None:
    servers = ServerPool([A])
    servers.record(A, Event.UPDATE_FAILED, reason="other shapes")
    assert servers.reasons == {A: "other shapes"}
