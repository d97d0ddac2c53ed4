"""The memory in a folder: what comes back, who may write, and what damage is told apart."""

import json
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drt.memory import (
    DeviceMemory,
    DiskMemory,
    HostMemory,
    MemoryFormatError,
    repair_memory,
)

MADE_BY = {"model": "m", "tokenizer": "t"}


def gathered(memory: Any, numbers: list[int] | None = None) -> list[torch.Tensor]:
    """Landmarks' order aside, all that a row holds: keys, values, lengths."""
    numbers = list(range(len(memory))) if numbers is None else numbers
    keys, values, lengths, indices = memory.gather(torch.tensor(numbers)[None, None])
    order = indices[0, 0]
    size = torch.full((len(keys),), keys.shape[1]) if lengths is None else lengths
    return [keys[order], values[order], size[order]]


def assert_row(memory: Any, wanted: Any) -> None:
    """Chunks of the first row as the oracle has them, and searches that agree."""
    row = wanted.rows[0]
    assert memory.counts == (len(row),)
    if row:
        for i, (_, key, value, length) in enumerate(row):
            keys, values, lengths = gathered(memory, [i])
            assert int(lengths[0]) == length
            assert torch.equal(keys[0, :length], key[:length])
            assert torch.equal(values[0, :length], value[:length])
    query = torch.randn(1, 1, 6)
    found = memory.search(query, torch.tensor([[len(row)]]), topk=3).scores[0, 0]
    scores = wanted.scores(0, query[0, 0], 0, len(row))[:3]
    assert torch.allclose(found[: len(scores)].double(), torch.tensor(scores).double(), atol=1e-5)


def create(folder: Path, **options: Any) -> DiskMemory:
    return DiskMemory.create(folder, fingerprint=MADE_BY, **options)


def filled(folder: Path, oracle: Any, count: int = 10, **options: Any) -> DiskMemory:
    memory = create(folder, **{"slab_size": 4, **options})
    memory.append(*oracle.make_chunks([count], 0))
    return memory


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_any_history(oracle: Any, tmp_path_factory: Any, seed: int, slab_size: int) -> None:
    choose, folder = random.Random(seed), tmp_path_factory.mktemp("memory")
    memory, wanted = create(folder, slab_size=slab_size, fsync="never"), oracle.memory([[]])
    forks = []
    for step in range(10):
        action = choose.random()
        if step < 1 or action < 0.5:
            made = oracle.make_chunks([choose.randint(0, 12)], seed + step, ragged=True)
            memory.append(*made)
            wanted.append(made)
        elif action < 0.65:
            forks.append((memory.fork(), wanted.select_rows([0])))
        elif action < 0.8 and not forks:
            keep = choose.randint(0, len(memory))
            memory.truncate(keep)
            del wanted.rows[0][keep:]
        elif action < 0.9:
            memory.close()
            memory = DiskMemory.open(folder, writable=True, fsync="never")
        for fork, held in forks[:2]:
            made = oracle.make_chunks([1], seed + 100 + step)
            fork.append(*made)
            held.append(made)
    for one, held in [(memory, wanted), (DiskMemory.open(folder), wanted), *forks]:
        assert_row(one, held)
    memory.verify()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kind", [DeviceMemory, HostMemory])
def test_saving_any_tier_keeps_every_bit(
    oracle: Any, tmp_path: Path, kind: Any, dtype: torch.dtype | None
) -> None:
    memory = kind(dtype=dtype, slab_size=8, landmark_dtype=torch.bfloat16)
    memory.append(*oracle.make_chunks([3, 20], 0, ragged=True))
    memory.save(tmp_path / "saved", row=1, fingerprint=MADE_BY, slab_size=6)
    row = memory.select_rows([1])
    query, limits = torch.randn(1, 2, 6), torch.tensor([[20, 11]])
    with DiskMemory.open(tmp_path / "saved", fingerprint=MADE_BY) as back:
        for mine, theirs in zip(gathered(row), gathered(back), strict=True):
            assert torch.equal(mine, theirs)
        scores = [m.search(query, limits, topk=5).scores for m in (row, back)]
        # One search sums in another order than the other when tiles differ in size.
        assert torch.allclose(scores[0], scores[1], atol=1e-6)
        back.save(tmp_path / "again", fingerprint=MADE_BY, slab_size=6)
    for name in ("journal.bin", "records.2.bin", "landmarks.3.bin"):
        saved, again = ((tmp_path / folder / name).read_bytes() for folder in ("saved", "again"))
        assert saved == again


