"""Models of every family equal transformers' in every parallel layout, from Hugging Face directories and from converted
checkpoints, and come back bit for bit. `make test` has half of the families in each layout, and every family in half of
the layouts; the drill has the others."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dasd_megatron.models.tiny import character_tokenizer
from tests.support.small_models import LAYOUTS, MODELS
from tests.support.worker_scripts import run_alone, torchrun

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of each family, and a checkpoint made of each, in chunks for two tensor-parallel
    ranks."""
    folder = tmp_path_factory.mktemp("models")
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    for name, make in MODELS.items():
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norm weights of exactly one would hide a norm that is loaded from the wrong place.
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)
    jobs = [
        ("hf_to_megatron", str(folder / name), str(folder / f"{name}.megatron"), {"tensor_parallel": 1 + index % 3})
        for index, name in enumerate(MODELS)
    ]
    run_alone("convert_models", jobs)
    return folder


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.drill)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_matches_transformers_and_comes_back(layout: str, half: int, models: Path, tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    nproc, overrides = LAYOUTS[layout]
    entries = []
    for index, name in enumerate(MODELS):
        # By pairs, so that both sources are in each half.
        if (index // 2 + list(LAYOUTS).index(layout)) % 2 != half:
            continue
        # Both sources for each family, in one layout or another.
        source = models / (name if (index + len(layout)) % 2 else f"{name}.megatron")
        paths = {"export": str(tmp_path / f"{name}.export"), "save": str(tmp_path / f"{name}.saved")}
        entries.append({"path": str(models / name), "load": str(source), **paths})
    torchrun("model_matches_hf", nproc, {"models": entries, "seed": seed, "overrides": overrides, "tolerance": 2e-5})
    run_alone("convert_models", [("megatron_to_hf", entry["save"], entry["save"] + ".hf", {}) for entry in entries])
    for entry in entries:
        before, after = (
            load_file(Path(entry["path"]) / "model.safetensors"),
            load_file(Path(entry["save"] + ".hf") / "model.safetensors"),
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
