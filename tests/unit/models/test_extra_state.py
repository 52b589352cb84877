"""Transformer Engine's extra states in a checkpoint cannot run code, and a run with delayed scaling keeps its own.

Transformer Engine needs a GPU, so a layer with the same two methods stands in for it: bytes of a pickle out, and
whatever it is given unpickled.
"""

from __future__ import annotations

import copyreg
import enum
import os
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dasd_megatron.models.extra_state import kept_scaling, load_state, read_scaling, without_extra_states
from dasd_megatron.models.hf_weights import WeightsError

RECIPES = "transformer_engine.common.recipe"
PERMISSION = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


class Helper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    E4M3 = Helper(448, 448)
    HYBRID = Helper(448, 57344)


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 4


class Layer(torch.nn.Linear):
    """A linear layer with FP8 scaling that is saved and loaded in the manner of Transformer Engine."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scaling: Any = None
        self.permitted = False

    def get_extra_state(self) -> Tensor:
        if self.scaling is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps(self.scaling)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if state.numel():
            self.permitted = os.environ.get(PERMISSION) == "1"
            self.scaling = pickle.loads(state.numpy().tobytes())


for kind in (Helper, Format, DelayedScaling):
    kind.__module__ = RECIPES


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the classes of recipes be pickled under the names that they have there."""
    for package in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    module = types.ModuleType(RECIPES)
    for kind in (Helper, Format, DelayedScaling):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, RECIPES, module)


def scaling(**changes: Any) -> dict[str, Any]:
    return {
        "recipe": DelayedScaling(),
        "scale_fwd": torch.tensor([2.0, 0.5, 1.0]),
        "amax_history_fwd": torch.rand(4, 3),
        "scale_bwd": torch.tensor([3.0]),
        "amax_history_bwd": torch.rand(4, 1),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "fp8_max_fwd": 448.0, "names": ("a", "b")},
        **changes,
    }


def packed(content: Any, protocol: int = pickle.DEFAULT_PROTOCOL) -> Tensor:
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class Call:
    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_the_numbers_of_an_own_state_come_back_exactly(protocol: int) -> None:
    saved = scaling()
    found = read_scaling("layer._extra_state", packed(saved, protocol))
    assert found is not None and "recipe" not in found
    for name in ("scale_fwd", "scale_bwd", "amax_history_fwd", "amax_history_bwd"):
        assert torch.equal(found[name], saved[name])
    assert found["extra_fp8_variables"] == saved["extra_fp8_variables"]


@pytest.mark.parametrize("value", [None, torch.empty(0, dtype=torch.uint8), packed(None), packed({})])
def test_a_layer_without_scaling_has_none(value: Tensor | None) -> None:
    assert read_scaling("layer._extra_state", value) is None


def test_a_state_without_the_tensors_of_delayed_scaling_is_read() -> None:
    """As of an attention layer that computes in half precision."""
    state = packed({"recipe": DelayedScaling(), "extra_fp8_variables": {"fp8_checkpoint": True}})
    assert read_scaling("layer._extra_state", state) == {"extra_fp8_variables": {"fp8_checkpoint": True}}


def test_a_run_goes_on_with_its_own_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PERMISSION, raising=False)
    saved, resumed = Layer(), Layer()
    saved.scaling = scaling(recipe=DelayedScaling(margin=7))
    load_state(resumed, saved.state_dict(), DelayedScaling(margin=0))
    assert resumed.permitted and PERMISSION not in os.environ
    assert torch.equal(resumed.scaling["amax_history_fwd"], saved.scaling["amax_history_fwd"])
    assert torch.equal(resumed.weight, saved.weight)
    # The recipe is that of the run and not of the checkpoint.
    assert resumed.scaling["recipe"].margin == 0
    monkeypatch.setenv(PERMISSION, "0")
    load_state(resumed, saved.state_dict(), DelayedScaling())
    assert os.environ[PERMISSION] == "0"


def test_only_delayed_scaling_is_kept() -> None:
    assert kept_scaling(SimpleNamespace(fp8=None, fp8_recipe="delayed")) is None  # type: ignore[arg-type]
    assert kept_scaling(SimpleNamespace(fp8="hybrid", fp8_recipe="mxfp8")) is None  # type: ignore[arg-type]


def registered_for_pickles(mark: str) -> bytes:
    copyreg.add_extension("os", "mkdir", 0xDA5D)
    try:
        return pickle.dumps(Call(os.mkdir, mark), 2)
    finally:
        copyreg.remove_extension("os", "mkdir", 0xDA5D)


def tensor_at(storage: Any, *place: Any) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage, *place, False, {})


def pickle_in_a_tensor(mark: str) -> dict[str, Any]:
    storage = Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.mkdir, mark)))
    return scaling(scale_fwd=tensor_at(storage, 0, (1,), (1,)))