def test_dtypes_of_a_reloaded_memory(oracle: Any, tmp_path: Path) -> None:
    filled(tmp_path, oracle, dtype=torch.float16).close()
    with DiskMemory.open(tmp_path) as memory:
        assert gathered(memory)[0].dtype == torch.float32
    with DiskMemory.open(tmp_path, compute_dtype=torch.bfloat16) as memory:
        assert gathered(memory)[0].dtype == torch.bfloat16


def test_reading_never_writes_to_the_folder(oracle: Any, tmp_path: Path) -> None:
    filled(tmp_path, oracle).close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with DiskMemory.open(tmp_path) as memory:
        fork = memory.fork()
        pair = memory.select_rows([0, 0])
        for one, rows in ((memory, 1), (fork, 1), (pair, 2)):
            one.append(*oracle.make_chunks([2] * rows, 1))
            assert one.counts == (12,) * rows
        with pytest.raises(ValueError, match="chunks of its own"):
            memory.refresh()
        with pytest.raises(ValueError, match="open for reading"):
            memory.commit()
        with pytest.raises(ValueError, match="open for reading"):
            memory.truncate(1)
    assert gathered(fork)[0].shape[0] == 12
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_fork_of_a_writer_outlives_it(oracle: Any, tmp_path: Path) -> None:
    memory = filled(tmp_path, oracle)
    fork = memory.fork()
    assert isinstance(fork, HostMemory)
    fork.append(*oracle.make_chunks([1], 1))
    memory.append(*oracle.make_chunks([3], 2))
    kept = gathered(memory)
    memory.close()
    mine = gathered(fork)
    assert torch.equal(mine[0][:10], kept[0][:10])
    assert torch.equal(mine[0][10], oracle.make_chunks([1], 1).keys[0, 0])


def test_a_memory_of_no_chunks_is_one(oracle: Any, tmp_path: Path) -> None:
    memory = DeviceMemory()
    memory.append(*oracle.make_chunks([0, 1], 0))
    memory.save(tmp_path / "saved", fingerprint=MADE_BY)
    with create(tmp_path / "made") as made:
        made.append(*oracle.make_chunks([0], 0))
    for name in ("saved", "made"):
        with DiskMemory.open(tmp_path / name, writable=True) as memory:
            assert memory.counts == (0,)
            assert memory.search(torch.ones(1, 1, 6), torch.ones(1, 1), topk=2).indices.eq(-1).all()
            memory.append(*oracle.make_chunks([1], 0))
            assert memory.counts == (1,)


def test_a_commit_brings_everything_to_the_medium(oracle: Any, tmp_path: Path, medium: Any) -> None:
    folder = tmp_path / "new" / "memory"
    memory = filled(folder, oracle)
    # The names of the folders, each in the one above it.
    assert set(medium.names[:2]) == {"new", tmp_path.name}
    assert "new" in medium.held[tmp_path.name]
    assert "memory" in medium.held["new"]
    del medium.names[:2]
    # The manifest, under the name that it has until it is whole, and its own name.
    assert medium.names == ["manifest.json.new", "memory"]
    assert medium.held["memory"] == {"lock", "journal.bin", "manifest.json"}
    medium.names.clear()
    memory.commit()
    # An entry on the medium must not come before what it vouches for.
    assert medium.names[-2:] == ["journal.bin", "memory"]
    slabs = {f"{name}.{i}.bin" for name in ("records", "landmarks") for i in range(3)}
    assert len(medium.names) == 8
    assert set(medium.names[:-2]) == slabs
    medium.assert_holds(folder)
    medium.names.clear()
    memory.append(*oracle.make_chunks([1], 1))
    assert medium.names == []
    memory.close()
    # Of the slabs, only that which has grown since.
    assert medium.names == ["records.2.bin", "landmarks.2.bin", "journal.bin", "memory"]
    medium.assert_holds(folder)


def test_a_commit_vouches_for_what_an_earlier_writer_left(
    oracle: Any, tmp_path: Path, medium: Any
) -> None:
    folder = tmp_path / "memory"
    earlier = DiskMemory.create(folder, fingerprint=MADE_BY, slab_size=4, fsync="never")
    earlier.append(*oracle.make_chunks([10], 0))
    earlier.close()
    medium.names.clear()
    with DiskMemory.open(folder, fingerprint=MADE_BY, writable=True) as memory:
        memory.append(*oracle.make_chunks([1], 1))
        memory.commit()
        slabs = {f"{name}.{n}.bin" for name in ("records", "landmarks") for n in range(3)}
        assert set(medium.names[:-2]) == slabs
        assert medium.names[-2:] == ["journal.bin", "memory"]


