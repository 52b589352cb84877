"""Requests to stop a run: the signals that ask for it, the ranks that hear of them, and the limit until the end.

``dasd train`` blocks the signals and has a thread that waits for them. Its workers begin with the signals blocked, so
that none is lost while they import. A worker calls :func:`listen` first and :func:`spread` once it has peers. From then
on :func:`requested` is true on a rank that got a signal, and soon on global rank 0. Code that waits for long asks it
and raises :class:`StopRequested`, which :func:`~dasd_megatron.training.parallel.on_selected_rank` raises on every rank.
Between steps the ranks agree by a collective.
"""

from __future__ import annotations

import datetime
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_STATUS = os.EX_TEMPFAIL
"""75: the run has been saved and is to be started again with ``resume=auto``."""
WATCH_EXIT_STATUS = 76
"""The watch on training has stopped the run, which has been saved. Somebody should look at it before it is started
again."""

REPEAT_SECONDS = 2.0
"""A job's signal reaches a worker twice within this time: by itself, and forwarded by ``dasd train``."""
_POLL_SECONDS = 0.5

_requested = threading.Event()
# A request and the end of the run both set this, so that the watching thread wakes up for either.
_news = threading.Event()
_wakeup_descriptor: int | None = None


class StopRequested(RuntimeError):
    """A signal asked the run to stop. Raised on every rank."""

    on_all_ranks = True
    exit_status = EXIT_STATUS


class WatchStopped(StopRequested):
    """``watch.action`` has stopped the run. Raised on every rank; only rank 0's message says why."""

    exit_status = WATCH_EXIT_STATUS


def requested() -> bool:
    """Return whether this rank knows of a request to stop."""
    return _requested.is_set()


def raise_if_requested() -> None:
    """Raise :class:`StopRequested` if this rank knows of a request to stop."""
    if requested():
        raise StopRequested("a signal asked the run to stop")


def is_repeat(signum: int, seconds: float) -> bool:
    """Return whether a signal that comes ``seconds`` after the first is a copy of it, and not a demand to end at
    once."""
    return signum != signal.SIGINT and seconds < REPEAT_SECONDS


def listen(grace_seconds: float) -> None:
    """Take the signals as requests to stop at the next safe point. Called in the main thread of a worker.

    A second signal, or ``grace_seconds`` after the first, ends the process at once.
    """
    global _wakeup_descriptor
    reader, _wakeup_descriptor = os.pipe()
    os.set_blocking(_wakeup_descriptor, False)
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: None)
    # Python runs a handler between two instructions of the main thread, so not while that waits in a collective. The
    # descriptor is written at once.
    signal.set_wakeup_fd(_wakeup_descriptor, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_react, args=(reader, grace_seconds), name="signals", daemon=True).start()


def _react(reader: int, grace_seconds: float) -> None:
    """Note the first signal, and end the process at a second one or when the grace is over."""
    while _next_signal(reader, None) is None:
        pass
    began = time.monotonic()
    _requested.set()
    _news.set()
    while True:
        signum = _next_signal(reader, max(0.0, began + grace_seconds - time.monotonic()))
        if signum is None:
            print(
                f"dasd: not saved within checkpoint.grace_seconds={grace_seconds:g} of the signal",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_STATUS)
        if not is_repeat(signum, time.monotonic() - began):
            os._exit(128 + signum)


def _next_signal(reader: int, timeout: float | None) -> int | None:
    """Return the next of ``SIGNALS`` that the descriptor names; None after ``timeout`` seconds."""
    while select.select([reader], [], [], timeout)[0]:
        signum = os.read(reader, 1)[0]
        if signum in SIGNALS:
            return signum
    return None


def spread(rank: int) -> Callable[[], None]:
    """Let global rank 0, which waits for rollouts, know of signals that any rank gets.

    Called after :func:`listen`, once the process group has been started. Returns the function that ends the exchange.
    It has to be called before the process ends: a thread inside the store would abort an interpreter that shuts down.
    """
    from torch.distributed import PrefixStore, TCPStore

    if _wakeup_descriptor is None:
        raise RuntimeError("spread() comes after listen()")
    wakeup_descriptor = _wakeup_descriptor
    # The exchange has a connection of its own, because the process group's may be waiting for something.
    limit = datetime.timedelta(seconds=30)
    server = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    store = PrefixStore(f"dasd_stop/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)

    over = threading.Event()

    def exchange() -> None:
        try:
            while not _news.wait(_POLL_SECONDS):
                if rank == 0 and store.check(["requested"]):
                    os.write(wakeup_descriptor, bytes([signal.SIGTERM]))
                    return
            if not over.is_set():
                store.set("requested", "1")
        # The process that keeps the store is gone, and the run with it.
        except RuntimeError:
            return

    thread = threading.Thread(target=exchange, name="stop requests", daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        _news.set()
        thread.join(limit.total_seconds())

    return end
