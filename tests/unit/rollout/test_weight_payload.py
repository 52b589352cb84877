"""Buckets in shared memory: what arrives is what was sent, nothing is left, and nothing else is ever loaded."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from dasd_megatron.models.weight_formats import HfTensor
from dasd_megatron.rollout.weight_payload import PayloadError, SharedBuffer, pack, unpack

ENTRIES = [
    HfTensor("a", torch.float32, (3, 4)),
    HfTensor("none", torch.float32, (0, 4)),
    HfTensor("b", torch.bfloat16, (5,)),
    HfTensor("c", torch.float16, ()),
]
SIZE = 48 + 10 + 2

# Prints the tensors of a payload, then tells the sender and waits, so that both hold the memory for a while.
RECEIVER = """
import base64, sys
from dasd_megatron.rollout.weight_payload import unpack
tensors = unpack(base64.b64decode(sys.stdin.readline()))
found = [(name, str(tensor.dtype), list(tensor.shape), tensor.double().sum().item()) for name, tensor in tensors]
print(found, flush=True)
sys.stdin.readline()
print(tensors[0][1].double().sum().item(), flush=True)
"""


@pytest.fixture
def buffer():
    made = SharedBuffer(100)
    made.bytes[:SIZE] = torch.arange(SIZE, dtype=torch.uint8)
    yield made
    made.close()
    assert not made.path.exists()


def content(buffer: SharedBuffer) -> dict[str, Any]:
    """The payload as SGLang's own serialiser would write it, but for the classes of what describes the tensors."""
    handle = buffer.bytes.untyped_storage()._share_filename_cpu_()
    buffer.bytes.untyped_storage()._shared_incref()
    opened = Call(reductions.rebuild_storage_filename, torch.UntypedStorage, *handle)
    typed = Call(reductions.rebuild_typed_storage, opened, torch.uint8)
    return {
        "flattened_tensor": Call(reductions.rebuild_tensor, torch.Tensor, typed, (0, torch.Size([SIZE]), (1,), False)),
        "metadata": [
            SimpleNamespace(name="a", shape=torch.Size([3, 4]), dtype=torch.float32, start_idx=0, end_idx=48, numel=48)
        ],
    }


