"""Weights of Hugging Face directories, one tensor at a time: read with every file checked first, written in a stream.

Reading goes through safetensors' memory maps. Writing does not, because safetensors can only save a whole file from
memory: :class:`HfDirectoryWriter` lays the files out from the tensors' shapes and fills them in whatever order the
tensors come, so that the host never holds more than one of them. Imports no Megatron.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dasd_megatron.errors import first_line
from dasd_megatron.files import atomic_file, replace_directory
from dasd_megatron.reading import UnreadableError, iterate_json_lines, read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MANIFEST_FILE = "dasd_manifest.json"
JOURNAL_FILE = "journal.jsonl"
_MANIFEST_SHAPES = {"files": {"bytes": int, "sha256": str}, "tensors": {"file": str, "sha256": str}}
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
# These can be written for servers. A model to train is not read from them, since its values would lack their scales.
_WRITTEN_DTYPE_NAMES = {**_DTYPE_NAMES, torch.float8_e4m3fn: "F8_E4M3"}
# Old files of Llama hold these buffers, which every model computes.
_RECOMPUTED = "rotary_emb.inv_freq"
_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


class WeightsError(RuntimeError):
    """Weights that cannot be read or written. The message is one line that names the file and the tensor."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the contiguous bytes of a host tensor, without a copy where it is contiguous already."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def sha256(data: memoryview | bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(folder: Path) -> list[list[Any]]:
    """Return name, size and time of change of every file in a folder, which a resumed job's source must still have."""
    return [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir()) if path.is_file()
    ]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as config.json has it."""
    return str(dtype).removeprefix("torch.")


def common_dtype(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """Return the narrowest dtype that holds tensors of all these dtypes, by name, exactly."""
    found = set(dtypes.values())
    return found.pop() if len(found) == 1 else torch.float32


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in ``dtype``; values that are not finite stay so.

    Raises:
        WeightsError: a finite value would not be finite any more; tensor and value are named.
    """
    result = tensor.to(dtype)
    # Only a range can be left, never digits: float32 holds all others, and bfloat16 holds float16.
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        lost = tensor.isfinite() & ~result.isfinite()
        if bool(lost.any()):
            raise WeightsError(
                f"tensor {name}: {tensor[lost][0].item():g} does not fit into {dtype_name(dtype)}, whose largest value "
                f"is {torch.finfo(dtype).max:g}; choose another dtype"
            )
    return result


