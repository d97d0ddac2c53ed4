"""A state saved and loaded goes on as if nothing had happened; what is wrong with one is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from drt import DeviceMemory, DiskMemory, DRTForCausalLM, HostMemory, MemoryFormatError
from drt.saved_state import saved_cursor
from drt.testing import tiny_config


def make(**changes: object) -> DRTForCausalLM:
    torch.manual_seed(0)
    return DRTForCausalLM(tiny_config(**changes)).eval()


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("length", [0, 5, 16, 100])
@torch.no_grad()
def test_a_loaded_state_goes_on_as_the_saved_one(tmp_path: Path, tier: str, length: int) -> None:
    model, folder = make(exclude_window_chunks=True), tmp_path / "memory"
    marks = {"model": model.fingerprint()}
    memory = {
        "device": DeviceMemory,
        "host": HostMemory,
        "disk": lambda: DiskMemory.create(folder, fingerprint=marks),
    }[tier]()
    ids, rest = torch.randint(0, 61, (1, length)), torch.randint(0, 61, (1, 60))
    ends = torch.rand(1, length) < 0.05
    with memory:
        state = model.new_state(memory=memory)
        model(ids, past_key_values=state, chunk_ends=ends)
        model.save_state(state, folder, notes={"read": ["a", length]})
    loaded, notes = make(exclude_window_chunks=True).load_state(folder)
    assert notes == {"read": ["a", length]}
    assert loaded.cursors == state.cursors
    got = torch.cat([model(p, past_key_values=loaded).logits for p in rest.split(7, 1)], 1)
    all_ends = torch.cat([ends, torch.zeros_like(rest, dtype=torch.bool)], 1)
    whole = model(torch.cat([ids, rest], 1), chunk_ends=all_ends).logits[:, length:]
    # The bound of the specification for one function in segments.
    assert (got - whole).abs().max() < 1e-4


@torch.no_grad()
def test_a_state_that_died_after_its_last_save_goes_on_from_there(tmp_path: Path) -> None:
    model, ids = make(), torch.randint(0, 61, (1, 200))
    marks = {"model": model.fingerprint()}
    memory = DiskMemory.create(tmp_path, fingerprint=marks, fsync="never")
    state = model.new_state(memory=memory)
    model(ids[:, :70], past_key_values=state)
    model.save_state(state, tmp_path)
    model(ids[:, 70:], past_key_values=state)
    # No save, no commit: as if the process had gone.
    memory.close()
    for writable in (False, True):
        loaded, _ = model.load_state(tmp_path, writable=writable)
        assert loaded.num_tokens == [70]
        assert loaded.memory.counts == (4,)
        out = model(ids[:, 70:], past_key_values=loaded).logits
        assert (out - model(ids).logits[:, 70:]).abs().max() < 1e-4
        assert loaded.memory.counts == (12,)
    loaded.memory.close()
    with DiskMemory.open(tmp_path) as again:
        assert again.counts == (12,)


@torch.no_grad()
def test_who_waits_for_the_folder_sees_what_was_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make(), torch.randint(0, 61, (1, 200))
    memory = DiskMemory.create(tmp_path, fingerprint={"model": model.fingerprint()})
    state = model.new_state(memory=memory)
    model(ids[:, :70], past_key_values=state)
    model.save_state(state, tmp_path)
    opened = DiskMemory.open

    def finish_first(*args: Any, **kwargs: Any) -> DiskMemory:
        # The other writer commits and goes after the newcomer has looked at the state.
        if not memory._closed:
            model(ids[:, 70:], past_key_values=state)
            model.save_state(state, tmp_path)
            memory.close()
        return opened(*args, **kwargs)

    monkeypatch.setattr(DiskMemory, "open", finish_first)
    loaded, _ = model.load_state(tmp_path, writable=True)
    assert loaded.num_tokens == [200]
    assert loaded.memory.counts == (12,)
    loaded.memory.close()


@torch.no_grad()
def test_a_folder_is_the_same_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(), torch.randint(0, 61, (1, 70))
    folder = tmp_path / "memory"
    memory = DiskMemory.create(folder, fingerprint={"model": model.fingerprint()})
    state = model.new_state(memory=memory)
    model(ids, past_key_values=state)
    monkeypatch.chdir(tmp_path)
    model.save_state(state, "memory")
    memory.close()
    assert model.load_state(folder)[0].num_tokens == [70]


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_a_saved_state_reaches_the_medium_whole_and_after_its_memory(
    tmp_path: Path, medium: Any, tier: str
) -> None:
    model, folder = make(), tmp_path / "memory"
    marks = {"model": model.fingerprint()}
    on_disk = tier == "disk"
    memory = DiskMemory.create(folder, fingerprint=marks) if on_disk else DeviceMemory()
    state = model.new_state(memory=memory)
    with torch.no_grad():
        model(torch.randint(0, 61, (1, 70)), past_key_values=state)
    names, held = medium.names, medium.held
    for turn in range(2 if on_disk else 1):
        names.clear()
        model.save_state(state, folder, notes={"turn": turn})
        # The chunks that the state names, then the state, and last its name.
        assert names[-4:] == ["journal.bin", "memory", "state.partial", "memory"]
        assert held["state.partial"] == (folder / "state.safetensors").read_bytes()
        assert held["memory"] == {file.name for file in folder.iterdir()}
        assert held["journal.bin"] == (folder / "journal.bin").read_bytes()
        assert {"records.0.bin", "landmarks.0.bin"} <= held.keys()
    # One so small that a buffer holds it all.
    model.save_state(model.new_state(), tmp_path / "small")
    assert names[-2:] == ["state.partial", "small"]
    assert held["state.partial"] == (tmp_path / "small" / "state.safetensors").read_bytes()
    memory.close()
    assert model.load_state(folder)[1] == {"turn": 1 if on_disk else 0}


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    # No chunk is full yet, so that the state is the first that is written.
    state = model.new_state()
    model(torch.zeros(1, 4, dtype=torch.int64), past_key_values=state)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("drt.saved_state.os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write: No space left.*state\.partial"):
        model.save_state(state, tmp_path)
    with pytest.raises(OSError, match=r"cannot write: No space left.*memory"):
        model.save_state(state, tmp_path / "memory")


def test_the_model_and_what_else_was_named_are_checked(tmp_path: Path) -> None:
    model, folder = make(), tmp_path / "memory"
    state = model.new_state()
    model(torch.zeros(1, 40, dtype=torch.int64), past_key_values=state)
    model.save_state(state, folder, fingerprint={"tokenizer": "bytes"})
    assert model.load_state(folder, fingerprint={"tokenizer": "bytes"})[0].num_tokens == [40]
    with pytest.raises(MemoryFormatError, match="another tokenizer: its fingerprint is bytes"):
        model.load_state(folder, fingerprint={"tokenizer": "gpt2"})
    other = make()
    with torch.no_grad():
        other.model.norm.weight += 1
    with pytest.raises(MemoryFormatError, match="made by another model"):
        other.load_state(folder)


def test_damage_is_named(tmp_path: Path) -> None:
    model, folder = make(), tmp_path / "memory"
    with pytest.raises(MemoryFormatError, match=r"there is no state\.safetensors"):
        model.load_state(tmp_path)
    state = model.new_state()
    model(torch.zeros(1, 40, dtype=torch.int64), past_key_values=state)
    model.save_state(state, folder)
    file = folder / "state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(MemoryFormatError, match=r"state\.safetensors is damaged"):
        model.load_state(folder)
    file.write_bytes(whole)
    with safe_open(file, framework="pt") as opened:
        whole_text = opened.metadata()["drt"]
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    header = json.loads(whole_text)

    def refused(message: str, text: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, file, metadata={"drt": text})
        with pytest.raises(MemoryFormatError, match=message):
            model.load_state(folder)

    for version in (2, 99):
        text = json.dumps({**header, "version": version})
        refused(rf"not a saved state of version 3.*version {version}", text, tensors)
    refused("its header is no JSON", whole_text[:-1], tensors)
    refused("its header is no JSON", "[1]", tensors)
    moved = {**header["cursor"], "tokens": header["cursor"]["tokens"] + 1}
    renamed = {key.replace("cursor", "cursxr"): value for key, value in header.items()}
    for changed in ({**header, "cursor": moved}, renamed):
        refused("its content is not what was saved", json.dumps(changed), tensors)
    keys = {**tensors, "windows.0.keys": tensors["windows.0.keys"] + 1}
    refused("its content is not what was saved", whole_text, keys)
    file.write_bytes(whole)
    with DiskMemory.open(folder, writable=True) as memory:
        memory.truncate(1)
    with pytest.raises(MemoryFormatError, match=r"holds 1 chunks.*goes with 2"):
        model.load_state(folder)


def test_any_damaged_byte_of_a_saved_state_is_found(tmp_path: Path) -> None:
    model = make()
    state = model.new_state()
    model(torch.zeros(1, 5, dtype=torch.int64), past_key_values=state)
    model.save_state(state, tmp_path)
    file = tmp_path / "state.safetensors"
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    # Every fifth byte of the header, and here and there of the tensors.
    for place in (*range(0, length, 5), *range(length, len(whole), 499)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(MemoryFormatError):
            saved_cursor(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(MemoryFormatError):
        saved_cursor(tmp_path)


def test_a_state_that_cannot_be_loaded_leaves_the_folder_free(tmp_path: Path) -> None:
    model = make()
    with DiskMemory.create(tmp_path, fingerprint={"model": model.fingerprint()}) as memory:
        state = model.new_state(memory=memory)
        with torch.no_grad():
            model(torch.randint(0, 61, (1, 40)), past_key_values=state)
        model.save_state(state, tmp_path)
    records = tmp_path / "records.0.bin"
    whole = records.read_bytes()
    records.write_bytes(bytes(byte ^ 1 for byte in whole))
    # What the state has retrieved is damaged.
    with pytest.raises(MemoryFormatError, match="chunk 0 is damaged") as kept:
        model.load_state(tmp_path, writable=True)
    records.write_bytes(whole)
    loaded, _ = model.load_state(tmp_path, writable=True)
    loaded.memory.close()
    assert kept.value.chunk == 0


OPTIONS: dict[str, Any] = {
    "dtype": torch.int8,
    "landmark_dtype": torch.bfloat16,
    "slab_size": 32,
    "scan": "bfloat16",
}


@torch.no_grad()
@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_memory_without_chunks_keeps_its_options(
    tmp_path: Path, tier: str, writable: bool
) -> None:
    model, ids = make(), torch.randint(0, 61, (1, 40))
    of_files: dict[str, Any] = {"fsync": "always", "verify_reads": False}
    if tier == "host":
        memory: Any = HostMemory(**OPTIONS)
    else:
        marks = {"model": model.fingerprint()}
        memory = DiskMemory.create(tmp_path, fingerprint=marks, **OPTIONS, **of_files)
    with memory:
        state = model.new_state(memory=memory)
        model(ids[:, :5], past_key_values=state)
        model.save_state(state, tmp_path)
    loaded, _ = model.load_state(tmp_path, writable=writable)
    found: Any = loaded.memory
    assert vars(found.options) == OPTIONS
    if tier == "disk" and writable:
        assert (found.fsync, found.verify_reads) == ("always", False)
    model(ids[:, 5:], past_key_values=loaded)
    assert found.blocks()[0].records.dtype == torch.int8
    found.close()


def test_several_rows_are_refused_and_one_of_them_is_not(tmp_path: Path) -> None:
    model, ids = make(), torch.randint(0, 61, (2, 50))
    state = model.new_state(2)
    model(ids, past_key_values=state)
    with pytest.raises(ValueError, match="the state has 2 rows, a folder holds one"):
        model.save_state(state, tmp_path)
    row = state.fork()
    row.batch_select_indices(torch.tensor([1]))
    model.save_state(row, tmp_path)
    assert model.load_state(tmp_path)[0].num_tokens == [50]
    with pytest.raises(ValueError, match="holds a memory already"):
        model.save_state(row, tmp_path)


def test_a_memory_made_for_something_else_is_refused_when_saving(tmp_path: Path) -> None:
    model = make()
    with DiskMemory.create(tmp_path, fingerprint={"model": "other"}) as memory:
        state = model.new_state(memory=memory)
        with pytest.raises(ValueError, match=r"was created with the fingerprint.*'other'"):
            model.save_state(state, tmp_path)


def test_what_the_weights_are_made_to_do_is_part_of_the_fingerprint() -> None:
    model = make()
    for change in ({"retrieval_topk": 3}, {"chunk_size": 8}, {"rope_theta": 5e5}):
        other = make(**change)
        other.load_state_dict(model.state_dict())
        assert other.fingerprint() != model.fingerprint()
    assert make().fingerprint() == model.fingerprint()
