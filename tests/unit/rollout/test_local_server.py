"""The command line of a real SGLang server."""

from __future__ import annotations

from pathlib import Path

import pytest

from dasd_megatron.config import RolloutConfig, SGLangConfig
from dasd_megatron.rollout.local_server import sglang_command


@pytest.mark.parametrize(
    ("backend", "release", "given"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_memory_that_is_to_be_released_is_saved_on_gpus(backend: str, release: bool, given: bool) -> None:
    rollout = RolloutConfig(
        max_new_tokens=8, max_prompt_tokens=8, release_memory=release, sglang=SGLangConfig(backend=backend)
    )
    assert ("--enable-memory-saver" in sglang_command(rollout, "model", 1)) is given


def test_the_script_that_starts_sglang_is_there() -> None:
    rollout = RolloutConfig(max_new_tokens=8, max_prompt_tokens=8, sglang=SGLangConfig(python="python"))
    python, script, *_ = sglang_command(rollout, "model", 1)
    assert python == "python" and Path(script).is_file()
