"""Slabs: where a run of chunks of one row's history is kept. Append-only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from drt.memory.records import RecordFormat

Tier = Literal["device", "host", "disk"]
Scan = Literal["float32", "bfloat16"]

_numbers = count()


@dataclass(frozen=True)
class Layout:
    """What all chunks of a memory have in common, known since its first append."""

    records: RecordFormat
    """How keys and values are stored."""
    landmark_size: int
    """Width of a landmark L."""
    landmark_dtype: torch.dtype
    """float32 or bfloat16."""
    compute_dtype: torch.dtype
    """Of the keys and values that are appended and gathered."""
    device: torch.device
    """Where landmarks stay and gathered chunks go."""
    scan: Scan
    """In what landmarks are searched."""


class EncodedChunks(NamedTuple):
    """n chunks as they are stored."""

    landmarks: Tensor
    """(n, L) in the landmark dtype, on the layout's device."""
    records: Tensor
    """(n, R) uint8."""
    lengths: np.ndarray
    """(n,) int64 content tokens, 1 to S."""

    def part(self, start: int, stop: int) -> EncodedChunks:
        """Chunks start to stop - 1."""
        landmarks, records, lengths = self
        return EncodedChunks(landmarks[start:stop], records[start:stop], lengths[start:stop])


class Slab(ABC):
    """Room for `capacity` chunks; the first `filled` are written and never change.

    Landmarks and lengths are in memory; where the records are is the subclass's affair.
    """

    def __init__(self, layout: Layout, capacity: int) -> None:
        self.number = next(_numbers)
        self.capacity = capacity
        self.filled = 0
        self.record_bytes = layout.records.record_bytes
        self.lengths = np.empty(capacity, dtype=np.int64)
        shape = (capacity, layout.landmark_size)
        self.landmarks = allocate(shape, layout.landmark_dtype, layout.device)
        self._copy: Tensor | None = None
        if layout.scan == "bfloat16" and layout.landmark_dtype != torch.bfloat16:
            self._copy = allocate(shape, torch.bfloat16, layout.device)

    @property
    def scanned(self) -> Tensor:
        """(capacity, L): the landmarks in the dtype they are scanned in."""
        return self.landmarks if self._copy is None else self._copy

    @abstractmethod
    def read(self, positions: np.ndarray, out: Tensor) -> None:
        """Copy the records at ascending `positions` (m,) to `out` (m, R) uint8."""

    def num_bytes(self) -> dict[Tier, int]:
        """Bytes allocated, by where they are."""
        found: dict[Tier, int] = {"device": 0, "host": 0, "disk": 0}
        for tensor in (self.landmarks, self._copy):
            if tensor is not None:
                found[tier(tensor)] += tensor.nbytes
        return found

    def _publish(self, landmarks: Tensor, lengths: np.ndarray) -> None:
        """Take in the landmarks and lengths of chunks whose records are written."""
        place = slice(self.filled, self.filled + len(lengths))
        self.landmarks[place] = landmarks
        if self._copy is not None:
            self._copy[place] = landmarks
        self.lengths[place] = lengths
        self.filled = place.stop


class RamSlab(Slab):
    """A slab whose records are a tensor, on the model's device or in host memory.

    Args:
        layout: of the memory.
        capacity: chunks.
        place: device of the records.
    """

    def __init__(self, layout: Layout, capacity: int, place: torch.device) -> None:
        super().__init__(layout, capacity)
        # Pinned memory is what a GPU reads and writes at full speed.
        pinned = layout.device.type == "cuda" and place.type == "cpu"
        shape = (capacity, layout.records.record_bytes)
        self.records = allocate(shape, torch.uint8, place, pinned=pinned)

    def append(self, chunks: EncodedChunks) -> None:
        """Write chunks behind the last one; there must be room."""
        stop = self.filled + len(chunks.lengths)
        assert stop <= self.capacity
        self.records[self.filled : stop] = chunks.records
        self._publish(chunks.landmarks, chunks.lengths)

    def read(self, positions: np.ndarray, out: Tensor) -> None:
        """As `Slab.read`."""
        index = torch.from_numpy(positions).to(self.records.device, non_blocking=True)
        # Records are whole words, and words are copied faster than bytes.
        words = self.records.view(torch.int64)
        torch.index_select(words, 0, index, out=out.view(torch.int64))

    def num_bytes(self) -> dict[Tier, int]:
        """As `Slab.num_bytes`."""
        found = super().num_bytes()
        found[tier(self.records)] += self.records.nbytes
        return found


def tier(tensor: Tensor) -> Tier:
    """Where a tensor is."""
    return "host" if tensor.device.type == "cpu" else "device"


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, pinned: bool = False
) -> Tensor:
    """Uninitialized memory that may be written in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
