"""Between Hugging Face directories and Megatron-Core's distributed checkpoints, in one process that holds one tensor at
a time.

A model on the meta device says which tensors Megatron expects, with their keys and shapes. The bridge, which the
trainer's weight sync goes through too, says how they are made of Hugging Face's. Needs the CPU backend selected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from transformers import PretrainedConfig

from dasd_megatron.backend import cpu
from dasd_megatron.errors import ConfigError
from dasd_megatron.models.bridge import make_bridge
from dasd_megatron.models.gpt import build_chunks, load_megatron_weights
from dasd_megatron.models.hf_config import TIED_HEAD, declared_dtype, expected_tensors, hf_folder, read_hf_config
from dasd_megatron.models.hf_weights import (
    HfDirectoryWriter,
    HfWeights,
    WeightsError,
    cast,
    common_dtype,
    copy_side_files,
    dtype_name,
    fingerprint,
)
from dasd_megatron.models.mbridge_families import Bridge
from dasd_megatron.models.megatron_checkpoint import CheckpointFiles, CheckpointWriter

Progress = Callable[[int, int], None]
"""A function that is called with the number of tensors that are done and the number of all."""
VERIFY_TOKENS = 64
# These arguments initialise nothing, because the weights are loaded afterwards or never needed.
_SINGLE = dict(
    **cpu.transformer_config_overrides("local"),
    sequence_parallel=False,
    perform_initialization=False,
    attention_dropout=0.0,
)


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion: tensors on either side, all of them used, and the bytes and dtype of the weights
    written.

    note: a line on the choice of dtype, where the source does not leave only one.
    """

    hf_tensors: int
    megatron_tensors: int
    bytes: int
    dtype: torch.dtype
    note: str | None = None


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Set up a process group and Megatron's parallel state of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def meta_chunks(hf_config: PretrainedConfig, dtype: torch.dtype, **layout: Any) -> tuple[Bridge, list[GPTModel]]:
    """Return the bridge and this rank's part of the model without storage; inside :func:`single_process` the whole
    model.

    ``layout``: fields of Megatron's TransformerConfig.
    """
    bridge = make_bridge(hf_config, dtype=dtype, transformer_engine=False, **_SINGLE | layout)
    with torch.device("meta"):
        return bridge, build_chunks(bridge, transformer_engine=False)


def _entries(model: GPTModel) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Return Megatron's name of every weight and how it is stored."""
    state = model.sharded_state_dict(metadata={"dp_cp_group": parallel_state.get_data_parallel_group()})
    return {name: entry for name, entry in state.items() if isinstance(entry, ShardedTensor | ShardedTensorFactory)}


