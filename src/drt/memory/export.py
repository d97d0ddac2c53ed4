"""A memory as safetensors, to hand on: sharded, without pickle, written once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drt.memory.base import InferenceMemory
from drt.memory.disk import DiskMemory
from drt.memory.files import MemoryFormatError
from drt.memory.manifest import Manifest, parse_manifest
from drt.memory.records import Parts
from drt.memory.slabs import EncodedChunks, Layout

_METADATA = "memory"


def export_safetensors(
    memory: InferenceMemory,
    folder: str | Path,
    *,
    row: int = 0,
    fingerprint: Mapping[str, str] | None = None,
    shard_bytes: int = 1 << 30,
) -> list[Path]:
    """Write one row to `memory-<i>-of-<n>.safetensors`.

    Each shard holds, for its chunks, landmarks (m, L), keys and values (m, S, G, D) in the storage
    dtype, for int8 key_scales and value_scales (m, G) float32, lengths (m,) int64, and as metadata
    "memory" the fields of `manifest.json`.

    Args:
        memory: of any tier.
        folder: where; made if need be.
        row: which row.
        fingerprint: what made the memory; None = a `DiskMemory`'s own.
        shard_bytes: size of a shard, roughly; at least one chunk is in each.

    Returns:
        The files, in order.

    Raises:
        ValueError: an empty memory, a row that there is not, or a folder that has such files.
    """
    layout, _ = memory.blocks(row)
    folder = Path(folder)
    if any(folder.glob("memory-*.safetensors")):
        raise ValueError(f"{folder} has memory-*.safetensors already")
    folder.mkdir(parents=True, exist_ok=True)
    if fingerprint is None:
        fingerprint = memory.fingerprint if isinstance(memory, DiskMemory) else {}
    manifest = Manifest.of(layout, slab_size=memory.slab_size, fingerprint=fingerprint)
    size = max(shard_bytes // layout.records.record_bytes, 1)
    total = max(-(-memory.counts[row] // size), 1)
    paths = []
    for i, tensors in enumerate(_shards(memory, layout, row=row, size=size)):
        paths.append(folder / f"memory-{i + 1:05}-of-{total:05}.safetensors")
        save_file(tensors, paths[-1], metadata={_METADATA: json.dumps(manifest.content())})
    return paths


def _shards(
    memory: InferenceMemory, layout: Layout, *, row: int, size: int
) -> Iterator[dict[str, Tensor]]:
    """Tensors of `size` chunks at a time; of none when there are none."""
    waiting: list[EncodedChunks] = []
    count, any_yet = 0, False
    for chunks in memory.blocks(row, size)[1]:
        while len(chunks.lengths):
            part = chunks.part(0, size - count)
            chunks = chunks.part(size - count, len(chunks.lengths))
            waiting.append(part)
            count += len(part.lengths)
            if count == size:
                yield _tensors(layout, waiting)
                waiting, count, any_yet = [], 0, True
    if waiting or not any_yet:
        yield _tensors(layout, waiting)


def _tensors(layout: Layout, blocks: list[EncodedChunks]) -> dict[str, Tensor]:
    landmarks = torch.empty(0, layout.landmark_size, dtype=layout.landmark_dtype)
    records = torch.empty(0, layout.records.record_bytes, dtype=torch.uint8)
    landmarks = torch.cat([landmarks, *(block.landmarks.cpu() for block in blocks)])
    records = torch.cat([records, *(block.records for block in blocks)])
    lengths = [torch.from_numpy(block.lengths) for block in blocks]
    keys, values, scales = layout.records.parts(records)
    tensors = {
        "landmarks": landmarks,
        "keys": keys.transpose(1, 2).contiguous(),
        "values": values.transpose(1, 2).contiguous(),
        "lengths": torch.cat([torch.empty(0, dtype=torch.int64), *lengths]),
    }
    if scales is not None:
        tensors["key_scales"] = scales[:, 0].contiguous()
        tensors["value_scales"] = scales[:, 1].contiguous()
    return tensors


def import_safetensors(
    source: str | Path,
    folder: str | Path,
    *,
    fingerprint: Mapping[str, str] | None = None,
    slab_size: int | None = None,
) -> DiskMemory:
    """Make a memory folder of what `export_safetensors` wrote, bit for bit, or none.

    Args:
        source: the folder of the shards.
        folder: the new memory's; it must not hold one.
        fingerprint: what the shards' fingerprint must say, for the keys given here.
        slab_size: chunks per file; None = about 512 MiB of records.

    Returns:
        The new memory, open for writing.

    Raises:
        MemoryFormatError: shards that are missing, damaged, or of another fingerprint.
        ValueError: the folder holds a memory.
    """
    paths = _shard_paths(Path(source))
    manifest = _manifest(paths[0])
    manifest.check_fingerprint(paths[0], fingerprint or {})
    layout = manifest.layout(torch.device("cpu"))
    memory = DiskMemory.create(
        folder,
        fingerprint=manifest.fingerprint,
        dtype=layout.records.dtype,
        landmark_dtype=layout.landmark_dtype,
        slab_size=slab_size,
    )
    memory.append_encoded(layout, (_read(path, manifest, layout) for path in paths))
    return memory


def _shard_paths(source: Path) -> list[Path]:
    paths = sorted(source.glob("memory-*-of-*.safetensors"))
    total = len(paths)
    wanted = [f"memory-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    if not paths or [path.name for path in paths] != wanted:
        found = ", ".join(path.name for path in paths) or "none"
        raise MemoryFormatError(f"{source}: shards 1 to n of one memory are wanted, found {found}")
    return paths


def _manifest(path: Path) -> Manifest:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise MemoryFormatError(f"{path}: {error}") from error
    if _METADATA not in metadata:
        raise MemoryFormatError(f"{path} is not of a memory: no metadata {_METADATA!r}")
    return parse_manifest(path, metadata[_METADATA])


def _read(path: Path, manifest: Manifest, layout: Layout) -> EncodedChunks:
    """The chunks of a shard, checked against the first one's manifest."""
    if _manifest(path) != manifest:
        raise MemoryFormatError(f"{path} is of another memory than the first shard")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise MemoryFormatError(f"{path}: {error}") from error
    _check_tensors(path, tensors, layout)
    scales = None
    if layout.records.dtype == torch.int8:
        scales = torch.stack([tensors["key_scales"], tensors["value_scales"]], 1)
    keys, values = (tensors[name].transpose(1, 2) for name in ("keys", "values"))
    records = layout.records.pack(Parts(keys, values, scales))
    return EncodedChunks(tensors["landmarks"], records, tensors["lengths"].numpy())


def _check_tensors(path: Path, tensors: dict[str, Tensor], layout: Layout) -> None:
    form, count = layout.records, len(tensors.get("lengths", ()))
    shape = (count, form.chunk_size, form.kv_heads, form.head_dim)
    wanted = {
        "landmarks": ((count, layout.landmark_size), layout.landmark_dtype),
        "keys": (shape, form.dtype),
        "values": (shape, form.dtype),
        "lengths": ((count,), torch.int64),
    }
    if form.dtype == torch.int8:
        wanted |= dict.fromkeys(
            ("key_scales", "value_scales"), ((count, form.kv_heads), torch.float32)
        )
    for name, (size, dtype) in wanted.items():
        found = tensors.get(name)
        if found is None or tuple(found.shape) != size or found.dtype != dtype:
            raise MemoryFormatError(f"{path}: {name} should be {size} in {dtype}")
    lengths = tensors["lengths"]
    if count and not 1 <= int(lengths.min()) <= int(lengths.max()) <= form.chunk_size:
        raise MemoryFormatError(f"{path}: lengths should be 1 to {form.chunk_size}")
