"""JSON bodies that the embedded server takes, with SGLang 0.5.23's field names and its words for what breaks them."""

from __future__ import annotations

import base64
import binascii
import reprlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, StringConstraints, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass

# The server repeats names and versions in every row of an answer.
MAX_NAME_LENGTH = 256
MAX_PATH_LENGTH = 4096
MAX_SKIPPED_TENSORS = 1024

Name = Annotated[str, StringConstraints(max_length=MAX_NAME_LENGTH)]
# Without fail_fast each wrong element of a long list would be reported, with a copy of it.
StringList = Annotated[list[str], Field(fail_fast=True)]


def _short_repr() -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 80
    return short


_SHORT_REPR = _short_repr()


def brief(value: Any, *, quote: bool = True) -> str:
    """Return a value of a request as a message may repeat it: one line of at most a few hundred characters."""
    if isinstance(value, str) and not quote:
        return value if len(value) <= 80 else f"{value[:77]}..."
    if isinstance(value, int) and not -(10**80) < value < 10**80:
        # Python refuses to write out the longest integers.
        return f"an integer of {value.bit_length()} bits"
    return _SHORT_REPR.repr(value)


class ContractError(ValueError):
    """A JSON body that breaks SGLang's schema of /generate; answered as ``{"error": "<message>"}``."""


def _check_int64_lists(value: Any) -> Any:
    """Return input_ids that pass SGLang's check: null, a list of int64 or a list of such lists; raises ValueError."""
    if value is not None and (problem := _fault_of_int64_lists(value)):
        raise ValueError(problem)
    return value


def _fault_of_int64_lists(value: Any) -> str | None:
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
            if not isinstance(x, int) or not _fits_int64(x):
                return f"{where}contains non-int64 element: {brief(x)}"
    return None


def _fits_int64(value: int) -> bool:
    return -(2**63) <= value < 2**63


@pydantic_dataclass
class GenerateReqInput:
    """The fields of /generate that the embedded server reads.

    Those of UNSUPPORTED_FIELDS are refused, and all others ignored.
    """

    rid: Name | Annotated[list[Name], Field(fail_fast=True)] | None = None
    text: StringList | str | None = None
    input_ids: Annotated[Any, PlainValidator(_check_int64_lists)] = None
    sampling_params: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | dict[str, Any] | None = None
    return_logprob: Annotated[list[bool], Field(fail_fast=True)] | bool | None = None
    logprob_start_len: Annotated[list[int], Field(fail_fast=True)] | int | None = None
    top_logprobs_num: Annotated[list[int], Field(fail_fast=True)] | int | None = None
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False


GENERATE_BODY: TypeAdapter[GenerateReqInput] = TypeAdapter(GenerateReqInput)

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

# These are the sampling parameters of SGLang 0.5.23 in its order, with the JSON type that its schema check expects.
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
# The embedded server does not implement these parameters. It takes the values at which they change nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
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


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"boolean `{str(value).lower()}`"
    if isinstance(value, int):
        return f"integer `{brief(value)}`"
    if isinstance(value, float):
        return f"floating point `{value}`"
    if isinstance(value, str):
        return f'string "{brief(value, quote=False)}"'
    return "sequence" if isinstance(value, list) else "map"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fits_float(value: int | float) -> bool:
    return isinstance(value, float) or abs(value) < 2**1023


# Each scalar kind has a test of JSON values, and the name that SGLang gives it in refusals.
_SCALARS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "i64": (_is_int, "i64"),
    "f64": (lambda value: _is_int(value) or isinstance(value, float), "f64"),
    "string": (lambda value: isinstance(value, str), "a string"),
    "boolean": (lambda value: isinstance(value, bool), "a boolean"),
    "map": (lambda value: isinstance(value, dict), "a map"),
    "any": (lambda value: True, "anything"),
}


def _check_type(value: Any, kind: str) -> None:
    """Raise ContractError, in SGLang's words, unless a JSON value is of ``kind``."""
    if kind in _SCALARS:
        accepts, expected = _SCALARS[kind]
        if not accepts(value):
            raise ContractError(f"invalid type: {_describe(value)}, expected {expected}")
        if kind == "f64" and not _fits_float(value):
            raise ContractError(f"invalid value: {_describe(value)}, expected {expected}")
        return
    element = {"String": "string", "Int64": "i64", "Bool": "boolean"}[kind.removesuffix("List").removesuffix("Or")]
    if isinstance(value, list):
        for item in value:
            _check_type(item, element)
    elif not kind.endswith("OrList"):
        raise ContractError(f"invalid type: {_describe(value)}, expected a sequence")
    elif not _SCALARS[element][0](value):
        raise ContractError(f"invalid type: {_describe(value)}, expected a value or an array of values for {kind}")


