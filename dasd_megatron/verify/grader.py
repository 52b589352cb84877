"""Grading responses against expected answers, in a pool of worker processes that can be killed."""

from __future__ import annotations

import logging
import multiprocessing.popen_spawn_posix
import multiprocessing.spawn
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import pebble

from dasd_megatron.config import VerifyConfig
from dasd_megatron.plugins import load_function
from dasd_megatron.verify.answers import extract_answer
from dasd_megatron.verify.comparison import compare_answers
from dasd_megatron.verify.measures import Measures
from dasd_megatron.verify.symbolic import prepare_worker, symbolically_equal

logger = logging.getLogger(__name__)

STARTUP_TIMEOUT_SECONDS = 120.0
_TRIES = 2
_PROBE = ("2x", "x+x")

Pair = tuple[str, str]


class GraderError(RuntimeError):
    """The grading workers cannot be started, or the grader was used after it was closed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The grade of a response. ``predicted_answer`` is None where the response marks no answer, or a longer one than
    the limit."""

    correct: bool
    predicted_answer: str | None
    timed_out: bool


class _Attempt(NamedTuple):
    """Comparisons of pairs by the workers."""

    results: dict[Pair, bool]
    """Without the pairs whose comparison took too long."""
    died: list[Pair]
    """Pairs whose worker died."""


