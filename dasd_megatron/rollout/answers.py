"""Checks on what rollout servers answer: an answer is read only when it is sound in whole.

A sound answer of /generate has as many rows as were asked for, at least one token a row and no more than were asked
for, ids of the vocabulary, one finite log-prob per token, and the expected weight version. No answer has more bytes
than what was asked for can need. A server's own words are shown on one line, cut, and without control characters.
"""

from __future__ import annotations

import contextlib
import gc
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeGuard

import numpy as np
import orjson

from dasd_megatron.errors import printable
from dasd_megatron.samples import (
    LARGEST_FLOAT32,
    LOG_PROB_TOLERANCE,
    Ids,
    LogProbs,
    Mask,
    ids_array,
    log_probs_array,
    mask_array,
    same_fields,
)

PLAIN_ANSWER_BYTES = 32 * 2**20
"""The most that an answer without samples may have. The longest is /weights_checker: 100 bytes for each tensor of each
process."""
ROW_BYTES = 64 * 2**10
"""The most that a row of /generate may have beside its tokens."""
TOKEN_BYTES = 2**10
"""The most that one token may add to an answer of /generate: its id twice, its log-prob, its version, and its text. The
longest tokens of today's vocabularies are 256 spaces, and a character takes up to six bytes of JSON where it is
escaped."""
DEFAULT_NEW_TOKENS = 2**15
"""Number of tokens that an answer is given room for where the request sets no ``max_new_tokens``."""
WORDS, VALUE = 1000, 200
"""The most characters that are shown of a server's message, and of a value in its answer."""
_MOST_VERSION_CHARACTERS = 200
_LARGEST_ID = 2**31 - 1
# These names stand once in each row. Inside a text they would be followed by a backslash, which escapes the quote.
_NAMES_OF_A_ROW = [b"meta_info", b"output_ids", b"output_token_logprobs", b"finish_reason"]
_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxlong = _VALUES.maxother = WORDS
_FIRST, _SECOND = itemgetter(0), itemgetter(1)


@dataclass(slots=True, eq=False)
class Completion:
    """One sampled response.

    ``log_probs`` are natural logs after temperature, one per token of ``output_ids``, the stop token included.
    weight_versions: (version, tokens) of each stretch of tokens, in order; more than one where the weights were updated
    meanwhile. response_mask: as in :class:`~dasd_megatron.samples.Sample`; servers sample every token. Ids, log-probs
    and masks are NumPy arrays; lists that a completion is made with become arrays, and ValueError says which cannot.
    """

    output_ids: Ids
    log_probs: LogProbs
    finish_reason: str
    weight_versions: list[tuple[str, int]]
    text: str
    response_mask: Mask | None = None

    def __post_init__(self) -> None:
        self.use_arrays()

    def use_arrays(self) -> None:
        """Make arrays of lists of ids, log-probs and mask. Raises ValueError for what cannot be one."""
        self.output_ids, self.log_probs = ids_array(self.output_ids), log_probs_array(self.log_probs)
        if self.response_mask is not None:
            self.response_mask = mask_array(self.response_mask)

    def __eq__(self, other: object) -> bool:
        return same_fields(self, other) if isinstance(other, Completion) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def weight_version(self) -> str:
        """The version of its last token, which the server held when it answered."""
        return self.weight_versions[-1][0]


@dataclass(frozen=True, slots=True)
class Answer:
    """The response of a server to a request for ``path``. ``headers`` may be asked in any case."""

    path: str
    status: int
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class FailedTryError(Exception):
    """A request that got no answer, or one that cannot be used. It may be made again."""


class OtherVersionError(FailedTryError):
    """An answer under another weight version than the expected one: under ``version``, where that is known."""

    def __init__(self, failure: str, version: str | None = None):
        super().__init__(failure)
        self.version = version


def show(value: Any, limit: int = VALUE) -> str:
    """Return a value of an answer as it stands in a message: cut in length and depth, and printable."""
    return printable(_VALUES.repr(value), limit)