def test_every_append_is_on_the_medium_if_that_is_wanted(
    oracle: Any, tmp_path: Path, medium: Any
) -> None:
    folder = tmp_path / "memory"
    memory = create(folder, fsync="always", slab_size=4)
    for step, (count, new) in enumerate([(3, True), (1, False), (2, True), (7, True)]):
        medium.names.clear()
        memory.append(*oracle.make_chunks([count], step))
        *before, last = medium.names
        assert last == "journal.bin"
        # The names of new files, before there is an entry.
        assert (before[-1] == "memory") == new
        medium.assert_holds(folder)
    medium.names.clear()
    memory.truncate(9)
    assert medium.names[-1] == "journal.bin"
    assert len(medium.held["journal.bin"]) == 9 * 24


def test_nothing_is_forced_to_the_medium_if_that_is_not_wanted(
    oracle: Any, tmp_path: Path, medium: Any
) -> None:
    (tmp_path / "memory").mkdir()
    memory = filled(tmp_path / "memory", oracle, fsync="never")
    # The manifest is written only once, and as a whole.
    medium.names.remove("manifest.json.new")
    medium.names.remove("memory")
    memory.commit()
    memory.truncate(5)
    memory.close()
    assert medium.names == []


def test_what_is_cut_and_kept_reaches_the_medium(oracle: Any, tmp_path: Path, medium: Any) -> None:
    memory = filled(tmp_path / "memory", oracle)
    medium.names.clear()
    memory.truncate(5)
    # Before what is cut off may be overwritten: chunks without entries are none.
    assert medium.names[-1] == "journal.bin"
    assert len(medium.held["journal.bin"]) == 5 * 24
    assert {"records.1.bin", "landmarks.1.bin"} <= set(medium.names)
    memory.append(*oracle.make_chunks([1], 1))
    memory.commit()
    medium.assert_holds(tmp_path / "memory")


def test_a_repair_reaches_the_medium(oracle: Any, tmp_path: Path, medium: Any) -> None:
    filled(tmp_path, oracle).close()
    _edit("records.1.bin", 192 * 3 + 7, b"\xaa\xbb")(tmp_path)
    medium.names.clear()
    assert repair_memory(tmp_path) == 7
    assert medium.names == ["journal.bin"]
    assert medium.held["journal.bin"] == (tmp_path / "journal.bin").read_bytes()


def test_a_memory_of_float64_is_opened_again(oracle: Any, tmp_path: Path) -> None:
    landmarks, keys, values, *rest = oracle.make_chunks([3], 0)
    with DiskMemory.create(tmp_path, fingerprint={}, dtype=torch.bfloat16) as memory:
        memory.append(landmarks, keys.double(), values.double(), *rest)
        wanted = memory.gather(torch.tensor([[[2, 0]]]))
    with DiskMemory.open(tmp_path) as again:
        found = again.gather(torch.tensor([[[2, 0]]]))
    assert found[0].dtype == torch.float64
    assert torch.equal(found[0], wanted[0])


def test_truncating_forgets_and_files_go(oracle: Any, tmp_path: Path) -> None:
    memory = filled(tmp_path, oracle)
    fork, before = memory.fork(), gathered(memory)
    memory.truncate(6)
    assert not (tmp_path / "records.2.bin").exists()
    memory.append(*oracle.make_chunks([3], 1))
    after = gathered(memory)
    assert torch.equal(after[0][:6], before[0][:6])
    assert torch.equal(after[0][6:], oracle.make_chunks([3], 1).keys[0])
    assert len(DiskMemory.open(tmp_path)) == 9
    assert torch.equal(gathered(fork, [5])[0], before[0][5:6])
    with pytest.raises(MemoryFormatError, match="chunk 6 is damaged"):
        fork.gather(torch.tensor([[[6]]]))
    with pytest.raises(ValueError, match="num_chunks must be 0 to 9, got 10"):
        memory.truncate(10)
    memory.truncate(0)
    assert len(DiskMemory.open(tmp_path)) == 0


def test_what_it_says_of_itself(oracle: Any, tmp_path: Path) -> None:
    with filled(tmp_path, oracle) as memory:
        info = memory.info()
        assert info["chunks"] == 10
        assert info["tokens"] == 30
        assert info["fingerprint"] == MADE_BY
        # 10 landmarks of 6 float32, 10 records of 2 x 24 float32.
        assert info["bytes"]["disk"] == 10 * (24 + 192)
        assert info["record_bytes"] == 192
        json.dumps(info)


