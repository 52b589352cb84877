"""Graded rollouts for one training step or one evaluation: from problems to :class:`Sample` records."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from dasd_megatron.config import RolloutConfig
from dasd_megatron.data.prompts import Problem
from dasd_megatron.rollout.answers import Completion
from dasd_megatron.rollout.client import RolloutClient, sampling_params
from dasd_megatron.rollout.limits import step_limit
from dasd_megatron.samples import Sample, ids_array
from dasd_megatron.verify.grader import Grader
from dasd_megatron.verify.reward import own_reward


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
    """Sample one completion for every prompt, in order.

    However many prompts there are, it goes on as long as one request after the other is answered. Raises
    :class:`RolloutServerError` where none has been for ``config.step_timeout_seconds``.

    vocab_size: number of logits the model has, the tokenizer's unused ids included; answers with other ids are refused.
    None sets no bound.
    """

    async def bounded() -> list[Completion]:
        async with client, step_limit(config, client.urls, f"{len(prompts)} rollouts") as advance:
            return await client.generate(
                prompts,
                sampling_params(config, seeds, temperature=temperature, top_p=top_p),
                weight_version=weight_version,
                rows_per_request=rows_per_request,
                vocab_size=vocab_size,
                on_answer=advance,
            )

    return asyncio.run(bounded())


def sampled_text(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the tokens that the policy sampled, without special tokens.

    What others said, like a tool, is no part of it. Each stretch of sampled tokens is decoded by itself and begins a
    line, so that the words before a tool's answer do not run into those behind it.
    """
    ids, mask = completion.output_ids, completion.response_mask
    if mask is None:
        stretches = [ids]
    else:
        bounds = np.flatnonzero(np.diff(mask)) + 1
        parts = zip(np.split(ids, bounds), np.split(mask, bounds), strict=True)
        stretches = [part for part, sampled in parts if sampled[0]]
    return "\n".join(tokenizer.decode(stretch.tolist(), skip_special_tokens=True) for stretch in stretches)


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
    needs_feedback: bool = False,
) -> list[Sample]:
    """Grade ``completions``, of which ``samples_per_group`` neighbours belong to each problem, into samples.

    The reward is 1 or 0, or what ``verify.reward`` makes of it. Under ``verify.truncated_is_wrong`` completions that
    end for their length have no answer and reward 0.

    groups: the position of each problem in the order of training problems, or its index. places: the number of each
    completion among its problem's; None counts them up. needs_feedback: refuse a ``verify.reward`` that gives a number
    without a text.

    The text that is graded and stored is made of the sampled tokens (:func:`sampled_text`): they are what is trained
    on, and a server started without a tokenizer sends no text.
    """
    arrays = [ids_array(prompt) for prompt in prompts]
    repeated = [part for part in zip(problems, groups, arrays, strict=True) for _ in range(samples_per_group)]
    texts = [sampled_text(completion, tokenizer) for completion in completions]
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
            prompt_ids=prompt,
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
            sample.reward, sample.feedback = own_reward(grader.reward, sample, needs_feedback=needs_feedback)
    if grader.measures is not None:
        for sample in samples:
            sample.measures = grader.measures.of(sample)
    return samples
