"""Damage to the small files of a run, and records of checkpoints to be damaged."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Damage = Callable[[Path], None]


def trainer_record(step: int, **changes: Any) -> dict[str, Any]:
    """Return what ``trainer.json`` has after ``step`` steps."""
    counters = {"skipped": 0, "discarded": 0, "rollbacks": 0, "rolled_back_to": -1}
    record = {"step": step, **counters, "position": 16 * step, "pending": [], "collected": {"drawn": 16}}
    return record | {"world_size": 1, "architecture": {"vocab_size": 64}} | changes


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _put_directory(path: Path) -> None:
    _remove(path)
    path.mkdir()


def _put_loop(path: Path) -> None:
    _remove(path)
    path.symlink_to(path.name)


def _put_pipe(path: Path) -> None:
    _remove(path)
    os.mkfifo(path)


def _make_huge(path: Path) -> None:
    os.truncate(path, 2**44 - 4096)


def _write(content: bytes) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(content)

    return damage


def _truncate(share: float) -> Damage:
    return lambda path: os.truncate(path, int(share * path.stat().st_size))


def _flip(seed: int, bits: int) -> Damage:
    def damage(path: Path) -> None:
        draw, content = random.Random(seed), bytearray(path.read_bytes())
        for _ in range(bits if content else 0):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)

    return damage


# Wrong types, numbers of many digits, halves of surrogate pairs, deep nesting, YAML bombs.
_CONTENTS = (
    *(
        b"",
        b"\n",
        b"null\n",
        b"[]\n",
        b"3\n",
        b'"text"\n',
        b"{}\n",
        b"[{}]\n",
        b"NaN\n",
        b"\0" * 512,
        b"\xff\xfe\xfd\n",
    ),
    *(b"[" * 50000, b'{"a":' * 50000, b"9" * 5000 + b"\n", b'{"step": 1' + b"0" * 400 + b"}\n", b'{"\\ud800": 1}\n'),
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
)


def listed_damage(seed: int, flips: int = 8) -> dict[str, Damage]:
    """Return one damage of each kind by its name, and ``flips`` flipped bits."""
    kinds: dict[str, Damage] = {
        "missing": _remove,
        "directory": _put_directory,
        "loop": _put_loop,
        "pipe": _put_pipe,
        "huge": _make_huge,
    }
    kinds |= {f"content {content[:12]!r}": _write(content) for content in _CONTENTS}
    kinds |= {f"cut to {share:.0%}": _truncate(share) for share in (0.01, 0.33, 0.5, 0.9, 0.99)}
    kinds |= {f"flip {number}": _flip(1000 * seed + number, 1) for number in range(flips)}
    kinds["random"] = _write(random.Random(seed).randbytes(700))
    return kinds


def small_file_damage() -> st.SearchStrategy[Damage]:
    """Return a strategy of damage to a file."""
    return st.one_of(
        st.sampled_from(list(listed_damage(0, flips=0).values())),
        st.floats(0, 1, exclude_max=True).map(_truncate),
        st.builds(_flip, st.integers(0, 2**31), st.integers(1, 4)),
        st.binary(max_size=300).map(_write),
    )
