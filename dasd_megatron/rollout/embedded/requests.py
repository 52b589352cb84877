"""Requests of the embedded server: a /generate body becomes a job of rows, each with checked sampling parameters."""

from __future__ import annotations

import math
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dasd_megatron.rollout.embedded.sampling import TOP_K_ALL
from dasd_megatron.rollout.embedded.schema import (
    GENERATE_BODY,
    NEUTRAL_VALUES,
    UNSUPPORTED_FIELDS,
    GenerateReqInput,
    brief,
    check_contract,
)

MAX_STOP_COUNT = 32
MAX_STOP_BYTES = 1024
"""Longest stop string. It is looked for in the text of as many tokens, at each token."""
MAX_STOP_TOKEN_IDS = 1024
MAX_CHARACTERS_PER_TOKEN = 64
"""A text with more characters for each token of the context is refused before it is tokenized."""
MAX_REQUEST_TOKENS = 1 << 22
"""Most tokens of a request, as :func:`row_tokens` counts them."""
ROW_TOKENS = 64
"""Tokens that have the memory of an empty row."""
_TEXTS_CHARACTERS = 1 << 20


class InvalidRequestError(ValueError):
    """A request that the server understands and does not serve. The message is the answer's."""


def running_future() -> Future:
    """Return a future that a waiting HTTP handler cannot cancel, so that setting its result never fails."""
    future: Future = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(slots=True)
class SamplingParams:
    """Checked sampling parameters of one row.

    A ``temperature`` of 0 has become temperature 1 with ``top_k`` 1, as in SGLang.

    stop_tail: output tokens that can hold the longest stop string; stop_ids: end-of-sequence ids and stop_token_ids,
    which are barred while fewer than min_new_tokens were drawn.
    """

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: list[str]
    stop_tail: int
    stop_ids: frozenset[int]
    ignore_eos: bool
    skip_special_tokens: bool
    no_stop_trim: bool
    seed: int


@dataclass(slots=True, eq=False)
class Row:
    """One sequence to sample, and what has been sampled.

    logprob_start: prompt log-probs are wanted from this position on; len(prompt) asks for none. earlier_versions: for
    each weight version that was replaced, the number of output tokens until then.
    """

    request: GenerateJob
    rid: str
    prompt: list[int]
    params: SamplingParams
    return_logprob: bool
    logprob_start: int
    top_logprobs: int
    output_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top: list[list[tuple[float, int]]] = field(default_factory=list)
    input_log_probs: list[float | None] = field(default_factory=list)
    input_top: list[list[tuple[float, int]] | None] = field(default_factory=list)
    weight_version: str = ""
    earlier_versions: list[tuple[str, int]] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    finished_at: float = 0.0
    started: bool = False
    abort: bool = False

    @property
    def most_tokens(self) -> int:
        """Tokens of the prompt and of the longest response."""
        return len(self.prompt) + self.params.max_new_tokens


@dataclass(slots=True, eq=False)
class GenerateJob:
    """One HTTP request and its rows in the order of the answer.

    ``done`` resolves to None once all rows have a finish reason. tokens: what its rows may take, by :func:`row_tokens`.
    """

    rows: list[Row] = field(default_factory=list)
    single: bool = False
    rid: str | None = None
    text_in_logprobs: bool = False
    prompt_token_ids: bool = False
    created: float = field(default_factory=time.perf_counter)
    done: Future = field(default_factory=running_future)
    unfinished: int = 0
    tokens: int = 0


