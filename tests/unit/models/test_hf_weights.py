"""Hugging Face weights are checked before they are used, and written whole or not at all, whatever stops the writer."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dasd_megatron.models import hf_weights
from dasd_megatron.models.hf_weights import (
    INDEX_FILE,
    MANIFEST_FILE,
    HfDirectoryWriter,
    HfWeights,
    WeightsError,
    cast,
    common_dtype,
)

NAMES = [f"layer{index}.weight" for index in range(6)]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(index + 2, 5) for index, name in enumerate(NAMES)}


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3", "dtype": "float32"}))
    (path / "tokenizer.json").write_text("{}")
    return path


def write(
    tensors: dict[str, torch.Tensor], path: Path, template: Path, dtype: torch.dtype = torch.float32, **options
) -> Path:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    writer = HfDirectoryWriter(path, shapes, dtype, template_dir=template, **options)
    for name in reversed(tensors):
        assert not path.exists()
        writer.write(name, tensors[name])
    writer.finish()
    return path


@pytest.fixture
def sharded(tensors: dict[str, torch.Tensor], tmp_path: Path, template: Path) -> Path:
    return write(tensors, tmp_path / "model", template, max_shard_bytes=200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_are_safetensors_with_the_tensors_in_them(tensors, tmp_path, template, dtype):
    path = write(tensors, tmp_path / "model", template, dtype)
    loaded = load_file(path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], tensor.to(dtype))
    assert json.loads((path / "config.json").read_text()) == {
        "model_type": "qwen3",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not (path / INDEX_FILE).exists() and not list(tmp_path.glob("*.partial"))


def test_shards_and_index_as_transformers_writes_them(tensors, sharded):
    index = json.loads((sharded / INDEX_FILE).read_text())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name in files:
        loaded = load_file(sharded / name)
        assert sum(4 * tensor.numel() for tensor in loaded.values()) <= 200 or len(loaded) == 1
        assert all(
            index["weight_map"][key] == name and torch.equal(value, tensors[key]) for key, value in loaded.items()
        )
    with HfWeights(sharded) as weights:
        assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in tensors.items())


def test_what_is_missing_or_wrong_is_not_published(tensors, tmp_path, template):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    writer = HfDirectoryWriter(tmp_path / "model", shapes, torch.float32, template_dir=template)
    for name in NAMES[:-1]:
        writer.write(name, tensors[name])
    with pytest.raises(WeightsError, match=NAMES[-1]):
        writer.finish()
    with pytest.raises(WeightsError, match="shape"):
        writer.write(NAMES[-1], torch.zeros(3, 3))
    with pytest.raises(WeightsError, match="other.weight"):
        writer.write("other.weight", torch.zeros(3, 3))
    assert not (tmp_path / "model").exists()


def test_a_full_disk_is_found_before_anything_is_written(tensors, tmp_path, template, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(hf_weights.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WeightsError, match="free"):
        write(tensors, tmp_path / "model", template)


def test_a_killed_job_keeps_what_is_intact(tensors, tmp_path, template):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def begin(job: str) -> HfDirectoryWriter:
        return HfDirectoryWriter(
            tmp_path / "model", shapes, torch.float32, template_dir=template, job={"source": job}, max_shard_bytes=200
        )

    killed = begin("a")
    for name in NAMES[:4]:
        killed.write(name, tensors[name])
    partial = tmp_path / "model.partial"
    # The last line was cut short, and a tensor never reached the disk.
    journal = partial / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"name": "laye')
    file = killed._file_of[NAMES[1]]
    data = bytearray((partial / file).read_bytes())
    data[-1] ^= 1
    (partial / file).write_bytes(data)
    lost = next(name for name in reversed(NAMES) if killed._file_of[name] == file)

    again = begin("a")
    assert [name for name in NAMES if name in again] == [name for name in NAMES[:4] if name != lost]
    for name in NAMES:
        again.write(name, tensors[name])
    again.finish()
    with HfWeights(tmp_path / "model") as weights:
        assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in tensors.items())
    assert not any(name in begin("another") for name in NAMES)


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught, HfWeights(path) as weights:
        for name in NAMES:
            weights.tensor(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_shard_is_named(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    assert victim.name in refusal(sharded) and "missing" in refusal(sharded)


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_file_is_named(sharded, kept):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:kept])
    assert victim.name in refusal(sharded) and "truncated" in refusal(sharded)


def test_a_wrong_index_is_named(sharded):
    path = sharded / INDEX_FILE
    good = json.loads(path.read_text())
    places = good["weight_map"]
    other = next(file for file in places.values() if file != places[NAMES[0]])

    def with_map(changed: dict) -> str:
        path.write_text(json.dumps({**good, "weight_map": changed}))
        return refusal(sharded)

    assert NAMES[0] in with_map({**places, NAMES[0]: other})
    assert "unknown.weight" in with_map({**places, "unknown.weight": other})
    fewer = {name: file for name, file in places.items() if name != NAMES[0]}
    if places[NAMES[0]] in fewer.values():
        assert NAMES[0] in with_map(fewer)
    path.write_text("{")
    assert INDEX_FILE in refusal(sharded)


def test_a_corrupted_tensor_is_named(tensors, tmp_path, template):
    path = write(tensors, tmp_path / "model", template)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed[NAMES[3]][0, 0] = math.nextafter(float(changed[NAMES[3]][0, 0]), 1e9) + 1e-3
    save_file(changed, path / "model.safetensors")
    assert NAMES[3] in refusal(path)
    (path / MANIFEST_FILE).write_text("[]")
    assert MANIFEST_FILE in refusal(path)


def test_coverage_is_complete_and_exact(tensors, sharded):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with HfWeights(sharded) as weights:
        weights.check_coverage(shapes)
        weights.check_coverage({name: shapes[name] for name in NAMES[:-1]}, ignored=(NAMES[-1],))
        for expected, named in (
            ({**shapes, "more.weight": (1,)}, "more.weight"),
            ({name: shapes[name] for name in NAMES[:-1]}, NAMES[-1]),
            ({**shapes, NAMES[2]: (1, 5)}, NAMES[2]),
        ):
            with pytest.raises(WeightsError, match=named):
                weights.check_coverage(expected)


def test_a_folder_of_somebody_else_is_left_alone(tensors, tmp_path, template):
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "notes.txt").write_text("x")
    with pytest.raises(WeightsError, match="was not made by a conversion"):
        write(tensors, tmp_path / "model", template)
    assert (tmp_path / "model.partial" / "notes.txt").exists()


def test_a_journal_of_zeros_starts_anew(tensors, tmp_path, template):
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "journal.jsonl").write_bytes(b"\0" * 20 + b"\n")
    assert (write(tensors, tmp_path / "model", template) / "config.json").exists()


def test_quantised_weights_and_two_sets_of_weights_are_refused(tensors, sharded, tmp_path):
    (tmp_path / "int8").mkdir()
    save_file({NAMES[0]: torch.zeros(2, 5, dtype=torch.int8)}, tmp_path / "int8" / "model.safetensors")
    assert NAMES[0] in refusal(tmp_path / "int8") and "I8" in refusal(tmp_path / "int8")
    save_file(tensors, sharded / "model.safetensors")
    assert "has both" in refusal(sharded)


def test_an_index_that_names_the_single_file_alone_is_accepted(tensors, tmp_path):
    """As mlx-lm writes it: no two readers can differ in what they take."""
    folder = tmp_path / "indexed"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    places = dict.fromkeys(tensors, "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with HfWeights(folder) as weights:
        assert weights.shapes.keys() == tensors.keys()
        assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in tensors.items())
    # An index that is not of this file is refused as ever.
    for wrong in (dict(list(places.items())[1:]), {**places, "other": "model.safetensors"}, {}):
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": wrong}))
        assert str(folder) in refusal(folder)


def test_buffers_of_old_llama_files_are_passed_over(tensors, tmp_path):
    (tmp_path / "old").mkdir()
    save_file(
        {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)},
        tmp_path / "old" / "model.safetensors",
    )
    with HfWeights(tmp_path / "old") as weights:
        assert weights.shapes.keys() == tensors.keys()


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_common_dtype_holds_all_exactly() -> None:
    for dtype in DTYPES:
        assert common_dtype({"a": dtype, "b": dtype}) == dtype
    for first, second in itertools.permutations(DTYPES, 2):
        assert common_dtype({"a": first, "b": second, "c": second}) == torch.float32


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_a_cast_keeps_finite_values_finite_or_names_one(source: torch.dtype, target: torch.dtype) -> None:
    """Over every power of two and the extremes of the source; what is not finite stays what it is."""
    limits = torch.finfo(source)
    powers = [2.0**exponent for exponent in range(-149, 128) if 2.0**exponent <= limits.max]
    for value in (*powers, limits.max, limits.tiny, 0.0):
        for signed in (value, -value):
            tensor = torch.tensor([1.0, signed, 2.0]).to(source)
            expected = tensor.to(target)
            if expected.isfinite().all():
                assert torch.equal(cast("w", tensor, target), expected)
                continue
            with pytest.raises(WeightsError) as caught:
                cast("w", tensor, target)
            assert f"tensor w: {signed:g} does not fit into {str(target)[6:]}" in str(caught.value)
    special = torch.tensor([float("nan"), float("inf"), -float("inf")]).to(source)
    assert torch.equal(cast("w", special, target).isnan(), special.isnan())
    assert cast("w", special, target)[1:].tolist() == [float("inf"), -float("inf")]


def test_a_value_that_does_not_fit_is_not_written(tmp_path, template):
    writer = HfDirectoryWriter(tmp_path / "model", {"down": (2,)}, torch.float16, template_dir=template)
    with pytest.raises(
        WeightsError, match=r"tensor down: 99840 does not fit into float16, whose largest value is 65504"
    ):
        writer.write("down", torch.tensor([0.5, 1e5], dtype=torch.bfloat16))
    assert "down" not in writer
    writer.close()