class HfWeights:
    """The tensors of a Hugging Face directory, by name. Opening it reads the headers of all files and refuses what does
    not fit together.

    ``compare_hashes``: where the directory has a manifest of this package, compare a tensor's bytes with it when they
    are read.

    Raises:
        WeightsError: no safetensors files, a file of the index is missing, one is truncated, or the index and the files
            disagree.
    """

    def __init__(self, path: str | Path, *, compare_hashes: bool = True) -> None:
        self.path = Path(path)
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self._place: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        index = self._read_index()
        # Some writers put an index beside a single file. Where it names that file alone, no two readers can differ.
        if index is not None and set(index.values()) != {SINGLE_FILE} and (self.path / SINGLE_FILE).exists():
            raise WeightsError(
                f"{self.path} has both {SINGLE_FILE} and {INDEX_FILE}, and readers differ in which they take; remove "
                "one"
            )
        names = sorted(set(index.values())) if index is not None else [SINGLE_FILE]
        for name in names:
            file = self._open(name)
            for tensor in file.keys():  # noqa: SIM118 - not a dict
                if tensor in self._place:
                    raise WeightsError(
                        f"{self.path}: tensor {tensor} stands in both {self._place[tensor]} and {name}; remove one of "
                        "them"
                    )
                entry = file.get_slice(tensor)
                if tensor.endswith(_RECOMPUTED):
                    continue
                kind = entry.get_dtype()
                if kind not in _DTYPES:
                    raise WeightsError(
                        f"{self.path / name}: tensor {tensor} is {kind}; only F32, BF16 and F16 weights can be read"
                    )
                self._place[tensor] = name
                self.shapes[tensor] = tuple(entry.get_shape())
                self.dtypes[tensor] = _DTYPES[kind]
        index = (
            None
            if index is None
            else {tensor: name for tensor, name in index.items() if not tensor.endswith(_RECOMPUTED)}
        )
        for tensor, name in (index or {}).items():
            if self._place.get(tensor) != name:
                found = f"it is in {self._place[tensor]}" if tensor in self._place else "no file holds it"
                raise WeightsError(
                    f"{self.path / INDEX_FILE} places tensor {tensor} in {name}, but {found}; fetch the model again"
                )
        if index is not None and len(index) != len(self._place):
            extra = sorted(set(self._place) - set(index))
            raise WeightsError(
                f"{self.path / INDEX_FILE} does not list tensor {extra[0]} of {self._place[extra[0]]}; fetch the "
                "model again"
            )
        manifest = self.path / MANIFEST_FILE
        self._hashes = (
            {name: record["sha256"] for name, record in read_manifest(manifest, "tensors").items()}
            if compare_hashes and manifest.exists()
            else {}
        )

    def __enter__(self) -> HfWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _read_index(self) -> dict[str, str] | None:
        path = self.path / INDEX_FILE
        if not path.exists():
            if not (self.path / SINGLE_FILE).exists():
                raise WeightsError(
                    f"{self.path}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; give a directory with safetensors "
                    "weights"
                )
            return None
        try:
            index: dict[str, str] = read_json(path, {"weight_map": {str: str}}, advice="fetch the model again")[
                "weight_map"
            ]
        except UnreadableError as error:
            raise WeightsError(
                f"{path} is not an index of safetensors files: it {error.reason}; fetch it again"
            ) from error
        return index

    def _open(self, name: str) -> Any:
        path = self.path / name
        if not path.is_file():
            raise WeightsError(f"{path}: {INDEX_FILE} names this file, and it is missing; fetch it")
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is truncated or no safetensors file ({first_line(error)}); fetch it again"
            ) from error
        self._files[name] = file
        return file

    def check_coverage(self, expected: dict[str, tuple[int, ...]], *, ignored: tuple[str, ...] = ()) -> None:
        """Compare names and shapes with those that the architecture has.

        ``ignored``: names that may be there without need, like the copy of a tied head.

        Raises:
            WeightsError: tensors are missing, not needed, or of another shape; the first ones are named.
        """
        missing = [name for name in expected if name not in self.shapes]
        if missing:
            raise WeightsError(
                f"{self.path}: {len(missing)} tensors that config.json calls for are missing: {_some(missing)}"
            )
        unused = [name for name in self.shapes if name not in expected and name not in ignored]
        if unused:
            raise WeightsError(
                f"{self.path}: {len(unused)} tensors have no place in the model that config.json describes: "
                f"{_some(unused)}"
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise WeightsError(
                    f"{self.path / self._place[name]}: tensor {name} has shape {self.shapes[name]}, but config.json "
                    f"calls for {shape}"
                )

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor in its stored dtype, mapped from its file.

        Raises:
            WeightsError: its bytes are not those that the manifest was written for.
        """
        tensor = self._files[self._place[name]].get_tensor(name)
        expected = self._hashes.get(name)
        if expected is not None and sha256(tensor_bytes(tensor)) != expected:
            raise WeightsError(
                f"{self.path / self._place[name]}: tensor {name} is not what {MANIFEST_FILE} lists; restore the file"
            )
        return tensor


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def read_manifest(path: Path, section: str, *, advice: str = "remove it to go on without its checks") -> dict[str, Any]:
    """Return what a manifest says of each file (``section`` files) or of each tensor (``section`` tensors), by name.

    Raises:
        WeightsError: it is damaged; the message ends with ``advice``.
    """
    try:
        manifest = read_json(path, {"format": int, section: {str: _MANIFEST_SHAPES[section]}}, advice=advice)
        if manifest["format"] != 1:
            raise UnreadableError(path, f"is damaged (format {manifest['format']} is unknown)", advice)
    except UnreadableError as error:
        raise WeightsError(str(error)) from error
    found: dict[str, Any] = manifest[section]
    return found


class Journal:
    """The record of what has been written of an output, so that a job that was killed goes on where it was.

    The folder is ``<output>.partial``. Its journal begins with a description of the job. A folder of another job is
    emptied.

    Raises:
        WeightsError: the folder exists and is not this package's.
    """

    def __init__(self, output: Path, job: dict[str, Any]) -> None:
        self.folder = output.with_name(output.name + ".partial")
        self._path = self.folder / JOURNAL_FILE
        self.done: dict[str, dict[str, Any]] = {}
        job = json.loads(json.dumps(job))
        lines = _whole_lines(self._path)
        if lines and lines[0] == job:
            self.done = {line["name"]: line for line in lines[1:]}
            # A kill may have cut the last line short.
            _write_lines(self._path, lines)
        else:
            if os.path.lexists(self.folder):
                if self.folder.is_dir() and any(self.folder.iterdir()) and not self._path.exists():
                    raise WeightsError(
                        f"{self.folder} is in the way and was not made by a conversion; remove it, or give another "
                        "output"
                    )
                shutil.rmtree(self.folder) if self.folder.is_dir() else self.folder.unlink()
            self.folder.mkdir(parents=True)
            _write_lines(self._path, [job])

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Note that ``name`` is written whole."""
        self.done[name] = {"name": name, **record}
        with open(self._path, "a") as file:
            file.write(json.dumps(self.done[name]) + "\n")

    def commit(self, output: Path) -> None:
        """Flush everything to disk and make the folder ``output``, in place of one that is there."""
        replace_directory(self.folder, output)
        (output / JOURNAL_FILE).unlink()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal up to the first that is not as it was written: a power loss can leave zeros."""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(UnreadableError):
        for line in iterate_json_lines(path, advice=""):
            if line.problem is not None or not line.is_whole or (lines and not isinstance(line.row.get("name"), str)):
                break
            lines.append(line.row)
    return lines


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    # A full disk must not take what a job that was killed had noted.
    with atomic_file(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))


def copy_side_files(source: Path, target: Path, dtype: torch.dtype, fields: Mapping[str, Any] | None = None) -> None:
    """Copy config.json with ``dtype`` and further ``fields`` in it, tokenizer, chat template and generation config from
    one Hugging Face directory to another."""
    hf_config = read_json(source / "config.json", dict, advice="restore it")
    # transformers 4.56 renamed the key and reads both; other readers know the old one.
    hf_config.pop("dtype", None)
    hf_config["torch_dtype"] = dtype_name(dtype)
    hf_config |= fields or {}
    (target / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    for name in _SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def shard_plan(
    shapes: dict[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], max_shard_bytes: int
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Return the tensors of each file, in order, and the bytes of each tensor.

    There is one file if all tensors fit into it, else several with transformers' names.
    """
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}, sizes
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)
    }, sizes


