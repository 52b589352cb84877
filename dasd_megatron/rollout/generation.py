"""Graded rollouts for one training step or one evaluation: from problems to :class:`Sample` records."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dasd_megatron import stopping
from dasd_megatron.config import RolloutConfig
from dasd_megatron.data.prompts import Problem
from dasd_megatron.rollout.access import api_key
from dasd_megatron.rollout.client import Completion, RolloutClient, RolloutError
from dasd_megatron.rollout.pool import ServerPool
from dasd_megatron.rollout.samples import Sample
from dasd_megatron.verify.grader import Grader
from dasd_megatron.verify.reward import own_reward

ALONGSIDE_SECONDS = 2.0
STOP_POLL_SECONDS = 0.2


def sampling_seed(*parts: int | str) -> int:
    """A 31-bit seed that depends on ``parts`` alone, so a retried or resumed rollout draws the same tokens."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def make_client(config: RolloutConfig, urls: Sequence[str], pool: ServerPool | None = None) -> RolloutClient:
    return RolloutClient(
        list(urls),
        connect_timeout=config.connect_timeout_seconds,
        request_timeout=config.request_timeout_seconds,
        max_retries=config.max_retries,
        backoff=config.backoff_seconds,
        max_in_flight=config.max_in_flight,
        pool=pool,
        router=config.router,
        api_key=api_key(),
    )


def generate(
    client: RolloutClient,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    config: RolloutConfig,
    *,
    temperature: float,
    top_p: float,
    weight_version: str | None,
    rows_per_request: int,
    vocab_size: int | None,
) -> list[Completion]:
    """One completion for every prompt, in order; :class:`RolloutError` after ``config.step_timeout_seconds`` at the
    latest.

    vocab_size: number of logits the model has, the tokenizer's unused ids included; answers with other ids are refused.
    None sets no bound.
    """

    async def bounded() -> list[Completion]:
        async with client, step_limit(config, client.urls, f"{len(prompts)} rollouts"):
            return await client.generate(
                prompts,
                sampling_params(config, seeds, temperature=temperature, top_p=top_p),
                weight_version=weight_version,
                rows_per_request=rows_per_request,
                vocab_size=vocab_size,
            )

    return asyncio.run(bounded())


def sampling_params(
    config: RolloutConfig, seeds: Sequence[int], *, temperature: float, top_p: float
) -> list[dict[str, Any]]:
    """The sampling parameters of a request with one row for each seed."""
    common = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": config.top_k,
        "max_new_tokens": config.max_new_tokens,
    }
    return [{**common, "sampling_seed": seed} for seed in seeds]


@contextlib.asynccontextmanager
async def step_limit(config: RolloutConfig, urls: Sequence[str], what: str) -> AsyncIterator[None]:
    """End the body after ``config.step_timeout_seconds`` with a :class:`RolloutError`, and when the run is asked to
    stop with a :class:`~dasd_megatron.stopping.StopRequested`."""

    async def watch() -> None:
        while not stopping.requested():
            await asyncio.sleep(STOP_POLL_SECONDS)
        limit.reschedule(0.0)

    try:
        async with asyncio.timeout(config.step_timeout_seconds) as limit:
            watcher = asyncio.ensure_future(watch())
            try:
                yield
            finally:
                watcher.cancel()
    except TimeoutError as error:
        stopping.raise_if_requested()
        raise RolloutError(
            ", ".join(urls),
            f"{what} did not finish within rollout.step_timeout_seconds={config.step_timeout_seconds:g}",
            1,
            "look at the rollout server's log, or raise rollout.step_timeout_seconds",
        ) from error


@contextlib.asynccontextmanager
async def meanwhile(work: Callable[[], Awaitable[None]] | None) -> AsyncIterator[None]:
    """Do ``work`` while the body runs; once that is done, wait for it a little longer and then cancel it. Its errors
    are raised."""
    if work is None:
        yield
        return
    task = asyncio.ensure_future(work())
    try:
        yield
        await asyncio.wait([task], timeout=ALONGSIDE_SECONDS)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def make_samples(
    problems: Sequence[Problem],
    groups: Sequence[int],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    grader: Grader,
    *,
    samples_per_group: int,
    tokenizer: PreTrainedTokenizerBase,
    places: Sequence[int] | None = None,
) -> list[Sample]:
    """Grade ``completions``, of which ``samples_per_group`` neighbours belong to each problem, into samples with reward
    1 or 0, or what ``verify.reward`` makes of them; under ``verify.truncated_is_wrong`` those that end for their length
    have no answer and 0.

    groups: the position of each problem in the order of training problems, or its index. places: of each completion
    among its problem's; None: counted up.

    What is graded and stored is the text of the tokens, without special tokens: the tokens are what is trained on, and
    a server started without a tokenizer sends no text.
    """
    repeated = [part for part in zip(problems, groups, prompts, strict=True) for _ in range(samples_per_group)]
    texts = [tokenizer.decode(completion.output_ids, skip_special_tokens=True) for completion in completions]
    cut = [grader.config.truncated_is_wrong and completion.finish_reason == "length" for completion in completions]
    graded = ["" if is_cut else text for text, is_cut in zip(texts, cut, strict=True)]
    verdicts = grader.grade(graded, [problem.expected_answer for problem, _, _ in repeated])
    samples = [
        Sample(
            group=group,
            sample=index % samples_per_group if places is None else places[index],
            position=group,
            problem_id=problem.id,
            problem=problem.problem,
            expected_answer=problem.expected_answer,
            reference_solution=problem.reference_solution,
            prompt_ids=list(prompt),
            response_ids=completion.output_ids,
            rollout_log_probs=completion.log_probs,
            text=text,
            finish_reason=completion.finish_reason,
            weight_versions=[list(span) for span in completion.weight_versions],
            reward=float(verdict.correct),
            predicted_answer=verdict.predicted_answer,
            timed_out=verdict.timed_out,
            response_mask=completion.response_mask,
        )
        for index, ((problem, group, prompt), completion, text, verdict) in enumerate(
            zip(repeated, completions, texts, verdicts, strict=True)
        )
    ]
    if grader.reward is not None:
        for sample in samples:
            sample.reward = own_reward(grader.reward, sample)
    return samples
