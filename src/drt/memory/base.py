"""What the memories of inference share: rows of slabs behind the interface."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from drt.memory.interface import Chunks
from drt.memory.records import STORAGE_DTYPES, RecordFormat
from drt.memory.rows import Row, places
from drt.memory.search import OVERFETCH, Best, Bounds, rescored, search_tiles
from drt.memory.slabs import EncodedChunks, Layout, RamSlab, Scan, Tier
from drt.precision import without_autocast
from drt.retrieval import Retrieval, retrieval_weights

if TYPE_CHECKING:
    from drt.memory.files import FsyncPolicy

# Slabs are as large as this many bytes of records, or hold this many chunks if that is less: few
# enough that searching them costs no more than reading their landmarks.
_SLAB_BYTES, _SLAB_CHUNKS = 1 << 29, 1 << 16

_BLOCK = 256


@dataclass(frozen=True)
class Options:
    """What a user chooses about a memory."""

    dtype: torch.dtype | None = None
    """Storage dtype of keys and values, one of `STORAGE_DTYPES`; None = as appended."""
    slab_size: int | None = None
    """Chunks of the largest slabs; the first ones are smaller. None = about 512 MiB of records."""
    landmark_dtype: torch.dtype = torch.float32
    """float32 or bfloat16."""
    scan: Scan = "float32"
    """"bfloat16" scans rounded copies for four times the chunks and ranks these in float32."""

    def __post_init__(self) -> None:
        if self.slab_size is not None and self.slab_size < 1:
            raise ValueError(f"slab_size must be at least 1, got {self.slab_size}")
        if self.dtype is not None and self.dtype not in STORAGE_DTYPES:
            raise ValueError(f"dtype must be one of {STORAGE_DTYPES}, got {self.dtype}")
        if self.landmark_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"landmark_dtype must be float32 or bfloat16: {self.landmark_dtype}")
        if self.scan not in ("float32", "bfloat16"):
            raise ValueError(f"scan must be 'float32' or 'bfloat16', got {self.scan!r}")


class InferenceMemory(ABC):
    """Rows of slabs: growing copies nothing, and neither do `fork` and `select_rows`.

    A context manager that closes the memory at its end. Chunks leave the autograd graph.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._layout: Layout | None = None
        self._rows: list[Row] = []
        self._closed = False

    @property
    def counts(self) -> tuple[int, ...]:
        """Chunks of each row; empty before the first append."""
        return tuple(row.count for row in self._rows)

    def __len__(self) -> int:
        """Chunks of all rows together."""
        return sum(row.count for row in self._rows)

    def append(
        self, landmarks: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None = None
    ) -> None:
        """As `ChunkMemory.append`.

        Raises:
            ValueError: shapes, devices or a number of rows that are not those of the first append,
                or lengths out of range.
        """
        self._check_open()
        chunks = _Appended(landmarks, keys, values, lengths)
        layout, rows = self._layout or self._new_layout(chunks), self._rows
        if keys.dtype != layout.compute_dtype:
            # A run of another precision goes on with the memory.
            keys, values = (x.to(layout.compute_dtype) for x in (keys, values))
            chunks = _Appended(landmarks, keys, values, lengths)
        chunks.check_against(layout, len(rows))
        if not rows:
            rows = [Row() for _ in range(landmarks.shape[0])]
        encoded = self._encode(chunks, layout)
        self._layout, self._rows = layout, rows
        for row, content in zip(rows, encoded, strict=True):
            self._append_row(row, content)

    def search(
        self, queries: Tensor, limits: Tensor, *, topk: int, firsts: Tensor | None = None
    ) -> Retrieval:
        """As `ChunkMemory.search`; the weights are float32.

        Raises:
            ValueError: shapes that are not those of the interface or of what was appended.
        """
        self._check_open()
        self._check_search(queries, limits, firsts, topk)
        if not self._rows or not queries.numel():
            shape = (*queries.shape[:2], topk)
            none = torch.full(shape, -1, dtype=torch.int64, device=queries.device)
            return retrieval_weights(none.float(), none)
        firsts = torch.zeros_like(limits) if firsts is None else firsts.clamp(min=0)
        # Autocast would rank rounded candidates by rounded scores.
        with torch.no_grad(), without_autocast(queries.device.type):
            scaled = queries.detach().float() / math.sqrt(queries.shape[-1])
            found = [
                self._search_row(row, scaled[b], firsts[b], limits[b], topk)
                for b, row in enumerate(self._rows)
            ]
            scores, indices = (torch.stack(x) for x in zip(*found, strict=True))
            return retrieval_weights(scores, indices)

    def gather(self, indices: Tensor) -> Chunks:
        """As `ChunkMemory.gather`: each chunk once, also when several rows share it.

        There is at least one chunk in the pool, of zeros when none is asked for.

        Raises:
            ValueError: an empty memory, or a chunk number out of range.
        """
        self._check_open()
        layout = self._layout
        if layout is None:
            raise ValueError("the memory is empty: there is nothing to gather")
        if indices.dim() != 3 or indices.shape[0] != len(self._rows):
            raise ValueError(f"indices must be ({len(self._rows)}, n, K), got {_shape(indices)}")
        flat = indices.reshape(len(self._rows), -1).cpu().numpy()
        keys = np.concatenate([row.keys(flat[b]) for b, row in enumerate(self._rows)])
        unique, local = np.unique(keys, return_inverse=True)
        if len(unique) and unique[0] < 0:
            unique, local = unique[1:], local - 1
        records, lengths = self._read(unique, layout)
        stored = layout.records.decode(
            records.to(layout.device, non_blocking=True), layout.compute_dtype
        )
        where = torch.from_numpy(local.reshape(tuple(indices.shape)))
        where = where.to(indices.device, non_blocking=True)
        full = bool((lengths == layout.records.chunk_size).all())
        sizes = torch.from_numpy(lengths).to(layout.device, non_blocking=True)
        return Chunks(*stored, None if full else sizes, where)

    def fork(self) -> InferenceMemory:
        """As `ChunkMemory.fork`: nothing is copied but lists of slabs."""
        return self.select_rows(range(len(self._rows)))

    def select_rows(self, rows: Sequence[int]) -> InferenceMemory:
        """As `ChunkMemory.select_rows`: reorders, repeats and drops rows without copying chunks.

        Raises:
            ValueError: a row that there is not.
        """
        self._check_open()
        other = self._sibling()
        if not self._rows:
            # Before the first append there may be any number of rows, all empty.
            return other
        if any(not 0 <= row < len(self._rows) for row in rows):
            raise ValueError(f"rows must be 0 to {len(self._rows) - 1}, got {list(rows)}")
        other._layout = self._layout
        other._rows = [self._rows[row].copy() for row in rows]
        return other

    def prefix(self, num_chunks: int) -> InferenceMemory:
        """A fork that knows only the first chunks of each row.

        Raises:
            ValueError: a negative number, or more than some row has.
        """
        if not 0 <= num_chunks <= min(self.counts, default=0):
            raise ValueError(f"num_chunks must be 0 to {min(self.counts, default=0)}: {num_chunks}")
        other = self.fork()
        other._rows = [row.prefix(num_chunks) for row in self._rows]
        return other

    def bytes_by_tier(self) -> dict[Tier, int]:
        """Bytes allocated on the "device", in the "host"'s memory and on "disk".

        What is on a CPU is the host's, landmarks too. Slabs that rows share count once; slabs that
        memories share count in each.
        """
        total: dict[Tier, int] = {"device": 0, "host": 0, "disk": 0}
        slabs = {view.slab.number: view.slab for row in self._rows for view in row.views}
        for slab in slabs.values():
            for tier, size in slab.num_bytes().items():
                total[tier] += size
        return total

    def save(
        self,
        folder: str | Path,
        *,
        fingerprint: Mapping[str, str],
        row: int = 0,
        slab_size: int | None = None,
        fsync: FsyncPolicy = "commit",
    ) -> None:
        """Write one row to a new folder that `DiskMemory.open` reads, bytes as they are stored.

        Until all of it is there the folder is no memory, and saving to it can begin anew.

        Args:
            folder: where; it must not hold a memory.
            fingerprint: what made the memory, as in `DiskMemory.create`.
            row: which row.
            slab_size: chunks per file; None = about 512 MiB of records.
            fsync: as in `DiskMemory.create`.

        Raises:
            ValueError: an empty memory, or a row that there is not.
            OSError: the folder cannot be written.
        """
        from drt.memory.disk import DiskMemory

        layout, blocks = self.blocks(row)
        with DiskMemory.create(
            folder,
            fingerprint=fingerprint,
            dtype=layout.records.dtype,
            landmark_dtype=layout.landmark_dtype,
            slab_size=slab_size,
            fsync=fsync,
        ) as target:
            target.append_encoded(layout, blocks)

    def blocks(self, row: int = 0, size: int = _BLOCK) -> tuple[Layout, Iterator[EncodedChunks]]:
        """The chunks of a row as they are stored, in order, up to `size` at a time.

        Raises:
            ValueError: an empty memory, or a row that there is not.
        """
        self._check_open()
        if self._layout is None:
            raise ValueError("the memory is empty: nothing says what its chunks look like")
        if not 0 <= row < len(self._rows):
            raise ValueError(f"row must be 0 to {len(self._rows) - 1}, got {row}")
        return self._layout, self._rows[row].blocks(size)

    def close(self) -> None:
        """Let go of everything; the memory cannot be used after. Forks can."""
        self._rows = []
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _sibling(self) -> InferenceMemory:
        """An empty memory for rows of this one."""

    @abstractmethod
    def _place(self, device: torch.device) -> torch.device:
        """Where the records are, given the model's device."""

    def _append_row(self, row: Row, chunks: EncodedChunks) -> None:
        row.append(chunks, self._new_slab, self.slab_size)

    @property
    def slab_size(self) -> int:
        """Chunks of the largest slabs; known from the first append on."""
        if self.options.slab_size is None:
            assert self._layout is not None
            fitting = _SLAB_BYTES // self._layout.records.record_bytes
            # A power of two, as capacities are that double.
            return min(1 << max(fitting, 1).bit_length() - 1, _SLAB_CHUNKS)
        return self.options.slab_size

    def _new_slab(self, capacity: int) -> RamSlab:
        assert self._layout is not None
        return RamSlab(self._layout, capacity, self._place(self._layout.device))

    def _new_layout(self, chunks: _Appended) -> Layout:
        _, _, size, heads, width = chunks.keys.shape
        return Layout(
            records=RecordFormat(size, heads, width, self.options.dtype or chunks.keys.dtype),
            landmark_size=chunks.landmarks.shape[-1],
            landmark_dtype=self.options.landmark_dtype,
            compute_dtype=chunks.keys.dtype,
            device=chunks.keys.device,
            scan=self.options.scan,
        )

    def _encode(self, chunks: _Appended, layout: Layout) -> list[EncodedChunks]:
        """The chunks of each row as they are stored, records where the slabs are."""
        batch, count = chunks.landmarks.shape[:2]
        lengths = chunks.content()
        flat = None if (lengths == layout.records.chunk_size).all() else lengths.reshape(-1)
        keys, values = (x.detach().flatten(0, 1) for x in (chunks.keys, chunks.values))
        with torch.no_grad():
            records = layout.records.encode(keys, values, flat)
            records = records.to(self._place(layout.device)).unflatten(0, (batch, count))
            landmarks = chunks.landmarks.detach().to(layout.landmark_dtype)
        counts = (lengths > 0).sum(1).tolist()
        parts = map(EncodedChunks, landmarks, records, lengths.numpy())
        return [part.part(0, used) for part, used in zip(parts, counts, strict=True)]

    def _search_row(
        self, row: Row, queries: Tensor, firsts: Tensor, limits: Tensor, topk: int
    ) -> Best:
        """Best chunks of one row for its (n, L) scaled queries."""
        assert self._layout is not None
        bounds = Bounds(firsts, limits.clamp(max=row.count))
        exact = [slab.landmarks[:used] for slab, used in row.views]
        if self._layout.scan == "float32":
            return search_tiles(exact, queries, bounds, topk=topk)
        rounded = [slab.scanned[:used] for slab, used in row.views]
        found = search_tiles(rounded, queries.bfloat16(), bounds, topk=OVERFETCH * topk)
        return rescored(exact, queries, found, topk=topk)

    def _read(self, keys: np.ndarray, layout: Layout) -> tuple[Tensor, np.ndarray]:
        """Records and lengths of (M,) ascending keys of `Row.keys`."""
        place = self._place(layout.device)
        shape = (max(len(keys), 1), layout.records.record_bytes)
        if not len(keys):
            records = torch.zeros(shape, dtype=torch.uint8, device=place)
            return records, np.array([layout.records.chunk_size])
        pinned = layout.device.type == "cuda" and place.type == "cpu"
        records = torch.empty(shape, dtype=torch.uint8, device=place, pin_memory=pinned)
        lengths, start = [], 0
        for slab, positions in places(self._rows, keys):
            stop = start + len(positions)
            slab.read(positions, records[start:stop])
            lengths.append(slab.lengths[positions])
            start = stop
        return records, np.concatenate(lengths)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the memory is closed")

    def _check_search(
        self, queries: Tensor, limits: Tensor, firsts: Tensor | None, topk: int
    ) -> None:
        if queries.dim() != 3:
            raise ValueError(f"queries must be (B, n, L), got {_shape(queries)}")
        if self._rows and queries.shape[0] != len(self._rows):
            raise ValueError(f"queries of {queries.shape[0]} rows; there are {len(self._rows)}")
        if self._layout and queries.shape[-1] != self._layout.landmark_size:
            size = self._layout.landmark_size
            raise ValueError(f"queries are {queries.shape[-1]} wide; landmarks are {size} wide")
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        for name, bound in (("limits", limits), ("firsts", firsts)):
            if bound is not None and bound.shape != queries.shape[:2]:
                raise ValueError(f"{name} must be (B, n), {_shape(queries)[:2]}: {_shape(bound)}")


