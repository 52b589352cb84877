"""The servers of the contract suite, each started once for all of its files.

Tests that take the fixture ``target`` run against the embedded server and against real SGLang. Those that take
``embedded_target`` or start their own process are about the embedded server alone.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dasd_megatron.config import SGLangConfig, TinyModelConfig
from dasd_megatron.models.tiny import make_tiny_model
from dasd_megatron.rollout.local_server import LocalServer
from tests.support.rollout_contract import (
    TINY,
    Target,
    put_back,
    rollout,
)
from tests.support.servers import sglang_python


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Make two tiny models of one shape, and models that do not fit them; their directories by name."""
    root = tmp_path_factory.mktemp("models")
    paths = {name: str(make_tiny_model(root / name, TINY, seed)) for name, seed in (("a", 0), ("b", 1))}
    wider = TinyModelConfig(**{**vars(TINY), "intermediate_size": 192})
    deeper = TinyModelConfig(**{**vars(TINY), "num_layers": 3})
    paths |= {
        "wider": str(make_tiny_model(root / "wider", wider, 0)),
        "deeper": str(make_tiny_model(root / "deeper", deeper, 0)),
    }
    for name in ("no_config_wider", "no_config_deeper"):  # only the tensors can tell
        paths[name] = str(make_tiny_model(root / name, wider if "wider" in name else deeper, 0))
        (root / name / "config.json").unlink()
    rope = Path(make_tiny_model(root / "rope", TINY, 0))  # same tensors, another function
    config = json.loads((rope / "config.json").read_text())
    (rope / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))
    torn = Path(make_tiny_model(root / "torn", TINY, 0))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:5000])
    (root / "empty").mkdir()
    return paths | {"rope": str(rope), "torn": str(torn), "empty": str(root / "empty"), "absent": str(root / "absent")}


@pytest.fixture(scope="session")
def serve(models, tmp_path_factory):
    """Return a function that gives the server of a kind, which is started when it is first asked for."""
    found = {}
    with ExitStack() as stack:

        def of(kind):
            if kind not in found:
                changes = {}
                if kind == "sglang":
                    sglang = SGLangConfig(backend="cpu", python=sglang_python(), max_total_tokens=65536)
                    changes = {"engine": "sglang", "sglang": sglang, "startup_timeout_seconds": 240.0}
                log = tmp_path_factory.mktemp("log") / "server.log"
                server = stack.enter_context(LocalServer(models["a"], "v1", rollout(max_batch_size=64, **changes), log))
                found[kind] = Target(kind, server.url, models["a"])
            return found[kind]

        yield of


@pytest.fixture(scope="session", params=["embedded", "sglang"])
def target(request, serve):
    return serve(request.param)


@pytest.fixture(scope="session")
def embedded_target(serve):
    return serve("embedded")


@pytest.fixture
def changing(target):
    """Give the server to a test that changes its weights, and change them back."""
    yield target
    put_back(target)


@pytest.fixture
def embedded(embedded_target):
    yield embedded_target
    put_back(embedded_target)


@pytest.fixture(scope="session")
def reference(models):
    model = AutoModelForCausalLM.from_pretrained(models["a"], dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(models["a"])