def completions_bytes(sampling_params: Sequence[Mapping[str, Any]]) -> int:
    """Return the most bytes that an answer of /generate may have, with one row for each of ``sampling_params``."""
    tokens = sum(params.get("max_new_tokens") or DEFAULT_NEW_TOKENS for params in sampling_params)
    return PLAIN_ANSWER_BYTES + ROW_BYTES * len(sampling_params) + TOKEN_BYTES * tokens


def prompt_bytes(input_ids: Sequence[int]) -> int:
    """Return the most bytes that an answer with the log-probs of the prompt ``input_ids`` may have."""
    return PLAIN_ANSWER_BYTES + TOKEN_BYTES * len(input_ids)


def ignore_answer(response: Answer) -> None:
    """Accept any answer, where the status says it all."""


def check_success(response: Answer) -> None:
    """Raise FailedTryError unless the answer says that the call succeeded."""
    answer = read_json_object(response)
    if answer.get("success") is not True:
        raise FailedTryError(f"{response.path} failed: {show(answer.get('message'), WORDS)}")


def read_json(response: Answer) -> Any:
    """Parse an answer; raises FailedTryError where it is not JSON."""
    try:
        return orjson.loads(response.content)
    except ValueError as error:
        kind = show(response.headers.get("Content-Type", "no type"))
        raise FailedTryError(
            f"{response.path} answered what is not JSON ({printable(str(error), VALUE)}) but {kind}: "
            f"{response.content[:80]!r}"
        ) from error


def read_json_object(response: Answer) -> dict[str, Any]:
    """Parse an answer; raises FailedTryError where it is not a JSON object."""
    answer = read_json(response)
    if not isinstance(answer, dict):
        raise FailedTryError(f"{response.path} answered {_type_name(answer)} instead of an object")
    return answer


def _type_name(value: Any) -> str:
    return f"a {type(value).__name__}"


def error_message(response: Answer) -> str:
    """Return the server's own words, from any of SGLang's error bodies."""
    try:
        body = orjson.loads(response.content)
    except ValueError:
        return printable(response.content[:300].decode(errors="replace"))
    if isinstance(body, dict):
        error = body.get("error")
        message = error.get("message") if isinstance(error, dict) else error
        body = message or body.get("message") or body.get("detail") or body
    return printable(body, WORDS) if isinstance(body, str) else show(body)


def read_version(response: Answer) -> str:
    """Return the weight version that /model_info names; raises FailedTryError where it names none."""
    version = read_json_object(response).get("weight_version")
    if not _is_version(version):
        raise FailedTryError(f"{response.path} names no weight version, but {show(version)}")
    return version


