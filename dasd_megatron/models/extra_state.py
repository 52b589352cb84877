"""Transformer Engine's extra states in checkpoints, read without running what they hold.

A layer of Transformer Engine keeps its FP8 scaling in an extra state: bytes, which are a pickle, and which it unpickles
when a state dict is loaded. Whoever wrote the checkpoint could make it do anything. Only delayed scaling keeps anything
there: scales and the history of maxima, as its ``get_extra_state`` writes them
(``transformer_engine/pytorch/module/base.py``, versions 2.0 to 2.18). So a run with delayed scaling takes these numbers
out and gives its layers a pickle of its own with them. All other runs leave extra states out.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dasd_megatron.errors import first_line
from dasd_megatron.models.hf_weights import WeightsError
from dasd_megatron.models.pickles import check_pickle, load_tensors

_SUFFIX = "_extra_state"
_RECIPES = ("transformer_engine.common.recipe", "megatron.core.extensions.transformer_engine")
_TENSORS = ("scale_fwd", "scale_bwd", "amax_history_fwd", "amax_history_bwd")
# From version 2.16.1 on Transformer Engine reads the extra states of delayed scaling only where this is 1.
_PERMISSION = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def without_extra_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a model's state dict, sharded or loaded, that are no extra states."""
    return {key: entry for key, entry in state.items() if _SUFFIX not in key}


def load_state(module: torch.nn.Module, state: Mapping[str, Any], recipe: Any = None) -> None:
    """Load a state dict that may come from others into ``module``.

    Args:
        state: tensors, and the extra states as they stand in the checkpoint.
        recipe: Transformer Engine's recipe of this run, where it keeps its scaling between steps. None: extra states
            are left out.

    Raises:
        WeightsError: an extra state is not a layer's scaling, or the state does not fit the module.
    """
    kept = without_extra_states(state)
    if recipe is not None:
        for key in state.keys() - kept.keys():
            scaling = read_scaling(key, state[key])
            if scaling is not None:
                content = pickle.dumps({**scaling, "recipe": recipe})
                kept[key] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    try:
        with _reading_own_pickles():
            mismatch = module.load_state_dict(kept, strict=False)
    except (RuntimeError, KeyError) as error:
        raise WeightsError(f"the checkpoint does not fit the model ({first_line(error)})") from error
    missing = [key for key in mismatch.missing_keys if _SUFFIX not in key]
    if missing or mismatch.unexpected_keys:
        raise WeightsError(
            f"the checkpoint does not fit the model: missing {missing[:3]}, unexpected {mismatch.unexpected_keys[:3]}"
        )


def kept_scaling(config: TransformerConfig) -> Any:
    """Return Transformer Engine's recipe for a model whose extra states hold scaling that the next step needs; None for
    all other models."""
    if not config.fp8 or config.fp8_recipe != "delayed":
        return None
    # Megatron-Core defines this where Transformer Engine is installed.
    from megatron.core.fp8_utils import get_fp8_recipe

    return get_fp8_recipe(config)


@contextlib.contextmanager
def _reading_own_pickles() -> Iterator[None]:
    """Let Transformer Engine unpickle meanwhile: what it is given was pickled by this process."""
    before = os.environ.get(_PERMISSION)
    os.environ[_PERMISSION] = "1"
    try:
        yield
    finally:
        os.environ.pop(_PERMISSION)
        if before is not None:
            os.environ[_PERMISSION] = before


def read_scaling(name: str, value: Any) -> dict[str, Any] | None:
    """Return the numbers of a layer's extra state ``name``: float32 tensors by their names, and the plain values under
    ``extra_fp8_variables``; None where there are none.

    Nothing that it names is called.

    Raises:
        WeightsError: it holds anything else.
    """
    if value is None or (isinstance(value, Tensor) and value.numel() == 0):
        return None
    try:
        if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
            raise ValueError(f"it is a {type(value).__name__} and not bytes")
        pickled = value.cpu().numpy().tobytes()
        check_pickle(pickled)
        reader = _Reader(pickled)
        content = reader.load()
        if content is None or content == {}:
            return None
        return {
            **{key: reader.tensor(content[key]) for key in _TENSORS if key in content},
            "extra_fp8_variables": _plain_values(content["extra_fp8_variables"]),
        }
    except Exception as error:  # A pickle can break in any way.
        raise WeightsError(
            f"{name} is damaged, or would run code if it were loaded ({first_line(error)}); restore the checkpoint"
        ) from error


class _Record:
    """The arguments of a call that an extra state asks for, in the place of the call."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        """Leave out the attributes of a recipe: the run has its own."""


class _Reader(pickle.Unpickler):
    """Unpickler that reads an extra state into records, and refuses names that none has."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        # These classes are made anew each time, since a pickle can change the attributes of classes it names.
        self._tensor: type[_Record] = type("tensor", (_Record,), {})
        self._storage: type[_Record] = type("storage", (_Record,), {})
        self._plain: type[_Record] = type("plain", (_Record,), {})
        self._named = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch.storage", "_load_from_bytes"): self._storage,
            ("collections", "OrderedDict"): self._plain,
        }

    def find_class(self, module: str, name: str) -> Any:
        if module in _RECIPES:
            return self._plain
        if (module, name) not in self._named:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self._named[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside itself")

    def tensor(self, record: Any) -> Tensor:
        """Return the tensor of a record of one; ValueError or TypeError on what is none of a scaling."""
        storage, offset, shape, stride = _arguments(record, self._tensor)[:4]
        if not all(type(number) is int and number >= 0 for number in (offset, *shape, *stride)):
            raise ValueError("a tensor without a place in its storage")
        (content,) = _arguments(storage, self._storage)
        stored = load_tensors(content)
        count = math.prod(shape)
        if stored.dtype != torch.float32 or offset + count > len(stored):
            raise ValueError(f"{len(stored)} values of {stored.dtype} where {list(shape)} of float32 belong")
        tensor = torch.empty(0).set_(stored.untyped())[offset : offset + count].reshape(shape).clone()
        if tensor.stride() != tuple(stride):
            raise ValueError(f"a tensor of stride {list(stride)} where one without gaps belongs")
        if not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise ValueError("scales or maxima that are negative or not finite")
        return tensor


def _arguments(record: Any, kind: type[_Record]) -> tuple[Any, ...]:
    if type(record) is not kind:
        raise ValueError(f"a {type(record).__name__} where a {kind.__name__} belongs")
    return record.arguments


def _plain_values(values: Any) -> dict[str, Any]:
    """Return numbers, texts and rows of them by their names; ValueError on anything else."""

    def is_plain(value: Any) -> bool:
        return type(value) in (bool, int, float, str)

    for key, value in values.items():
        row = value if type(value) in (tuple, list) else [value]
        if type(key) is not str or not all(map(is_plain, row)):
            raise ValueError(f"a {type(value).__name__} where a plain value belongs")
    return dict(values)
