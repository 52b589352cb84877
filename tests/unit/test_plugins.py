"""A function is found by its path, or it is said why not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dasd_megatron.errors import ConfigError
from dasd_megatron.plugins import call_own, load_function


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "mine.py").write_text("constant = 3\ndef function(x): return x + 1\n")
    (tmp_path / "broken.py").write_text("raise RuntimeError('first\\nsecond')\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(4)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("mine", None)


def test_found() -> None:
    assert load_function("mine:function", "verify.reward")(1) == 2
    assert load_function(None, "verify.reward") is None


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere:function", "No module named 'nowhere'"),
        ("mine:absent", "no attribute 'absent'"),
        ("mine:constant", "3 and no function"),
        ("exits:function", "SystemExit: 4; write module:function"),
        ("broken:function", "RuntimeError: first; write module:function"),
    ],
)
def test_not_found(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^some.field={path}.*{said}") as caught:
        load_function(path, "some.field")
    assert "\n" not in str(caught.value)


def test_the_interrupt_of_the_main_thread_is_nobodys_failure() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_own(interrupted, RuntimeError)
    with ThreadPoolExecutor(1) as threads, pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        threads.submit(call_own, interrupted, RuntimeError).result()
