"""A slab whose records are in a file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drt.memory.files import BinaryFile, FileMode, MemoryFormatError
from drt.memory.journal import checksums
from drt.memory.slabs import EncodedChunks, Layout, Slab, Tier

_BLOCK_BYTES = 1 << 26


class DiskSlab(Slab):
    """Records in `records.<n>.bin`, read when gathered; landmarks in memory and in a file.

    Args:
        layout: of the memory.
        folder: of the memory.
        index: n.
        capacity: chunks of each pair of files.
        mode: whether its files are to be read, written, or made.
        verify: whether each read compares the checksum.

    Raises:
        MemoryFormatError: a file is not there and is not to be made.
    """

    def __init__(
        self,
        layout: Layout,
        folder: Path,
        index: int,
        *,
        capacity: int,
        mode: FileMode,
        verify: bool,
    ) -> None:
        super().__init__(layout, capacity)
        self.first = index * capacity
        self.verify_reads = verify
        self._checksums = np.empty(capacity, dtype=np.uint32)
        self._landmark_checksums = np.empty(capacity, dtype=np.uint32)
        self._landmark_bytes = layout.landmark_size * layout.landmark_dtype.itemsize
        self._landmark_dtype = layout.landmark_dtype
        self._records = BinaryFile(folder / f"records.{index}.bin", mode=mode, chunk=self.first)
        path = folder / f"landmarks.{index}.bin"
        self._landmarks = BinaryFile(path, mode=mode, chunk=self.first)

    def load(self, entries: np.ndarray) -> None:
        """Take in chunks that the journal names, behind those that are here.

        Raises:
            MemoryFormatError: a file is shorter than the journal says, or a landmark is damaged.
        """
        stop = self.filled + len(entries)
        self._check_size(self._records, self.record_bytes, stop)
        self._check_size(self._landmarks, self._landmark_bytes, stop)
        rows = self._read_landmarks(self.filled, entries["landmark"])
        landmarks = torch.from_numpy(rows).view(self._landmark_dtype)
        self.publish(EncodedChunks(landmarks, torch.empty(0), entries["length"]), entries)

    def write(self, chunks: EncodedChunks, landmarks: np.ndarray) -> None:
        """Write chunks behind the last one; they count once they are published.

        Args:
            chunks: with records in host memory.
            landmarks: (n, bytes) uint8.
        """
        try:
            records = chunks.records.numpy().reshape(-1)
            self._records.write(records.data, self.filled * self.record_bytes)
            target = self.filled * self._landmark_bytes
            self._landmarks.write(landmarks.reshape(-1).data, target)
        except OSError:
            self.trim()
            raise

    def trim(self) -> None:
        """Cut the files to what is published."""
        self._records.truncate(self.filled * self.record_bytes)
        self._landmarks.truncate(self.filled * self._landmark_bytes)

    def publish(self, chunks: EncodedChunks, entries: np.ndarray) -> None:
        """Take in chunks that are written and journalled."""
        place = slice(self.filled, self.filled + len(entries))
        self._checksums[place] = entries["record"]
        self._landmark_checksums[place] = entries["landmark"]
        self._publish(chunks.landmarks, chunks.lengths)

    def read(self, positions: np.ndarray, out: Tensor) -> None:
        """As `Slab.read`; neighbours are read together.

        Raises:
            MemoryFormatError: the file is cut short, or a record is damaged.
        """
        self._read(positions, out.numpy())
        if self.verify_reads:
            self._check(checksums(out.numpy()), positions)

    def verify(self, used: int) -> None:
        """Read everything of the first `used` chunks and compare checksums.

        Raises:
            MemoryFormatError: names the first damaged chunk.
        """
        size = max(_BLOCK_BYTES // self.record_bytes, 1)
        for start in range(0, used, size):
            positions = np.arange(start, min(start + size, used))
            self._read_landmarks(start, self._landmark_checksums[positions])
            rows = np.empty((len(positions), self.record_bytes), dtype=np.uint8)
            self._read(positions, rows)
            self._check(checksums(rows), positions)

    def sync(self) -> None:
        """Bring what is written to the medium."""
        self._records.sync()
        self._landmarks.sync()

    def num_bytes(self) -> dict[Tier, int]:
        """As `Slab.num_bytes`."""
        found = super().num_bytes()
        found["disk"] += self.filled * (self.record_bytes + self._landmark_bytes)
        return found

    def _check_size(self, file: BinaryFile, row_bytes: int, count: int) -> None:
        if file.size < count * row_bytes:
            first = self.first + file.size // row_bytes
            sizes = f"{file.size} of {count * row_bytes} bytes"
            raise MemoryFormatError(f"{file.path} is cut short: {sizes}", chunk=first)

    def _read(self, positions: np.ndarray, rows: np.ndarray) -> None:
        borders = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
        for start, stop in pairwise(borders):
            offset = int(positions[start]) * self.record_bytes
            self._records.read(rows[start:stop].reshape(-1).data, offset)

    def _check(self, found: np.ndarray, positions: np.ndarray) -> None:
        wrong = np.flatnonzero(found != self._checksums[positions])
        if len(wrong):
            self._damaged(self._records.path, int(positions[wrong[0]]))

    def _read_landmarks(self, start: int, wanted: np.ndarray) -> np.ndarray:
        """(n, bytes) uint8 landmarks from position `start` on that have these checksums."""
        rows = np.empty((len(wanted), self._landmark_bytes), dtype=np.uint8)
        self._landmarks.read(rows.reshape(-1).data, start * self._landmark_bytes)
        wrong = np.flatnonzero(checksums(rows) != wanted)
        if len(wrong):
            self._damaged(self._landmarks.path, start + int(wrong[0]))
        return rows

    def _damaged(self, path: Path, position: int) -> None:
        number = self.first + position
        raise MemoryFormatError(
            f"{path}: chunk {number} is damaged: its checksum is not the journal's", chunk=number
        )
