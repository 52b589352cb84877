"""Pickles from others that Python's reader would not survive, refused before it reads them.

Names that a pickle may use are the business of each reader. But a pickle without any name can end the process too:
hashing a tuple calls itself for every tuple inside, without an end of the stack in sight, and hashes anew what stands
there twice. The reader also makes room for as many memorised objects as the largest number in the pickle says.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import IO, Any

import torch

MAX_WEIGHT = 2000
"""Most values in a tuple or an object, with those of the tuples and objects in it. The state of Python's random numbers
has 630; lists, dicts and sets inside count as one."""

# Tensors inside other pickles are saved in torch's first format, without an archive: a magic number, the format's
# version, the machine, the content, the keys of the storages, and then their bytes.
_PICKLES_OF_OLD_FILES = 5
_READS_MEMO = frozenset({"GET", "BINGET", "LONG_BINGET"})
_WRITES_MEMO = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_FILLS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"})
_CALLS = frozenset({"BUILD", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"})
_CONTAINERS = frozenset({"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LIST", "DICT"})


class _Value:
    """A value on the pickle's stack.

    weight: how much hashing it costs.
    content: of a list, dict or set: the weight of what is in it, which cannot be hashed in there, but which an object
        may take out.
    holds: of a tuple or an object: the lists, dicts and sets in it.
    shared: something else may hold it already.
    """

    __slots__ = ("content", "holds", "shared", "weight")

    def __init__(self, weight: int, content: int | None, holds: list[_Value]) -> None:
        self.weight = weight
        self.content = content
        self.holds = holds
        self.shared = False

    def containers(self) -> list[_Value]:
        return self.holds if self.content is None else [self]


class _Stack:
    """The stack and the memo of a pickle's reader, with weights in the place of values."""

    def __init__(self) -> None:
        self.values: list[_Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Value] = {}

    def pop(self, opcode: pickletools.OpcodeInfo) -> list[_Value]:
        """Return the values that an opcode takes, the lowest first; raises IndexError where there are fewer."""
        before = list(opcode.stack_before)
        start = len(self.values)
        if pickletools.markobject in before:
            start = self.marks.pop()
            before = before[: before.index(pickletools.markobject)]
        start -= len(before)
        if start < (self.marks[-1] if self.marks else 0):
            raise IndexError("it takes values that it does not have")
        taken = self.values[start:]
        del self.values[start:]
        return taken

    def run(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name = opcode.name
        if name == "MARK":
            self.marks.append(len(self.values))
        elif name == "POP" and self.marks and self.marks[-1] == len(self.values):
            self.marks.pop()
        elif name in _WRITES_MEMO or name == "MEMOIZE":
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.values[-1]
        elif name in _READS_MEMO or name == "DUP":
            value = self.values[-1] if name == "DUP" else self.memo[argument]
            value.shared = True
            self.values.append(value)
        else:
            taken = self.pop(opcode)
            if opcode.stack_after:
                self.values.append(_made(name, taken))


def _made(name: str, taken: list[_Value]) -> _Value:
    """Return what the opcode ``name`` makes of the values that it takes; UnpicklingError where it weighs too much."""
    if name in _CONTAINERS:
        return _Value(1, sum(value.weight for value in taken), [])
    if name in _FILLS:
        target = taken[0]
        if target.content is not None:
            target.content += sum(value.weight for value in taken[1:])
        return target
    holds = [container for value in taken for container in value.containers()]
    if name == "BUILD":
        made = taken[0]
        if made.shared:
            # Its weight is in those of its holders already. Nothing that we read refers to itself.
            raise pickle.UnpicklingError("it changes an object that something else holds")
        made.weight += taken[1].weight
        made.holds = holds
    else:
        made = _Value(1 + sum(value.weight for value in taken), None, holds)
    if name in _CALLS:
        made.weight += sum(container.content or 0 for container in holds)
    if made.weight > MAX_WEIGHT:
        raise pickle.UnpicklingError(f"a tuple or an object of more than {MAX_WEIGHT} values, with those inside")
    return made


def check_pickle(data: bytes | IO[bytes]) -> None:
    """Refuse a pickle that Python's reader would fall over. Nothing in it is made or called.

    Args:
        data: the pickle, or a stream that stands at its beginning, of which no more than the pickle is read.

    Raises:
        pickle.UnpicklingError: it is nested too deeply, numbers objects that it does not have, or is no pickle.
    """
    stack = _Stack()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name in _WRITES_MEMO and not 0 <= (argument or 0) <= count:
                raise pickle.UnpicklingError("it numbers objects that it does not have")
            stack.run(opcode, argument)
    except (ValueError, IndexError, KeyError) as error:
        raise pickle.UnpicklingError(f"it is no pickle: {error}") from error


def load_tensors(content: bytes) -> Any:
    """Return what ``torch.save`` has written, on the CPU. No code in it is run.

    Raises:
        pickle.UnpicklingError, RuntimeError, EOFError: it would run code, is damaged, or is no file of ``torch.save``.
    """
    stream = io.BytesIO(content)
    if content.startswith(b"PK"):
        # Torch's own reader of the archive: another one could find another pickle in it.
        check_pickle(torch._C.PyTorchFileReader(stream).get_record("data.pkl"))
    else:
        for _ in range(_PICKLES_OF_OLD_FILES):
            check_pickle(stream)
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
