"""Collection of the groups of rollouts that a step trains on: sampled, graded and filtered, also while the trainer
computes.

One process has one collector, which talks to all servers. The work is done in a thread with an event loop.
:class:`~dasd_megatron.rollout.buffer.GroupBuffer` decides what is drawn, in flight and ready.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from dasd_megatron import stopping
from dasd_megatron.config import BatchConfig, RolloutConfig
from dasd_megatron.data.order import DataOrder
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.teacher_prompts import TeacherPrompts
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.plugins import PluginError, call_own, describe_raised, load_function
from dasd_megatron.rollout.answers import Completion
from dasd_megatron.rollout.buffer import BufferState, Counts, Group, GroupBuffer, make_group
from dasd_megatron.rollout.client import RolloutClient, sampling_params
from dasd_megatron.rollout.grading import make_samples
from dasd_megatron.rollout.limits import STOP_POLL_SECONDS, meanwhile, step_limit
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.samples import Sample, log_probs_are_sound, mask_fault, sampling_seed, version_name
from dasd_megatron.verify.grader import Grader

T = TypeVar("T")

STUCK_SECONDS = 30.0
CANCEL_SECONDS = 2.0  # a user's function may take its time to be cancelled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutRequest:
    """Argument of a function of ``rollout.function``: one prompt, and the sampling parameters of each response that is
    wanted to it."""

    problem: Problem
    prompt_ids: list[int]
    sampling_params: list[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase


class Generate(Protocol):
    """Function that samples one completion of each prompt (token ids) with the parameters at its place."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling_params: Sequence[dict[str, Any]]
    ) -> Awaitable[list[Completion]]: ...


@dataclass(frozen=True)
class Batch:
    """The groups of one step.

    ``grading_seconds``: the part of the wait for them that came after the last response had been sampled.
    """

    groups: list[Group]
    counts: Counts
    grading_seconds: float

    def samples(self) -> list[Sample]:
        """Return all samples, group after group, each numbered by its group's place in the step."""
        for index, group in enumerate(self.groups):
            for sample in group.samples:
                sample.group = index
        return [sample for group in self.groups for sample in group.samples]


