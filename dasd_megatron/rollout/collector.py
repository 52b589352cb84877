"""Collects the groups of rollouts that a step trains on: samples, grades, filters, and goes on while the trainer
computes.

One process has one, which talks to all servers; the work is done in a thread with an event loop. What is drawn, in
flight and ready is :class:`~dasd_megatron.rollout.buffer.GroupBuffer`'s to decide.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import dataclasses
import itertools
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from dasd_megatron import stopping
from dasd_megatron.config import Config
from dasd_megatron.data.order import DataOrder
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.errors import first_line
from dasd_megatron.plugins import PluginError, load_function
from dasd_megatron.rollout.answers import LOG_PROB_TOLERANCE, Completion
from dasd_megatron.rollout.buffer import BufferState, Counts, Group, GroupBuffer, make_group
from dasd_megatron.rollout.client import RolloutClient, sampling_params, sampling_seed
from dasd_megatron.rollout.grading import make_samples
from dasd_megatron.rollout.limits import STOP_POLL_SECONDS, meanwhile, step_limit
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.samples import Sample, mask_fault, version_name
from dasd_megatron.verify.grader import Grader

T = TypeVar("T")

STUCK_SECONDS = 30.0
CANCEL_SECONDS = 2.0  # a user's function may take its time to be cancelled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutRequest:
    """What a function of ``rollout.function`` is given: one prompt, and the sampling parameters of each response that
    is wanted to it."""

    problem: Problem
    prompt_ids: list[int]
    sampling_params: list[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase


class Generate(Protocol):
    """Samples one completion of each prompt (token ids) with the parameters at its place."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling_params: Sequence[dict[str, Any]]
    ) -> Awaitable[list[Completion]]: ...


@dataclass(frozen=True)
class Batch:
    """The groups of one step. ``grading_seconds``: of the wait for them, what came after the last response had been
    sampled."""

    groups: list[Group]
    counts: Counts
    grading_seconds: float

    def samples(self) -> list[Sample]:
        """All of them, group after group, each numbered by its group's place in the step."""
        for index, group in enumerate(self.groups):
            for sample in group.samples:
                sample.group = index
        return [sample for group in self.groups for sample in group.samples]