def parse_sampling_params(
    given: dict[str, Any], *, prompt_length: int, context_length: int, eos_ids: frozenset[int]
) -> SamplingParams:
    """Check one row's sampling parameters and fill in defaults, as SGLang does.

    Raises InvalidRequestError with SGLang's message.
    """
    # An absent limit is 128. An explicit null means "up to the context".
    requested = given.get("max_new_tokens", 128)
    given = {name: value for name, value in given.items() if value is not None}
    for name, neutral in NEUTRAL_VALUES.items():
        if name in given and given[name] not in neutral:
            raise InvalidRequestError(
                f"{name}={brief(given[name])} is not supported by the embedded rollout server; leave it out or serve "
                "the model with SGLang."
            )
    if "max_new_tokens" in given and requested + prompt_length > context_length:
        raise InvalidRequestError(
            f"Requested token count exceeds the model's maximum context length of {context_length} tokens. You "
            f"requested a total of {requested + prompt_length} tokens: {prompt_length} tokens from the input messages "
            f"and {requested} tokens for the completion. Please reduce the number of tokens in the input messages or "
            "the completion to fit within the limit."
        )
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > MAX_STOP_COUNT:
        raise InvalidRequestError(f"at most {MAX_STOP_COUNT} stop strings are allowed, got {len(stop)}")
    if "" in stop:
        raise InvalidRequestError("stop strings must not be empty.")
    stop_lengths = [len(text.encode()) for text in stop]
    if max(stop_lengths, default=0) > MAX_STOP_BYTES:
        raise InvalidRequestError(
            f"a stop string may have at most {MAX_STOP_BYTES} bytes, got one of {max(stop_lengths)}"
        )
    stop_token_ids = given.get("stop_token_ids", ())
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids are allowed, got {len(stop_token_ids)}")
    temperature = float(given.get("temperature", 1.0))
    if not math.isfinite(temperature) or temperature < 0.0:
        raise InvalidRequestError(f"temperature must be a non-negative finite number, got {temperature}.")
    top_p = float(given.get("top_p", 1.0))
    if not 0.0 < top_p <= 1.0:
        raise InvalidRequestError(f"top_p must be in (0, 1], got {top_p}.")
    top_k = given.get("top_k", -1)
    if temperature < 1e-6:
        temperature, top_k = 1.0, 1
    if top_k == -1:
        top_k = TOP_K_ALL
    if top_k < 1:
        raise InvalidRequestError(f"top_k must be -1 (disable) or at least 1, got {top_k}.")
    room = context_length - prompt_length
    max_new_tokens = room if requested is None else min(requested, room)
    min_new_tokens = given.get("min_new_tokens", 0)
    if min_new_tokens < 0:
        raise InvalidRequestError(f"min_new_tokens must be in [0, max_new_tokens], got {min_new_tokens}.")
    if requested is not None and requested < 0:
        raise InvalidRequestError(f"max_new_tokens must be at least 0, got {requested}.")
    if requested is not None and min_new_tokens > requested:
        raise InvalidRequestError(f"min_new_tokens must be in [0, max_new_tokens({requested})], got {min_new_tokens}.")
    seed = given.get("sampling_seed")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise InvalidRequestError(f"sampling_seed must be in [-2**63, 2**63 - 1], got {brief(seed)}.")
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(min_new_tokens, max_new_tokens),
        temperature=temperature,
        top_p=top_p,
        # Beyond the vocabulary top_k changes nothing. This value fits into the tensors of a batch.
        top_k=min(top_k, TOP_K_ALL),
        stop=stop,
        # Every token carries at least one byte of text. So this many tokens hold a stop string that ends in the newest
        # token, and a little context before it in case the cut falls inside a character.
        stop_tail=max(stop_lengths, default=0) + 4,
        stop_ids=eos_ids | frozenset(stop_token_ids),
        ignore_eos=given.get("ignore_eos", False),
        skip_special_tokens=given.get("skip_special_tokens", True),
        no_stop_trim=given.get("no_stop_trim", False),
        seed=secrets.randbits(63) if seed is None else seed,
    )


def _per_row(value: Any, default: Any, name: str, size: int, n: int) -> list[Any]:
    """Return a scalar-or-list field as one value for each of ``size`` prompts."""
    if value is None:
        return [default] * size
    if not isinstance(value, list):
        return [value] * size
    if n > 1:
        raise InvalidRequestError(f"Cannot use list {name} with parallel_sample_num > 1")
    if len(value) != size:
        raise InvalidRequestError(f"The length of {name} should be equal to the batch size.")
    return value