def _is_version(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= _MOST_VERSION_CHARACTERS


def read_checksums(response: Answer) -> list[dict[str, str]]:
    """Return the checksums of /weights_checker: those of each process, in the order of tensor-parallel ranks."""
    check_success(response)
    ranks: Any = read_json_object(response).get("ranks")
    try:
        ranks = [rank["checksums"] for rank in sorted(ranks, key=lambda rank: rank["parallelism_info"][0]["tp_rank"])]
        if all(all(type(value) is str for value in checksums.values()) for checksums in ranks):
            return ranks
    except (TypeError, KeyError, IndexError, AttributeError):
        pass
    raise FailedTryError(f"{response.path} answered no checksums: {show(ranks)}")


def read_completions(
    response: Answer,
    sampling_params: Sequence[dict[str, Any]],
    weight_version: str | Collection[str] | None,
    vocab_size: int | None = None,
) -> list[Completion]:
    """Read the completions of an answer of /generate; raises as :func:`check_completions`.

    An object that has a name twice is refused too, since parsers do not agree which of the two counts.
    """
    for name in _NAMES_OF_A_ROW:
        quoted, rows = b'"%s"' % name, len(sampling_params)
        # Counting is fast; the second look leaves out what is a value and no name.
        if response.content.count(quoted) > rows and _count_names(response.content, quoted) > rows:
            raise FailedTryError(f"/generate answered garbage: {name.decode()} stands more than once in a row")
    with _without_cycle_collection():
        return check_completions(read_json(response), sampling_params, weight_version, vocab_size)


def _count_names(content: bytes, quoted: bytes) -> int:
    return sum(part.lstrip(b" \t\r\n").startswith(b":") for part in content.split(quoted)[1:])


@contextlib.contextmanager
def _without_cycle_collection() -> Iterator[None]:
    """Switch Python's search for cycles off in the body, which parses long answers.

    Three lists a token would make Python search the whole process again and again, and JSON has no cycles.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_completions(
    answer: Any,
    sampling_params: Sequence[dict[str, Any]],
    weight_version: str | Collection[str] | None,
    vocab_size: int | None = None,
) -> list[Completion]:
    """Check a parsed batch answer of /generate and return its completions; raises FailedTryError for anything unsound.

    sampling_params: those of the request, one per row; a row has at most its ``max_new_tokens`` tokens, where given.
    weight_version: the version that every token must have, or the versions that it may have; None accepts any, and
    another version raises OtherVersionError. vocab_size: ids are in [0, vocab_size); None sets no upper bound.
    """
    rows = len(sampling_params)
    if not isinstance(answer, list):
        raise FailedTryError(f"/generate answered {_type_name(answer)} instead of a list of {rows} rows")
    if len(answer) != rows:
        raise FailedTryError(f"/generate answered {len(answer)} rows instead of {rows}")
    return [
        _read_row(row, index, params.get("max_new_tokens"), weight_version, vocab_size)
        for index, (row, params) in enumerate(zip(answer, sampling_params, strict=True))
    ]


def _read_row(
    row: Any,
    index: int,
    max_new_tokens: int | None,
    weight_version: str | Collection[str] | None,
    vocab_size: int | None,
) -> Completion:
    meta = row.get("meta_info") if isinstance(row, dict) else None
    if not isinstance(meta, dict):
        raise _unsound(index, "no meta_info")
    reason = meta.get("finish_reason")
    if not isinstance(reason, dict) or not isinstance(reason.get("type"), str):
        raise _unsound(index, f"finish_reason is {show(reason)}")
    if reason["type"] == "abort":
        raise FailedTryError(f"row {index} was aborted by the server: {show(reason.get('message'), WORDS)}")
    ids = _read_ids(row, index, reason["type"], max_new_tokens, vocab_size)
    log_probs = _read_log_probs(meta, index, row["output_ids"])
    text = row.get("text", "")  # a server started without a tokenizer sends none
    if not isinstance(text, str):
        raise _unsound(index, f"text is {_type_name(text)}")
    versions = _read_versions(meta, index, len(ids))
    if weight_version is not None:
        accepted = {weight_version} if isinstance(weight_version, str) else weight_version
        if any(version not in accepted for version, _ in versions):
            found = " and ".join(sorted({show(version) for version, _ in versions}))
            wanted = " or ".join(sorted(map(repr, accepted)))
            raise OtherVersionError(
                f"expected weight version {wanted}, but row {index} was sampled under {found}", meta["weight_version"]
            )
    return Completion(ids, log_probs, reason["type"], versions, text)


def _unsound(index: int, fault: str) -> FailedTryError:
    return FailedTryError(f"/generate answered garbage in row {index}: {fault}")


def _read_ids(row: dict[str, Any], index: int, reason: str, max_new_tokens: int | None, vocab_size: int | None) -> Ids:
    ids = row.get("output_ids")
    if not isinstance(ids, list) or not _all_of_type(ids, int):
        raise _unsound(index, "output_ids is not a list of integers")
    if not ids:
        # Every response ends with a stop token or at the limit, so that even the shortest has one token.
        raise _unsound(index, f"no tokens, but finish_reason {show(reason)}")
    if max_new_tokens is not None and len(ids) > max_new_tokens:
        raise _unsound(index, f"{len(ids)} tokens, but max_new_tokens is {max_new_tokens}")
    largest = _LARGEST_ID if vocab_size is None else vocab_size - 1
    try:
        array = np.array(ids, dtype=np.int64)
    except OverflowError:
        array = np.array([-1])
    if array.min() < 0 or array.max() > largest:
        position, token = next((i, token) for i, token in enumerate(ids) if not 0 <= token <= largest)
        bounds = "is no token's" if vocab_size is None else f"is outside the vocabulary of {vocab_size}"
        raise _unsound(index, f"id {token} of token {position} {bounds}")
    return array.astype(np.int32)


def _read_log_probs(meta: dict[str, Any], index: int, ids: list[int]) -> LogProbs:
    """Return the log-prob of each of ``ids``."""
    triples = meta.get("output_token_logprobs")
    try:
        if not isinstance(triples, list) or not triples or not _all_of_type(triples, list):
            raise IndexError
        # All values are checked at once, at the speed of C. They are looked at singly only to say which is wrong.
        values, tokens = list(map(_FIRST, triples)), list(map(_SECOND, triples))
    except IndexError:
        raise _unsound(index, "output_token_logprobs is missing or not a list of [log-prob, id, text]") from None
    if len(triples) != len(ids):
        raise _unsound(index, f"{len(triples)} log-probs for {len(ids)} tokens")
    if not _all_of_type(values, float) and not all(map(_is_log_prob, values)):
        raise _unsound_log_prob(index, values)
    log_probs = np.array(values, dtype=np.float64)
    if not ((log_probs >= -LARGEST_FLOAT32) & (log_probs <= LOG_PROB_TOLERANCE)).all():
        raise _unsound_log_prob(index, values)
    if tokens != ids:
        position = next(i for i, (token, drawn) in enumerate(zip(tokens, ids, strict=True)) if token != drawn)
        raise _unsound(index, f"log-prob {position} belongs to token {show(tokens[position])}, not to {ids[position]}")
    return log_probs.astype(np.float32)


def _unsound_log_prob(index: int, values: list[Any]) -> FailedTryError:
    position, value = next((i, value) for i, value in enumerate(values) if not _is_log_prob(value))
    return _unsound(index, f"log-prob {show(value)} of token {position}")


def _all_of_type(values: Sequence[Any], *types: type) -> bool:
    """Return whether each value is of exactly one of ``types``: True is no int."""
    return set(map(type, values)) <= set(types)


def _is_log_prob(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST_FLOAT32 <= value <= LOG_PROB_TOLERANCE


def _read_versions(meta: dict[str, Any], index: int, length: int) -> list[tuple[str, int]]:
    """Return (version, tokens) of each stretch of a response of ``length`` tokens."""
    version, spans = meta.get("weight_version"), meta.get("weight_versions")
    if not _is_version(version):
        raise _unsound(index, f"weight_version is {show(version)}")
    if not spans:
        return [(version, length)]
    versions, end = [], 0
    for span in spans if isinstance(spans, list) else []:
        if (
            not isinstance(span, dict)
            or span.get("start") != end
            or type(span.get("end")) is not int
            or span["end"] < end
            or not _is_version(span.get("version"))
        ):
            break
        if span["end"] > end:
            versions.append((span["version"], span["end"] - end))
        end = span["end"]
    else:
        if end == length:
            return versions
    raise _unsound(index, f"weight_versions {show(spans)} are not spans of {length} tokens")


def read_prompt_log_probs(response: Answer, input_ids: Sequence[int]) -> list[float]:
    """Return the log-probs of all of ``input_ids`` but the first; raises FailedTryError for an unsound answer."""
    answer = read_json(response)
    if not isinstance(answer, list) or len(answer) != 1 or not isinstance(answer[0], dict):
        raise _unsound_prompt(f"{_type_name(answer)} instead of a list of one row")
    meta = answer[0].get("meta_info")
    triples = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
    if not isinstance(triples, list) or not all(isinstance(t, list) and len(t) >= 2 for t in triples):
        raise _unsound_prompt("input_token_logprobs is missing or not a list of [log-prob, id, text]")
    if [triple[1] for triple in triples] != list(input_ids):
        raise _unsound_prompt("input_token_logprobs are not those of the prompt")
    values = [triple[0] for triple in triples[1:]]
    for value in values:
        if not _is_log_prob(value):
            raise _unsound_prompt(f"log-prob {show(value)} of a prompt token")
    return [float(value) for value in values]


def _unsound_prompt(fault: str) -> FailedTryError:
    return FailedTryError(f"/generate answered garbage: {fault}")