class Collector:
    """Draws the prompts of ``problems`` in the order of a :class:`~dasd_megatron.data.order.DataOrder` and collects
    their rollouts.

    :meth:`connect` and :meth:`after_sync` come before the first step. Methods are called from one thread and block; a
    step's rollouts may go on between them.

    Args:
        vocab_size: number of logits the model has.
        state: where to go on.
    """

    def __init__(
        self,
        config: Config,
        problems: Sequence[Problem],
        renderer: PromptRenderer,
        grader: Grader,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        state: BufferState,
    ):
        rollout = config.rollout
        self.config, self.problems, self.grader, self.vocab_size = config, problems, grader, vocab_size
        # The trainer uses its own while these are used in a thread, and tokenizers do not like that.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.renderer = copy.copy(renderer)
        self.renderer.tokenizer = self.tokenizer
        self.order = DataOrder(len(problems), config.run.seed, config.data.shuffle)
        self.buffer = GroupBuffer(
            config.batch.groups,
            over_sampling=rollout.over_sampling,
            filter_limit=rollout.filter_limit,
            wait_for_all=rollout.unfinished == "finish",
            max_staleness=rollout.max_staleness,
            state=_of_size(state, config.batch.samples_per_group),
        )
        self.keep = load_function(rollout.filter, "rollout.filter")
        self.function = load_function(rollout.function, "rollout.function")
        self._client: RolloutClient | None = None
        self._version = 0
        self._accepted: set[str] = set()
        self._steps = 0  # steps' worth of groups that are to be ready or in flight
        self._tasks: dict[asyncio.Task, list[int]] = {}
        self._failure: Exception | None = None
        self._sampled_at = 0.0
        self._suspended = self._closed = False
        self._loop = asyncio.new_event_loop()
        self._changed, self._open = asyncio.Event(), asyncio.Event()
        self._at_work = asyncio.Lock()
        threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True).start()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        # The work has limits of its own, longer than this only where nothing is done: a user's function must not block
        # the loop.
        limit = 2 * self.config.rollout.step_timeout_seconds + STUCK_SECONDS
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(limit)
        except concurrent.futures.TimeoutError as error:
            if future.done():
                raise
            function = self.config.rollout.function
            raise PluginError(
                f"rollouts are stuck for {limit:g} s: rollout.function={function} has to await what it waits for"
            ) from error

    def connect(self, client: RolloutClient) -> None:
        """Ask the servers of ``client`` from now on. What was in flight elsewhere is started again."""

        async def change() -> None:
            await self._break_off(list(self._tasks))
            old, self._client = self._client, client
            if old is not None:
                await old.aclose()

        self._run(change())

    def start_ahead(self, steps: int) -> None:
        """Go on collecting while the trainer computes, until the groups of the next ``steps`` steps are there; 0: no
        more."""

        async def start() -> None:
            self._steps = steps
            self._start()

        self._run(start())

    def take(self, alongside: Callable[[], Awaitable[None]] | None = None) -> Batch:
        """Wait for the groups of a step. ``alongside`` is done meanwhile, and cancelled where it is not done soon
        after.

        Raises:
            RolloutServerError: the servers failed, or ``rollout.step_timeout_seconds`` were over. Nothing is lost: it
            can be tried again. GraderError, PluginError: the rollouts cannot be graded or filtered.
        """
        return self._run(self._take(alongside))

    async def _take(self, alongside: Callable[[], Awaitable[None]] | None) -> Batch:
        started = time.perf_counter()
        self._steps = max(self._steps, 1)
        try:
            async with (
                step_limit(self.config.rollout, self._client.urls, "a step's rollouts, or their grading,"),
                meanwhile(alongside),
            ):
                self._start()
                while self._failure is None and not self.buffer.can_take():
                    self._changed.clear()
                    await self._changed.wait()
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    raise failure
        except BaseException:
            # Servers that go on with what nobody waits for would keep the next update waiting.
            await self._abort()
            raise
        groups, counts = self.buffer.take()
        self._steps -= 1
        if self.config.rollout.max_staleness == 0:
            # They would be too old for the next step.
            await self._abort()
        return Batch(groups, counts, max(0.0, time.perf_counter() - max(started, self._sampled_at)))

    def before_sync(self) -> None:
        """The servers are about to get other weights: wait for what is in flight, break it off or suspend it, by
        ``rollout.unfinished``."""
        self._run(self._before_sync())

    async def _before_sync(self) -> None:
        rollout = self.config.rollout
        if rollout.unfinished == "finish" and self._tasks:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rollout.step_timeout_seconds):
                    while self._tasks and not stopping.requested():
                        self._changed.clear()
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(STOP_POLL_SECONDS):
                                await self._changed.wait()
            if self._tasks and not stopping.requested():
                logger.warning(
                    "%d rollout requests are broken off and started again: not done within "
                    "rollout.step_timeout_seconds=%g",
                    len(self._tasks),
                    rollout.step_timeout_seconds,
                )
        self._open.clear()
        if rollout.unfinished == "retract" and self._tasks:
            self._suspended = True
            await self._client.pause_generation("retract")
        elif self._tasks:
            await self._abort()

    def after_sync(self, step: int) -> None:
        """The servers have the weights after ``step`` steps. Rollouts that are too old by now are started again."""
        self._run(self._after_sync(step))

    async def _after_sync(self, step: int) -> None:
        self._version = step
        self._accepted.clear()
        oldest = step - self.config.rollout.max_staleness if self.config.rollout.unfinished == "retract" else step
        self._accepted.update(version_name(version) for version in range(max(oldest, 0), step + 1))
        late = set(self.buffer.age(step))
        await self._break_off([task for task, positions in self._tasks.items() if late.intersection(positions)])
        await self._go_on()
        if isinstance(self._failure, RolloutServerError):
            logger.warning("rollouts ahead of their step failed and are started again: %s", self._failure)
            self._failure = None
        self._open.set()
        self._start()

    async def _go_on(self) -> None:
        if self._suspended:
            self._suspended = False
            await self._client.continue_generation()

    def start_over(self) -> None:
        """Forget what is in flight and ready: its prompts are sampled again after the next sync."""

        async def forget() -> None:
            self._open.clear()
            await self._abort()
            self.buffer.start_over()

        self._run(forget())

    def state(self) -> BufferState:
        async def read() -> BufferState:
            return self.buffer.state()

        return self._run(read())

    def close(self) -> None:
        """Break off what is in flight and end the thread. Another call does nothing."""
        if self._closed:
            return
        self._closed = True

        async def end() -> None:
            self._steps = 0
            await self._break_off(list(self._tasks))
            if self._client is not None:
                await self._go_on()
                await self._client.aclose()

        future = asyncio.run_coroutine_threadsafe(end(), self._loop)
        concurrent.futures.wait([future], timeout=STUCK_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)

    # In the thread of the event loop.

    def _start(self) -> None:
        """Start what is missing, unless something has failed that has to be dealt with first."""
        if self._failure is not None or not self._open.is_set():
            return
        started, size = self.buffer.start(self._steps, self._version), self.config.rollout.groups_per_request
        for first in range(0, len(started), size):
            positions = started[first : first + size]
            self._tasks[self._loop.create_task(self._collect(positions))] = positions

    async def _break_off(self, tasks: Sequence[asyncio.Task]) -> None:
        """Cancel them, and their prompts go back. Servers notice that the connection is gone."""
        for task in tasks:
            self.buffer.give_back(self._tasks.pop(task))
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_SECONDS)

    async def _abort(self) -> None:
        if not self._tasks:
            return
        await self._break_off(list(self._tasks))
        await self._client.abort_request()

    async def _collect(self, positions: list[int]) -> None:
        """Sample, grade and filter the groups of one request, and start what is then missing."""
        try:
            problems = [self.problems[self.order.indices(position, 1)[0]] for position in positions]
            prompts = await self._in_thread(lambda: [self.renderer.student(problem) for problem in problems])
            completions = await self._sample(positions, problems, prompts)
            self._sampled_at = time.perf_counter()
            graded = await self._in_thread(lambda: self._grade(positions, problems, prompts, completions))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever it is, the trainer has to hear of it
            self.buffer.give_back(self._tasks.pop(asyncio.current_task()))
            if self._failure is None:
                self._failure = error
        else:
            del self._tasks[asyncio.current_task()]
            for group, keep in graded:
                self.buffer.finish(group, keep)
            # Where time must not decide, what is missing is counted when nothing is on its way.
            if not (self.buffer.wait_for_all and self.buffer.in_flight):
                self._start()
        self._changed.set()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """``work`` in a thread, one at a time, since it uses the tokenizer. A user's function that hangs there must not
        keep the process from ending, as a pool's would."""
        done = self._loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if not done.done():
                done.set_exception(error) if error is not None else done.set_result(result)

        def run() -> None:
            try:
                result, error = work(), None
            except BaseException as caught:
                result, error = None, caught
            self._loop.call_soon_threadsafe(settle, result, error)

        async with self._at_work:
            threading.Thread(target=run, name="grading", daemon=True).start()
            return await done

    async def _sample(
        self, positions: list[int], problems: list[Problem], prompts: list[list[int]]
    ) -> list[Completion]:
        rollout, groups, n = self.config.rollout, self.config.batch.groups, self.config.batch.samples_per_group
        # A prompt's seeds are its own, however often and in whatever company it is sampled.
        params = [
            sampling_params(
                rollout,
                [
                    sampling_seed(self.config.run.seed, position // groups + 1, position % groups, sample)
                    for sample in range(n)
                ],
                temperature=rollout.temperature,
                top_p=rollout.top_p,
            )
            for position in positions
        ]
        if self.function is None:
            repeated = [prompt for prompt in prompts for _ in range(n)]
            return await self._generate(repeated, list(itertools.chain.from_iterable(params)))
        requests = [RolloutRequest(*parts, self.tokenizer) for parts in zip(problems, prompts, params, strict=True)]
        answers = await asyncio.gather(*map(self._own_rollout, requests))
        return list(itertools.chain.from_iterable(answers))

    async def _generate(
        self, prompts: Sequence[Sequence[int]], sampling_params: Sequence[dict[str, Any]]
    ) -> list[Completion]:
        while True:
            await self._open.wait()
            version = self._version
            try:
                return await self._client.generate(
                    prompts,
                    sampling_params,
                    weight_version=self._accepted,
                    rows_per_request=len(prompts),
                    vocab_size=self.vocab_size,
                )
            except RolloutServerError:
                # While weights change, servers refuse what comes; afterwards it is another matter.
                if self._open.is_set() and version == self._version:
                    raise

    async def _own_rollout(self, request: RolloutRequest) -> list[Completion]:
        where = f"rollout.function={self.config.rollout.function} on problem {request.problem.id}"
        try:
            completions = await self.function(request, self._generate)
        except RolloutServerError:  # of the servers
            raise
        except Exception as error:  # the user's code may raise anything
            raise PluginError(f"{where}: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(completions, list) or len(completions) != len(request.sampling_params):
            raise PluginError(
                f"{where} gave {completions!r:.80}; return a list of {len(request.sampling_params)} Completions"
            )
        for completion in completions:
            older = {version for version, _ in getattr(completion, "weight_versions", [])} - self._accepted
            if older:
                raise PluginError(
                    f"{where} gave a Completion of the weights {sorted(older)}, not of {sorted(self._accepted)}"
                )
            unsound = _unsound(completion, self.vocab_size, self.config.rollout.max_new_tokens)
            if unsound:
                raise PluginError(f"{where} gave a Completion with {unsound}")
        return completions

    def _grade(
        self, positions: list[int], problems: list[Problem], prompts: list[list[int]], completions: list[Completion]
    ) -> list[tuple[Group, bool]]:
        """The groups of one request, and which are to be trained on. In the worker's thread."""
        n = self.config.batch.samples_per_group
        samples = make_samples(
            problems, positions, prompts, completions, self.grader, samples_per_group=n, tokenizer=self.tokenizer
        )
        graded = []
        for index in range(len(positions)):
            members = samples[index * n : (index + 1) * n]
            graded.append((make_group(members), self._wanted(members)))
        return graded

    def _wanted(self, members: list[Sample]) -> bool:
        if self.keep is None:
            return True
        where = f"rollout.filter={self.config.rollout.filter} on problem {members[0].problem_id}"
        try:
            wanted = self.keep(members)
        except Exception as error:  # the user's code may raise anything
            raise PluginError(f"{where}: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(wanted, bool):
            raise PluginError(f"{where} gave {wanted!r:.80}; return True or False")
        return wanted


def _of_size(state: BufferState, samples_per_group: int) -> BufferState:
    """Of a run that goes on with another number of samples, prompts whose groups have the former one are sampled
    again."""
    other = [group.position for group in [*state.ready, *state.refused] if len(group.samples) != samples_per_group]
    ready, refused = (
        [group for group in groups if group.position not in other] for groups in (state.ready, state.refused)
    )
    return dataclasses.replace(state, pending=[*state.pending, *other], ready=ready, refused=refused)


def _unsound(completion: Any, vocab_size: int, max_new_tokens: int) -> str | None:
    """What is wrong with a response that did not come from a server straight away; None if nothing is."""
    if not isinstance(completion, Completion):
        return f"a {type(completion).__name__} in its place"
    ids, log_probs = completion.output_ids, completion.log_probs
    spans = sum(tokens for _, tokens in completion.weight_versions)
    if not len(ids) == len(log_probs) == spans > 0:
        return (
            f"{len(ids)} output_ids, {len(log_probs)} log_probs and weight_versions of {spans} tokens: one of each "
            "for every token"
        )
    if len(ids) > max_new_tokens:
        return f"{len(ids)} output_ids, more than rollout.max_new_tokens={max_new_tokens}"
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        return f"output_ids outside the vocabulary of {vocab_size}"
    if not all(math.isfinite(value) and value <= LOG_PROB_TOLERANCE for value in log_probs):
        return "log_probs that are none"
    return mask_fault(completion.response_mask, log_probs)