class Grader:
    """Grader of responses: a context manager that owns ``config.workers`` processes.

    An answer is compared by text and as a plain number first
    (:func:`~dasd_megatron.verify.comparison.compare_answers`). An answer that this leaves open needs algebra, which a
    worker process does. The first such answer starts the workers, which takes about two seconds. With ``workers=0``
    such an answer is wrong.

    Algebra can take minutes and any amount of memory on a hostile answer. So the worker is killed after
    ``config.timeout_seconds``, and its memory has a limit
    (:data:`~dasd_megatron.verify.symbolic.MEMORY_LIMIT_BYTES`).

    :meth:`grade` may be called from any thread; concurrent calls that need workers take turns.
    """

    def __init__(self, config: VerifyConfig) -> None:
        if config.workers < 0:
            raise ValueError(f"verify.workers is {config.workers}; it must be 0 or more")
        if config.timeout_seconds <= 0:
            raise ValueError(f"verify.timeout_seconds is {config.timeout_seconds}; it must be over 0")
        if config.max_answer_chars < 1:
            raise ValueError(f"verify.max_answer_chars is {config.max_answer_chars}; it must be at least 1")
        self.config = config
        self.reward = load_function(config.reward, "verify.reward")
        """The user's own reward function, or None."""
        measures = load_function(config.measures, "verify.measures")
        self.measures = None if measures is None else Measures(measures)
        """The user's own measures of graded samples, or None."""
        self._pool: pebble.ProcessPool | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, after a :meth:`grade` that is under way in another thread. Harmless when called twice."""
        with self._lock:
            self._closed = True
            self._stop_pool()

    def grade(self, responses: Sequence[str], expected_answers: Sequence[str]) -> list[Verdict]:
        """Grade each response against the expected answer at the same place.

        An answer longer than ``config.max_answer_chars`` is wrong without a comparison. A comparison over its time
        limit is wrong with ``timed_out`` set, and so is one whose worker died twice. Equal pairs of answers are
        compared once.

        Raises:
            ValueError: the two sequences differ in length.
            GraderError: workers are needed and cannot be started, or the grader is closed.
        """
        if len(responses) != len(expected_answers):
            raise ValueError(
                f"{len(responses)} responses, but {len(expected_answers)} expected answers; give one for each"
            )
        if self._closed:
            raise GraderError("the grader is closed; grade inside its with block")
        pairs = [
            (self._capped(extract_answer(response)), expected)
            for response, expected in zip(responses, expected_answers, strict=True)
        ]
        # The value is None where a comparison did not end in time.
        results: dict[Pair, bool | None] = {}
        undecided: list[Pair] = []
        for predicted, expected in dict.fromkeys(pairs):
            if predicted is None:
                continue
            decision = compare_answers(predicted, expected)
            results[predicted, expected] = bool(decision)
            if decision is None and self.config.workers:
                undecided.append((predicted, expected))
        if undecided:
            results |= self._compare_in_workers(undecided)
        return [
            Verdict(correct=False, predicted_answer=None, timed_out=False)
            if predicted is None
            else Verdict(
                correct=bool(results[predicted, expected]),
                predicted_answer=predicted,
                timed_out=results[predicted, expected] is None,
            )
            for predicted, expected in pairs
        ]

    def _capped(self, answer: str | None) -> str | None:
        return None if answer is not None and len(answer) > self.config.max_answer_chars else answer

    def _compare_in_workers(self, pairs: list[Pair]) -> dict[Pair, bool | None]:
        """Return for each pair whether algebra finds it equal; None where no comparison ended in time."""
        results: dict[Pair, bool | None] = dict.fromkeys(pairs)
        remaining = pairs
        with self._lock:
            for _ in range(_TRIES):
                attempt = self._try_pairs(remaining)
                results |= attempt.results
                remaining = attempt.died
                if not remaining:
                    break
        for predicted, expected in remaining:
            logger.warning(
                "the grading worker died %d times over answer %.80r (expected %.80r); it counts as timed out",
                _TRIES,
                predicted,
                expected,
            )
        return results

    def _try_pairs(self, pairs: list[Pair]) -> _Attempt:
        pool = self._running_pool()
        timeout = self.config.timeout_seconds
        # The pool itself ends a hanging answer at ``timeout``, so only a pool that has stopped working passes this.
        deadline = time.monotonic() + STARTUP_TIMEOUT_SECONDS + 2 * timeout * len(pairs)
        try:
            futures = [pool.schedule(symbolically_equal, args=(*pair, timeout), timeout=timeout) for pair in pairs]
        except RuntimeError:
            # A worker that dies while idle breaks a pebble pool.
            return _Attempt({}, pairs)
        results: dict[Pair, bool] = {}
        died: list[Pair] = []
        for pair, future in zip(pairs, futures, strict=True):
            try:
                results[pair] = _result(pool, future, deadline)
            except FutureTimeoutError:
                logger.info(
                    "grading answer %.80r (expected %.80r) took over %g s; it counts as timed out", *pair, timeout
                )
            except (pebble.ProcessExpired, BrokenProcessPool):
                died.append(pair)
            # An error of sympy that nobody foresaw must cost one reward and not the run.
            except Exception:
                logger.warning(
                    "algebra failed on answer %.80r (expected %.80r); it counts as wrong", *pair, exc_info=True
                )
                results[pair] = False
        if time.monotonic() > deadline:
            self._stop_pool()
        return _Attempt(results, died)

    def _running_pool(self) -> pebble.ProcessPool:
        """Return the pool of workers, started and probed if there is none that works.

        Raises:
            GraderError: the workers do not start, or the grader is closed.
        """
        if self._closed:
            raise GraderError("the grader is closed; grade inside its with block")
        if self._pool is not None and not self._pool.active:
            self._stop_pool()
        if self._pool is None:
            self._pool = pebble.ProcessPool(self.config.workers, initializer=prepare_worker, context=_WorkerContext())
            try:
                probe = self._pool.schedule(symbolically_equal, args=(*_PROBE, STARTUP_TIMEOUT_SECONDS))
                works = _result(self._pool, probe, time.monotonic() + STARTUP_TIMEOUT_SECONDS)
            except Exception as error:
                self._stop_pool()
                raise GraderError(
                    f"the grading workers do not start ({type(error).__name__}: {error}); their error stands above. "
                    "Check that math-verify[antlr4_9_3] is installed, or set verify.workers=0"
                ) from error
            if not works:
                self._stop_pool()
                raise GraderError(
                    "the grading workers do not find 2x equal to x+x; install math-verify[antlr4_9_3] with its own "
                    "antlr4 runtime"
                )
        return self._pool

    def _stop_pool(self) -> None:
        if self._pool is None:
            return
        pool = self._pool
        self._pool = None
        pool.stop()
        pool.join()


def _result(pool: pebble.ProcessPool, future: Future[bool], deadline: float) -> bool:
    """Return the future's result, or raise its error.

    Raises:
        BrokenProcessPool: at ``deadline``, or when the pool has died, which leaves its futures open.
    """
    while not wait([future], timeout=0.5).done:
        if not pool.active or time.monotonic() > deadline:
            raise BrokenProcessPool("the pool stopped working")
    return future.result()


class _WorkerProcess(SpawnProcess):
    """A spawned process that does not import its parent's main module.

    multiprocessing lets a spawned child import it, for functions that are defined there. Under a trainer that import is
    torch and Megatron, seconds and gigabytes in each worker, and there is no public switch.
    """

    _launch_lock = threading.Lock()

    @staticmethod
    def _Popen(process: BaseProcess) -> multiprocessing.popen_spawn_posix.Popen:
        launching_thread = threading.get_ident()
        with _WorkerProcess._launch_lock:
            original = multiprocessing.spawn.get_preparation_data

            def without_main(name: str) -> dict[str, Any]:
                data = original(name)
                if threading.get_ident() == launching_thread:
                    data.pop("init_main_from_name", None)
                    data.pop("init_main_from_path", None)
                return data

            multiprocessing.spawn.get_preparation_data = without_main
            try:
                return multiprocessing.popen_spawn_posix.Popen(process)
            finally:
                multiprocessing.spawn.get_preparation_data = original


class _WorkerContext(SpawnContext):
    Process = _WorkerProcess
