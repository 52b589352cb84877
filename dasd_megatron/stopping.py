"""How a run is asked to stop: which signals mean it, who hears of them, and what happens when it takes too long.

``dasd train`` blocks the signals and has a thread that waits for them, so that its workers begin with them blocked and
none is lost while they import. A worker calls :func:`listen` first and :func:`spread` once it has peers. From then on
:func:`requested` is true on a rank that got a signal, and soon on global rank 0; whoever waits long asks it and raises
:class:`StopRequested`, which :func:`~dasd_megatron.training.parallel.on_selected_rank` raises on every rank. Between
steps the ranks agree by a collective.
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
"""The watch on training has stopped the run, which has been saved; somebody should look at it before it is started
again."""

# A job's signal reaches a worker twice: by itself, and forwarded by `dasd train`. Later ones mean impatience.
REPEAT_SECONDS = 2.0
_POLL_SECONDS = 0.5

_requested = threading.Event()
# A request, or the end of the run.
_news = threading.Event()
_told: int | None = None


class StopRequested(RuntimeError):
    """A signal asked the run to stop. Raised on every rank."""

    on_all_ranks = True
    exit_status = EXIT_STATUS


class WatchStopped(StopRequested):
    """``watch.action`` has stopped the run. Raised on every rank; only rank 0's message says why."""

    exit_status = WATCH_EXIT_STATUS


def requested() -> bool:
    return _requested.is_set()


def raise_if_requested() -> None:
    if requested():
        raise StopRequested("a signal asked the run to stop")


def is_repeat(signum: int, seconds: float) -> bool:
    """Whether a signal that comes ``seconds`` after the first is a copy of it, and not a demand to end at once."""
    return signum != signal.SIGINT and seconds < REPEAT_SECONDS


def listen(grace_seconds: float) -> None:
    """From now on the signals mean: stop at the next safe point. For the main thread of a worker.

    A second one, or ``grace_seconds`` after the first, ends the process at once.
    """
    global _told
    reader, _told = os.pipe()
    os.set_blocking(_told, False)
    for one in SIGNALS:
        signal.signal(one, lambda *_: None)
    # A handler in Python runs between two of the main thread's instructions, so not while that waits in a collective.
    # The descriptor is written at once.
    signal.set_wakeup_fd(_told, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_react, args=(reader, grace_seconds), name="signals", daemon=True).start()


def _react(reader: int, grace_seconds: float) -> None:
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
    """The next of ``SIGNALS`` that the descriptor tells of; None after ``timeout`` seconds, or where it was another."""
    while select.select([reader], [], [], timeout)[0]:
        signum = os.read(reader, 1)[0]
        if signum in SIGNALS:
            return signum
    return None


def spread(rank: int) -> Callable[[], None]:
    """Let global rank 0, which waits for rollouts, know of signals that any rank gets. After the process group has been
    started.

    Returns what ends it, to be called before the process does: a thread inside the store would abort an interpreter
    that shuts down.
    """
    from torch.distributed import PrefixStore, TCPStore

    # A connection of its own: the process group's may be waiting for something.
    limit = datetime.timedelta(seconds=30)
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    store = PrefixStore(f"dasd_stop/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    over = threading.Event()

    def exchange() -> None:
        try:
            while not _news.wait(_POLL_SECONDS):
                if rank == 0 and store.check(["requested"]):
                    os.write(_told, bytes([signal.SIGTERM]))
                    return
            if not over.is_set():
                store.set("requested", "1")
        # Whoever keeps the store is gone, and the run with it.
        except RuntimeError:
            return

    thread = threading.Thread(target=exchange, name="stop requests", daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        _news.set()
        thread.join(limit.total_seconds())

    return end
