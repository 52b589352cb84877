"""Pickles that end Python's reader, or that it never gets done with, are refused before it reads them."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import zipfile
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dasd_megatron.models.extra_state import read_scaling
from dasd_megatron.models.hf_weights import WeightsError
from dasd_megatron.models.pickles import MAX_WEIGHT, check_pickle, load_tensors
from dasd_megatron.rollout.weight_payload import PayloadError, unpack

HEAD = b"\x80\x04"
DEEP = 50_000
INDEX = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"


def _doubled(levels: int) -> bytes:
    """A tuple of one tuple twice, and so on: hashing it takes 2 to the power of ``levels`` steps."""
    return b")" + b"2\x86" * levels


def _filled_later(levels: int) -> bytes:
    """Objects that hold the one below twice, which they get after the one above has been made."""
    made = b"".join(INDEX + b")\x81r" + i.to_bytes(4, "little") + b"0" for i in range(levels))
    filled = b"".join(
        b"j" + i.to_bytes(4, "little") + b"}\x8c\x03fqn" + (b"j" + (i - 1).to_bytes(4, "little")) * 2 + b"\x86sb0"
        for i in range(levels - 1, 0, -1)
    )
    return made + filled + b"j" + (levels - 1).to_bytes(4, "little")


def _filled_first(levels: int) -> bytes:
    """Objects that hold the one below twice, as attributes."""
    state = b"}\x8c\x03fqn"
    return INDEX + b")\x81" + b"".join(
        b"r" + i.to_bytes(4, "little") + b"0" + INDEX + b")\x81" + state
        + (b"j" + i.to_bytes(4, "little")) * 2 + b"\x86sb"
        for i in range(levels)
    )  # fmt: skip


HOSTILE = {
    "deep tuple as a key": HEAD + b"})" + b"\x85" * DEEP + b"K\x01s.",
    "deep pairs as a key": HEAD + b"}" + b")" * (DEEP + 1) + b"\x86" * DEEP + b"K\x01s.",
    "deep tuple of marks": HEAD + b"}" + b"(" * DEEP + b"t" * DEEP + b"K\x01s.",
    "deep calls": HEAD + b"}" + b"ctorch\nSize\n" * DEEP + b")" + b"\x85R" * DEEP + b"K\x01s.",
    "deep calls of one list": HEAD
    + b"ctorch\nSize\nq\x00]q\x01Na\x85q\x020"
    + b"h\x01K\x00h\x00h\x02Rs0" * DEEP
    + b"}h\x00h\x02RNs.",
    "deep frozen sets": HEAD + b"}" + b"(" * DEEP + b"\x91" * DEEP + b"K\x01s.",
    "doubled tuple as a key": HEAD + b"}" + _doubled(60) + b"K\x01s.",
    "doubled tuple from the memo": HEAD + b"})" + b"".join(b"\x94h%ch%c\x86" % (i, i) for i in range(60)) + b"K\x01s.",
    "doubled objects": HEAD + b"}" + _filled_first(60) + b"K\x01s.",
    "objects filled later": HEAD + b"}" + _filled_later(60) + b"K\x01s.",
    "memo number": HEAD + b"Nr\xf0\xff\xff\x7f.",
    "memo number in digits": b"Np2147483632\n.",
    "memo number of a byte": HEAD + b"Nq\xff.",
    "nothing on the stack": HEAD + b"0.",
    "no mark": HEAD + b"t.",
    "below a mark": HEAD + b"NN(\x86.",
    "unknown memo": HEAD + b"h\x07.",
    "no end": HEAD + b"N",
    "empty": b"",
}


def _torch_file(pickled: bytes) -> bytes:
    """A file of ``torch.save`` with another pickle in it."""
    saved, planted = io.BytesIO(), io.BytesIO()
    torch.save({}, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(planted, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
    return planted.getvalue()


def _old_torch_file(pickled: bytes) -> bytes:
    """The head of a file of torch's first format, with another pickle in it."""
    saved = io.BytesIO()
    torch.save({}, saved, _use_new_zipfile_serialization=False)
    saved.seek(0)
    for _ in range(3):
        check_pickle(saved)
    return saved.getvalue()[: saved.tell()] + pickled


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_every_reader(name):
    with pytest.raises(pickle.UnpicklingError):
        check_pickle(HOSTILE[name])
    with pytest.raises(pickle.UnpicklingError):
        load_tensors(_torch_file(HOSTILE[name]))
    with pytest.raises(pickle.UnpicklingError):
        load_tensors(_old_torch_file(HOSTILE[name]))
    with pytest.raises(PayloadError):
        unpack(HOSTILE[name])
    if HOSTILE[name]:
        with pytest.raises(WeightsError, match="layer._extra_state is damaged"):
            read_scaling("layer._extra_state", torch.frombuffer(bytearray(HOSTILE[name]), dtype=torch.uint8))


