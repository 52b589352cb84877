"""Every family finds its class of mbridge."""

from __future__ import annotations

import json

from tests.support.worker_scripts import run_alone


def test_a_family_has_the_class_of_its_module() -> None:
    classes = json.loads(run_alone("mbridge_classes", {}).strip().splitlines()[-1])
    assert classes == {
        "qwen2": "Qwen2Bridge",
        "qwen3": "Qwen3Bridge",
        "llama": "LLaMABridge",
        "relative": "LLaMABridge",
    }