_GENERATE_KINDS = {
    "rid": "StringOrList",
    "text": "StringOrList",
    "return_logprob": "BoolOrList",
    "logprob_start_len": "Int64OrList",
    "top_logprobs_num": "Int64OrList",
    "return_text_in_logprobs": "boolean",
    "stream": "boolean",
    "return_prompt_token_ids": "boolean",
}


def check_contract(body: Any) -> None:
    """Check a parsed /generate body against SGLang's schema; raises ContractError."""
    if not isinstance(body, dict):
        raise ContractError(f"invalid type: {_describe(body)}, expected struct GenerateRequest")
    for name, kind in _GENERATE_KINDS.items():
        if body.get(name) is not None:
            _check_type(body[name], kind)
    given = body.get("input_ids") or []
    for row in [row for row in given if isinstance(row, list)] or [given]:
        for token in row:
            if isinstance(token, bool):
                raise ContractError(f"invalid type: {_describe(token)}, expected i64")
    params = body.get("sampling_params")
    for row_params in params if isinstance(params, list) else [params or {}]:
        _check_sampling_fields(row_params)


def _check_sampling_fields(params: dict[str, Any]) -> None:
    for name, value in params.items():
        if name not in SAMPLING_FIELDS:
            listed = ", ".join(f"`{field}`" for field in SAMPLING_FIELDS)
            raise ContractError(f"unknown field `{brief(name, quote=False)}`, expected one of {listed}")
        if value is not None:
            _check_type(value, SAMPLING_FIELDS[name])
        # A seed out of range has a message of its own. SGLang's own check of types takes integers of any size.
        if SAMPLING_FIELDS[name] == "i64" and name != "sampling_seed" and value is not None and not _fits_int64(value):
            raise ContractError(f"invalid value: {_describe(value)}, expected i64")


@pydantic_dataclass
class UpdateWeightFromDiskReqInput:
    """Body of /update_weights_from_disk."""

    model_path: Annotated[str, StringConstraints(max_length=MAX_PATH_LENGTH)]
    load_format: Name | None = None
    abort_all_requests: bool = False
    weight_version: Name | None = None
    flush_cache: bool = True  # accepted for compatibility; there is no cache to flush


@pydantic_dataclass
class InitWeightsUpdateGroupReqInput:
    """Body of /init_weights_update_group."""

    master_address: Name
    master_port: int
    rank_offset: int
    world_size: int
    group_name: Name = "weight_update_group"
    backend: Name = "nccl"


@pydantic_dataclass
class DestroyWeightsUpdateGroupReqInput:
    """Body of /destroy_weights_update_group."""

    group_name: Name = "weight_update_group"


@pydantic_dataclass
class UpdateWeightsFromDistributedReqInput:
    """Body of /update_weights_from_distributed."""

    names: StringList
    dtypes: StringList
    shapes: Annotated[list[Annotated[list[int], Field(fail_fast=True)]], Field(fail_fast=True)]
    group_name: Name = "weight_update_group"
    load_format: Name | None = None
    flush_cache: bool = True  # accepted for compatibility; there is no cache to flush


def _decode_base64(value: Any) -> Any:
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else value
    except binascii.Error:
        raise ValueError("Expected base64-encoded bytes") from None


@pydantic_dataclass
class UpdateWeightsFromTensorReqInput:
    """Body of /update_weights_from_tensor."""

    serialized_named_tensors: Annotated[list[Annotated[bytes, BeforeValidator(_decode_base64)]], Field(fail_fast=True)]
    load_format: Name | None = None
    flush_cache: bool = True  # accepted for compatibility; there is no cache to flush


@pydantic_dataclass
class MemoryOccupationReqInput:
    """Body of /release_memory_occupation and /resume_memory_occupation."""

    tags: StringList | None = None


@pydantic_dataclass
class CheckWeightsReqInput:
    """Body of /weights_checker."""

    action: Name = "checksum"
    skip_tensor_list: Annotated[list[str], Field(fail_fast=True, max_length=MAX_SKIPPED_TENSORS)] | None = None


@pydantic_dataclass
class UpdateWeightVersionReqInput:
    """Body of /update_weight_version."""

    new_version: Name
    abort_all_requests: bool = True


@pydantic_dataclass
class AbortReq:
    """Body of /abort_request."""

    rid: Name | None = None
    abort_all: bool = False


@pydantic_dataclass
class PauseGenerationReqInput:
    """Body of /pause_generation."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


@pydantic_dataclass
class ContinueGenerationReqInput:
    """Body of /continue_generation."""

    torch_empty_cache: bool = True  # accepted for compatibility
