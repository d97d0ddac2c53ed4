"""Killed writers and full disks: what the journal names is there, and writing goes on."""

import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from drt.memory import (
    DeviceMemory,
    DiskMemory,
    MemoryFormatError,
    export_safetensors,
    import_safetensors,
)
from drt.memory import files as memory_files
from drt.memory.files import BinaryFile

SLAB = 512


def seeded(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chunks start .. stop - 1 of an endless sequence, the same however it is cut."""
    numbers = torch.arange(start, stop)[None]
    keys = torch.arange(32.0).sin().view(1, 1, 4, 2, 4) * (numbers + 1.0)[..., None, None, None]
    landmarks = (torch.arange(6.0) + 1) * (numbers + 1.0)[..., None]
    return landmarks, keys, -keys, numbers % 4 + 1


def append_until(folder: Path, total: int, seed: int, said: int | None = None) -> None:
    """What the child does: go on from where the folder is, in random pieces.

    After each append it tells the descriptor `said` how many chunks there are, 8 bytes each time.
    """
    choose = random.Random(seed)
    with DiskMemory.open(folder, writable=True, fsync="never") as memory:
        while len(memory) < total:
            memory.append(*seeded(len(memory), min(len(memory) + choose.randint(1, 9), total)))
            if said is not None:
                os.write(said, len(memory).to_bytes(8, "little"))


def run_and_kill(folder: Path, seed: int) -> int:
    """Kill a writer at a random moment; how many chunks it has said that there are, 0 = nothing.

    Of five writers one is killed at any moment, perhaps while it opens the folder; the others while
    they append, after a random number of appends.
    """
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        # Nothing of pytest may run in the child, not even its clean-up.
        try:
            append_until(folder, 10**6, seed, said)
        finally:
            os._exit(1)
    os.close(said)
    choose = random.Random(seed)
    count = b""
    with os.fdopen(heard, "rb") as file:
        if seed % 5 == 0:
            time.sleep(choose.uniform(0.0, 0.04))
        else:
            count = file.read(8 * choose.randint(1, 3))
            time.sleep(choose.uniform(0.0, 0.003))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        count += file.read()
    return int.from_bytes(count[-8:], "little")


def assert_as_seeded(folder: Path, start: int) -> int:
    """All checksums hold, chunks from `start` on are the expected ones; how many there are."""
    with DiskMemory.open(folder) as memory:
        memory.verify()
        count = len(memory)
        if count > start:
            numbers = torch.arange(start, count)
            found = memory.gather(numbers[None, None])
            _, keys, values, lengths = seeded(start, count)
            beyond = torch.arange(4) >= lengths[0, :, None]
            order = found.indices[0, 0]
            for got, wanted in ((found.keys, keys), (found.values, values)):
                assert torch.equal(got[order], wanted[0].masked_fill(beyond[..., None, None], 0.0))
        return count


def test_a_hundred_kills_lose_nothing_that_was_journalled(tmp_path: Path) -> None:
    folder, kills = tmp_path, 100
    with DiskMemory.create(folder / "killed", fingerprint={}, slab_size=SLAB) as memory:
        memory.append(*seeded(0, 1))
    counts = [1]
    for seed in range(kills):
        said = run_and_kill(folder / "killed", seed)
        assert seed % 5 == 0 or said > counts[-1]
        counts.append(assert_as_seeded(folder / "killed", counts[-1]))
        # What has been appended outlives whoever appended it.
        assert counts[-1] >= max(counts[-2], said)
    # The last writer comes to the end, and the folder is as if nothing had happened.
    last = counts[-1] + 1000
    append_until(folder / "killed", last, kills)
    with DiskMemory.create(folder / "whole", fingerprint={}, slab_size=SLAB) as memory:
        for start in range(0, last, 777):
            memory.append(*seeded(start, min(start + 777, last)))
    names = sorted(path.name for path in (folder / "whole").iterdir())
    assert sorted(path.name for path in (folder / "killed").iterdir()) == names
    for name in set(names) - {"lock"}:
        killed, whole = (
            (folder / "killed" / name).read_bytes(),
            (folder / "whole" / name).read_bytes(),
        )
        assert killed[: len(whole)] == whole, name


def test_a_kill_at_any_write_leaves_what_was_journalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files as they are before, within and after every write are what a kill there leaves."""
    folder, left = tmp_path / "memory", []
    real = os.pwrite

    def keep() -> None:
        left.append((tmp_path / str(len(left)), len(memory)))
        shutil.copytree(folder, left[-1][0])

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        keep()
        # The caller asks again for the rest.
        return real(descriptor, data[: max(len(data) // 2, 16)], offset)

    with DiskMemory.create(folder, fingerprint={}, slab_size=4) as memory:
        memory.append(*seeded(0, 3))
        with monkeypatch.context() as patch:
            patch.setattr(memory_files.os, "pwrite", write)
            memory.append(*seeded(3, 5))
            memory.append(*seeded(5, 6))
        keep()
    # Records, landmarks and the journal: two slabs, then one, every write in several pieces.
    assert len(left) > 2 * (2 * 2 + 1 + 2 + 1)
    for killed, count in left:
        found = assert_as_seeded(killed, 0)
        assert count <= found <= 6
        append_until(killed, 9, 0)
        assert assert_as_seeded(killed, 0) == 9


@pytest.mark.parametrize("way", ["save", "import"])
def test_a_kill_while_a_memory_is_copied_leaves_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The files as they are before every write and every sync are what a kill there leaves."""
    left: list[Path] = []

    def keep(real: Any) -> Any:
        def kept(*args: Any) -> Any:
            left.append(tmp_path / str(len(left)))
            shutil.copytree(tmp_path / "copy", left[-1])
            return real(*args)

        return kept

    memory = DeviceMemory()
    memory.append(*seeded(0, 9))
    export_safetensors(memory, tmp_path / "shards", shard_bytes=3 * 256)

    def copy(folder: Path) -> None:
        if way == "import":
            import_safetensors(tmp_path / "shards", folder, slab_size=4).close()
        else:
            memory.save(folder, fingerprint={}, slab_size=4)

    with monkeypatch.context() as patch:
        patch.setattr(memory_files.os, "pwrite", keep(os.pwrite))
        patch.setattr(memory_files.os, "fsync", keep(os.fsync))
        # Whether there is a memory is decided by the name of its manifest.
        patch.setattr(Path, "replace", keep(Path.replace))
        copy(tmp_path / "copy")
    assert assert_as_seeded(tmp_path / "copy", 0) == 9
    assert len(left) > 3 * 2 + 3
    unborn = [folder for folder in left if not (folder / "manifest.json").exists()]
    for folder in left:
        if folder not in unborn:
            assert assert_as_seeded(folder, 0) == 9
            continue
        with pytest.raises(MemoryFormatError, match="it has no manifest"):
            DiskMemory.open(folder)
    # What was left before the manifest is in the way of nothing, whatever comes there.
    assert len(unborn) > 3 * 2 + 3
    copy(unborn[-1])
    assert assert_as_seeded(unborn[-1], 0) == 9
    with DiskMemory.create(unborn[-2], fingerprint={}, slab_size=4) as other:
        other.append(*seeded(0, 1))
    assert assert_as_seeded(unborn[-2], 0) == 1
    assert not (unborn[-2] / "records.1.bin").exists()


@pytest.mark.parametrize("way", ["save", "import"])
def test_a_copy_that_fails_leaves_nothing_and_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    memory, folder = DeviceMemory(), tmp_path / "copy"
    memory.append(*seeded(0, 9))
    paths = export_safetensors(memory, tmp_path / "shards", shard_bytes=3 * 256)
    last = paths[-1].read_bytes()
    if way == "import":
        paths[-1].write_bytes(last[:-1])
        with pytest.raises(MemoryFormatError, match="00003-of-00003"):
            import_safetensors(tmp_path / "shards", folder, slab_size=4)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(memory_files.os, "pwrite", _no_space)
            with pytest.raises(OSError, match="No space left"):
                memory.save(folder, fingerprint={})
    assert [path.name for path in folder.iterdir()] == ["lock"]
    paths[-1].write_bytes(last)
    if way == "import":
        import_safetensors(tmp_path / "shards", folder).close()
    else:
        memory.save(folder, fingerprint={})
    assert assert_as_seeded(folder, 0) == 9


def assert_consistent(memory: DiskMemory, folder: Path, count: int) -> None:
    """Memory and folder hold the same `count` chunks."""
    assert len(memory) == count
    assert assert_as_seeded(folder, 0) == count
    found = memory.search(torch.ones(1, 1, 6), torch.tensor([[10**6]]), topk=1)
    assert int(found.indices[0, 0, 0]) == count - 1


@pytest.mark.parametrize(
    "name", ["records.0.bin", "records.1.bin", "landmarks.1.bin", "journal.bin"]
)
@pytest.mark.parametrize("partly", [False, True])
def test_a_failed_write_changes_nothing_and_appending_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, partly: bool
) -> None:
    memory = DiskMemory.create(tmp_path, fingerprint={}, slab_size=4)
    memory.append(*seeded(0, 3))
    real, write = os.pwrite, BinaryFile.write
    left = {"bytes": 10 if partly else 0}

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        if left["bytes"] == 0:
            raise OSError(28, "No space left on device")
        count = real(descriptor, data[: left["bytes"]], offset)
        left["bytes"] -= count
        return count

    def failing(self: BinaryFile, data: memoryview, offset: int) -> None:
        with monkeypatch.context() as patch:
            if self.path.name == name:
                patch.setattr(memory_files.os, "pwrite", full)
            write(self, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(BinaryFile, "write", failing)
        with pytest.raises(OSError, match=r"cannot write \d+ bytes: No space left") as caught:
            memory.append(*seeded(3, 9))
        assert caught.value.filename == str(tmp_path / name)
        assert_consistent(memory, tmp_path, 3)
    memory.append(*seeded(3, 9))
    assert_consistent(memory, tmp_path, 9)


def test_a_full_disk_at_the_first_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = DiskMemory.create(tmp_path, fingerprint={})
    with monkeypatch.context() as patch:
        patch.setattr(memory_files.os, "pwrite", _no_space)
        with pytest.raises(OSError, match="No space left"):
            memory.append(*seeded(0, 2))
    assert len(memory) == 0
    memory.append(*seeded(0, 2))
    assert_consistent(memory, tmp_path, 2)


def _no_space(*_: Any) -> int:
    raise OSError(28, "No space left on device")


def _append_under_a_limit(folder: Path) -> None:
    """In a child: the kernel itself refuses to let files grow beyond 20,000 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
    with DiskMemory.create(folder, fingerprint={}, slab_size=4096, fsync="always") as memory:
        for start in range(0, 77, 7):
            memory.append(*seeded(start, start + 7))
        with pytest.raises(OSError, match="File too large"):
            memory.append(*seeded(77, 84))
        count = len(memory)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert_consistent(memory, folder, count)
        memory.append(*seeded(count, count + 100))


def test_a_limit_of_the_kernel(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _append_under_a_limit(tmp_path)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    # 20,000 bytes are 78 records of 256.
    assert assert_as_seeded(tmp_path, 0) == 177
