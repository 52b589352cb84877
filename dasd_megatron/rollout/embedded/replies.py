"""JSON answers of the embedded server to /generate, in SGLang's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from transformers import PreTrainedTokenizerBase

from dasd_megatron.rollout.embedded.requests import GenerateJob, Row

CONTEXT_TOKENS = 5
"""Prompt tokens decoded together with the output, so that a tokenizer that strips a leading space does not."""


class DecodingError(RuntimeError):
    """A row that the engine gave up, because the model failed."""


def write_reply(job: GenerateJob, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return a finished job's answer as JSON, in which the infinite log-prob of a barred token is null.

    Raises DecodingError when the model failed on a row.
    """
    return orjson.dumps(build_reply(job, tokenizer))


def build_reply(job: GenerateJob, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | list[dict[str, Any]]:
    """Return a finished job's JSON answer: an object for a single request, else a list in the order of its rows.

    Raises DecodingError when the model failed on a row.
    """
    answers = [_row_reply(row, tokenizer) for row in job.rows]
    return answers[0] if job.single else answers


def _row_reply(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    assert row.finish_reason is not None, "the row is not finished"
    if row.finish_reason["type"] == "abort" and row.finish_reason.get("status_code") is not None:
        raise DecodingError(row.finish_reason["message"])
    meta: dict[str, Any] = {"id": row.rid, "finish_reason": row.finish_reason, "weight_version": row.weight_version}
    if row.started:
        meta["weight_versions"] = _version_spans([*row.earlier_versions, (row.weight_version, len(row.output_ids))])
        meta |= {"prompt_tokens": len(row.prompt), "num_retractions": 0, "reasoning_tokens": 0, "cached_tokens": 0}
    meta["completion_tokens"] = len(row.output_ids)
    meta["e2e_latency"] = row.finished_at - row.request.created
    if row.return_logprob:
        meta |= _log_prob_fields(row, tokenizer)
    answer = {"text": _text(row, tokenizer), "output_ids": row.output_ids, "meta_info": meta}
    if row.request.prompt_token_ids:
        answer["prompt_token_ids"] = row.prompt
    return answer


def _log_prob_fields(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # Without a tokenizer the triples have no texts.
    speller = tokenizer if row.request.text_in_logprobs else None
    read_ids = row.prompt[len(row.prompt) - len(row.input_log_probs) :]
    fields: dict[str, Any] = {
        "input_token_logprobs": _triples(row.input_log_probs, read_ids, speller),
        "output_token_logprobs": _triples(row.log_probs, row.output_ids, speller),
        "output_token_logprobs_length": len(row.log_probs),
    }
    if row.top_logprobs:
        for name, tops in (("input_top_logprobs", row.input_top), ("output_top_logprobs", row.top)):
            fields[name] = [
                None if top is None else _triples([log_prob for log_prob, _ in top], [i for _, i in top], speller)
                for top in tops
            ]
    return fields


def _triples(
    log_probs: Sequence[float | None], ids: Sequence[int], speller: PreTrainedTokenizerBase | None
) -> list[tuple[float | None, int, str | None]]:
    """Return SGLang's (log-prob, id, text) of each token."""
    texts = [None] * len(ids) if speller is None else speller.batch_decode([[i] for i in ids])
    return list(zip(log_probs, ids, texts, strict=True))


def _text(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    assert row.finish_reason is not None, "the row is not finished"
    matched = row.finish_reason.get("matched")
    ids = row.output_ids
    if isinstance(matched, int) and not row.params.no_stop_trim:
        ids = ids[:-1]
    skip = row.params.skip_special_tokens
    context = row.prompt[-CONTEXT_TOKENS:]
    before = tokenizer.decode(context, skip_special_tokens=skip)
    text = tokenizer.decode(context + ids, skip_special_tokens=skip)
    text = text[len(before) :] if text.startswith(before) else tokenizer.decode(ids, skip_special_tokens=skip)
    if isinstance(matched, str) and matched in text:
        text = text[: text.index(matched) + (len(matched) if row.params.no_stop_trim else 0)]
    return text


def _version_spans(ends: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Return SGLang's spans of output tokens under one version each.

    ends: (version, output tokens until its end), in order.
    """
    spans: list[dict[str, Any]] = []
    for version, end in ends:
        start = spans[-1]["end"] if spans else 0
        if not spans or end > start:
            spans.append({"version": version, "start": start, "end": end})
    return spans
