"""Memories as safetensors and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drt.memory import (
    DeviceMemory,
    DiskMemory,
    MemoryFormatError,
    export_safetensors,
    import_safetensors,
)
from drt.memory.records import STORAGE_DTYPES


def made(oracle: Any, count: int, **options: Any) -> DeviceMemory:
    memory = DeviceMemory(slab_size=8, **options)
    memory.append(*oracle.make_chunks([2, count], 0, ragged=True))
    return memory


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("landmark_dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_keeps_every_bit(
    oracle: Any, tmp_path: Path, dtype: torch.dtype, landmark_dtype: torch.dtype
) -> None:
    memory = made(oracle, 21, dtype=dtype, landmark_dtype=landmark_dtype)
    memory.save(tmp_path / "saved", row=1, fingerprint={"model": "m"}, slab_size=5)
    with DiskMemory.open(tmp_path / "saved") as saved:
        paths = export_safetensors(saved, tmp_path / "shards", shard_bytes=7 * 64)
    assert paths == sorted((tmp_path / "shards").iterdir())
    assert len(paths) > 1
    again = import_safetensors(tmp_path / "shards", tmp_path / "again", slab_size=5)
    again.verify()
    again.close()
    for path in (tmp_path / "saved").iterdir():
        if path.name != "lock":
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_what_the_tensors_are(oracle: Any, tmp_path: Path) -> None:
    memory = made(oracle, 5)
    (path,) = export_safetensors(memory, tmp_path, row=1)
    assert path.name == "memory-00001-of-00001.safetensors"
    tensors = load_file(path)
    keys, values, lengths, indices = memory.gather(torch.tensor([[[-1] * 5], [[0, 1, 2, 3, 4]]]))
    assert torch.equal(tensors["keys"], keys[indices[1, 0]])
    assert torch.equal(tensors["values"], values[indices[1, 0]])
    assert lengths is not None
    assert torch.equal(tensors["lengths"], lengths[indices[1, 0]])
    with pytest.raises(ValueError, match="already"):
        export_safetensors(memory, tmp_path, row=1)


def test_a_memory_of_no_chunks(oracle: Any, tmp_path: Path) -> None:
    export_safetensors(made(oracle, 0), tmp_path / "shards", row=1, fingerprint={"model": "m"})
    with import_safetensors(tmp_path / "shards", tmp_path / "folder") as memory:
        assert memory.counts == (0,)
        memory.append(*oracle.make_chunks([1], 0))
    with DiskMemory.open(tmp_path / "folder", fingerprint={"model": "m"}) as memory:
        assert memory.counts == (1,)
    with pytest.raises(ValueError, match="the memory is empty"):
        export_safetensors(DeviceMemory(), tmp_path / "other")
    with pytest.raises(ValueError, match="row must be 0 to 1, got 2"):
        export_safetensors(made(oracle, 0), tmp_path / "other", row=2)


def test_damaged_shards_are_named(oracle: Any, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    paths = export_safetensors(made(oracle, 9), shards, row=1, shard_bytes=3 * 192)

    def refused(message: str) -> None:
        with pytest.raises(MemoryFormatError, match=message):
            import_safetensors(shards, tmp_path / message.replace("/", ""))

    content = paths[1].read_bytes()
    paths[1].write_bytes(content[:-1])
    refused("00002-of")
    tensors = load_file(paths[2])
    save_file(tensors, paths[1])
    refused("no metadata 'memory'")
    paths[1].unlink()
    refused("shards 1 to n of one memory are wanted")
    with pytest.raises(MemoryFormatError, match="found none"):
        import_safetensors(tmp_path / "nowhere", tmp_path / "target")
    paths[1].write_bytes(content)
    with pytest.raises(MemoryFormatError, match="made with model None, not 'm'"):
        import_safetensors(shards, tmp_path / "target", fingerprint={"model": "m"})
