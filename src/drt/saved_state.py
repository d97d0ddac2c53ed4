"""A decoding state in a folder: its memory, and beside it `state.safetensors` with all the rest.

The file is replaced as a whole, and names how many chunks it goes with; chunks that were written
after it are no part of the state. So whoever dies in between loses only what came after.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from drt.chunking import Cursor
from drt.configuration import DRTConfig
from drt.memory import ChunkMemory, DiskMemory, HostMemory, MemoryFormatError
from drt.memory.base import InferenceMemory
from drt.memory.files import make_folder, named_errors, sync_folder
from drt.retrieval import RetrievedChunks
from drt.state import CurrentRetrieval, DRTState

STATE_FILE, MANIFEST_FILE = "state.safetensors", "manifest.json"
FORMAT, VERSION = "drt-state", 3

PARTIAL_FILE = "state.partial"
"""The state while it is written."""

# Options of a memory that are dtypes, and names in JSON.
_DTYPES = ("dtype", "landmark_dtype")

# Fields of a configuration that no weight shows, and without which a state means something else;
# of a configuration that extends `DRTConfig`, all that it adds.
_MEANING = (
    *("chunk_size", "sliding_window", "retrieval_groups", "retrieval_topk", "retrieval_onset"),
    *("exclude_window_chunks", "position_embedding", "rope_theta", "softmax_plus_one"),
    *("rms_norm_eps", "num_attention_heads"),
)


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the model's weights, and of what its configuration has them do: 32 digits."""
    digest = hashlib.blake2b(digest_size=16)
    config: Any = model.config
    added = {field.name for field in fields(config)} - {field.name for field in fields(DRTConfig)}
    for name in (*_MEANING, *sorted(added)):
        digest.update(f"{name} {getattr(config, name)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_state(
    state: DRTState,
    folder: str | Path,
    *,
    fingerprint: Mapping[str, str],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Save a state of one row.

    Args:
        state: the state. If its memory is a `DiskMemory` of this very folder it is committed there;
            any other memory is written to the folder, which must then hold none.
        folder: where to.
        fingerprint: what made the state, {"model": ..., "tokenizer": ...}; checked when loading.
        notes: anything that JSON can hold, given back by `load_state`.

    Raises:
        ValueError: the state has several rows, the folder holds another memory, or its memory was
            created with another fingerprint.
        OSError: the folder cannot be written.
    """
    if state.batch_size != 1:
        raise ValueError(
            f"the state has {state.batch_size} rows, a folder holds one: "
            "fork the state, select a row with batch_select_indices and save that"
        )
    folder, memory = Path(folder), state.memory
    if (
        isinstance(memory, DiskMemory)
        and memory.writable
        and memory.folder.resolve() == folder.resolve()
    ):
        _check_maker(memory, fingerprint)
        memory.commit()
    elif len(memory):
        assert isinstance(memory, InferenceMemory)
        memory.save(folder, fingerprint=fingerprint)
    else:
        if (folder / MANIFEST_FILE).exists():
            raise ValueError(f"{folder} holds another memory already")
        make_folder(folder)
    tensors = _tensors(state)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": dict(fingerprint),
        "cursor": state.cursors[0]._asdict(),
        "window_lengths": [window.lengths for window in state.windows],
        "num_columns": state.num_columns,
        # With chunks, the manifest has them.
        "options": None if (folder / MANIFEST_FILE).exists() else _options(memory),
        "notes": dict(notes or {}),
    }
    # One text, as several would stand in the file in any order.
    text = json.dumps({**header, "digest": _digest(header, tensors)})
    _replace(folder / STATE_FILE, tensors, {"drt": text})


def _check_maker(memory: DiskMemory, fingerprint: Mapping[str, str]) -> None:
    """A folder whose memory names another maker than its state could not be loaded."""
    for key, wanted in fingerprint.items():
        if memory.fingerprint.get(key) != wanted:
            raise ValueError(
                f"{memory.folder} was created with the fingerprint {dict(memory.fingerprint)}, "
                f"which does not say {key} = {wanted}: give it to DiskMemory.create"
            )


def _options(memory: ChunkMemory) -> dict[str, Any]:
    """What was chosen about a memory, as JSON has it."""
    found = dict(vars(memory.options)) if isinstance(memory, InferenceMemory) else {}
    for name in _DTYPES:
        if found.get(name) is not None:
            found[name] = str(found[name]).removeprefix("torch.")
    if isinstance(memory, DiskMemory):
        found |= {"fsync": memory.fsync, "verify_reads": memory.verify_reads}
    return found


def _tensors(state: DRTState) -> dict[str, Tensor]:
    """What of a state is tensors; chunks that are retrieved stay in the memory."""
    tensors: dict[str, Tensor | None] = {
        "opened": state.opened,
        "opened_ids": state.opened_ids,
        "recent_ids": state.recent_ids,
    }
    for number, window in enumerate(state.windows):
        tensors[f"windows.{number}.keys"] = window.keys
        tensors[f"windows.{number}.values"] = window.values
    for group, current in enumerate(state.current):
        if current is not None:
            tensors[f"current.{group}.numbers"] = current.numbers
            tensors[f"current.{group}.weights"] = current.chunks.weights
    return {name: x.cpu().contiguous() for name, x in tensors.items() if x is not None}


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A hash of a header, which is the same once JSON gave it back, and of tensors: 32 digits."""
    digest = hashlib.blake2b(json.dumps(header).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _replace(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file beside the old one and put it in its place."""
    partial = file.with_name(PARTIAL_FILE)
    with named_errors(partial), partial.open("wb") as written:
        written.write(save(tensors, metadata=metadata))
        written.flush()
        os.fsync(written.fileno())
    partial.replace(file)
    sync_folder(file.parent)


def load_state(
    folder: str | Path,
    config: DRTConfig,
    *,
    fingerprint: Mapping[str, str],
    device: torch.device,
    writable: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[DRTState, dict[str, Any]]:
    """Load what `save_state` wrote.

    A memory that had no chunks yet is made anew with the options that it had.

    Args:
        folder: where it is.
        config: the model's configuration.
        fingerprint: what must have made it.
        device: the model's device.
        writable: whether what is read from here on goes to the folder; else it stays in memory.
        dtype: storage dtype of keys and values if the folder has no chunks yet; None = as it was.

    Returns:
        The state, and the notes that were saved with it.

    Raises:
        MemoryFormatError: nothing of the kind is there, it is damaged, or another model's.
        BlockingIOError: it is to be written and somebody else is writing.
    """
    folder = Path(folder)
    header, tensors = _read_of(folder, fingerprint)
    memory = _memory(folder, header["options"], fingerprint, device, writable, dtype)
    try:
        if writable:
            # Whoever wrote before us may have done so until the folder was ours.
            header, tensors = _read_of(folder, fingerprint)
        memory = _as_far_as(memory, _cursor(header).chunks, folder)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        return _restored(config, memory, header, tensors), header["notes"]
    except BaseException:
        memory.close()
        raise


def _restored(
    config: DRTConfig, memory: InferenceMemory, header: dict[str, Any], tensors: dict[str, Tensor]
) -> DRTState:
    """The state of what a file says, its tensors on the model's device."""
    state = DRTState(config, 1)
    state.memory, state.cursors = memory, [_cursor(header)]
    state.num_columns = header["num_columns"]
    state.recent_ids = tensors.get("recent_ids")
    state.opened = tensors.get("opened")
    state.opened_ids = tensors.get("opened_ids")
    for number, window in enumerate(state.windows):
        window.keys = tensors.get(f"windows.{number}.keys")
        window.values = tensors.get(f"windows.{number}.values")
        window.lengths = header["window_lengths"][number]
    for group in range(len(state.current)):
        if f"current.{group}.numbers" in tensors:
            numbers = tensors[f"current.{group}.numbers"]
            chunks = RetrievedChunks(
                *state.memory.gather(numbers), tensors[f"current.{group}.weights"]
            )
            state.current[group] = CurrentRetrieval(numbers, chunks)
    return state


def saved_cursor(folder: str | Path) -> tuple[Cursor, dict[str, Any]]:
    """Where the row of a saved state stands, and the notes, without loading the state.

    Raises:
        MemoryFormatError: there is no state, or it is damaged.
    """
    header, _ = _read(Path(folder) / STATE_FILE)
    return _cursor(header), header["notes"]


def _cursor(header: dict[str, Any]) -> Cursor:
    saved = header["cursor"]
    return Cursor(**{**saved, "recent_starts": tuple(saved["recent_starts"])})


def _read_of(
    folder: Path, fingerprint: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As `_read`, of a state that this made."""
    file = folder / STATE_FILE
    header, tensors = _read(file)
    for key, wanted in fingerprint.items():
        found = header["fingerprint"].get(key)
        if found != wanted:
            raise MemoryFormatError(
                f"{file} was made by another {key}: its fingerprint is {found}, not {wanted}"
            )
    return header, tensors


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says, and its tensors in host memory."""
    if not file.is_file():
        raise MemoryFormatError(f"no saved state in {file.parent}: there is no {file.name}")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise MemoryFormatError(f"{file} is damaged: {error}") from error
    try:
        header = dict(json.loads(metadata.get("drt", "{}")))
    except (ValueError, TypeError) as error:
        raise MemoryFormatError(f"{file} is damaged: its header is no JSON: {error}") from error
    if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise MemoryFormatError(
            f"{file} is not a saved state of version {VERSION}: it says "
            f"{header.get('format')!r}, version {header.get('version')!r}"
        )
    if header.pop("digest", None) != _digest(header, tensors):
        raise MemoryFormatError(f"{file} is damaged: its content is not what was saved")
    return header, tensors


def _memory(
    folder: Path,
    options: Mapping[str, Any] | None,
    fingerprint: Mapping[str, str],
    device: torch.device,
    writable: bool,
    dtype: torch.dtype | None,
) -> InferenceMemory:
    """The folder's memory; to be written, nobody else may write to it from now on."""
    if options is None or (folder / MANIFEST_FILE).exists():
        return DiskMemory.open(folder, writable=writable, fingerprint=fingerprint, device=device)
    chosen = dict(options)
    for name in _DTYPES:
        if chosen.get(name) is not None:
            chosen[name] = getattr(torch, chosen[name])
    if dtype is not None:
        chosen["dtype"] = dtype
    if writable:
        return DiskMemory.create(folder, fingerprint=fingerprint, **chosen)
    of_files = ("fsync", "verify_reads")
    return HostMemory(**{name: each for name, each in chosen.items() if name not in of_files})


def _as_far_as(memory: InferenceMemory, num_chunks: int, folder: Path) -> InferenceMemory:
    """A folder's memory as far as its state goes."""
    if len(memory) < num_chunks:
        raise MemoryFormatError(
            f"{folder} holds {len(memory)} chunks, its {STATE_FILE} goes with {num_chunks}"
        )
    if len(memory) == num_chunks:
        return memory
    assert isinstance(memory, DiskMemory)
    if memory.writable:
        memory.truncate(num_chunks)
        return memory
    return memory.prefix(num_chunks)