class Collector:
    """Collector that draws the prompts of ``problems`` in ``order`` and collects their rollouts.

    :meth:`connect` and :meth:`after_sync` come before the first step. Methods are called from one thread and block; a
    step's rollouts may go on between them.

    Args:
        order: its seed, the run's, seeds the sampling too.
        teacher: makes the teacher's prompts of the samples; None where no teacher is shown any.
        vocab_size: number of logits the model has.
        state: where to go on.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        batch: BatchConfig,
        *,
        problems: Sequence[Problem],
        order: DataOrder,
        renderer: PromptRenderer,
        teacher: TeacherPrompts | None = None,
        grader: Grader,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        state: BufferState,
    ):
        self.rollout, self.batch = rollout, batch
        self.problems, self.order, self.grader, self.vocab_size = problems, order, grader, vocab_size
        # The trainer uses its own tokenizer while this one is used in a thread, and a tokenizer bears one thread alone.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.renderer = self._own(renderer)
        self.teacher = None
        if teacher is not None:
            self.teacher = dataclasses.replace(teacher, renderer=self._own(teacher.renderer))
        self.buffer = GroupBuffer(
            batch.groups,
            over_sampling=rollout.over_sampling,
            filter_limit=rollout.filter_limit,
            wait_for_all=rollout.unfinished == "finish",
            max_staleness=rollout.max_staleness,
            state=_without_groups_of_other_size(state, batch.samples_per_group),
        )
        self.filter = load_function(rollout.filter, "rollout.filter")
        self.function = load_function(rollout.function, "rollout.function")
        self._client: RolloutClient | None = None
        self._version = 0
        self._accepted: set[str] = set()
        self._steps = 0
        """Number of steps whose groups are to be ready or in flight."""
        self._tasks: dict[asyncio.Task, list[int]] = {}
        self._failure: Exception | None = None
        # Files have no prompts of the teacher. A template may fail, and only take() can raise that everywhere.
        self._read_back = [*self.buffer.ready, *self.buffer.refused]
        self._sampled_at = 0.0
        self._suspended = self._closed = False
        self._loop = asyncio.new_event_loop()
        self._changed, self._open = asyncio.Event(), asyncio.Event()
        self._at_work = asyncio.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def _own(self, renderer: PromptRenderer) -> PromptRenderer:
        own = copy.copy(renderer)
        own.tokenizer = self.tokenizer
        return own

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` in the loop's thread and wait for it; raises PluginError where that is stuck or has ended."""
        # The work has shorter limits of its own. This one passes only where a user's function blocks the loop.
        limit = 2 * self.rollout.step_timeout_seconds + STUCK_SECONDS
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        deadline = time.monotonic() + limit
        while not concurrent.futures.wait([future], timeout=STOP_POLL_SECONDS).done:
            # A task that a user's function has started may end the loop by SystemExit.
            if not self._thread.is_alive():
                raise PluginError(
                    f"the thread of the rollouts has ended: rollout.function={self.rollout.function} must not raise "
                    "SystemExit in tasks of its own"
                )
            if time.monotonic() > deadline:
                raise PluginError(
                    f"rollouts are stuck for {limit:g} s: rollout.function={self.rollout.function} has to await what "
                    "it waits for"
                )
        return future.result()

    def connect(self, client: RolloutClient) -> None:
        """Ask the servers of ``client`` from now on. What was in flight elsewhere is started again."""

        async def change() -> None:
            await self._cancel(list(self._tasks))
            old, self._client = self._client, client
            if old is not None:
                await old.aclose()

        self._run(change())

    def start_ahead(self, steps: int) -> None:
        """Go on collecting while the trainer computes, until the groups of the next ``steps`` steps are there.

        0 steps end it.
        """

        async def start() -> None:
            self._steps = steps
            self._start_missing()

        self._run(start())

    def take(self, alongside: Callable[[], Awaitable[None]] | None = None) -> Batch:
        """Wait for the groups of a step.

        ``alongside`` is done meanwhile, and cancelled where it is not done soon after.

        Raises:
            RolloutServerError: the servers failed, or ``rollout.step_timeout_seconds`` were over. Nothing is lost, and
                the call can be made again.
            GraderError, PluginError: the rollouts cannot be graded or filtered.
        """
        return self._run(self._take(alongside))

    async def _take(self, alongside: Callable[[], Awaitable[None]] | None) -> Batch:
        started = time.perf_counter()
        self._steps = max(self._steps, 1)
        try:
            async with (
                step_limit(self.rollout, self._servers().urls, "a step's rollouts, or their grading,"),
                meanwhile(alongside),
            ):
                self._start_missing()
                await self._prepare_read_back()
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
        if self.rollout.max_staleness == 0:
            # What is still in flight would be too old for the next step.
            await self._abort()
        return Batch(groups, counts, max(0.0, time.perf_counter() - max(started, self._sampled_at)))

    async def _prepare_read_back(self) -> None:
        """Make the teacher's prompts of the groups that were read from a checkpoint, before a step takes the first."""
        if self._read_back:
            groups = self._read_back
            await self._in_thread(lambda: self._assign_teacher_prompts(groups))
            self._read_back = []

    def before_sync(self) -> None:
        """Prepare for other weights on the servers: what is in flight is waited for, broken off or suspended.

        ``rollout.unfinished`` says which.
        """
        self._run(self._before_sync())

    async def _before_sync(self) -> None:
        if self.rollout.unfinished == "finish":
            await self._wait_for_tasks()
        self._open.clear()
        if not self._tasks:
            return
        if self.rollout.unfinished == "retract":
            self._suspended = True
            await self._servers().pause_generation("retract")
        else:
            await self._abort()

    async def _wait_for_tasks(self) -> None:
        """Wait until nothing is in flight, for ``rollout.step_timeout_seconds``, or until the run is asked to stop."""
        limit = self.rollout.step_timeout_seconds
        end = self._loop.time() + limit
        while self._tasks and not stopping.requested():
            left = end - self._loop.time()
            if left <= 0:
                logger.warning(
                    "%d rollout requests are broken off and started again: not done within "
                    "rollout.step_timeout_seconds=%g",
                    len(self._tasks),
                    limit,
                )
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left, STOP_POLL_SECONDS))

    def after_sync(self, step: int) -> None:
        """Go on with the weights after ``step`` steps, which the servers have now.

        Rollouts that are too old by now are started again.
        """
        self._run(self._after_sync(step))

    async def _after_sync(self, step: int) -> None:
        self._version = step
        self._accepted.clear()
        oldest = step - self.rollout.max_staleness if self.rollout.unfinished == "retract" else step
        self._accepted.update(version_name(version) for version in range(max(oldest, 0), step + 1))
        late = set(self.buffer.age(step))
        await self._cancel([task for task, positions in self._tasks.items() if late.intersection(positions)])
        await self._end_suspension()
        if isinstance(self._failure, RolloutServerError):
            logger.warning("rollouts ahead of their step failed and are started again: %s", self._failure)
            self._failure = None
        self._open.set()
        self._start_missing()

    async def _end_suspension(self) -> None:
        if self._suspended:
            self._suspended = False
            await self._servers().continue_generation()

    def _servers(self) -> RolloutClient:
        if self._client is None:
            raise RuntimeError("connect() comes before the first step")
        return self._client

    def start_over(self) -> None:
        """Forget what is in flight and ready: its prompts are sampled again after the next sync."""

        async def forget() -> None:
            self._open.clear()
            await self._abort()
            self.buffer.start_over()

        self._run(forget())

    def state(self) -> BufferState:
        """Return what has to be saved, to go on there."""

        async def read() -> BufferState:
            return self.buffer.state()

        return self._run(read())

    def close(self) -> None:
        """Break off what is in flight and end the thread. Another call does nothing."""
        if self._closed:
            return
        self._closed = True
        if not self._thread.is_alive():
            return

        async def end() -> None:
            self._steps = 0
            await self._cancel(list(self._tasks))
            if self._client is not None:
                await self._end_suspension()
                await self._client.aclose()

        future = asyncio.run_coroutine_threadsafe(end(), self._loop)
        concurrent.futures.wait([future], timeout=STUCK_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)

    # The following methods run in the thread of the event loop.

    def _start_missing(self) -> None:
        """Start what is missing, unless something has failed that has to be dealt with first."""
        if self._failure is not None or not self._open.is_set():
            return
        started, size = self.buffer.start(self._steps, self._version), self.rollout.groups_per_request
        for first in range(0, len(started), size):
            positions = started[first : first + size]
            self._tasks[self._loop.create_task(self._collect(positions))] = positions

    async def _cancel(self, tasks: Sequence[asyncio.Task]) -> None:
        """Cancel tasks and give their prompts back. Servers notice that the connection is gone."""
        for task in tasks:
            self.buffer.give_back(self._tasks.pop(task))
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_SECONDS)

    async def _abort(self) -> None:
        if not self._tasks:
            return
        await self._cancel(list(self._tasks))
        await self._servers().abort_request()

    async def _collect(self, positions: list[int]) -> None:
        """Sample, grade and filter the groups of one request, and start what is then missing."""
        task = asyncio.current_task()
        assert task is not None, "it runs as a task"
        try:
            problems = [self.problems[self.order.indices(position, 1)[0]] for position in positions]
            prompts = await self._in_thread(lambda: [self.renderer.student(problem) for problem in problems])
            completions = await self._sample(positions, problems, prompts)
            self._sampled_at = time.perf_counter()
            graded = await self._in_thread(lambda: self._grade(positions, problems, prompts, completions))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever it is, the trainer has to hear of it
            self.buffer.give_back(self._tasks.pop(task))
            if self._failure is None:
                self._failure = error
        else:
            del self._tasks[task]
            for group, keep in graded:
                self.buffer.finish(group, keep)
            # Where time must not decide, missing groups are counted when nothing is on its way.
            if not (self.buffer.wait_for_all and self.buffer.in_flight):
                self._start_missing()
        self._changed.set()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread, one at a time, since it uses the tokenizer.

        A user's function that hangs there must not keep the process from ending, as a thread of a pool would.
        """
        done = self._loop.create_future()

        def settle(result: T | None, error: Exception | None) -> None:
            if not done.done():
                done.set_exception(error) if error is not None else done.set_result(result)

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except Exception as caught:
                # A future cannot hold StopIteration.
                error = PluginError(describe_raised(caught)) if isinstance(caught, StopIteration) else caught
            # SystemExit would end the thread of the loop when it is raised there, and the run would wait for ever.
            except BaseException as caught:
                error = PluginError(f"grading: {describe_raised(caught)}")
            self._loop.call_soon_threadsafe(settle, result, error)

        async with self._at_work:
            threading.Thread(target=run, name="grading", daemon=True).start()
            return await done

    async def _sample(
        self, positions: list[int], problems: list[Problem], prompts: list[list[int]]
    ) -> list[Completion]:
        n = self.batch.samples_per_group
        params = [self._params(position) for position in positions]
        if self.function is None:
            repeated = [prompt for prompt in prompts for _ in range(n)]
            return await self._generate(repeated, list(itertools.chain.from_iterable(params)))
        requests = [
            RolloutRequest(problem, list(prompt), sampling, self.tokenizer)
            for problem, prompt, sampling in zip(problems, prompts, params, strict=True)
        ]
        answers = await asyncio.gather(*(self._call_function(self.function, request) for request in requests))
        return list(itertools.chain.from_iterable(answers))

    def _params(self, position: int) -> list[dict[str, Any]]:
        """Return the sampling parameters of a prompt's responses.

        A prompt's seeds are its own, however often and with whatever others it is sampled.
        """
        groups, n = self.batch.groups, self.batch.samples_per_group
        seeds = [
            sampling_seed(self.order.seed, position // groups + 1, position % groups, sample) for sample in range(n)
        ]
        return sampling_params(self.rollout, seeds, temperature=self.rollout.temperature, top_p=self.rollout.top_p)

    async def _generate(
        self, prompts: Sequence[Sequence[int]], sampling_params: Sequence[dict[str, Any]]
    ) -> list[Completion]:
        while True:
            await self._open.wait()
            version = self._version
            try:
                return await self._servers().generate(
                    prompts,
                    sampling_params,
                    weight_version=self._accepted,
                    rows_per_request=len(prompts),
                    vocab_size=self.vocab_size,
                )
            except RolloutServerError:
                # While weights change, servers refuse what comes, and it is asked again afterwards.
                if self._open.is_set() and version == self._version:
                    raise

    async def _call_function(self, function: Callable[..., Any], request: RolloutRequest) -> list[Completion]:
        """Let a user's function sample one prompt and check what it returns; raises PluginError."""
        where = f"rollout.function={self.rollout.function} on problem {request.problem.id}"
        try:
            completions = await function(request, self._generate)
        # A server's fault is not the function's, and the collector cancels what it no longer needs.
        except (RolloutServerError, asyncio.CancelledError):
            raise
        # The user's code may raise anything. SystemExit would end the thread of the loop.
        except BaseException as error:
            raise PluginError(f"{where}: {describe_raised(error)}") from error
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
            fault = completion_fault(completion, self.vocab_size, self.rollout.max_new_tokens)
            if fault:
                raise PluginError(f"{where} gave a Completion with {fault}")
        return completions

    def _grade(
        self, positions: list[int], problems: list[Problem], prompts: list[list[int]], completions: list[Completion]
    ) -> list[tuple[Group, bool]]:
        """Return the groups of one request, and whether each is to be trained on; runs in the worker's thread."""
        n = self.batch.samples_per_group
        samples = make_samples(
            problems,
            positions,
            prompts,
            completions,
            self.grader,
            samples_per_group=n,
            tokenizer=self.tokenizer,
            needs_feedback=self.teacher is not None and "feedback" in self.teacher.settings.privileged,
        )
        graded = []
        for index in range(len(positions)):
            members = samples[index * n : (index + 1) * n]
            group = make_group(members)
            self._assign_teacher_prompts([group])
            graded.append((group, self._passes_filter(members)))
        return graded

    def _assign_teacher_prompts(self, groups: Sequence[Group]) -> None:
        if self.teacher is not None:
            for group in groups:
                self.teacher.assign(group.samples)

    def _passes_filter(self, members: list[Sample]) -> bool:
        if self.filter is None:
            return True
        where = f"rollout.filter={self.rollout.filter} on problem {members[0].problem_id}"
        own_filter = self.filter
        wanted = call_own(
            lambda: own_filter([sample.copy() for sample in members]), lambda text: PluginError(f"{where}: {text}")
        )
        if not isinstance(wanted, bool):
            raise PluginError(f"{where} gave {wanted!r:.80}; return True or False")
        return wanted


