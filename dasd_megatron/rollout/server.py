"""The embedded rollout server: SGLang 0.5.23's native HTTP API over transformers on the CPU, in its own process.

``python -m dasd_megatron.rollout.server --model-path DIR --port 30000`` serves any Hugging Face causal LM directory.
Field names,
answers and error bodies are those of SGLang 0.5.23, so that a client written for one works against the other. Where the
embedded
server differs, on purpose:

- A token id outside the vocabulary, lists of unequal length and ``n < 1`` get a 400; SGLang answers 500 or goes down.
- Known parameters that change the distribution or the answer and are not implemented here (penalties, grammars,
  ``min_p``,
  ``stop_regex``, streaming, LoRA, images, ...) get a 400 when they are set; they are never ignored. Unknown fields are
  treated as
  SGLang treats them: ignored at the top level, refused inside ``sampling_params``.
- ``sampling_seed`` always counts. SGLang reads it only under ``--enable-deterministic-inference`` (42 where it is
  absent) and ignores
  it otherwise. With ``n > 1`` and a seed, all n samples carry the same seed in SGLang and come out identical; so they
  do here.
  Distinct samples of one prompt under a seed are n rows with n seeds.
- A prompt may fill the context but for one token; SGLang keeps up to seven tokens of it for itself.
- ``/abort_request`` ends the one request of this id, SGLang all whose ids begin so; and it ends suspended requests at
  once, SGLang when generation goes on.
- There is no prefix cache: ``cached_tokens`` is 0 and ``/flush_cache`` only checks that nothing is running.
- ``/update_weights_from_tensor`` takes buckets in shared memory alone, and what it cannot read gets a 400; SGLang's
  process ends.
- Requests get a 400 while memory is released, and after a release of the weights until they have been sent again;
  SGLang tries to answer. ``/release_memory_occupation`` while requests run, and ``/resume_memory_occupation`` of what
  is not released, get a 400; SGLang goes down.
- ``/weights_checker`` has the action ``checksum`` alone, and Hugging Face's names of tensors, SGLang its own.
- An update over a process group or out of memory gathers weights beside the served ones, which ``/end_weight_update``
  replaces.
- Sequences that ``pause_generation`` suspends go on under the weights of an update that comes meanwhile: in mode
  ``retract`` their keys and values are computed anew, in mode ``in_place`` they stay those of the old weights, for
  which SGLang needs ``flush_cache=false``.

Sampling is a pure function of weights, prompt, ``sampling_seed`` and position: a counter-based hash gives one uniform
per token, and
the token is the inverse of the cumulative distribution at it, in float64.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import copy
import ctypes
import hashlib
import inspect
import json
import logging
import math
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import transformers
import uvicorn
from fastapi import Body, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, PlainValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from dasd_megatron import access
from dasd_megatron.rollout.weight_checksum import cpu_checksum
from dasd_megatron.rollout.weight_receiver import ReceiveError, WeightReceiver

logger = logging.getLogger("dasd_megatron.rollout.server")

TOP_K_ALL = 1 << 30
MAX_STOP_COUNT = 32
PREFILL_TOKENS = 16384  # most tokens, padding included, of one forward pass over prompts; bounds its activations
# prompt tokens decoded together with the output, so that a tokenizer that strips a leading space does not
CONTEXT_TOKENS = 5
MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")
HEALTH_TIMEOUT_SECONDS = 20.0
DISCONNECT_POLL_SECONDS = 1.0
GRACEFUL_SHUTDOWN_SECONDS = 30


class ServerError(RuntimeError):
    """A server that cannot start. The message is one line: what is wrong and what to do."""


class ModelDirectoryError(ServerError):
    """A directory that is not a complete Hugging Face causal LM, or not of the served architecture."""


# ---- Sampling
# --------------------------------------------------------------------------------------------------------------


def _mix64(x: np.ndarray) -> np.ndarray:
    """A bijective 64-bit finaliser (xor-shift-multiply, splitmix64's constants); uint64 in, uint64 out, arithmetic
    modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def counter_uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One uniform per row from a hash of (seed, position).

    seeds: [B] int64; positions: [B] int64, the sequence position of the token to draw. Returns [B] float64 strictly
    inside (0, 1), multiples of 2**-49, so that ``u * total < total`` holds in float64 and inverting a cumulative sum
    never runs past its last
    positive entry.
    """
    key = _mix64(seeds.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    bits = _mix64(
        key ^ _mix64(positions.astype(np.int64).view(np.uint64) * np.uint64(0xD1B54A32D192ED03) + np.uint64(1))
    )
    return ((bits >> np.uint64(16)).astype(np.float64) + 0.5) * 2.0**-48


def keep_top(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero what top-k and top-p cut off, unnormalised.

    probs: [B, V] float64; top_k: [B] int64 >= 1; top_p: [B] float64 in (0, 1]. A token stays when its rank is under
    top_k and the mass
    of the tokens ranked before it is at most top_p (SGLang's rule: both cuts look at the unfiltered distribution). Ties
    rank by id.
    """
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(probs.shape[-1])
    drop = (rank >= top_k[:, None]) | (before > top_p[:, None])
    return torch.zeros_like(probs).scatter_(-1, ids, ordered.masked_fill(drop, 0.0))


def sample_tokens(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution at ``uniforms``; ``top_k == 1`` takes the largest
    logit.

    logits: [B, V] any float dtype; temperature: [B] float64 > 0; top_k: [B] int64 >= 1; top_p: [B] float64 in (0, 1];
    uniforms: [B]
    float64 in (0, 1). Returns tokens [B] int64 and log-probs [B, V] float64 of the whole vocabulary, after temperature
    and before top-k/top-p.
    """
    log_probs = torch.log_softmax(logits.double() / temperature[:, None], dim=-1)
    greedy = top_k == 1
    if bool(greedy.all()):
        return log_probs.argmax(-1), log_probs
    probs = log_probs.exp()
    cut = ((top_k < probs.shape[-1]) | (top_p < 1.0)) & ~greedy
    if bool(cut.any()):
        rows = cut.nonzero()[:, 0]
        probs[rows] = keep_top(probs[rows], top_k[rows], top_p[rows])
    cumulative = probs.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)
    return torch.where(greedy, log_probs.argmax(-1), tokens), log_probs


# ---- Requests
# --------------------------------------------------------------------------------------------------------------


def _running_future() -> Future:
    """A future that a waiting HTTP handler cannot cancel, so that setting its result never fails."""
    future: Future = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(slots=True)
class SamplingParams:
    """Checked sampling parameters of one row. ``temperature`` 0 has become temperature 1 with ``top_k`` 1, as in
    SGLang."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: list[str]
    stop_tail: int  # output tokens that can hold the longest stop string
    stop_ids: frozenset[int]  # end-of-sequence and stop_token_ids; barred while fewer than min_new_tokens were drawn
    ignore_eos: bool
    skip_special_tokens: bool
    no_stop_trim: bool
    seed: int


@dataclass(slots=True, eq=False)
class Row:
    """One sequence to sample, and what has been sampled."""

    request: GenerateJob
    rid: str
    prompt: list[int]
    params: SamplingParams
    return_logprob: bool
    logprob_start: int  # prompt log-probs are wanted from here; len(prompt): none
    top_logprobs: int
    output_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top: list[list[tuple[float, int]]] = field(default_factory=list)
    input_log_probs: list[float | None] = field(default_factory=list)
    input_top: list[list[tuple[float, int]] | None] = field(default_factory=list)
    weight_version: str = ""
    # (version, output tokens until it was replaced)
    earlier_versions: list[tuple[str, int]] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    finished_at: float = 0.0
    started: bool = False
    abort: bool = False


@dataclass(slots=True, eq=False)
class GenerateJob:
    """One HTTP request: its rows in answer order. ``done`` resolves to None when all rows have a finish reason."""

    rows: list[Row] = field(default_factory=list)
    single: bool = False
    rid: str | None = None
    text_in_logprobs: bool = False
    prompt_token_ids: bool = False
    created: float = field(default_factory=time.perf_counter)
    done: Future = field(default_factory=_running_future)
    unfinished: int = 0


@dataclass(slots=True, eq=False)
class UpdateJob:
    """A weight update that waits for its turn: ``load`` gives the new model. ``done`` resolves to (success,
    message)."""

    load: Callable[[], PreTrainedModel]
    model_path: str
    weight_version: str | None
    done: Future = field(default_factory=_running_future)


def _int64_lists(value: Any) -> Any:
    """input_ids as SGLang checks them: null, a list of int64 or a list of such lists; raises ValueError."""
    if value is not None and (problem := _int64_problem(value)):
        raise ValueError(problem)
    return value


def _int64_problem(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"must be list or null; got {type(value).__name__}"
    if value and not isinstance(value[0], (int, list)):
        return f"elements must be int or list; got {type(value[0]).__name__}"
    nested = bool(value) and isinstance(value[0], list)
    for i, row in enumerate(value if nested else [value]):
        where = f"row {i}: " if nested else ""
        if not isinstance(row, list):
            return f"{where}must be list; got {type(row).__name__}"
        for x in row:
            if not isinstance(x, int) or not -(2**63) <= x < 2**63:
                return f"{where}contains non-int64 element: {x!r}"
    return None


@pydantic_dataclass
class GenerateReqInput:
    """The fields of /generate that the embedded server reads; others are ignored or, in UNSUPPORTED_FIELDS, refused."""

    rid: str | list[str] | None = None
    text: list[str] | str | None = None
    input_ids: Annotated[Any, PlainValidator(_int64_lists)] = None
    sampling_params: list[dict[str, Any]] | dict[str, Any] | None = None
    return_logprob: list[bool] | bool | None = None
    logprob_start_len: list[int] | int | None = None
    top_logprobs_num: list[int] | int | None = None
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False


UNSUPPORTED_FIELDS = (
    "stream",
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "token_ids_logprob",
    "return_sampling_mask",
    "return_hidden_states",
    "return_routed_experts",
    "session_params",
    "lora_path",
    "custom_logit_processor",
    "max_thinking_tokens",
    "watermark",
)
# Sampling parameters of SGLang 0.5.23 in its order, with the JSON type that its schema check expects.
SAMPLING_FIELDS = {
    "max_new_tokens": "i64",
    "stop": "StringOrList",
    "stop_token_ids": "Int64List",
    "stop_regex": "StringOrList",
    "temperature": "f64",
    "top_p": "f64",
    "top_k": "i64",
    "min_p": "f64",
    "frequency_penalty": "f64",
    "presence_penalty": "f64",
    "repetition_penalty": "f64",
    "min_new_tokens": "i64",
    "n": "i64",
    "json_schema": "string",
    "regex": "string",
    "ebnf": "string",
    "structural_tag": "string",
    "ignore_eos": "boolean",
    "skip_special_tokens": "boolean",
    "spaces_between_special_tokens": "boolean",
    "no_stop_trim": "boolean",
    "stream_interval": "i64",
    "logit_bias": "map",
    "sampling_seed": "i64",
    "custom_params": "any",
    "beam_width": "i64",
    "watermark": "map",
    "choice": "StringList",
}
# Those that the embedded server does not implement, with the values at which they change nothing.
NEUTRAL = {
    "stop_regex": ([],),
    "min_p": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "json_schema": ("",),
    "regex": ("",),
    "ebnf": ("",),
    "structural_tag": ("",),
    "spaces_between_special_tokens": (True,),
    "logit_bias": ({},),
    "custom_params": ({},),
    "beam_width": (1,),
    "watermark": ({},),
    "choice": ([],),
}


class ContractError(ValueError):
    """A JSON body that breaks SGLang's schema of /generate; answered as ``{"error": "<message>"}``."""


def _unexpected(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"boolean `{str(value).lower()}`"
    if isinstance(value, int):
        return f"integer `{value}`"
    if isinstance(value, float):
        return f"floating point `{value}`"
    if isinstance(value, str):
        return f'string "{value}"'
    return "sequence" if isinstance(value, list) else "map"


def _expect(value: Any, kind: str) -> None:
    """Raise ContractError, in SGLang's words, unless a JSON value is of ``kind``."""

    def is_int(v: Any) -> bool:
        return isinstance(v, int) and not isinstance(v, bool)

    scalars: dict[str, tuple[Callable[[Any], bool], str]] = {
        "i64": (is_int, "i64"),
        "f64": (lambda v: is_int(v) or isinstance(v, float), "f64"),
        "string": (lambda v: isinstance(v, str), "a string"),
        "boolean": (lambda v: isinstance(v, bool), "a boolean"),
        "map": (lambda v: isinstance(v, dict), "a map"),
        "any": (lambda v: True, "anything"),
    }
    if kind in scalars:
        accepts, expected = scalars[kind]
        if not accepts(value):
            raise ContractError(f"invalid type: {_unexpected(value)}, expected {expected}")
        return
    element = {"String": "string", "Int64": "i64", "Bool": "boolean"}[kind.removesuffix("List").removesuffix("Or")]
    if isinstance(value, list):
        for v in value:
            _expect(v, element)
    elif not kind.endswith("OrList"):
        raise ContractError(f"invalid type: {_unexpected(value)}, expected a sequence")
    elif not scalars[element][0](value):
        raise ContractError(f"invalid type: {_unexpected(value)}, expected a value or an array of values for {kind}")


def check_contract(body: Any) -> None:
    """SGLang's schema check of a parsed /generate body; raises ContractError."""
    if not isinstance(body, dict):
        raise ContractError(f"invalid type: {_unexpected(body)}, expected struct GenerateRequest")
    top_level = {
        "rid": "StringOrList",
        "text": "StringOrList",
        "return_logprob": "BoolOrList",
        "logprob_start_len": "Int64OrList",
        "top_logprobs_num": "Int64OrList",
        "return_text_in_logprobs": "boolean",
        "stream": "boolean",
        "return_prompt_token_ids": "boolean",
    }
    for name, kind in top_level.items():
        if body.get(name) is not None:
            _expect(body[name], kind)
    for row in [r for r in body.get("input_ids") or [] if isinstance(r, list)] or [body.get("input_ids") or []]:
        for token in row:
            if isinstance(token, bool):
                raise ContractError(f"invalid type: {_unexpected(token)}, expected i64")
    params = body.get("sampling_params")
    for one in params if isinstance(params, list) else [params or {}]:
        for name, value in one.items():
            if name not in SAMPLING_FIELDS:
                listed = ", ".join(f"`{f}`" for f in SAMPLING_FIELDS)
                raise ContractError(f"unknown field `{name}`, expected one of {listed}")
            if value is not None:
                _expect(value, SAMPLING_FIELDS[name])


def parse_sampling_params(
    given: dict[str, Any], *, prompt_length: int, context_length: int, eos_ids: frozenset[int]
) -> SamplingParams:
    """One row's sampling parameters, defaulted and checked as SGLang does; raises ValueError with its message."""
    # An absent limit is 128; an explicit null means "up to the context".
    requested = given.get("max_new_tokens", 128)
    given = {name: value for name, value in given.items() if value is not None}
    for name, neutral in NEUTRAL.items():
        if name in given and given[name] not in neutral:
            raise ValueError(
                f"{name}={given[name]!r} is not supported by the embedded rollout server; leave it out or serve the "
                "model with SGLang."
            )
    if "max_new_tokens" in given and requested + prompt_length > context_length:
        raise ValueError(
            f"Requested token count exceeds the model's maximum context length of {context_length} tokens. You "
            f"requested a total of {requested + prompt_length} tokens: {prompt_length} tokens from the input messages "
            f"and {requested} tokens for the completion. Please reduce the number of tokens in the input messages or "
            "the completion to fit within the limit."
        )
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > MAX_STOP_COUNT:
        raise ValueError(f"at most {MAX_STOP_COUNT} stop strings are allowed, got {len(stop)}")
    if "" in stop:
        raise ValueError("stop strings must not be empty.")
    temperature = float(given.get("temperature", 1.0))
    if not math.isfinite(temperature) or temperature < 0.0:
        raise ValueError(f"temperature must be a non-negative finite number, got {temperature}.")
    top_p = float(given.get("top_p", 1.0))
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}.")
    top_k = given.get("top_k", -1)
    if temperature < 1e-6:
        temperature, top_k = 1.0, 1
    if top_k == -1:
        top_k = TOP_K_ALL
    if top_k < 1:
        raise ValueError(f"top_k must be -1 (disable) or at least 1, got {top_k}.")
    room = context_length - prompt_length
    max_new_tokens = room if requested is None else min(requested, room)
    min_new_tokens = given.get("min_new_tokens", 0)
    if min_new_tokens < 0:
        raise ValueError(f"min_new_tokens must be in [0, max_new_tokens], got {min_new_tokens}.")
    if requested is not None and requested < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {requested}.")
    if requested is not None and min_new_tokens > requested:
        raise ValueError(f"min_new_tokens must be in [0, max_new_tokens({requested})], got {min_new_tokens}.")
    seed = given.get("sampling_seed")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"sampling_seed must be in [-2**63, 2**63 - 1], got {seed}.")
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(min_new_tokens, max_new_tokens),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        # Every token carries at least one byte of text, so this many tokens hold a stop string that ends in the newest
        # one, and a
        # little context in front of it in case the cut falls inside a character.
        stop_tail=max((len(s.encode()) for s in stop), default=0) + 4,
        stop_ids=eos_ids | frozenset(given.get("stop_token_ids", ())),
        ignore_eos=given.get("ignore_eos", False),
        skip_special_tokens=given.get("skip_special_tokens", True),
        no_stop_trim=given.get("no_stop_trim", False),
        seed=secrets.randbits(63) if seed is None else seed,
    )


def _per_row(value: Any, default: Any, name: str, size: int, n: int) -> list[Any]:
    """A scalar-or-list field as one value for each of ``size`` prompts."""
    if value is None:
        return [default] * size
    if not isinstance(value, list):
        return [value] * size
    if n > 1:
        raise ValueError(f"Cannot use list {name} with parallel_sample_num > 1")
    if len(value) != size:
        raise ValueError(f"The length of {name} should be equal to the batch size.")
    return value


def build_job(
    body: Any, *, tokenizer: PreTrainedTokenizerBase, vocab_size: int, context_length: int, eos_ids: frozenset[int]
) -> GenerateJob:
    """A parsed /generate body as a job, prompt-major when ``n > 1``.

    Raises pydantic's ValidationError (wrong JSON types), ContractError (schema) or ValueError (anything else), all of
    them status 400.
    """
    obj: GenerateReqInput = _GENERATE_ADAPTER.validate_python(body)
    check_contract(body)
    for name in UNSUPPORTED_FIELDS:
        if body.get(name):
            raise ValueError(
                f"{name} is not supported by the embedded rollout server; leave it out or serve the model with SGLang."
            )
    if obj.text is None and obj.input_ids is None:
        raise ValueError("Either text, input_ids or input_embeds should be provided.")
    # As in SGLang, input_ids wins where both are given.
    if obj.input_ids is not None:
        if not obj.input_ids:
            raise ValueError("input_ids cannot be empty.")
        single = isinstance(obj.input_ids[0], int)
        prompts = [obj.input_ids] if single else obj.input_ids
    else:
        single = isinstance(obj.text, str)
        texts = [obj.text] if single else obj.text
        prompts = tokenizer(texts)["input_ids"] if texts else []
    size = len(prompts)
    given = obj.sampling_params if obj.sampling_params is not None else {}
    if isinstance(given, list) and len(given) != size:
        raise ValueError("The length of sampling_params should be equal to the batch size.")
    given = given if isinstance(given, list) else [given] * size
    counts = {1 if params.get("n") is None else params["n"] for params in given} or {1}
    if len(counts) > 1:
        raise ValueError("The parallel_sample_num should be the same for all samples in sample params.")
    n = counts.pop()
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
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
        if not prompt:
            raise ValueError("The prompt is empty: it has no tokens.")
        if len(prompt) >= context_length:
            raise ValueError(
                f"The input ({len(prompt)} tokens) is longer than the model's context length ({context_length} tokens)."
            )
        bad = next((t for t in prompt if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise ValueError(f"input_ids contains out-of-vocabulary token id {bad}; valid range is [0, {vocab_size}).")
        start = logprob_start[i]
        if start < 0 or not return_logprob[i]:
            start = len(prompt)
        elif start > len(prompt):
            raise ValueError(
                f"req.logprob_start_len={start} is higher than the number of input tokens "
                f"len(req.origin_input_ids)={len(prompt)}. Please use a smaller logprob_start_len."
            )
        for sample in range(n):
            params = parse_sampling_params(
                given[i], prompt_length=len(prompt), context_length=context_length, eos_ids=eos_ids
            )
            job.rows.append(
                Row(
                    job,
                    rids[i * n + sample],
                    prompt,
                    params,
                    return_logprob[i],
                    start,
                    top_logprobs[i] if return_logprob[i] else 0,
                )
            )
    job.unfinished = len(job.rows)
    return job


def _request_ids(rid: None | str | list[str], single: bool, size: int, n: int) -> list[str]:
    if single and isinstance(rid, list):
        raise ValueError("The rid should be a string for a single request.")
    if isinstance(rid, list):
        if len(rid) != size:
            raise ValueError("The specified rids length mismatch with the batch_size for batch processing.")
        duplicates = sorted({r for r in rid if rid.count(r) > 1})
        if duplicates:
            raise ValueError(f"Duplicate request IDs detected within the request: {duplicates}")
        if n == 1:
            return rid
    if rid is None or n > 1:  # SGLang gives parallel samples fresh ids
        return [uuid.uuid4().hex for _ in range(size * n)]
    return [rid] if single else [f"{rid}_{i}" for i in range(size)]


_GENERATE_ADAPTER = TypeAdapter(GenerateReqInput)


# ---- Engine
# --------------------------------------------------------------------------------------------------------------


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with spare columns, so that a decoding step writes one column and copies
    nothing.

    ``keys`` and ``values`` are views [B, heads, length, head_dim] of the filled part.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple:
        if not self.is_initialized:
            self.lazy_initialization(key_states)
            self.keys, self.values = key_states, value_states
            self.buffers = (key_states, value_states)
            return key_states, value_states
        old, new = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if new > self.buffers[0].shape[-2]:
            self.buffers = tuple(_with_room(t, old, new + max(32, new // 4)) for t in self.buffers)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self.buffers)
        return self.keys, self.values

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take over keys and values of another batch or length."""
        self.keys, self.values = keys, values
        self.buffers = (keys, values)


def _with_room(states: torch.Tensor, filled: int, columns: int) -> torch.Tensor:
    buffer = states.new_empty(*states.shape[:-2], columns, states.shape[-1])
    buffer[..., :filled, :] = states[..., :filled, :]
    return buffer


def _new_cache(num_layers: int) -> DynamicCache:
    # Full-length layers even for sliding-window models: the attention mask still limits the window, and rows of unequal
    # age can be merged.
    cache = DynamicCache()
    cache.layers = [GrowingLayer() for _ in range(num_layers)]
    return cache


class DecodingBatch:
    """Left-padded sequences that are decoded together.

    rows: B sequences, some of them finished (dropped by :meth:`compact`); cache: keys and values, ``length`` columns;
    mask: [B, length] int64, 0 on padding; next_ids: [B] int64, drawn but not yet fed; positions: [B] int64, where they
    go in their own sequence.
    """

    def __init__(self, rows: list[Row], cache: DynamicCache, mask: torch.Tensor, positions: torch.Tensor):
        self.rows = rows
        self.cache = cache
        self.mask = mask
        self.positions = positions
        self.next_ids = torch.zeros(len(rows), dtype=torch.int64)
        self._read_params()

    def _read_params(self) -> None:
        params = [row.params for row in self.rows]
        self.temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64)
        self.top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64)
        self.top_k = torch.tensor([p.top_k for p in params], dtype=torch.int64)
        self.seeds = np.array([p.seed for p in params], dtype=np.int64)
        self.longest_minimum = max((p.min_new_tokens for p in params), default=0)
        self.top_logprobs = max((row.top_logprobs for row in self.rows), default=0)

    def compact(self) -> bool:
        """Drop finished rows once they are an eighth of the batch, and columns that are then all padding. False: no row
        remains."""
        keep = [i for i, row in enumerate(self.rows) if row.finish_reason is None]
        if not keep:
            return False
        if 8 * (len(self.rows) - len(keep)) < len(self.rows):
            return True
        index = torch.tensor(keep)
        mask = self.mask[index]
        start = int(mask.any(0).nonzero()[0])
        self.mask = mask[:, start:]
        for layer in self.cache.layers:
            layer.replace(layer.keys[index, :, start:], layer.values[index, :, start:])
        self.positions, self.next_ids = self.positions[index], self.next_ids[index]
        self.rows = [self.rows[i] for i in keep]
        self._read_params()
        return True

    def join(self, other: DecodingBatch) -> None:
        """Append another batch's rows; the shorter cache is padded on the left."""
        length = max(self.mask.shape[1], other.mask.shape[1])

        def pad(t: torch.Tensor, dim: int) -> torch.Tensor:
            missing = length - t.shape[dim]
            return t if missing == 0 else torch.nn.functional.pad(t, (0, 0, missing, 0) if dim == -2 else (missing, 0))

        # All layers are computed before one is changed: where memory runs out, this batch stays as it was.
        layers = [
            [torch.cat([pad(a, -2), pad(b, -2)]) for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values))]
            for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True)
        ]
        for layer, (keys, values) in zip(self.cache.layers, layers, strict=True):
            layer.replace(keys, values)
        self.mask = torch.cat([pad(self.mask, -1), pad(other.mask, -1)])
        self.positions = torch.cat([self.positions, other.positions])
        self.next_ids = torch.cat([self.next_ids, other.next_ids])
        self.rows = self.rows + other.rows
        self._read_params()


def load_model(path: str, dtype: torch.dtype, config: transformers.PretrainedConfig | None = None) -> PreTrainedModel:
    """Load a causal LM onto the CPU from a local directory; nothing is fetched.

    With ``config`` (that of the served model) the directory's weights must fit it exactly. Raises ModelDirectoryError
    when the directory is missing, incomplete, unreadable or of another shape.
    """
    if not Path(path).is_dir():
        raise ModelDirectoryError(f"{path} is not a directory; give a Hugging Face model directory")
    if config is not None and (Path(path) / "config.json").is_file():
        _check_same_architecture(path, config)
    try:
        with torch.inference_mode(False):
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=copy.deepcopy(config),
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=True,  # other weights are pickles
                trust_remote_code=False,
            )
    # transformers raises a dozen kinds here; all of them mean that this directory cannot be served
    except Exception as error:
        raise ModelDirectoryError(
            f"cannot load a causal LM from {path}: {type(error).__name__}: {_one_line(error)}"
        ) from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            names = ", ".join(sorted(map(str, info[kind]))[:3])
            raise ModelDirectoryError(
                f"{path} does not fit its architecture: {len(info[kind])} {kind.replace('_', ' ')} ({names}, ...)"
            )
    # matmul picks other kernels, with other rounding, where a weight requires a gradient
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # equally aligned on every load, and no longer backed by the file
    return model


def _check_same_architecture(path: str, config: transformers.PretrainedConfig) -> None:
    ignored = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"}
    try:
        other = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise ModelDirectoryError(f"cannot read {path}/config.json: {_one_line(error)}") from error
    served = config.to_dict()
    for name in sorted((served.keys() | other.keys()) - ignored):
        if served.get(name) != other.get(name):
            raise ModelDirectoryError(
                f"{path} is a model of another architecture: its config has {name}={other.get(name)!r}, the served "
                f"one {served.get(name)!r}"
            )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; raises ModelDirectoryError."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise ModelDirectoryError(
            f"cannot load a tokenizer from {path}: {type(error).__name__}: {_one_line(error)}"
        ) from error


class Engine:
    """A queue of jobs and the one thread that works on it.

    deterministic: a request is decoded alone, in batches of at most ``max_batch_size`` rows; otherwise waiting rows
    join the running batch between decoding steps. Every public method may be called from any thread and returns without
    waiting for the model.
    """

    def __init__(
        self, model_path: str, *, dtype: torch.dtype, max_batch_size: int, weight_version: str, deterministic: bool
    ):
        self.model = load_model(model_path, dtype)
        self.tokenizer = load_tokenizer(model_path)
        self.config = copy.deepcopy(self.model.config)
        self.model_path = model_path
        self.weight_version = weight_version
        self.dtype = dtype
        self.max_batch_size = max_batch_size
        self.deterministic = deterministic
        self.vocab_size = self.model.get_input_embeddings().weight.shape[0]
        self.context_length = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(self.context_length, int):
            raise ModelDirectoryError(
                f"{model_path}/config.json has no max_position_embeddings: the context length is unknown"
            )
        self.eos_ids = self._end_of_sequence_ids()
        self.num_layers = self.config.get_text_config().num_hidden_layers
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self._keeps_last_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._probe()

        self.steps = 0  # decoding steps so far; moves while the engine is alive and busy
        self._queue: deque[Row | UpdateJob] = deque()
        self._batch: DecodingBatch | None = None
        self._admitted: list[Row] = []  # rows whose prompts are being read, on their way into the batch
        self._paused: str | None = None
        self._released: set[str] = set()
        self._weights_lost = False  # they were released, and no others have come since
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def _end_of_sequence_ids(self) -> frozenset[int]:
        ids: set[int] = set()
        for source in (self.config, self.model.generation_config, self.tokenizer):
            given = getattr(source, "eos_token_id", None)
            ids |= set(given) if isinstance(given, (list, tuple)) else set() if given is None else {given}
        return frozenset(ids)

    @torch.inference_mode()
    def _probe(self) -> None:
        """One token through the model: its keys and values must land in our cache, or batched decoding would be
        silently wrong."""
        cache = _new_cache(self.num_layers)
        try:
            logits = self._forward(
                torch.zeros(1, 1, dtype=torch.int64),
                torch.ones(1, 1, dtype=torch.int64),
                torch.zeros(1, 1, dtype=torch.int64),
                cache,
                True,
            )
        except Exception as error:  # whatever the architecture trips over
            raise ModelDirectoryError(
                f"the embedded server cannot run {self.model_path}: {type(error).__name__}: {_one_line(error)}"
            ) from error
        if not all(layer.is_initialized and layer.keys.shape[-2] == 1 for layer in cache.layers):
            raise ModelDirectoryError(
                f"{self.model_path} is not a pure attention model: it does not keep its state in a key/value cache. "
                "Serve it with SGLang."
            )
        self.logits_size = logits.shape[-1]

    # Called from the HTTP side.

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    @property
    def running(self) -> int:
        """Rows that are being decoded."""
        batch = self._batch
        return sum(row.finish_reason is None for row in self._admitted + (batch.rows if batch is not None else []))

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        with self._wake:
            return sum(isinstance(item, Row) for item in self._queue)

    @property
    def paused(self) -> str | None:
        return self._paused

    @property
    def lacks(self) -> str | None:
        """What was released that requests need, and what to do."""
        if self._released:
            return f"memory is released ({', '.join(sorted(self._released))}): call /resume_memory_occupation"
        return "the weights were released: send them again" if self._weights_lost else None

    def submit(self, job: GenerateJob) -> None:
        """Queue a job; raises ValueError when one of its ids is in use, HTTPException 503 when the server is going
        down."""
        with self._wake:
            if self._closing:
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "The server is shutting down.")
            if self.lacks:
                raise ValueError(self.lacks)
            live = {row.rid for row in self._live_rows()}
            for row in job.rows:
                if row.rid in live:
                    raise ValueError(f"Duplicate request ID detected: {row.rid}")
            self._queue.extend(job.rows)
            if not job.rows:
                job.done.set_result(None)
            self._wake.notify_all()

    def update(self, model_path: str, weight_version: str | None) -> Future:
        """Queue a weight update behind the requests that came before it; resolves to (success, message)."""
        return self._queue_update(
            UpdateJob(lambda: load_model(model_path, self.dtype, self.config), model_path, weight_version)
        )

    def replace(self, model: PreTrainedModel) -> Future:
        """The same with a model in memory, of the served one's architecture and dtype, under the old version."""
        return self._queue_update(UpdateJob(lambda: model, self.model_path, None))

    def _queue_update(self, job: UpdateJob) -> Future:
        with self._wake:
            if self._closing:
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "The server is shutting down.")
            self._queue.append(job)
            self._wake.notify_all()
        return job.done

    def abort(
        self, *, rid: str = "", everything: bool = False, job: GenerateJob | None = None, waiting: bool = True
    ) -> None:
        """End rows early: those of an id (a row's or its request's), of a job, or all. ``waiting=False`` spares rows
        not started."""

        def hit(row: Row) -> bool:
            return (
                everything
                or (job is not None and row.request is job)
                or (rid != "" and rid in (row.rid, row.request.rid))
            )

        with self._wake:
            for row in self._live_rows():
                if not hit(row):
                    continue
                if row.started:
                    row.abort = True
                elif waiting:
                    self._queue.remove(row)
                    self._finish(row, {"type": "abort", "message": "Abort in waiting queue"})
            self._wake.notify_all()

    def pause(self, mode: str) -> list[Future]:
        """Stop decoding. Mode ``abort`` also ends what runs or waits; returns the jobs to wait for."""
        with self._wake:
            again, self._paused = self._paused is not None, mode
            jobs = (
                [row.request.done for row in self._live_rows() if row.started or not again] if mode == "abort" else []
            )
        if mode == "abort":
            self.abort(everything=True, waiting=not again)  # requests that arrived during a pause wait for its end
        return jobs

    def resume(self) -> None:
        with self._wake:
            self._paused = None
            self._wake.notify_all()

    def release(self, tags: Sequence[str] | None) -> None:
        """Give memory back: that of the ``weights``, which are then gone, or what the key-value caches have left; None:
        of all kinds.

        Raises ValueError while requests run or wait, and for an unknown tag.
        """
        tags = self._known_tags(tags)
        with self._wake:
            if self._live_rows() and not (self._paused and self._batch is None and not self._admitted):
                raise ValueError("release_memory_occupation should be called only when server is idle.")
            self._released |= set(tags)
            if "weights" in tags:
                self._weights_lost = True
                for parameter in self.model.parameters():
                    parameter.data = parameter.data.new_empty(0)
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what was freed
        if trim is not None:
            trim(0)

    def take_back(self, tags: Sequence[str] | None) -> None:
        """End the release of these kinds of memory; weights come with the next update. Raises ValueError for one that
        is not released."""
        tags = self._known_tags(tags)
        with self._wake:
            if not set(tags) <= self._released:
                raise ValueError(f"{', '.join(sorted(set(tags) - self._released))}: not released")
            self._released -= set(tags)

    @staticmethod
    def _known_tags(tags: Sequence[str] | None) -> Sequence[str]:
        unknown = sorted(set(tags or ()) - set(MEMORY_TAGS))
        if unknown:
            raise ValueError(f"unknown memory tag {unknown[0]!r}; {', '.join(MEMORY_TAGS)} are known")
        return tags or MEMORY_TAGS

    def checksums(self, skip: Sequence[str]) -> dict[str, str]:
        """SGLang's checksum of each parameter's bytes, but of those whose names contain one of ``skip``."""
        model = self.model
        return {
            name: cpu_checksum([parameter])
            for name, parameter in model.named_parameters()
            if not any(part in name for part in skip)
        }

    def close(self) -> None:
        """Abort everything and refuse what comes; the thread ends after the step that it is in."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()

    def _live_rows(self) -> list[Row]:
        active = self._admitted + (self._batch.rows if self._batch is not None else [])
        return [row for row in active if row.finish_reason is None] + [
            item for item in self._queue if isinstance(item, Row)
        ]

    # The worker thread.

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._wake:
                work = self._next_work()
                while work is None:
                    self._wake.wait()
                    work = self._next_work()
            if work == "close":
                return
            if isinstance(work, UpdateJob):
                self._apply(work)
                continue
            try:
                self._step(work)
            # one failed batch must not take the server down: its requests get a 500, the rest goes on
            except Exception as error:
                logger.exception("decoding failed")
                reason = {
                    "type": "abort",
                    "message": f"decoding failed: {type(error).__name__}: {_one_line(error)}",
                    "status_code": 500,
                    "err_type": "InternalServerError",
                }
                with self._wake:
                    # A failure while prompts were read has not touched the running batch.
                    failed, joining = (self._admitted, True) if self._admitted else (self._batch.rows, False)
                    for row in failed:
                        self._finish(row, reason)
                    self._admitted = []
                    if not joining:
                        self._batch = None

    def _next_work(self) -> None | Literal["close"] | UpdateJob | list[Row]:
        """Under the lock: what to do now; a list (perhaps empty) of rows to admit means a decoding step, None means
        wait."""
        self._reap()
        if self._closing:
            for row in self._live_rows():
                self._finish(row, {"type": "abort", "message": "The server is shutting down."})
            for item in self._queue:
                if isinstance(item, UpdateJob):
                    item.done.set_result((False, "The server is shutting down."))
            self._queue.clear()
            self._batch = None
            return "close"
        update = next((item for item in self._queue if isinstance(item, UpdateJob)), None)
        if update is not None and (self._paused or (self._batch is None and self._queue[0] is update)):
            self._queue.remove(update)
            return update
        if self._paused:
            return None
        admitted = self._admit()
        return admitted if admitted or self._batch is not None else None

    def _reap(self) -> None:
        if self._batch is None:
            return
        for row in self._batch.rows:
            if row.abort and row.finish_reason is None:
                self._finish(row, {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None})
        if all(row.finish_reason is not None for row in self._batch.rows):
            self._batch = None

    def _admit(self) -> list[Row]:
        """Rows from the head of the queue that fit into the batch; an update at the head holds them back."""
        if self.deterministic and self._batch is not None:
            return []
        rows: list[Row] = []
        free = self.max_batch_size - self.running
        while self._queue and len(rows) < free and isinstance(self._queue[0], Row):
            if self.deterministic and rows and self._queue[0].request is not rows[0].request:
                break
            row = self._queue.popleft()
            row.started, row.weight_version = True, self.weight_version
            rows.append(row)
        self._admitted = rows
        return rows

    def _finish(self, row: Row, reason: dict[str, Any]) -> None:
        if row.finish_reason is not None:
            return
        row.finish_reason, row.finished_at = reason, time.perf_counter()
        if not row.started:
            row.weight_version = self.weight_version
        row.request.unfinished -= 1
        if row.request.unfinished == 0:
            row.request.done.set_result(None)

    def _apply(self, job: UpdateJob) -> None:
        try:
            model = job.load()
        except ModelDirectoryError as error:
            logger.error("update_weights_from_disk refused: %s", error)
            job.done.set_result((False, f"Failed to update weights: {error}. The served weights are unchanged."))
            return
        message = "Succeeded to update model weights."
        with self._wake:
            self.model, self.model_path, self._weights_lost = model, job.model_path, False
            if job.weight_version is not None:
                self.name_weights(job.weight_version)
                message += f" Weight version updated to {job.weight_version}."
            if self._batch is not None and self._paused == "retract":
                self._read_again(self._batch)
        job.done.set_result((True, message))

    def name_weights(self, version: str) -> None:
        """What is sampled from now on carries ``version``."""
        with self._wake:
            for row in self._live_rows():
                if row.started and version != row.weight_version:
                    if row.output_ids:
                        row.earlier_versions.append((row.weight_version, len(row.output_ids)))
                    row.weight_version = version
            self.weight_version = version

    def _read_again(self, batch: DecodingBatch) -> None:
        """Compute the keys and values of what the batch has read and drawn under the weights that are served now."""
        length = batch.mask.shape[1]
        ids = torch.zeros(len(batch.rows), length, dtype=torch.int64)
        for i, row in enumerate(batch.rows):
            # The last token is drawn, but not yet read.
            read = [*row.prompt, *row.output_ids[:-1]][-length:]
            ids[i, length - len(read) :] = torch.tensor(read)
        cache = _new_cache(self.num_layers)
        self._forward(ids, batch.mask, (batch.mask.cumsum(-1) - 1).clamp_(min=0), cache, last_only=True)
        batch.cache = cache

    def _forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, last_only: bool
    ) -> torch.Tensor:
        """Run [B, S] tokens at the end of the cache; returns logits [B, S, V], or [B, 1, V] with ``last_only``."""
        past = mask.shape[1] - input_ids.shape[1]
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            cache_position=torch.arange(past, mask.shape[1]),
            use_cache=True,
            **({"logits_to_keep": 1} if last_only and self._keeps_last_logits else {}),
        )
        return output.logits[:, -1:] if last_only else output.logits

    def _step(self, admitted: list[Row]) -> None:
        """Read the admitted prompts, draw their first token and let them join; otherwise draw one token of every
        running row."""
        if admitted:
            joined = self._prefill(admitted)
            if self._batch is not None:
                self._batch.join(joined)
                joined = self._batch
            with self._wake:
                self._batch, self._admitted = joined, []
            self._settle()
            return
        batch = self._batch
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
        logits = self._forward(batch.next_ids[:, None], batch.mask, batch.positions[:, None], batch.cache, True)[:, -1]
        # Finished rows ride along until they are dropped; they must not run off a learned position table.
        batch.positions = (batch.positions + 1).clamp_(max=self.context_length - 1)
        self._draw(batch, logits)
        self._settle()

    def _settle(self) -> None:
        self.steps += 1
        if not self._batch.compact():
            self._batch = None

    def _prefill(self, rows: list[Row]) -> DecodingBatch:
        """Read the rows' prompts, each distinct one once, and draw the first tokens."""
        joined: DecodingBatch | None = None
        for group in _prefill_groups(rows):
            distinct = list(dict.fromkeys(tuple(row.prompt) for row in group))
            index = {prompt: i for i, prompt in enumerate(distinct)}
            longest = max(map(len, distinct))
            ids = torch.zeros(len(distinct), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for i, prompt in enumerate(distinct):
                ids[i, longest - len(prompt) :] = torch.tensor(prompt)
                mask[i, longest - len(prompt) :] = 1
            positions = (mask.cumsum(-1) - 1).clamp_(min=0)
            cache = _new_cache(self.num_layers)
            wants_prompt = any(row.logprob_start < len(row.prompt) for row in group)
            logits = self._forward(ids, mask, positions, cache, last_only=not wants_prompt)
            select = torch.tensor([index[tuple(row.prompt)] for row in group])
            if wants_prompt:
                for row, i in zip(group, select.tolist(), strict=True):
                    _read_prompt_log_probs(row, logits[i, longest - len(row.prompt) :])
            for layer in cache.layers:
                layer.replace(layer.keys[select], layer.values[select])
            lengths = mask.sum(-1)[select]
            batch = DecodingBatch(group, cache, mask[select], lengths)
            self._draw(batch, logits[select, -1])
            if joined is None:
                joined = batch
            else:
                joined.join(batch)
        return joined

    def _draw(self, batch: DecodingBatch, logits: torch.Tensor) -> None:
        """Draw the next token of every row from [B, V] logits, record it and decide who is finished."""
        if batch.longest_minimum:
            logits = logits.clone()
            for i, row in enumerate(batch.rows):
                if len(row.output_ids) < row.params.min_new_tokens:
                    logits[i, [t for t in row.params.stop_ids if 0 <= t < logits.shape[-1]]] = -math.inf
        uniforms = torch.from_numpy(counter_uniforms(batch.seeds, batch.positions.numpy()))
        tokens, log_probs = sample_tokens(logits, batch.temperature, batch.top_k, batch.top_p, uniforms)
        batch.next_ids = tokens
        chosen = log_probs.gather(-1, tokens[:, None])[:, 0].tolist()
        if batch.top_logprobs:
            values, ids = (t.tolist() for t in log_probs.topk(min(batch.top_logprobs, log_probs.shape[-1])))
        finished: list[tuple[Row, dict[str, Any]]] = []
        for i, (row, token) in enumerate(zip(batch.rows, tokens.tolist(), strict=True)):
            if row.finish_reason is not None:
                continue
            if math.isnan(chosen[i]):
                reason = {
                    "type": "abort",
                    "message": "the model returned NaN logits",
                    "status_code": 500,
                    "err_type": "InternalServerError",
                }
                finished.append((row, reason))
                continue
            if row.params.max_new_tokens > 0:
                row.output_ids.append(token)
                row.log_probs.append(chosen[i])
                if row.top_logprobs:
                    row.top.append(list(zip(values[i], ids[i], strict=True))[: row.top_logprobs])
            reason = self._finish_reason(row)
            if reason is not None:
                finished.append((row, reason))
        if finished:
            with self._wake:
                for row, reason in finished:
                    self._finish(row, reason)

    def _finish_reason(self, row: Row) -> dict[str, Any] | None:
        """SGLang's order: stop strings, stop tokens, length. ``ignore_eos`` also silences stop_token_ids."""
        params = row.params
        if row.output_ids:
            if params.stop:
                tail = self.tokenizer.decode(row.output_ids[-params.stop_tail :], skip_special_tokens=False)
                for stop in params.stop:
                    if stop in tail:
                        return {"type": "stop", "matched": stop}
            if not params.ignore_eos and row.output_ids[-1] in params.stop_ids:
                return {"type": "stop", "matched": row.output_ids[-1]}
        if len(row.output_ids) >= params.max_new_tokens:
            return {"type": "length", "length": params.max_new_tokens}
        return None

    # Answers.

    def answer(self, job: GenerateJob) -> dict[str, Any] | list[dict[str, Any]]:
        """The finished job's JSON answer: an object for a single request, else a list in row order.

        Raises ValueError or HTTPException when a row was ended by an error, as SGLang does.
        """
        answers = [self._answer_row(row) for row in job.rows]
        return answers[0] if job.single else answers

    def _answer_row(self, row: Row) -> dict[str, Any]:
        status = row.finish_reason.get("status_code")
        if row.finish_reason["type"] == "abort" and status is not None:
            raise HTTPException(status, row.finish_reason["message"])
        meta: dict[str, Any] = {"id": row.rid, "finish_reason": row.finish_reason, "weight_version": row.weight_version}
        if row.started:
            meta["weight_versions"] = _version_spans([*row.earlier_versions, (row.weight_version, len(row.output_ids))])
        if row.started:
            meta |= {"prompt_tokens": len(row.prompt), "num_retractions": 0, "reasoning_tokens": 0, "cached_tokens": 0}
        meta["completion_tokens"] = len(row.output_ids)
        meta["e2e_latency"] = row.finished_at - row.request.created
        if row.return_logprob:
            with_text = row.request.text_in_logprobs
            meta["input_token_logprobs"] = self._triples(
                row.input_log_probs, row.prompt[len(row.prompt) - len(row.input_log_probs) :], with_text
            )
            meta["output_token_logprobs"] = self._triples(row.log_probs, row.output_ids, with_text)
            meta["output_token_logprobs_length"] = len(row.log_probs)
            if row.top_logprobs:
                for name, tops in (("input_top_logprobs", row.input_top), ("output_top_logprobs", row.top)):
                    meta[name] = [
                        None if top is None else self._triples(*zip(*top, strict=True), with_text) for top in tops
                    ]
        answer = {"text": self._text(row), "output_ids": row.output_ids, "meta_info": meta}
        if row.request.prompt_token_ids:
            answer["prompt_token_ids"] = row.prompt
        return answer

    def _triples(
        self, log_probs: Sequence[float | None], ids: Sequence[int], with_text: bool
    ) -> list[tuple[float | None, int, str | None]]:
        texts = self.tokenizer.batch_decode([[i] for i in ids]) if with_text else [None] * len(ids)
        return list(zip(log_probs, ids, texts, strict=True))

    def _text(self, row: Row) -> str:
        matched = row.finish_reason.get("matched")
        ids = row.output_ids
        if isinstance(matched, int) and not row.params.no_stop_trim:
            ids = ids[:-1]
        skip = row.params.skip_special_tokens
        context = row.prompt[-CONTEXT_TOKENS:]
        before = self.tokenizer.decode(context, skip_special_tokens=skip)
        text = self.tokenizer.decode(context + ids, skip_special_tokens=skip)
        text = text[len(before) :] if text.startswith(before) else self.tokenizer.decode(ids, skip_special_tokens=skip)
        if isinstance(matched, str) and matched in text:
            text = text[: text.index(matched) + (len(matched) if row.params.no_stop_trim else 0)]
        return text


def _version_spans(ends: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """SGLang's spans of output tokens under one version each, from (version, output tokens until its end)."""
    spans: list[dict[str, Any]] = []
    for version, end in ends:
        start = spans[-1]["end"] if spans else 0
        if not spans or end > start:
            spans.append({"version": version, "start": start, "end": end})
    return spans


def _prefill_groups(rows: list[Row]) -> list[list[Row]]:
    """Consecutive rows whose distinct prompts, padded to the longest, make at most PREFILL_TOKENS tokens."""
    groups: list[list[Row]] = []
    distinct: set[tuple[int, ...]] = set()
    longest = 0
    for row in rows:
        prompt = tuple(row.prompt)
        if not groups or (
            len(distinct | {prompt}) * max(longest, len(prompt)) > PREFILL_TOKENS and prompt not in distinct
        ):
            groups.append([])
            distinct, longest = set(), 0
        groups[-1].append(row)
        distinct.add(prompt)
        longest = max(longest, len(prompt))
    return groups


def _read_prompt_log_probs(row: Row, logits: torch.Tensor) -> None:
    """Raw log-probs of the prompt's tokens from ``logprob_start`` on; the first has none (SGLang's rule). logits:
    [len(prompt), V]."""
    start = row.logprob_start
    if start >= len(row.prompt):
        return
    log_probs = torch.log_softmax(logits[start : len(row.prompt) - 1].double(), dim=-1)
    targets = torch.tensor(row.prompt[start + 1 :], dtype=torch.int64)
    row.input_log_probs = [None, *log_probs.gather(-1, targets[:, None])[:, 0].tolist()]
    if row.top_logprobs:
        values, ids = (t.tolist() for t in log_probs.topk(min(row.top_logprobs, log_probs.shape[-1])))
        row.input_top = [None, *(list(zip(v, i, strict=True)) for v, i in zip(values, ids, strict=True))]


# ---- HTTP
# --------------------------------------------------------------------------------------------------------------


@pydantic_dataclass
class UpdateWeightFromDiskReqInput:
    model_path: str
    load_format: str | None = None
    abort_all_requests: bool = False
    weight_version: str | None = None
    flush_cache: bool = True  # accepted for compatibility: there is no cache to flush


@pydantic_dataclass
class InitWeightsUpdateGroupReqInput:
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


@pydantic_dataclass
class DestroyWeightsUpdateGroupReqInput:
    group_name: str = "weight_update_group"


@pydantic_dataclass
class UpdateWeightsFromDistributedReqInput:
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    load_format: str | None = None
    flush_cache: bool = True  # accepted for compatibility: there is no cache to flush


def _base64_bytes(value: Any) -> Any:
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else value
    except binascii.Error:
        raise ValueError("Expected base64-encoded bytes") from None


@pydantic_dataclass
class UpdateWeightsFromTensorReqInput:
    serialized_named_tensors: list[Annotated[bytes, BeforeValidator(_base64_bytes)]]
    load_format: str | None = None
    flush_cache: bool = True  # accepted for compatibility: there is no cache to flush


@pydantic_dataclass
class MemoryOccupationReqInput:
    tags: list[str] | None = None


@pydantic_dataclass
class CheckWeightsReqInput:
    action: str = "checksum"
    skip_tensor_list: list[str] | None = None


@pydantic_dataclass
class UpdateWeightVersionReqInput:
    new_version: str
    abort_all_requests: bool = True


@pydantic_dataclass
class AbortReq:
    rid: str | None = None
    abort_all: bool = False


@pydantic_dataclass
class PauseGenerationReqInput:
    mode: Literal["abort", "retract", "in_place"] = "abort"


@pydantic_dataclass
class ContinueGenerationReqInput:
    torch_empty_cache: bool = True  # accepted for compatibility: there is no GPU


def _validation_response(error: RequestValidationError) -> JSONResponse:
    text, errors = str(error), str(error.errors())
    message = f"{text} {errors}" if errors and errors != text else text
    return JSONResponse(
        {"object": "error", "message": message, "type": "Bad Request", "param": None, "code": 400}, status_code=400
    )


def _http_error_response(status: int, message: str) -> JSONResponse:
    return JSONResponse(
        {"object": "error", "message": message, "type": str(status), "param": None, "code": status}, status_code=status
    )


class _KeyCheck:
    """ASGI middleware that refuses requests without the API key, with 401, before it reads their body. As in SGLang,
    paths that tell of health alone are open, for those who watch over the server."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith("/health"):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not access.shows_key(given, self._key):
                message = "Unauthorized: this server asks for its API key, as Authorization: Bearer KEY"
                await JSONResponse({"error": message}, status_code=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def build_app(engine: Engine, settings: dict[str, Any]) -> FastAPI:
    """The HTTP side of an engine. ``settings`` is what /server_info adds to the live state. Handlers only wait, other
    threads work."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    key = access.api_key()
    if key is not None:
        app.add_middleware(_KeyCheck, key=key)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _http_error_response(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return _validation_response(error)

    def parse(raw: bytes) -> GenerateJob:
        try:
            body = json.loads(raw)
        except ValueError as error:
            detail = {
                "type": "json_invalid",
                "loc": ("body",),
                "msg": "JSON decode error",
                "input": {},
                "ctx": {"error": str(error)},
            }
            raise RequestValidationError([detail]) from None
        return build_job(
            body,
            tokenizer=engine.tokenizer,
            vocab_size=engine.vocab_size,
            context_length=engine.context_length,
            eos_ids=engine.eos_ids,
        )

    @app.api_route("/generate", methods=["POST", "PUT"])
    async def generate(request: Request) -> Response:
        raw = await request.body()
        try:
            job = await asyncio.to_thread(parse, raw)
            engine.submit(job)
        except ContractError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        except ValidationError as error:  # pydantic's, a subclass of ValueError
            raise RequestValidationError(
                [{**e, "loc": ("body", *e["loc"])} for e in error.errors(include_url=False)]
            ) from None
        except ValueError as error:
            return JSONResponse({"error": {"message": str(error)}}, status_code=400)
        done = asyncio.wrap_future(job.done)
        while not (await asyncio.wait({done}, timeout=DISCONNECT_POLL_SECONDS))[0]:
            if await request.is_disconnected():
                engine.abort(job=job)
        content = await asyncio.to_thread(lambda: json.dumps(engine.answer(job), ensure_ascii=False).encode())
        return Response(content, media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.alive else 503)

    @app.get("/health_generate")
    async def health_generate() -> Response:
        if not engine.alive or engine.lacks:
            return Response(status_code=503)
        job = None
        steps = engine.steps
        if not engine.running:
            job = build_job(
                {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}},
                tokenizer=engine.tokenizer,
                vocab_size=engine.vocab_size,
                context_length=engine.context_length,
                eos_ids=engine.eos_ids,
            )
            engine.submit(job)
        limit = time.monotonic() + HEALTH_TIMEOUT_SECONDS
        while time.monotonic() < limit:
            if engine.steps > steps:
                return Response(status_code=200)
            await asyncio.sleep(0.02)
        if job is not None:
            engine.abort(job=job)
        return Response(status_code=503)

    @app.get("/get_model_info")
    @app.get("/model_info")
    async def model_info() -> dict[str, Any]:
        return {
            "model_path": engine.model_path,
            "served_model_name": engine.model_path,
            "tokenizer_path": settings["tokenizer_path"],
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": engine.weight_version,
            "load_format": "auto",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": engine.config.model_type,
            "architectures": engine.config.architectures,
        }

    @app.get("/get_server_info")
    @app.get("/server_info")
    async def server_info() -> dict[str, Any]:
        state = {"paused": engine.paused, "weight_version": engine.weight_version, "decoding_steps": engine.steps}
        return {**settings, "internal_states": [state]}

    @app.get("/v1/loads")
    async def loads() -> dict[str, Any]:
        return {"loads": [{"dp_rank": 0, "num_running_reqs": engine.running, "num_waiting_reqs": engine.waiting}]}

    @app.post("/update_weights_from_disk")
    async def update_weights_from_disk(obj: Annotated[UpdateWeightFromDiskReqInput, Body()]) -> JSONResponse:
        if obj.load_format not in (None, "auto", "safetensors", "pt"):
            success, message = (
                False,
                f"load_format={obj.load_format!r} is not supported by the embedded rollout server; use auto.",
            )
        else:
            if obj.abort_all_requests:
                engine.abort(everything=True)
            success, message = await asyncio.wrap_future(engine.update(obj.model_path, obj.weight_version))
        return JSONResponse(
            {"success": success, "message": message, "num_paused_requests": 0}, status_code=200 if success else 400
        )

    receiver = WeightReceiver(lambda: engine.model, engine.shapes)

    async def received(work: Callable[..., Any], *arguments: Any, said: str) -> JSONResponse:
        try:
            await asyncio.to_thread(work, *arguments)
        except ReceiveError as error:
            logger.error("%s", error)
            return JSONResponse({"success": False, "message": str(error)}, status_code=400)
        return JSONResponse({"success": True, "message": said})

    @app.post("/init_weights_update_group")
    async def init_weights_update_group(obj: Annotated[InitWeightsUpdateGroupReqInput, Body()]) -> JSONResponse:
        place = (obj.master_address, obj.master_port, obj.rank_offset, obj.world_size, obj.group_name, obj.backend)
        return await received(receiver.join, *place, said="Succeeded to initialize custom process group.")

    @app.post("/destroy_weights_update_group")
    async def destroy_weights_update_group(obj: Annotated[DestroyWeightsUpdateGroupReqInput, Body()]) -> JSONResponse:
        return await received(receiver.leave, obj.group_name, said="Succeeded to destroy custom process group.")

    @app.post("/begin_weight_update")
    async def begin_weight_update() -> JSONResponse:
        return await received(receiver.begin, said="Success")

    @app.post("/update_weights_from_distributed")
    async def update_weights_from_distributed(
        obj: Annotated[UpdateWeightsFromDistributedReqInput, Body()],
    ) -> JSONResponse:
        bucket = (obj.names, obj.dtypes, obj.shapes, obj.group_name, obj.load_format)
        return await received(receiver.receive, *bucket, said="Succeeded to update parameter online.")

    @app.post("/update_weights_from_tensor")
    async def update_weights_from_tensor(obj: Annotated[UpdateWeightsFromTensorReqInput, Body()]) -> JSONResponse:
        return await received(receiver.load, obj.serialized_named_tensors, obj.load_format, said="Success")

    @app.post("/end_weight_update")
    async def end_weight_update() -> JSONResponse:
        try:
            model = receiver.end()
        except ReceiveError as error:
            return JSONResponse({"success": False, "message": str(error)}, status_code=400)
        success, message = await asyncio.wrap_future(engine.replace(model))
        return JSONResponse({"success": success, "message": message}, status_code=200 if success else 400)

    @app.post("/update_weight_version")
    async def update_weight_version(obj: Annotated[UpdateWeightVersionReqInput, Body()]) -> JSONResponse:
        if obj.abort_all_requests:
            engine.abort(everything=True)
        engine.name_weights(obj.new_version)
        message = f"Weight version updated to {obj.new_version}"
        return JSONResponse({"success": True, "message": message, "new_version": obj.new_version})

    async def occupation(change: Callable[[Sequence[str] | None], None], tags: Sequence[str] | None) -> JSONResponse:
        try:
            await asyncio.to_thread(change, tags)
        except ValueError as error:
            return JSONResponse({"error": {"message": str(error)}}, status_code=400)
        return JSONResponse(None)

    @app.api_route("/release_memory_occupation", methods=["GET", "POST"])
    async def release_memory_occupation(obj: Annotated[MemoryOccupationReqInput, Body()]) -> JSONResponse:
        return await occupation(engine.release, obj.tags)

    @app.api_route("/resume_memory_occupation", methods=["GET", "POST"])
    async def resume_memory_occupation(obj: Annotated[MemoryOccupationReqInput, Body()]) -> JSONResponse:
        return await occupation(engine.take_back, obj.tags)

    @app.api_route("/weights_checker", methods=["GET", "POST"])
    async def weights_checker(obj: Annotated[CheckWeightsReqInput | None, Body()] = None) -> JSONResponse:
        obj = obj or CheckWeightsReqInput()
        if obj.action != "checksum":
            message = f"action={obj.action!r} is not supported by the embedded rollout server; checksum is"
            return JSONResponse({"success": False, "message": message}, status_code=400)
        checksums = await asyncio.to_thread(engine.checksums, obj.skip_tensor_list or ())
        overall = hashlib.sha256("".join(name + checksums[name] for name in sorted(checksums)).encode()).hexdigest()
        alone = {"role": "target", **{f"{kind}_rank": 0 for kind in ("tp", "dp", "pp")}, "rank": 0}
        alone |= {f"{kind}_size": 1 for kind in ("tp", "dp", "pp")} | {"size": 1}
        ranks = [{"checksums": checksums, "per_gpu_checksum": overall, "parallelism_info": [alone]}]
        engine_checksum = hashlib.sha256(overall.encode()).hexdigest()
        return JSONResponse(
            {"success": True, "message": "Success.", "ranks": ranks, "per_engine_checksum": engine_checksum}
        )

    @app.post("/pause_generation")
    async def pause_generation(obj: Annotated[PauseGenerationReqInput, Body()]) -> JSONResponse:
        jobs = engine.pause(obj.mode)
        if jobs:
            await asyncio.wait({asyncio.wrap_future(job) for job in jobs})
        return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})

    @app.post("/continue_generation")
    async def continue_generation(obj: Annotated[ContinueGenerationReqInput, Body()]) -> JSONResponse:
        engine.resume()
        return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})

    @app.post("/abort_request")
    async def abort_request(obj: Annotated[AbortReq, Body()]) -> Response:
        engine.abort(rid=obj.rid or "", everything=obj.abort_all)
        return Response(status_code=200)

    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache(timeout: float = Query(0.0, ge=0.0)) -> Response:
        limit = time.monotonic() + timeout
        while engine.running or (engine.waiting and not engine.paused):
            if time.monotonic() >= limit:
                return Response("Flush cache failed: requests are running or waiting.\n", status_code=400)
            await asyncio.sleep(0.02)
        return Response("Cache flushed.\n", status_code=200)

    return app