def check_free_space(path: Path, folder: Path, needed: int) -> None:
    """Refuse to begin writing ``path``, by way of ``folder``, where its disk has no room for ``needed`` more bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WeightsError(
            f"{path}: {needed / 1e9:.1f} GB are to be written and the disk has {free / 1e9:.1f} GB free; free some"
        )


class HfDirectoryWriter:
    """A Hugging Face directory, filled tensor by tensor in any order, that appears whole or not at all.

    Args:
        path: where it will appear; a directory that is there is replaced.
        shapes: of every tensor, by name, in the order of the files.
        dtype: of every tensor but ``other_dtypes``.
        template_dir: Hugging Face directory to take config, tokenizer, chat template and generation config from.
        max_shard_bytes: most bytes of tensors in one file, unless one tensor is larger.
        hashes: note the SHA-256 of each tensor in a manifest.
        job: with it, tensors that a killed writer of the same job left behind are kept, after a look at their bytes.
        other_dtypes: of tensors that have another one, by name.
        config_fields: further fields of config.json.

    Raises:
        WeightsError: the disk has not enough room.
    """

    def __init__(
        self,
        path: Path,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        *,
        template_dir: Path,
        max_shard_bytes: int = 5 * 10**9,
        hashes: bool = True,
        job: dict[str, Any] | None = None,
        other_dtypes: Mapping[str, torch.dtype] | None = None,
        config_fields: Mapping[str, Any] | None = None,
    ) -> None:
        self.dtypes, self.config_fields = dict.fromkeys(shapes, dtype) | dict(other_dtypes or {}), config_fields
        self.path, self.shapes, self.dtype, self.template_dir, self.hashes = path, shapes, dtype, template_dir, hashes
        plan, self._sizes = shard_plan(shapes, self.dtypes, max_shard_bytes)
        layout = {name: [list(shape), str(self.dtypes[name])] for name, shape in shapes.items()}
        self._journal = Journal(
            path, {"job": job if job is not None else os.urandom(8).hex(), "layout": layout, "files": plan}
        )
        self._place: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        self._file_of = {name: file for file, names in plan.items() for name in names}
        total = sum(self._sizes.values())
        check_free_space(path, self._journal.folder, total - sum(self._sizes[name] for name in self._journal.done))
        for file, names in plan.items():
            self._begin_file(self._journal.folder / file, names)
        if len(plan) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            (self._journal.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        for name in [name for name, record in self._journal.done.items() if not self._intact(name, record)]:
            del self._journal.done[name]

    def _begin_file(self, path: Path, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in names:
            end = position + self._sizes[name]
            header[name] = {
                "dtype": _WRITTEN_DTYPE_NAMES[self.dtypes[name]],
                "shape": list(self.shapes[name]),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # The tensors begin at a multiple of 8 bytes.
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._descriptors.append(descriptor)
        _write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
        os.truncate(descriptor, start + position)
        for name in names:
            self._place[name] = (descriptor, start + header[name]["data_offsets"][0])

    def _intact(self, name: str, record: dict[str, Any]) -> bool:
        descriptor, offset = self._place[name]
        return sha256(os.pread(descriptor, self._sizes[name], offset)) == record.get("sha256")

    def __contains__(self, name: str) -> bool:
        """Return True where ``name`` is written."""
        return name in self._journal.done

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into its file, cast to its dtype there. A tensor that is written already is left as it is.

        Raises:
            WeightsError: the name is not in ``shapes``, the shape is another, or a value does not fit into the dtype.
            OSError: the disk is full.
        """
        if name in self:
            return
        if self.shapes.get(name) != tuple(tensor.shape):
            raise WeightsError(
                f"{self.path}: tensor {name} has shape {tuple(tensor.shape)}, and {self.shapes.get(name)} was to be "
                "written"
            )
        data = tensor_bytes(cast(name, tensor.to("cpu"), self.dtypes[name]))
        descriptor, offset = self._place[name]
        _write_all(descriptor, data, offset)
        self._journal.add(name, {"sha256": sha256(data)} if self.hashes else {})

    def finish(self, record: dict[str, Any] | None = None) -> None:
        """Add the files beside the weights and let the directory appear. ``record`` goes into the manifest.

        Raises:
            WeightsError: tensors have not been written.
        """
        missing = [name for name in self.shapes if name not in self]
        if missing:
            raise WeightsError(f"{self.path}: {len(missing)} tensors were not written: {_some(missing)}")
        self.close()
        folder = self._journal.folder
        copy_side_files(self.template_dir, folder, self.dtype, self.config_fields)
        if self.hashes:
            tensors = {
                name: {"file": self._file_of[name], "sha256": self._journal.done[name]["sha256"]}
                for name in self.shapes
            }
            (folder / MANIFEST_FILE).write_text(
                json.dumps({"format": 1, **(record or {}), "tensors": tensors}, indent=2) + "\n"
            )
        self._journal.commit(self.path)

    def close(self) -> None:
        """Close the files that are open for writing."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def _write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