def build_job(
    body: Any, *, tokenizer: PreTrainedTokenizerBase, vocab_size: int, context_length: int, eos_ids: frozenset[int]
) -> GenerateJob:
    """Turn a parsed /generate body into a job, prompt-major when ``n > 1``.

    Raises pydantic's ValidationError (wrong JSON types), ContractError (schema) or InvalidRequestError (anything
    else). All of them mean status 400.
    """
    obj = GENERATE_BODY.validate_python(body)
    check_contract(body)
    for name in UNSUPPORTED_FIELDS:
        if body.get(name):
            raise InvalidRequestError(
                f"{name} is not supported by the embedded rollout server; leave it out or serve the model with SGLang."
            )
    prompts, single = _read_prompts(obj, tokenizer, context_length)
    size = len(prompts)
    given = _params_per_prompt(obj.sampling_params, size)
    n = _sample_count(given)
    _check_size(size * n * ROW_TOKENS)
    single = single and n == 1
    rids = _request_ids(obj.rid, single, size, n)
    return_logprob = _per_row(obj.return_logprob, False, "return_logprob", size, n)
    logprob_start = _per_row(obj.logprob_start_len, -1, "logprob_start_len", size, n)
    top_logprobs = _per_row(obj.top_logprobs_num, 0, "top_logprobs_num", size, n)

    job = GenerateJob(
        single=single,
        rid=obj.rid if isinstance(obj.rid, str) else None,
        text_in_logprobs=obj.return_text_in_logprobs,
        prompt_token_ids=obj.return_prompt_token_ids,
    )
    for i, prompt in enumerate(prompts):
        _check_prompt(prompt, vocab_size, context_length)
        start = _first_log_prob(logprob_start[i], return_logprob[i], len(prompt))
        top = _top_count(top_logprobs[i], vocab_size) if return_logprob[i] else 0
        params = parse_sampling_params(
            given[i], prompt_length=len(prompt), context_length=context_length, eos_ids=eos_ids
        )
        if params.min_new_tokens and all(token in params.stop_ids for token in range(vocab_size)):
            raise InvalidRequestError("min_new_tokens bars the stop tokens, and these are the whole vocabulary.")
        job.tokens += n * row_tokens(len(prompt), params.max_new_tokens, len(prompt) - start, top)
        _check_size(job.tokens)
        for sample in range(n):
            drawn = sample > 0 and given[i].get("sampling_seed") is None
            job.rows.append(
                Row(
                    request=job,
                    rid=rids[i * n + sample],
                    prompt=prompt,
                    params=replace(params, seed=secrets.randbits(63)) if drawn else params,
                    return_logprob=return_logprob[i],
                    logprob_start=start,
                    top_logprobs=top,
                )
            )
    job.unfinished = len(job.rows)
    return job


def row_tokens(prompt: int, new: int, read: int, top: int) -> int:
    """Return how many tokens a row counts for in the bounds on memory.

    These are the tokens of its prompt and its response, each of the ``top`` tokens beside a token with a log-prob, and
    a constant for the row itself. A token takes at most 600 bytes, most of them while its answer is written.

    read: prompt tokens with log-probs.
    """
    return ROW_TOKENS + prompt + new + read + top * (new + read)


def _check_size(tokens: int) -> None:
    if tokens > MAX_REQUEST_TOKENS:
        raise InvalidRequestError(
            f"The request may take more than {MAX_REQUEST_TOKENS} tokens, counted over all rows with prompts, "
            "max_new_tokens and top_logprobs_num. Send it in parts."
        )


def _top_count(top: int, vocab_size: int) -> int:
    if top < 0:
        raise InvalidRequestError(f"top_logprobs_num must be at least 0, got {brief(top)}.")
    return min(top, vocab_size)