def _chunks(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    return list(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]


def _split(shard: ShardedTensor, axis: int | None, parts: int) -> list[ShardedTensor]:
    """Return ``shard`` in ``parts`` along ``axis`` of its data, as that many tensor-parallel ranks read it."""
    if axis is None or parts == 1:
        return [shard]
    pieces: list[ShardedTensor] = []
    for data in shard.data.chunk(parts, dim=axis):
        offset = list(shard.global_offset)
        offset[shard.prepend_axis_num + axis] += sum(piece.local_shape[axis] for piece in pieces)
        piece = shard.without_data()
        piece.data, piece.local_shape, piece.global_offset = data, tuple(data.shape), tuple(offset)
        pieces.append(piece)
    return pieces


def hf_to_megatron(
    hf_path: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    tensor_parallel: int = 1,
    progress: Progress = lambda *_: None,
) -> Conversion:
    """Write the weights of a Hugging Face directory as a distributed checkpoint, with config and tokenizer in its
    folder ``hf``.

    A job that was killed goes on where it was when it is started again with the same arguments.

    Args:
        dtype: of the weights written; None keeps that of the files, float32 where they have several.
        tensor_parallel: tensors are stored in chunks for this many ranks, so that each reads its own part alone. Any
            other layout can load the checkpoint too.

    Raises:
        ConfigError: config.json describes a model that Megatron-Core cannot represent, or ``tensor_parallel`` does not
        divide it. WeightsError: the weights are incomplete, damaged or of other shapes; OSError: the disk is full.
    """
    hf_config = read_hf_config(hf_path, "--hf-path")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(hf_config, name) % tensor_parallel:
            raise ConfigError(
                f"tensor parallel size {tensor_parallel} does not divide {name}={getattr(hf_config, name)}: give a "
                "divisor"
            )
    with HfWeights(hf_path) as weights, single_process():
        expected = expected_tensors(hf_config)
        weights.check_coverage(expected, ignored=TIED_HEAD)
        # A tied head that stands in the files is not read.
        stored = {name: weights.dtypes[name] for name in expected}
        note = None if dtype is not None else _dtype_note(stored, declared_dtype(hf_config))
        dtype = dtype or common_dtype(stored)
        bridge, (model,) = meta_chunks(hf_config, dtype)
        parameters = dict(model.named_parameters())
        entries = _entries(model)
        names = {name: bridge._weight_name_mapping_mcore_to_hf(name) for name in entries}
        _check_all_used(names, set(expected))
        job = {
            "source": str(hf_path.resolve()),
            "files": fingerprint(hf_path),
            "dtype": str(dtype),
            "tensor_parallel": tensor_parallel,
        }
        writer = CheckpointWriter(
            output, job, sum(torch.Size(shape).numel() for shape in expected.values()) * dtype.itemsize
        )
        copy_target = writer.folder / "hf"
        copy_target.mkdir(exist_ok=True)
        copy_side_files(hf_path, copy_target, dtype)
        written = 0
        for count, (name, entry) in enumerate(entries.items()):
            progress(count, len(entries))
            axis = (
                getattr(parameters[name], "partition_dim", -1)
                if getattr(parameters[name], "tensor_model_parallel", False)
                else None
            )
            pieces = [piece for chunk in _chunks(entry) for piece in _split(chunk, axis, tensor_parallel)]
            if not all(writer.has(piece) for piece in pieces):
                sources = [cast(hf_name, weights.tensor(hf_name), dtype) for hf_name in names[name]]
                entry.data = bridge._weight_to_mcore_format(name, sources)
                pieces = [piece for chunk in _chunks(entry) for piece in _split(chunk, axis, tensor_parallel)]
            for piece in pieces:
                writer.add(piece, dtype)
                written += piece.data.numel() * dtype.itemsize
            entry.data = None
        writer.finish(
            {
                "kind": "megatron",
                "source": str(hf_path.resolve()),
                "dtype": str(dtype),
                "tensor_parallel": tensor_parallel,
            }
        )
        progress(len(entries), len(entries))
    return Conversion(len(expected), len(entries), written, dtype, note)


def _dtype_note(stored: dict[str, torch.dtype], declared: str | None) -> str | None:
    """Return a line where tensors, by name, have several dtypes, or another one than config.json declares; None where
    they agree."""
    names: dict[str, list[str]] = {}
    for name, dtype in stored.items():
        names.setdefault(dtype_name(dtype), []).append(name)
    kept = dtype_name(common_dtype(stored))
    if len(names) > 1:
        found = " and ".join(f"{dtype} ({found[0]}{', ...' if found[1:] else ''})" for dtype, found in names.items())
        return f"the weights are {found}: written as {kept}, which holds all of them exactly; --dtype chooses another"
    if declared != kept:
        said = "does not say what the weights are" if declared is None else f"says {declared}"
        return f"config.json {said}, and the files hold {kept}: {kept} is kept"
    return None


def megatron_to_hf(
    path: Path,
    output: Path,
    *,
    template_dir: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress = lambda *_: None,
) -> Conversion:
    """Write the weights of a distributed checkpoint, saved in whatever layout, as a Hugging Face directory.

    A job that was killed goes on where it was when it is started again with the same arguments.

    Args:
        template_dir: Hugging Face directory to take config and tokenizer from; None: the checkpoint's own folder
            ``hf``.
        dtype: of the weights written; None keeps the checkpoint's.

    Raises:
        ConfigError: no config, or one that Megatron-Core cannot represent.
        WeightsError: the checkpoint is incomplete, damaged, or of another model; OSError: the disk is full.
    """
    files = CheckpointFiles(path)
    template_dir = template_dir or hf_folder(path)
    hf_config = read_hf_config(template_dir, "--hf-config")
    dtype = dtype or files.dtype()
    with single_process():
        bridge, (model,) = meta_chunks(hf_config, files.dtype())
        entries = _entries(model)
        files.check_coverage([chunk for entry in entries.values() for chunk in _chunks(entry)], hf_config.vocab_size)
        expected = expected_tensors(hf_config)
        names = {name: bridge._weight_name_mapping_mcore_to_hf(name) for name in entries}
        _check_all_used(names, set(expected))
        # The shapes have the order in which the tensors come, so that files fill one after another.
        shapes = {hf_name: expected[hf_name] for found in names.values() for hf_name in found}
        record = {"kind": "hf", "source": str(path.resolve()), "dtype": str(dtype)}
        job = {**record, "files": fingerprint(path), "config": fingerprint(template_dir)}
        writer = HfDirectoryWriter(
            output, shapes, dtype, template_dir=template_dir, max_shard_bytes=max_shard_bytes, job=job
        )
        with contextlib.closing(writer):
            for count, (name, entry) in enumerate(entries.items()):
                progress(count, len(entries))
                if all(hf_name in writer for hf_name in names[name]):
                    continue
                for hf_name, converted in zip(
                    *bridge._weight_to_hf_format(name, _read_entry(files, entry)), strict=True
                ):
                    writer.write(hf_name, converted)
            writer.finish(record)
        progress(len(entries), len(entries))
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    return Conversion(len(shapes), len(entries), total, dtype)


def _check_all_used(names: dict[str, list[str]], expected: set[str]) -> None:
    """Refuse (WeightsError) a mapping that leaves a tensor of the Hugging Face model unused, or asks for one that it
    does not have."""
    mapped = {hf_name for found in names.values() for hf_name in found}
    if mapped != expected:
        unused, unknown = sorted(expected - mapped)[:3], sorted(mapped - expected)[:3]
        raise WeightsError(f"the mapping to Megatron does not cover the model: unused {unused}, unknown {unknown}")


def _read_entry(files: CheckpointFiles, entry: ShardedTensor | ShardedTensorFactory) -> torch.Tensor:
    if isinstance(entry, ShardedTensorFactory):
        return entry.merge_fn([files.read(chunk) for chunk in entry.build()])
    return files.read(entry)


@torch.no_grad()
def compare_logits(checkpoint: Path, hf_path: Path, dtype: torch.dtype) -> tuple[float, float, float]:
    """Compare the logits of a Megatron checkpoint and of a Hugging Face directory on a fixed prompt of
    :data:`VERIFY_TOKENS` tokens.

    Both models are whole in memory, one after the other, their weights rounded to ``dtype`` and their arithmetic
    float32.

    Returns:
        The largest absolute difference, the largest absolute logit, and the share of positions with the same argmax.
    """
    from transformers import AutoModelForCausalLM

    hf_config = read_hf_config(hf_path)
    tokens = torch.randint(hf_config.vocab_size, (1, VERIFY_TOKENS), generator=torch.Generator().manual_seed(0))
    reference = (
        AutoModelForCausalLM.from_pretrained(
            hf_path, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        .float()(tokens)
        .logits
    )
    with single_process():
        bridge = make_bridge(hf_config, dtype=torch.float32, transformer_engine=False, **_SINGLE)
        (model,) = build_chunks(bridge, transformer_engine=False)
        load_megatron_weights([model], checkpoint)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        positions = torch.arange(VERIFY_TOKENS)[None]
        found = model.eval()(tokens, positions, None)[..., : hf_config.vocab_size]
    agreement = (found.argmax(-1) == reference.argmax(-1)).float().mean()
    return float((found - reference).abs().max()), float(reference.abs().max()), float(agreement)
