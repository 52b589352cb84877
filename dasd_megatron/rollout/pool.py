"""The health of rollout servers as a pure state machine, and the choice of the least loaded healthy one.

Nothing here talks to a server. :class:`~dasd_megatron.rollout.client.RolloutClient` reports what it saw and asks which
server to send a request to.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

DEAD_AFTER = 3
"""Number of failures in a row after which a server is taken for dead."""


class Status(enum.Enum):
    """States of a server. :meth:`ServerPool.choose` prefers the earlier ones, and never takes a stale server."""

    SERVING = "serving"
    """Answers, under the current weights."""
    STARTING = "starting"
    """Not heard of yet."""
    SUSPECT = "suspect"
    """Its last request failed."""
    DEAD = "dead"
    """Failed several times in a row, or broke off an update, so that nobody knows what it holds."""
    DRAINING = "draining"
    """Said that it is shutting down: like a dead server, it is asked where there is no other."""
    STALE = "stale"
    """Answers, but under other weights: it serves again only after a complete update."""


class Event(enum.Enum):
    """Things that a client reports of a server."""

    ANSWERED = "answered"
    """A request, a probe or a weight update succeeded; its version is what the server holds now."""
    FAILED = "failed"
    """No answer, a bad one or a server error."""
    CLOSING = "shutting down"
    """It answered 503."""
    UPDATE_FAILED = "weight update failed"
    """An update was refused or broken off."""


@dataclass(frozen=True, slots=True)
class Health:
    """State of one server. ``failures``: how many in a row; ``version``: the weights that it last said to hold, None
    where unknown."""

    status: Status = Status.STARTING
    failures: int = 0
    version: str | None = None


def transition(health: Health, event: Event, *, current: str | None, version: str | None = None) -> Health:
    """Return the health after ``event``.

    current: the weight version that counts, None where any does; version: the server's, with ANSWERED alone.
    """
    match event:
        case Event.ANSWERED:
            fits = current is None or version == current
            return Health(Status.SERVING if fits else Status.STALE, 0, version)
        case Event.CLOSING:
            return Health(Status.DRAINING, health.failures, health.version)
        case Event.UPDATE_FAILED:
            return Health(Status.DEAD, health.failures + 1, None)
        case Event.FAILED:
            failures = health.failures + 1
            # A server that was shutting down has done so. One under other weights must not become a candidate again by
            # failing.
            if failures >= DEAD_AFTER or health.status in (Status.DEAD, Status.DRAINING):
                return Health(Status.DEAD, failures, health.version)
            return Health(Status.STALE if health.status is Status.STALE else Status.SUSPECT, failures, health.version)


class ServerPool:
    """The servers of a run as one process sees them.

    urls: base addresses. May be used from several threads. Every change of a server's status but the first is a line in
    the log, and so is every change of its weights that is not to ``current``.
    """

    def __init__(self, urls: Iterable[str]):
        self.current: str | None = None
        self.health = {url.rstrip("/"): Health() for url in urls}
        self.reasons: dict[str, str] = {}
        """The reason of each server's last event."""
        self._in_flight = dict.fromkeys(self.health, 0)
        self._lock = threading.Lock()

    def record(self, url: str, event: Event, version: str | None = None, reason: str = "") -> None:
        """Let ``event`` happen to a server; ``reason`` goes to the log."""
        with self._lock:
            before = self.health[url]
            strayed = event is Event.ANSWERED and before.version not in (None, version) and version != self.current
            if strayed:
                reason = (
                    f"went from weights {before.version!r} to {version!r}, which this run has not given it now: it "
                    "was restarted, or something else updates it"
                )
            elif event is Event.ANSWERED and self.current not in (None, version):
                reason = reason or f"holds weights {version!r}, not {self.current!r}"
            self.reasons[url] = reason or event.value
            self._set(url, transition(before, event, current=self.current, version=version), self.reasons[url], strayed)

    def doubt(self, reason: str) -> None:
        """Suspect all servers that serve until they have answered again: one of them may have failed, and nobody knows
        which."""
        with self._lock:
            for url in self.with_status(Status.SERVING):
                self._set(url, Health(Status.SUSPECT, 0, self.health[url].version), reason)

    def expect(self, version: str | None) -> None:
        """Let ``version`` count from now on: a server that serves another is stale."""
        with self._lock:
            self.current = version
            for url, health in self.health.items():
                if health.status is Status.SERVING and version is not None and health.version != version:
                    self.health[url] = Health(Status.STALE, 0, health.version)

    def with_status(self, *statuses: Status) -> list[str]:
        """Return the servers in one of these states."""
        return [url for url, health in self.health.items() if health.status in statuses]

    def choose(self, avoid: Collection[str] = ()) -> str | None:
        """Return the server for the next request: of those in the best state the one with the fewest requests.

        Servers in ``avoid``, which have failed this request before, come last. None where all are stale.
        """
        for candidates in ([url for url in self.health if url not in avoid], list(avoid)):
            for statuses in ((Status.SERVING,), (Status.STARTING,), (Status.SUSPECT,), (Status.DEAD, Status.DRAINING)):
                able = [url for url in candidates if self.health[url].status in statuses]
                if able:
                    return min(able, key=self._in_flight.__getitem__)
        return None

    def begin(self, url: str) -> None:
        """Count a request to ``url`` as under way; :meth:`end` follows."""
        with self._lock:
            self._in_flight[url] += 1

    def end(self, url: str) -> None:
        """Count a request to ``url`` as done."""
        with self._lock:
            self._in_flight[url] -= 1

    def _set(self, url: str, after: Health, reason: str, strayed: bool = False) -> None:
        before, self.health[url] = self.health[url], after
        expected = after.status is before.status or (
            before.status in (Status.STARTING, Status.STALE) and after.status is Status.SERVING
        )
        if expected and not strayed:
            return
        level = logging.INFO if after.status is Status.SERVING and not strayed else logging.WARNING
        logger.log(level, "rollout server %s: %s -> %s (%s)", url, before.status.value, after.status.value, reason)