def _without_groups_of_other_size(state: BufferState, samples_per_group: int) -> BufferState:
    """Let prompts whose groups have another number of samples be sampled again.

    There are such groups where a run goes on with another number of samples.
    """
    other = [group.position for group in [*state.ready, *state.refused] if len(group.samples) != samples_per_group]
    ready, refused = (
        [group for group in groups if group.position not in other] for groups in (state.ready, state.refused)
    )
    return dataclasses.replace(state, pending=[*state.pending, *other], ready=ready, refused=refused)


def completion_fault(completion: Any, vocab_size: int, max_new_tokens: int) -> str | None:
    """Return the fault of a response that did not come from a server straight away; None for a sound one."""
    if not isinstance(completion, Completion):
        return f"a {type(completion).__name__} in its place"
    try:
        # A function may have put lists into a completion that it was given.
        completion.use_arrays()
    except ValueError as error:
        return f"fields that cannot be used: {error}"
    if not isinstance(completion.finish_reason, str):
        return f"finish_reason={completion.finish_reason!r:.80}, which is no text"
    ids, log_probs = completion.output_ids, completion.log_probs
    spans = sum(tokens for _, tokens in completion.weight_versions)
    if not len(ids) == len(log_probs) == spans > 0:
        return (
            f"{len(ids)} output_ids, {len(log_probs)} log_probs and weight_versions of {spans} tokens: one of each "
            "for every token"
        )
    if len(ids) > max_new_tokens:
        return f"{len(ids)} output_ids, more than rollout.max_new_tokens={max_new_tokens}"
    if ids.min() < 0 or ids.max() >= vocab_size:
        return f"output_ids outside the vocabulary of {vocab_size}"
    if not log_probs_are_sound(log_probs):
        return "log_probs that are none"
    return mask_fault(completion.response_mask, log_probs)
