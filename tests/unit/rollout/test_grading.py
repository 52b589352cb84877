"""Rewards come from the sampled tokens, whatever text the server sends, and the vocabulary's size reaches the
client."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable

import orjson
import pytest

from dasd_megatron.config import RolloutConfig, VerifyConfig
from dasd_megatron.data.prompts import Problem
from dasd_megatron.models.tiny import character_tokenizer
from dasd_megatron.rollout.answers import Answer, Completion
from dasd_megatron.rollout.client import RolloutClient, make_client
from dasd_megatron.rollout.grading import generate, make_samples
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.verify.grader import Grader

TOKENIZER = character_tokenizer()
PROBLEMS = [Problem("a", "1+1 =", "2", ""), Problem("b", "1+2 =", "3", "")]


def completion(response: str, server_text: str) -> Completion:
    ids = [*TOKENIZER.encode(response), TOKENIZER.eos_token_id]
    return Completion(ids, [-0.5] * len(ids), "stop", [("7", len(ids))], server_text)


@pytest.mark.parametrize("server_text", ["", "#### 2", "#### 3"], ids=["no text", "another text", "yet another text"])
def test_rewards_and_texts_are_those_of_the_tokens(server_text: str) -> None:
    responses = ["#### 2", "#### 3", "#### 3", "#### 2"]
    completions = [completion(response, server_text) for response in responses]
    with Grader(VerifyConfig(workers=0)) as grader:
        samples = make_samples(
            PROBLEMS, [4, 5], [[1], [2]], completions, grader, samples_per_group=2, tokenizer=TOKENIZER
        )
    assert [sample.reward for sample in samples] == [1.0, 0.0, 1.0, 0.0]
    assert [sample.predicted_answer for sample in samples] == ["2", "3", "3", "2"]
    assert [sample.text for sample in samples] == responses  # without the end token
    assert [sample.response_ids is c.output_ids for sample, c in zip(samples, completions, strict=True)] == [
        True
    ] * 4  # with it
    assert [(sample.problem_id, sample.group, sample.sample) for sample in samples] == [
        ("a", 4, 0),
        ("a", 4, 1),
        ("b", 5, 0),
        ("b", 5, 1),
    ]


@pytest.mark.parametrize("truncated_is_wrong", [False, True])
def test_a_response_cut_short_counts_by_configuration(truncated_is_wrong: bool) -> None:
    completions = [completion("#### 2", ""), dataclasses.replace(completion("#### 2", ""), finish_reason="length")]
    with Grader(VerifyConfig(workers=0, truncated_is_wrong=truncated_is_wrong)) as grader:
        samples = make_samples(PROBLEMS[:1], [0], [[1]], completions, grader, samples_per_group=2, tokenizer=TOKENIZER)
    assert [sample.reward for sample in samples] == [1.0, 0.0 if truncated_is_wrong else 1.0]
    assert [sample.predicted_answer for sample in samples] == ["2", None if truncated_is_wrong else "2"]
    assert [sample.text for sample in samples] == ["#### 2", "#### 2"]


def answering(token: int) -> Callable[..., Awaitable[Answer]]:
    """In the place of a request: an answer of one row with this one token."""

    async def answer(*_args: object, **_options: object) -> Answer:
        meta = {
            "finish_reason": {"type": "length"},
            "weight_version": "7",
            "output_token_logprobs": [[-0.5, token, None]],
        }
        return Answer("/generate", 200, orjson.dumps([{"text": "", "output_ids": [token], "meta_info": meta}]))

    return answer


@pytest.mark.parametrize(("vocab_size", "accepted"), [(None, True), (100, True), (99, False)])
def test_the_vocabulary_bounds_what_servers_answer(
    vocab_size: int | None, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RolloutClient, "_exchange", answering(99))
    config = RolloutConfig(max_new_tokens=1, max_prompt_tokens=8, max_retries=0)
    options = {"temperature": 1.0, "top_p": 1.0, "weight_version": "7", "rows_per_request": 1, "vocab_size": vocab_size}
    client = make_client(config, ["http://server"])
    if accepted:
        assert [c.output_ids.tolist() for c in generate(client, [[1]], [0], config, **options)] == [[99]]
    else:
        with pytest.raises(RolloutServerError, match="id 99 of token 0 is outside the vocabulary of 99"):
            generate(client, [[1]], [0], config, **options)


def masked(parts: list[tuple[str, int]]) -> Completion:
    """Return a completion of stretches of text, each sampled (1) or of a tool (0)."""
    stretches = [(TOKENIZER.encode(text), sampled) for text, sampled in parts]
    ids = [token for stretch, _ in stretches for token in stretch]
    mask = [sampled for stretch, sampled in stretches for _ in stretch]
    return Completion(ids, [-0.5 * sampled for sampled in mask], "stop", [("7", len(ids))], "", mask)


@pytest.mark.parametrize(
    ("parts", "text", "answer"),
    [
        ([("I do not know", 1), ("\n#### 42\n", 0), ("bye", 1)], "I do not know\nbye", None),
        # A mark that the policy writes and an answer that the tool gives are no answer together.
        ([("\\boxed{", 1), ("42", 0), ("}", 1)], "\\boxed{\n}", None),
        ([("#### 4", 1), (" and ", 0), ("2", 1)], "#### 4\n2", "4"),
        ([("#### 42\n", 0), ("#### 41", 1)], "#### 41", "41"),
        ([("#### 42", 1), ("\n#### 41", 0)], "#### 42", "42"),
    ],
)
def test_what_a_tool_said_is_no_answer(parts: list[tuple[str, int]], text: str, answer: str | None) -> None:
    problem = Problem("a", "6*7 =", "42", "")
    with Grader(VerifyConfig(workers=0)) as grader:
        [sample] = make_samples(
            [problem], [0], [[1]], [masked(parts)], grader, samples_per_group=1, tokenizer=TOKENIZER
        )
    # Own rewards and the health metrics read the text.
    assert sample.text == text
    assert (sample.reward, sample.predicted_answer) == (1.0 if answer == "42" else 0.0, answer)