def test_one_writer_at_a_time(oracle: Any, tmp_path: Path) -> None:
    memory = filled(tmp_path, oracle)
    for attempt in (lambda: DiskMemory.open(tmp_path, writable=True), lambda: create(tmp_path)):
        with pytest.raises(BlockingIOError, match=r"process \d+.*" + tmp_path.name):
            attempt()
    memory.close()
    DiskMemory.open(tmp_path, writable=True).close()
    with pytest.raises(ValueError, match="holds a memory already"):
        create(tmp_path)
    # A refused `create` does not keep the lock.
    DiskMemory.open(tmp_path, writable=True).close()


def test_only_one_row_fits(oracle: Any, tmp_path: Path) -> None:
    with create(tmp_path) as memory:
        with pytest.raises(ValueError, match="holds one row"):
            memory.append(*oracle.make_chunks([1, 1], 0))
        assert memory.counts == ()
    with pytest.raises(ValueError, match="the memory is closed"):
        memory.append(*oracle.make_chunks([1], 0))
    with pytest.raises(MemoryFormatError, match=r"not a memory folder: it has no manifest.json"):
        DiskMemory.open(tmp_path)
    with pytest.raises(ValueError, match="fsync must be one of"):
        create(tmp_path, fsync="sometimes")


def _edit(name: str, offset: int, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return change


def _cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def _manifest(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


DAMAGE: dict[str, Callable[[Path], None]] = {
    r"manifest.json is not JSON": _cut("manifest.json", 9),
    r"format is not 'drt-memory'": _manifest(format="zip"),
    r"format version 7, only 1 is known": _manifest(version=7),
    r"unexpected keyword argument 'colour'": _manifest(colour=1),
    r"'float8'": _manifest(dtype="float8"),
    r"sizes disagree; records should have 192 bytes": _manifest(record_bytes=64),
    r"journal.bin is missing": lambda folder: (folder / "journal.bin").unlink(),
    r"records.1.bin is missing": lambda folder: (folder / "records.1.bin").unlink(),
    r"landmarks.0.bin is missing": lambda folder: (folder / "landmarks.0.bin").unlink(),
    r"records.2.bin is cut short: 383 of 384": _cut("records.2.bin", 383),
    r"landmarks.2.bin is cut short: 47 of 48": _cut("landmarks.2.bin", 47),
    r"landmarks.1.bin: chunk 6 is damaged": _edit("landmarks.1.bin", 24 * 2 + 3, b"\xaa\xbb"),
    r"journal.bin: entry 3 is damaged, and intact": _edit("journal.bin", 24 * 3 + 8, b"\xaa\xbb"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named_on_opening(oracle: Any, tmp_path: Path, message: str) -> None:
    filled(tmp_path, oracle).close()
    DAMAGE[message](tmp_path)
    for writable in (False, True):
        with pytest.raises(MemoryFormatError, match=message):
            DiskMemory.open(tmp_path, writable=writable)


def test_a_damaged_record_is_named_when_it_is_read(oracle: Any, tmp_path: Path) -> None:
    filled(tmp_path, oracle).close()
    _edit("records.1.bin", 192 * 3 + 7, b"\xaa\xbb")(tmp_path)
    with DiskMemory.open(tmp_path) as memory:
        assert len(gathered(memory, [6, 8])[0]) == 2
        with pytest.raises(MemoryFormatError, match=r"records.1.bin: chunk 7 is damaged"):
            memory.gather(torch.tensor([[[6, 7]]]))
        with pytest.raises(MemoryFormatError, match="chunk 7 is damaged") as caught:
            memory.verify()
        assert caught.value.chunk == 7
    with DiskMemory.open(tmp_path, verify_reads=False) as memory:
        assert len(gathered(memory)[0]) == 10


@pytest.mark.parametrize(("name", "offset"), [("landmarks", 24 * 2 + 3), ("records", 192 * 2 + 7)])
def test_damage_since_the_opening_is_found_by_verifying(
    oracle: Any, tmp_path: Path, name: str, offset: int
) -> None:
    filled(tmp_path, oracle).close()
    with DiskMemory.open(tmp_path) as memory:
        memory.verify()
        _edit(f"{name}.1.bin", offset, b"\xaa\xbb")(tmp_path)
        with pytest.raises(MemoryFormatError, match=rf"{name}\.1\.bin: chunk 6 is da") as caught:
            memory.verify()
        assert caught.value.chunk == 6


REPAIRS: dict[str, tuple[Callable[[Path], None], int]] = {
    "nothing": (lambda folder: None, 10),
    "record": (_edit("records.1.bin", 192 * 3 + 7, b"\xaa\xbb"), 7),
    "landmark": (_edit("landmarks.1.bin", 24 * 2 + 3, b"\xaa\xbb"), 6),
    "journal": (_edit("journal.bin", 24 * 3 + 8, b"\xaa\xbb"), 3),
    "cut records": (_cut("records.2.bin", 191), 8),
    "cut landmarks": (_cut("landmarks.2.bin", 47), 9),
    "no records": (lambda folder: (folder / "records.1.bin").unlink(), 4),
}


@pytest.mark.parametrize("name", REPAIRS)
def test_a_repair_keeps_the_chunks_before_the_damage(
    oracle: Any, tmp_path: Path, name: str
) -> None:
    damage, kept = REPAIRS[name]
    filled(tmp_path, oracle).close()
    damage(tmp_path)
    assert repair_memory(tmp_path) == kept
    with DiskMemory.open(tmp_path, writable=True) as memory:
        assert len(memory) == kept
        with pytest.raises(BlockingIOError):
            repair_memory(tmp_path)
        memory.append(*oracle.make_chunks([5], 1))
        memory.verify()
    (tmp_path / "journal.bin").unlink()
    with pytest.raises(MemoryFormatError, match=r"journal.bin is missing"):
        repair_memory(tmp_path)


def test_another_fingerprint_is_refused(oracle: Any, tmp_path: Path) -> None:
    filled(tmp_path, oracle).close()
    DiskMemory.open(tmp_path, fingerprint={"model": "m"}).close()
    with pytest.raises(MemoryFormatError, match="made with model 'm', not 'other'"):
        DiskMemory.open(tmp_path, fingerprint={"model": "other"})
    with pytest.raises(MemoryFormatError, match="not a memory folder"):
        DiskMemory.open(tmp_path / "nowhere")


@pytest.mark.parametrize("cut", [1, 23, 24, 25, 100])
def test_a_torn_end_of_the_journal_is_dropped(oracle: Any, tmp_path: Path, cut: int) -> None:
    filled(tmp_path, oracle).close()
    _cut("journal.bin", 240 - cut)(tmp_path)
    kept = (240 - cut) // 24
    assert len(DiskMemory.open(tmp_path)) == kept
    assert (tmp_path / "journal.bin").stat().st_size == 240 - cut
    with DiskMemory.open(tmp_path, writable=True) as memory:
        assert (tmp_path / "journal.bin").stat().st_size == kept * 24
        memory.append(*oracle.make_chunks([2], 1))
        memory.verify()
    assert len(DiskMemory.open(tmp_path)) == kept + 2


def test_an_end_of_zeros_is_dropped(oracle: Any, tmp_path: Path) -> None:
    filled(tmp_path, oracle).close()
    _edit("journal.bin", 240, bytes(72))(tmp_path)
    assert len(DiskMemory.open(tmp_path)) == 10


def test_readers_follow_a_writer(oracle: Any, tmp_path: Path) -> None:
    filled(tmp_path, oracle, slab_size=16).close()
    readers = [DiskMemory.open(tmp_path) for _ in range(3)]
    # With one torch thread there are none that a fork could lose.
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=_write_all, args=(str(tmp_path), 300))
    writer.start()
    while writer.is_alive():
        for reader in readers:
            reader.refresh()
            reader.verify()
    writer.join()
    assert writer.exitcode == 0
    for reader in readers:
        reader.refresh()
        assert len(reader) == 910
        expected = torch.full((1, 3, 2, 4), 299.0)
        assert torch.equal(gathered(reader, [909])[0], expected)


def _write_all(folder: str, pieces: int) -> None:
    torch.set_num_threads(1)
    with DiskMemory.open(folder, writable=True, fsync="never") as memory:
        for i in range(pieces):
            shape = (1, 3, 3, 2, 4)
            memory.append(torch.ones(1, 3, 6), torch.full(shape, float(i)), torch.ones(shape))


def test_a_reader_of_a_truncated_folder_is_told(oracle: Any, tmp_path: Path) -> None:
    memory = filled(tmp_path, oracle)
    reader = DiskMemory.open(tmp_path)
    memory.truncate(5)
    with pytest.raises(MemoryFormatError, match="its writer has cut it to 5 chunks"):
        reader.refresh()


@pytest.mark.parametrize("fsync", ["always", "commit", "never"])
def test_every_policy_writes_the_same_files(oracle: Any, tmp_path: Path, fsync: Any) -> None:
    with filled(tmp_path, oracle, fsync=fsync) as memory:
        memory.commit()
        memory.append(*oracle.make_chunks([1], 1))
    with DiskMemory.open(tmp_path) as memory:
        memory.verify()
        assert len(memory) == 11