# These run code, or do what no scaling does, when they are unpickled.
EVIL: dict[str, Callable[[str], Any]] = {
    "a call": lambda mark: Call(os.mkdir, mark),
    "a call in the recipe": lambda mark: scaling(recipe=Call(os.mkdir, mark)),
    "a call in a variable": lambda mark: scaling(extra_fp8_variables={"a": Call(os.mkdir, mark)}),
    "a builtin": lambda mark: Call(eval, f"__import__('os').mkdir({mark!r})"),
    "a pickle in a tensor": pickle_in_a_tensor,
    "a name registered for pickles": registered_for_pickles,
    "an attribute": lambda mark: Call(getattr, "", "join"),
    "attributes of a class": lambda mark: f"\x80\x02c{RECIPES}\nDelayedScaling\n}}U\x01aK\x01sb.".encode("latin1"),
}
ONES = torch.storage.TypedStorage(wrap_storage=torch.ones(3).untyped_storage(), dtype=torch.float32, _internal=True)
# These are no extra state, or have numbers that are no scaling.
WRONG: dict[str, Callable[[], Any]] = {
    "floats": lambda: torch.ones(3),
    "two dimensions": lambda: packed(scaling())[None],
    "a list": lambda: [1, 2],
    "no dictionary": lambda: packed([1]),
    "no variables": lambda: packed({"recipe": DelayedScaling()}),
    "a nested variable": lambda: packed(scaling(extra_fp8_variables={"a": ((1,),)})),
    "not a number": lambda: packed(scaling(scale_fwd=torch.tensor([float("nan")]))),
    "an infinite maximum": lambda: packed(scaling(amax_history_fwd=torch.full((4, 3), float("inf")))),
    "a negative scale": lambda: packed(scaling(scale_bwd=torch.tensor([-1.0]))),
    "float64": lambda: packed(scaling(scale_fwd=torch.ones(3, dtype=torch.float64))),
    "a list for a tensor": lambda: packed(scaling(scale_fwd=[1.0])),
    "a tensor past its storage": lambda: packed(scaling(scale_fwd=tensor_at(ONES, 0, (9,), (1,)))),
    "a tensor that begins past it": lambda: packed(scaling(scale_fwd=tensor_at(ONES, 3, (1,), (1,)))),
    "a stride past it": lambda: packed(scaling(scale_fwd=tensor_at(ONES, 0, (3,), (10**15,)))),
    "a tensor with gaps": lambda: packed(scaling(scale_fwd=torch.rand(2, 3).t())),
    "no pickle": lambda: packed(b"garbage"),
    "nothing behind the start": lambda: packed(b"\x80\x04"),
}


@pytest.mark.parametrize("kind", EVIL)
def test_a_state_that_runs_code_is_refused(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "code-has-run"
    content = EVIL[kind](str(mark))
    state = {**Layer().state_dict(), "_extra_state": packed(content)}
    with pytest.raises(WeightsError, match=r"^_extra_state is damaged, or would run code"):
        load_state(Layer(), state, DelayedScaling())
    assert not mark.exists()
    # Without scaling to keep, nobody reads it.
    load_state(Layer(), state)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["a call", "a call in the recipe", "a builtin", "a pickle in a tensor"])
def test_a_plain_load_would_have_run_it(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "code-has-run"
    state = {**Layer().state_dict(), "_extra_state": packed(EVIL[kind](str(mark)))}
    try:
        Layer().load_state_dict(state)
    except Exception as error:  # After the code has run, anything may fail.
        print(error)
    assert mark.exists()


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_scaling_is_refused(kind: str) -> None:
    with pytest.raises(WeightsError, match=r"^layer\._extra_state is damaged") as caught:
        read_scaling("layer._extra_state", WRONG[kind]())
    assert "\n" not in str(caught.value)


def test_damaged_bytes_give_one_line_or_the_numbers() -> None:
    """No byte of a state, changed or cut off, gives anything but sound numbers or a line about it."""
    data = bytes(packed(scaling()).tolist())
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    refused = 0
    for _ in range(150):
        position, value = (int(torch.randint(0, high, (1,), generator=generator)) for high in (len(data), 256))
        changed = data[:position] + bytes([value]) + data[position + 1 :]
        for content in (changed, data[:position]):
            try:
                found = read_scaling("a", packed(content) if content else None)
            except WeightsError as error:
                refused += 1
                assert str(error).startswith("a is damaged") and "\n" not in str(error)
            else:
                assert found is None or set(found) >= {"extra_fp8_variables"}
    assert refused > 100


def test_a_state_that_does_not_fit_the_model_is_refused() -> None:
    whole = Layer().state_dict()
    with pytest.raises(WeightsError, match="missing \\['bias'\\]"):
        load_state(Layer(), {key: value for key, value in whole.items() if key != "bias"})
    with pytest.raises(WeightsError, match="unexpected \\['other'\\]"):
        load_state(Layer(), {**whole, "other": torch.ones(1)})
    with pytest.raises(WeightsError, match="does not fit the model"):
        load_state(Layer(), {**whole, "weight": torch.ones(3, 3)})
    assert set(without_extra_states(whole)) == {"weight", "bias"}
