"""Pickles that run code, planted in every file of a distributed checkpoint: the loaders would run them,
:func:`read_metadata` does not."""

import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from dasd_megatron import backend
from dasd_megatron.config import load_config

backend.select(load_config(["experiment=quickstart"]).backend)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # noqa: E402
from torch.distributed.checkpoint import FileSystemReader  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex  # noqa: E402

from dasd_megatron.models.hf_weights import WeightsError  # noqa: E402
from dasd_megatron.models.megatron_checkpoint import read_metadata  # noqa: E402

folder = Path(json.loads(sys.argv[1])["folder"])
mark = folder / "code-has-run"


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, (str(mark),)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def state() -> dict:
    return {
        "weight": ShardedTensor.from_rank_offsets("weight", torch.arange(6.0)),
        "object": ShardedObject("object", [1, 2], (1,), (0,)),
        "step": 3,
    }


def plant_metadata(path: Path, metadata: Metadata) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))


def plant_metadata_inside(path: Path, metadata: Metadata) -> None:
    metadata.planner_data = Evil()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_common(path: Path, metadata: Metadata) -> None:
    (path / "common.pt").write_bytes(saved(Evil()))


def plant_rng(path: Path, metadata: Metadata) -> None:
    (path / "rng.pt").write_bytes(saved(Evil()))


def plant_object(path: Path, metadata: Metadata) -> None:
    """In place of an object, behind the file's end."""
    index = next(
        i for i in metadata.storage_data if isinstance(metadata.state_dict_metadata[i.fqn], BytesStorageMetadata)
    )
    _append(path, index, metadata)


def plant_tensor(path: Path, metadata: Metadata) -> None:
    """A tensor that the metadata declares to be an object, which the loader believes."""
    place = metadata.storage_data.pop(next(i for i in metadata.storage_data if i.fqn == "weight"))
    metadata.state_dict_metadata["weight"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("weight")] = place
    _append(path, MetadataIndex("weight"), metadata)


def _append(path: Path, index: MetadataIndex, metadata: Metadata) -> None:
    place, content = metadata.storage_data[index], saved(Evil())
    file = path / place.relative_path
    place.offset, place.length = file.stat().st_size, len(content)
    with open(file, "ab") as stream:
        stream.write(content)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def runs_code(load: Callable[[], object]) -> bool:
    try:
        load()
    except (Exception, CheckpointException) as error:
        print("  the loader says", type(error).__name__, str(error)[:80].replace("\n", " "))
    found = mark.exists()
    if found:
        mark.rmdir()
    return found


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sound = folder / "sound"
    sound.mkdir()
    dist_checkpointing.save(state(), str(sound))
    torch.save([{"torch": torch.get_rng_state()}], sound / "rng.pt")
    metadata = read_metadata(sound)
    assert metadata.state_dict_metadata == FileSystemReader(sound).read_metadata().state_dict_metadata
    assert any(isinstance(entry, BytesStorageMetadata) for entry in metadata.state_dict_metadata.values()), (
        "no object in the checkpoint"
    )

    dangerous = []
    for plant in (plant_metadata, plant_metadata_inside, plant_common, plant_rng, plant_object, plant_tensor):
        path = folder / plant.__name__
        shutil.copytree(sound, path)
        plant(path, read_metadata(path))
        try:
            read_metadata(path)
        except WeightsError as error:
            message = str(error)
            print(plant.__name__, message, flush=True)
        else:
            raise AssertionError(f"{plant.__name__} was not refused")
        assert not mark.exists(), f"{plant.__name__} was run"
        assert "mkdir" in message and str(path) in message and "\n" not in message, message
        # What the check is for: Megatron's loader alone.
        if plant is not plant_rng and runs_code(lambda path=path: dist_checkpointing.load(state(), str(path))):
            dangerous.append(plant.__name__)
    print("dangerous without the check:", dangerous)
    assert {"plant_metadata", "plant_object"} <= set(dangerous), "nothing that the check is for"
    # Megatron-Core 0.19 writes no common.pt.
    for name in (".metadata", "rng.pt", *(["common.pt"] if (sound / "common.pt").exists() else [])):
        path = folder / f"cut_{name}"
        shutil.copytree(sound, path)
        (path / name).write_bytes((path / name).read_bytes()[:100])
        try:
            read_metadata(path)
        except WeightsError as error:
            assert str(path / name) in str(error) and "\n" not in str(error), error
        else:
            raise AssertionError(f"{name} is cut off and was accepted")
    path = folder / "deep"
    shutil.copytree(sound, path)
    # Python's reader overflows its stack.
    (path / ".metadata").write_bytes(b"\x80\x04})" + b"\x85" * 1_000_000 + b"K\x01s.")
    try:
        read_metadata(path)
    except WeightsError as error:
        assert str(path / ".metadata") in str(error) and "more than 2000 values" in str(error), error
    else:
        raise AssertionError("a key of a million levels was accepted")
    dist.destroy_process_group()


# Megatron-Core starts a process of its own to save, which imports this file again.
if __name__ == "__main__":
    main()