class _Server(uvicorn.Server):
    """uvicorn waits for open requests before it stops; end them first."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.close()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not listen yet, so that clients are refused until the server serves. Raises
    ServerError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ServerError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another port or address"
        ) from error
    return sock


def watch_parent(stop: Callable[[], None]) -> None:
    """Call ``stop`` once standard input reaches its end or the parent process changes, and exit hard if that does not
    end the process."""
    parent = os.getppid()

    def watch() -> None:
        stdin = sys.stdin.fileno()
        while os.getppid() == parent:
            readable = select.select([stdin], [], [], 1.0)[0]
            if readable and not os.read(stdin, 4096):
                break
        stop()
        time.sleep(GRACEFUL_SHUTDOWN_SECONDS + 5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def serve(args: argparse.Namespace) -> None:
    """Serve until SIGTERM, SIGINT or the parent's end; raises ServerError before that when the server cannot start."""
    access.api_key()  # a wrong one is to be said at once
    sock = socket.socket(fileno=args.fd) if args.fd is not None else bind(args.host, args.port)
    access.warn_if_open(sock.getsockname()[0], "the rollout server")
    if args.exit_with_parent:
        # Before the model is loaded there is nothing to finish: a parent that dies early ends this process at once.
        stop: list[Callable[[], None]] = [lambda: os._exit(1)]
        watch_parent(lambda: stop[0]())
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    engine = Engine(
        args.model_path,
        dtype=getattr(torch, args.dtype),
        max_batch_size=args.max_batch_size,
        weight_version=args.weight_version,
        deterministic=args.deterministic,
    )
    host, port = sock.getsockname()[:2]
    settings = {
        "model_path": args.model_path,
        "tokenizer_path": args.model_path,
        "host": host,
        "port": port,
        "dtype": args.dtype,
        "device": "cpu",
        "threads": args.threads,
        "max_running_requests": args.max_batch_size,
        "context_length": engine.context_length,
        "vocab_size": engine.vocab_size,
        "deterministic": args.deterministic,
        "engine": "dasd_megatron embedded",
        "api": "sglang 0.5.23",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    config = uvicorn.Config(
        build_app(engine, settings),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
        timeout_keep_alive=60,
    )
    server = _Server(config, engine)
    if args.exit_with_parent:
        stop[0] = lambda: server.handle_exit(signal.SIGTERM, None)
    logger.info("serving %s (weight version %s) on http://%s:%d", args.model_path, args.weight_version, host, port)
    asyncio.run(server.serve(sockets=[sock]))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dasd_megatron.rollout.server",
        description="Serve a Hugging Face causal LM with SGLang's native HTTP API, on the CPU. "
        "`dasd serve --engine sglang --help` is about SGLang itself.",
    )
    parser.add_argument("--model-path", required=True, help="Hugging Face model directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=30000, help="port to listen on; 0: any free one")
    parser.add_argument(
        "--fd", type=int, help="file descriptor of a bound socket to listen on, instead of host and port"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model")
    parser.add_argument(
        "--max-batch-size", "--max-running-requests", type=int, default=256, help="sequences decoded at once"
    )
    parser.add_argument(
        "--weight-version", default="default", help="version of the weights that the server starts with"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="one request is one decoding batch, never merged with others"
    )
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="exit when standard input ends or the parent process dies"
    )
    args = parser.parse_args(argv)
    for name in ("threads", "max_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        serve(args)
    except (ServerError, access.AccessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
