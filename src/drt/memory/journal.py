"""The journal of a memory folder: a chunk exists when its entry is intact."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from drt.memory.files import BinaryFile, FileMode, MemoryFormatError

ENTRY = np.dtype(
    [("number", "<u8"), ("length", "<u4"), ("landmark", "<u4"), ("record", "<u4"), ("own", "<u4")]
)
"""Chunk number, content tokens, and CRC-32 of the landmark, of the record, and of this entry."""

_CHECKED_BYTES = ENTRY.itemsize - 4


def make_entries(
    first: int, lengths: np.ndarray, landmarks: np.ndarray, records: np.ndarray
) -> np.ndarray:
    """Entries of chunks `first` onwards.

    Args:
        first: number of the first chunk.
        lengths: (n,) content tokens.
        landmarks: (n, bytes) uint8.
        records: (n, R) uint8.
    """
    entries = np.empty(len(lengths), dtype=ENTRY)
    entries["number"] = np.arange(first, first + len(lengths))
    entries["length"] = lengths
    entries["landmark"] = checksums(landmarks)
    entries["record"] = checksums(records)
    entries["own"] = _own_checksums(entries)
    return entries


def checksums(rows: np.ndarray) -> np.ndarray:
    """(n,) CRC-32 of each row of (n, bytes) uint8."""
    return np.fromiter(map(zlib.crc32, rows), dtype=np.uint32, count=len(rows))


def _own_checksums(entries: np.ndarray) -> np.ndarray:
    content = entries.view(np.uint8).reshape(len(entries), ENTRY.itemsize)
    return checksums(np.ascontiguousarray(content[:, :_CHECKED_BYTES]))


class Journal:
    """Entries behind one another in `journal.bin`.

    Args:
        folder: of the memory.
        mode: whether it is to be read, written, or made anew.

    Raises:
        MemoryFormatError: it is not there and is not to be made.
    """

    def __init__(self, folder: Path, *, mode: FileMode) -> None:
        self._file = BinaryFile(folder / "journal.bin", mode=mode)
        if mode == "make":
            self._file.truncate(0)
        self.count = 0

    def read(self) -> np.ndarray:
        """The intact entries from the last one read onwards.

        Raises:
            MemoryFormatError: entries that were read are gone, or a damaged one stands before
                intact ones. A damaged end is what a killed writer leaves, and is not returned.
        """
        path, start = self._file.path, self.count
        available = self._file.size // ENTRY.itemsize - start
        if available < 0:
            raise MemoryFormatError(f"{path}: its writer has cut it to {start + available} chunks")
        entries = np.empty(available, dtype=ENTRY)
        self._file.read(_bytes(entries), start * ENTRY.itemsize)
        numbers = np.arange(start, start + available)
        intact = (entries["own"] == _own_checksums(entries)) & (entries["number"] == numbers)
        good = available if intact.all() else int(intact.argmin())
        if intact[good:].any():
            number = start + good
            message = f"{path}: entry {number} is damaged, and intact ones follow it"
            raise MemoryFormatError(message, chunk=number)
        self.count += good
        return entries[:good]

    def append(self, entries: np.ndarray, *, sync: bool) -> None:
        """Write entries, all or none; `sync` brings them to the medium."""
        try:
            self._file.write(_bytes(entries), self.count * ENTRY.itemsize)
            if sync:
                self._file.sync()
        except OSError:
            self.truncate(self.count)
            raise
        self.count += len(entries)

    def truncate(self, count: int) -> None:
        """Keep the first `count` entries."""
        self._file.truncate(count * ENTRY.itemsize)
        self.count = count

    def sync(self) -> None:
        """Bring the entries to the medium."""
        self._file.sync()


def _bytes(entries: np.ndarray) -> memoryview:
    return entries.view(np.uint8).data