def _read_prompts(
    obj: GenerateReqInput, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> tuple[list[list[int]], bool]:
    """Return the prompts' token ids, and whether the body has one prompt outside of a list."""
    if obj.text is None and obj.input_ids is None:
        raise InvalidRequestError("Either text, input_ids or input_embeds should be provided.")
    # As in SGLang, input_ids wins where both are given.
    if obj.input_ids is not None:
        if not obj.input_ids:
            raise InvalidRequestError("input_ids cannot be empty.")
        single = isinstance(obj.input_ids[0], int)
        return [obj.input_ids] if single else obj.input_ids, single
    if isinstance(obj.text, str):
        return _tokenize([obj.text], tokenizer, context_length), True
    return _tokenize(obj.text or [], tokenizer, context_length), False


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, context_length: int) -> list[list[int]]:
    """Return the token ids of texts. A tokenizer takes much memory for each, so it gets a part of them at a time."""
    longest = max(map(len, texts), default=0)
    if longest > MAX_CHARACTERS_PER_TOKEN * context_length:
        raise InvalidRequestError(
            f"The input ({longest} characters) is longer than the model's context length ({context_length} tokens)."
        )
    _check_size(ROW_TOKENS * len(texts))
    prompts: list[list[int]] = []
    tokens, start = 0, 0
    while start < len(texts):
        end, characters = start, 0
        while end < len(texts) and (end == start or characters + len(texts[end]) <= _TEXTS_CHARACTERS):
            characters += len(texts[end])
            end += 1
        part = tokenizer(list(texts[start:end]))["input_ids"]
        tokens += sum(map(len, part)) + ROW_TOKENS * len(part)
        _check_size(tokens)
        prompts += part
        start = end
    return prompts


def _params_per_prompt(params: list[dict[str, Any]] | dict[str, Any] | None, size: int) -> list[dict[str, Any]]:
    given = params if params is not None else {}
    if isinstance(given, list) and len(given) != size:
        raise InvalidRequestError("The length of sampling_params should be equal to the batch size.")
    return given if isinstance(given, list) else [given] * size


def _sample_count(given: Sequence[dict[str, Any]]) -> int:
    """Return how many samples each prompt gets."""
    counts = {1 if params.get("n") is None else params["n"] for params in given} or {1}
    if len(counts) > 1:
        raise InvalidRequestError("The parallel_sample_num should be the same for all samples in sample params.")
    n = counts.pop()
    if n < 1:
        raise InvalidRequestError(f"n must be at least 1, got {brief(n)}.")
    return n


def _check_prompt(prompt: Sequence[int], vocab_size: int, context_length: int) -> None:
    if not prompt:
        raise InvalidRequestError("The prompt is empty: it has no tokens.")
    if len(prompt) >= context_length:
        raise InvalidRequestError(
            f"The input ({len(prompt)} tokens) is longer than the model's context length ({context_length} tokens)."
        )
    bad = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InvalidRequestError(
            f"input_ids contains out-of-vocabulary token id {bad}; valid range is [0, {vocab_size})."
        )


def _first_log_prob(start: int, return_logprob: bool, prompt_length: int) -> int:
    """Return the position from which on prompt log-probs are wanted; the prompt's length where none are."""
    if start < 0 or not return_logprob:
        return prompt_length
    if start > prompt_length:
        raise InvalidRequestError(
            f"req.logprob_start_len={brief(start)} is higher than the number of input tokens "
            f"len(req.origin_input_ids)={prompt_length}. Please use a smaller logprob_start_len."
        )
    return start


def _request_ids(rid: str | list[str] | None, single: bool, size: int, n: int) -> list[str]:
    """Return the id of each row, prompt-major."""
    if single and isinstance(rid, list):
        raise InvalidRequestError("The rid should be a string for a single request.")
    if isinstance(rid, list):
        if len(rid) != size:
            raise InvalidRequestError("The specified rids length mismatch with the batch_size for batch processing.")
        duplicates = sorted(name for name, count in Counter(rid).items() if count > 1)
        if duplicates:
            raise InvalidRequestError(f"Duplicate request IDs detected within the request: {brief(duplicates)}")
        if n == 1:
            return rid
    if isinstance(rid, str) and n == 1:
        return [rid] if single else [f"{rid}_{i}" for i in range(size)]
    # SGLang gives parallel samples fresh ids.
    return [uuid.uuid4().hex for _ in range(size * n)]