def test_a_message_says_what_is_wrong():
    with pytest.raises(pickle.UnpicklingError, match=f"more than {MAX_WEIGHT} values"):
        check_pickle(HOSTILE["deep tuple as a key"])
    with pytest.raises(pickle.UnpicklingError, match="numbers objects that it does not have"):
        check_pickle(HOSTILE["memo number"])
    with pytest.raises(pickle.UnpicklingError, match="it is no pickle"):
        check_pickle(HOSTILE["no end"])


def _metadata(tensors: int) -> Metadata:
    shape = torch.Size([4, 4])
    chunks = [ChunkStorageMetadata(torch.Size([0, 0]), shape)] * 2
    entries = {f"layer.{i}": TensorStorageMetadata(TensorProperties(), shape, chunks) for i in range(tensors)}
    places = {MetadataIndex(name, torch.Size([0, 0]), 0): ("__0_0.distcp", i) for i, name in enumerate(entries)}
    return Metadata(entries, {name: (name, i) for i, name in enumerate(entries)}, places)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_of_many_tensors_is_taken_in_every_protocol(protocol):
    content = pickle.dumps(_metadata(3000), protocol)
    check_pickle(content)
    check_pickle(pickletools.optimize(pickle.dumps(_metadata(3), protocol)))


def test_what_a_run_saves_is_taken():
    state = {"python": random.getstate(), "torch": torch.get_rng_state(), "model": torch.nn.Linear(2, 2).state_dict()}
    for archive in (True, False):
        saved = io.BytesIO()
        torch.save([state], saved, _use_new_zipfile_serialization=archive)
        (found,) = load_tensors(saved.getvalue())
        assert found["python"] == random.getstate() and torch.equal(found["torch"], state["torch"])


def test_a_stream_is_read_to_the_end_of_its_pickle():
    stream = io.BytesIO(pickle.dumps((1, 2)) + b"behind")
    check_pickle(stream)
    assert stream.read() == b"behind"


class _Harmless(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return type("record", (), {"__init__": lambda self, *arguments: None})

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inside: (
        st.lists(inside, max_size=4) | st.tuples(inside, inside) | st.dictionaries(st.text(max_size=3), inside)
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(value=plain, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_are_taken(value, protocol):
    check_pickle(pickle.dumps(value, protocol))


_CODES = [code.code.encode("latin-1") for code in pickletools.opcodes if not code.name.endswith(("8", "BYTES", "INST"))]


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from([*_CODES, b"K\1", b"\x8c\1a", b"h\0", b"q\0", b"cm\nn\n"]), max_size=60))
def test_what_python_reads_is_followed(parts):
    """Whatever is made of opcodes is taken or refused. What Python's reader takes of small ones is taken, except for
    objects that change once others hold them."""
    content = HEAD + b"".join(parts) + b"."
    try:
        check_pickle(content)
    except pickle.UnpicklingError as error:
        refused = str(error)
    else:
        refused = ""
    try:
        _Harmless(io.BytesIO(content)).load()
    except Exception:
        return
    assert not refused or "something else holds" in refused or "does not have" in refused