@dataclass
class _Appended:
    """The arguments of `append`."""

    landmarks: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor | None

    def __post_init__(self) -> None:
        if self.keys.dim() != 5 or self.keys.shape != self.values.shape:
            shapes = f"{_shape(self.keys)} and {_shape(self.values)}"
            raise ValueError(f"keys and values must both be (B, n, S, G, D), got {shapes}")
        if self.landmarks.dim() != 3 or self.landmarks.shape[:2] != self.keys.shape[:2]:
            wanted = f"({self.keys.shape[0]}, {self.keys.shape[1]}, L)"
            raise ValueError(f"landmarks must be {wanted}, got {_shape(self.landmarks)}")
        dtypes = [x.dtype for x in (self.landmarks, self.keys, self.values)]
        if dtypes[1] != dtypes[2] or not all(dtype.is_floating_point for dtype in dtypes):
            raise ValueError(f"landmarks, keys, values must be floating point, got {dtypes}")
        if self.lengths is not None:
            self._check_lengths(self.lengths)

    def _check_lengths(self, lengths: Tensor) -> None:
        if lengths.shape != self.keys.shape[:2]:
            raise ValueError(f"lengths must be {_shape(self.keys)[:2]}, got {_shape(lengths)}")
        size = self.keys.shape[2]
        if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > size):
            raise ValueError(f"lengths must be 0 to {size}, got {lengths.tolist()}")
        if bool(((lengths[:, 1:] > 0) & (lengths[:, :-1] == 0)).any()):
            raise ValueError(f"a chunk after one of length 0: {lengths.tolist()}")

    def check_against(self, layout: Layout, num_rows: int) -> None:
        """Raise ValueError unless these go with what a memory holds."""
        _, _, size, heads, width = self.keys.shape
        records = layout.records
        found = (size, heads, width, self.landmarks.shape[-1])
        wanted = (records.chunk_size, records.kv_heads, records.head_dim, layout.landmark_size)
        if found != wanted:
            raise ValueError(f"chunks of sizes (S, G, D, L) = {found}; the memory has {wanted}")
        if self.keys.device != layout.device:
            raise ValueError(f"keys on {self.keys.device}; the memory is for {layout.device}")
        if num_rows and self.keys.shape[0] != num_rows:
            raise ValueError(f"chunks of {self.keys.shape[0]} rows; there are {num_rows}")

    def content(self) -> Tensor:
        """(B, n) int64 lengths."""
        if self.lengths is None:
            return torch.full(self.keys.shape[:2], self.keys.shape[2])
        return self.lengths.to(device="cpu", dtype=torch.int64)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