class Call:
    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_other_processes_read_what_was_written_and_nothing_is_left(buffer: SharedBuffer) -> None:
    texts = [pack(buffer.bytes[:SIZE], ENTRIES) for _ in range(2)]
    receivers = [
        subprocess.Popen([sys.executable, "-c", RECEIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in texts
    ]
    for receiver, text in zip(receivers, texts, strict=True):
        receiver.stdin.write(text + "\n")
        receiver.stdin.flush()
    expected = []
    start = 0
    for name, dtype, shape in ENTRIES:
        size = torch.Size(shape).numel() * dtype.itemsize
        tensor = buffer.bytes[start : start + size].view(dtype)
        expected.append((name, str(dtype), list(shape), tensor.double().sum().item()))
        start += size
    for receiver in receivers:
        assert repr(eval(receiver.stdout.readline())) == repr(expected)
    # Closed before they are: they keep what they have, and remove nothing twice when they end.
    buffer.close()
    assert not buffer.path.exists()
    for receiver in receivers:
        output, _ = receiver.communicate("go on\n", timeout=60)
        assert float(output) == pytest.approx(expected[0][3])
        assert receiver.returncode == 0


def test_memory_is_gone_with_the_sender_however_it_ends() -> None:
    code = (
        "import os, signal; from dasd_megatron.rollout.weight_payload import SharedBuffer; b = SharedBuffer(99); "
        "print(b.path, flush=True)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code + "; os.kill(os.getpid(), signal.SIGKILL)"], capture_output=True, text=True
    )
    assert killed.returncode == -9
    path = Path(killed.stdout.strip())
    for _ in range(200):
        if not path.exists():
            break
        subprocess.run(["sleep", "0.05"], check=True)
    assert path.name.startswith("torch_") and not path.exists()


def test_sglangs_own_writing_of_it_is_read_too(buffer: SharedBuffer) -> None:
    ((name, tensor),) = unpack(pickle.dumps(content(buffer)))
    assert name == "a"
    assert torch.equal(tensor.flatten().view(torch.uint8), buffer.bytes[:48])
    # As it names its own class, which this process has not.
    text = pickle.dumps(content(buffer), protocol=3)
    assert b"ctypes\nSimpleNamespace" in text
    renamed = text.replace(
        b"ctypes\nSimpleNamespace", b"csglang.srt.weight_sync.tensor_bucket\nFlattenedTensorMetadata"
    )
    assert torch.equal(unpack(renamed)[0][1], tensor)


def test_no_room_is_said_before_anything_is_written() -> None:
    with pytest.raises(PayloadError, match="rollout.weight_bucket_bytes"):
        SharedBuffer(1 << 50)


def touch(path: Path) -> str:
    return f"touch {path}"


MALICIOUS = {
    "a shell command": lambda path: Call(os.system, touch(path)),
    "a shell command inside a bucket": lambda path: {"flattened_tensor": Call(os.system, touch(path)), "metadata": []},
    "code": lambda path: Call(eval, f"open({str(path)!r}, 'w')"),
    "a method of an allowed class": lambda path: Call(getattr, SimpleNamespace(), "__class__"),
    "a nested load": lambda path: Call(torch.load, str(path)),
    "another file": lambda path: Call(open, str(path), "w"),
    "a file of another kind of sharing": lambda path: Call(reductions.rebuild_storage_fd, torch.UntypedStorage, 3, 100),
}


@pytest.mark.parametrize("kind", MALICIOUS)
def test_a_pickle_that_does_anything_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "made"
    with pytest.raises(PayloadError, match="Blocked unsafe global"):
        unpack(pickle.dumps(MALICIOUS[kind](path)))
    assert not path.exists()


def test_what_a_pickle_does_to_the_classes_it_names_stays_in_it(buffer: SharedBuffer) -> None:
    # BUILD with a slot state sets attributes of the class itself.
    attack = b"ctypes\nSimpleNamespace\n(N(V__init__\nVgone\ndtb."
    with pytest.raises(PayloadError):
        unpack(attack)
    assert unpack(base64.b64decode(pack(buffer.bytes[:SIZE], ENTRIES)))[0][0] == "a"


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(payload: dict[str, Any]) -> Any:
        setattr(payload["metadata"][0], path, value)
        return payload

    return change


def reopened(place: int, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(payload: dict[str, Any]) -> Any:
        function, arguments = payload["flattened_tensor"].call[1][1].call[1][0].call
        arguments = (*arguments[:place], value, *arguments[place + 1 :])
        payload["flattened_tensor"].call[1][1].call = (
            reductions.rebuild_typed_storage,
            (Call(function, *arguments), torch.uint8),
        )
        return payload

    return change


BROKEN = {
    "no pickle": lambda payload: None,
    "no bucket": lambda payload: [1, 2],
    "no memory": lambda payload: {**payload, "flattened_tensor": torch.Size([1])},
    "a tensor past the end": changed("end_idx", 10**6),
    "a tensor before the beginning": changed("start_idx", -48),
    "a tensor of another size": changed("shape", (5, 5)),
    "a negative shape": changed("shape", (-3, -4)),
    "no dtype": changed("dtype", "float32"),
    "no name": changed("name", 5),
    "a truth for a number": changed("start_idx", False),
    "a manager that is no socket": reopened(1, b"/etc/passwd"),
    "a manager that is not there": reopened(1, b"/nowhere/manager.sock"),
    "memory of others": reopened(2, b"/sem.mp-1"),
    "memory elsewhere": reopened(2, b"/torch_/../../etc/passwd"),
    "memory that is gone": reopened(2, b"/torch_1_2_3"),
    "more memory than there is": reopened(3, 10**9),
    "less memory than the bucket": reopened(3, 10),
    "no size": reopened(3, "100"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_bucket_is_refused(kind: str, buffer: SharedBuffer) -> None:
    payload = BROKEN[kind](content(buffer))
    with pytest.raises(PayloadError) as caught:
        unpack(b"garbage" if payload is None else pickle.dumps(payload))
    assert "\n" not in str(caught.value)


def nested_key(levels: int) -> bytes:
    """A pickle whose dictionary has a tuple in a tuple as its key, so many levels deep."""
    return b"\x80\x04}N" + b"\x85" * levels + b"Ns."


def nested_key_without_tuple_opcodes(levels: int) -> bytes:
    """The same, where one list is the argument of every call that makes a tuple."""
    head = b"\x80\x04ctorch\nSize\nq\x00]q\x01Na\x85q\x020"
    level = b"h\x01K\x00h\x00h\x02Rs0"
    return head + level * levels + b"}h\x00h\x02RNs."


@pytest.mark.parametrize(
    "data",
    [
        nested_key(1_000_000),
        nested_key_without_tuple_opcodes(400_000),
        b"\x80\x04Nr\xff\xff\xff\xff.",
        b"Np4294967295\n.",
        b"\x80\x04Nq\xff.",
        b"\x80\x04" + b"(" * 1000,
        b"\x80\xff.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        b"",
    ],
    ids=["tuples", "calls", "binary number", "written number", "small number", "marks", "protocol", "length", "empty"],
)
def test_what_would_end_the_reader_is_refused(data: bytes) -> None:
    """Python's reader of pickles overflows the stack or takes gigabytes for some of these."""
    with pytest.raises(PayloadError) as caught:
        unpack(data)
    assert "\n" not in str(caught.value)
