"""The memory that outlives the process: one row in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drt.memory.base import InferenceMemory, Options
from drt.memory.disk_slab import DiskSlab
from drt.memory.files import (
    FSYNC_POLICIES,
    FileMode,
    FolderLock,
    FsyncPolicy,
    make_folder,
    sync_folder,
)
from drt.memory.journal import Journal, make_entries
from drt.memory.manifest import FORMAT, VERSION, Manifest
from drt.memory.ram import HostMemory
from drt.memory.rows import Row
from drt.memory.slabs import EncodedChunks, Layout, Scan


class DiskMemory(InferenceMemory):
    """One row of chunks in a folder; landmarks are in memory too, records are read when gathered.

    Made by `create` or `open`. One process may write, any number may read meanwhile. What a memory
    opened for reading appends stays in its host memory, and so does what forks append: asking a
    question never writes to the folder. A fork reads the folder's chunks as long as these exist.
    """

    def __init__(self, folder: Path, options: Options, *, verify_reads: bool) -> None:
        super().__init__(options)
        self.folder = folder
        self.verify_reads = verify_reads
        self.fingerprint: Mapping[str, str] = {}
        self.fsync: FsyncPolicy = "commit"
        self._lock: FolderLock | None = None
        self._journal: Journal | None = None
        self._written: list[DiskSlab] = []

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        fingerprint: Mapping[str, str],
        dtype: torch.dtype | None = None,
        landmark_dtype: torch.dtype = torch.float32,
        slab_size: int | None = None,
        scan: Scan = "float32",
        fsync: FsyncPolicy = "commit",
        verify_reads: bool = True,
    ) -> DiskMemory:
        """A new memory in a folder, to be written; files appear with the first append.

        Args:
            folder: where; made if need be.
            fingerprint: what made the memory, say {"model": ..., "tokenizer": ...}.
            dtype: storage dtype of keys and values; None = as appended.
            landmark_dtype: float32 or bfloat16.
            slab_size: chunks per file; None = about 512 MiB of records.
            scan: as in `DeviceMemory`.
            fsync: when appended chunks are forced to the medium: "always" by the append, "commit"
                by `commit()` and `close()`, "never". Only a power cut makes a difference.
            verify_reads: compare a checksum with every record that is gathered.

        Raises:
            ValueError: the folder holds a memory, or an option that there is not.
            BlockingIOError: somebody else is writing to it.
        """
        _check_fsync(fsync)
        folder = Path(folder)
        options = Options(dtype, slab_size, landmark_dtype, scan)
        memory = cls(folder, options, verify_reads=verify_reads)
        make_folder(folder)
        memory._lock, memory.fsync = FolderLock(folder), fsync
        if (folder / "manifest.json").exists():
            memory._lock.release()
            raise ValueError(f"{folder} holds a memory already: open it with writable=True")
        memory.fingerprint = dict(fingerprint)
        return memory

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        writable: bool = False,
        fingerprint: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | None = None,
        scan: Scan = "float32",
        fsync: FsyncPolicy = "commit",
        verify_reads: bool = True,
    ) -> DiskMemory:
        """The memory in a folder, up to the last chunk that was written in full.

        Args:
            folder: where.
            writable: append to the folder.
            fingerprint: what the folder's fingerprint must say, for the keys given here.
            device: the model's: where landmarks are kept and gathered chunks go.
            compute_dtype: dtype of what is gathered and appended; None = as first appended.
            scan: as in `DeviceMemory`.
            fsync: as in `create`.
            verify_reads: compare a checksum with every record that is gathered.

        Raises:
            MemoryFormatError: not a memory, one of another version or fingerprint, or damaged.
            BlockingIOError: it is to be written and somebody else is writing.
        """
        _check_fsync(fsync)
        folder = Path(folder)
        manifest = Manifest.read(folder)
        manifest.check_fingerprint(folder, fingerprint or {})
        place = torch.empty(0, device=device).device
        layout = manifest.layout(place, compute_dtype=compute_dtype, scan=scan)
        options = Options(layout.records.dtype, manifest.slab_size, layout.landmark_dtype, scan)
        memory = cls(folder, options, verify_reads=verify_reads)
        memory.fingerprint, memory.fsync, memory._layout = manifest.fingerprint, fsync, layout
        memory._start(writable)
        return memory

    @property
    def writable(self) -> bool:
        """Whether `append` writes to the folder."""
        return self._lock is not None

    def append(
        self, landmarks: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None = None
    ) -> None:
        """As `ChunkMemory.append`, of one row: all n chunks are in the journal, or none.

        Raises:
            ValueError: as `InferenceMemory.append`, or more rows than one.
            OSError: the disk is full or fails; once there is room, appending can go on.
        """
        if landmarks.shape[0] != 1:
            raise ValueError(f"a DiskMemory holds one row, a folder for each; got {len(landmarks)}")
        super().append(landmarks, keys, values, lengths)

    def append_encoded(self, layout: Layout, blocks: Iterable[EncodedChunks]) -> None:
        """Fill a new memory with chunks as another stores them; one of no chunks is one too.

        The manifest is written last: a folder that was left before that is no memory. After an
        error the files are gone and the memory is closed.

        Raises:
            ValueError: opened for reading, or the memory has chunks already.
            OSError: the disk is full or fails.
        """
        self._check_writable()
        if self._journal is not None:
            raise ValueError(f"{self.folder} has chunks already: only a new memory can be filled")
        self._layout, self._rows = layout, [Row()]
        try:
            self._journal = self._make_journal()
            for chunks in blocks:
                self._append_row(self._rows[0], chunks)
            self.commit()
            self._manifest(layout).write(self.folder)
        except BaseException:
            for name in ("manifest.json", "manifest.json.new", "journal.bin"):
                (self.folder / name).unlink(missing_ok=True)
            self._drop_unused_files(0)
            # There is nothing to commit.
            self._journal = None
            self.close()
            raise

    def commit(self) -> None:
        """Bring all that was appended to the medium, unless fsync is "never"."""
        self._check_writable()
        if self.fsync == "never" or self._journal is None:
            return
        for slab in self._written:
            slab.sync()
        self._written = []
        self._journal.sync()
        sync_folder(self.folder)

    def truncate(self, num_chunks: int) -> None:
        """Forget the chunks from `num_chunks` on, in the folder too.

        Forks that hold them can still search them; gathering them fails.

        Raises:
            ValueError: opened for reading, or fewer chunks than that.
        """
        self._check_writable()
        if not 0 <= num_chunks <= len(self):
            raise ValueError(f"num_chunks must be 0 to {len(self)}, got {num_chunks}")
        if self._journal is None or num_chunks == len(self):
            return
        if self.fsync != "never":
            # The slabs that are cut are opened anew, and nobody would remember to sync them.
            for slab in self._written:
                slab.sync()
        # The journal first: a chunk without an entry is no chunk, an entry without one is damage.
        self._journal.truncate(num_chunks)
        if self.fsync != "never":
            self._journal.sync()
        whole = num_chunks // self.slab_size
        self._rows = [Row(self._rows[0].views[:whole])]
        self._written = [slab for slab in self._written if slab.first + slab.filled <= num_chunks]
        self._journal.count = whole * self.slab_size
        self._load()
        self._drop_unused_files(-(-num_chunks // self.slab_size))

    def refresh(self) -> int:
        """See what the writer has added since; the number of new chunks.

        Raises:
            ValueError: this memory has chunks of its own.
            MemoryFormatError: the writer has truncated the folder, or it is damaged.
        """
        self._check_open()
        if self.writable or self._journal is None:
            return 0
        if len(self) > self._journal.count:
            raise ValueError("the memory has chunks of its own behind the folder's: open it anew")
        before = len(self)
        self._load()
        return len(self) - before

    def verify(self) -> None:
        """Read every chunk of the folder and compare all checksums.

        Raises:
            MemoryFormatError: names the first damaged chunk and its file; `chunk` is its number.
        """
        self._check_open()
        for slab, used in self._disk_views():
            slab.verify(used)

    def info(self) -> dict[str, Any]:
        """What there is to say about the folder: sizes, dtypes, counts, bytes."""
        self._check_open()
        chunks = sum(used for _, used in self._disk_views())
        tokens = sum(int(slab.lengths[:used].sum()) for slab, used in self._disk_views())
        found: dict[str, Any] = {"folder": str(self.folder), "writable": self.writable}
        found |= {"format": FORMAT, "version": VERSION, "fingerprint": dict(self.fingerprint)}
        if self._layout is not None:
            found |= self._manifest(self._layout).content()
        return found | {"chunks": chunks, "tokens": tokens, "bytes": self.bytes_by_tier()}

    def close(self) -> None:
        """Commit, and let another writer in. Forks go on reading."""
        if self._closed:
            return
        try:
            if self.writable:
                self.commit()
        finally:
            super().close()
            self._journal, self._written = None, []
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _sibling(self) -> HostMemory:
        return HostMemory(**vars(self.options))

    def _place(self, device: torch.device) -> torch.device:
        return torch.device("cpu")

    def _append_row(self, row: Row, chunks: EncodedChunks) -> None:
        if not self.writable:
            super()._append_row(row, chunks)
        else:
            self._write(row, chunks)

    def _write(self, row: Row, chunks: EncodedChunks) -> None:
        """Records, landmarks, then the journal: all chunks or none."""
        self._journal = self._journal or self._make_files()
        landmarks = _landmark_bytes(chunks)
        entries = make_entries(row.count, chunks.lengths, landmarks, chunks.records.numpy())
        parts = list(self._parts(row, len(entries)))
        for slab, part in parts:
            slab.write(chunks.part(part.start, part.stop), landmarks[part])
            if self.fsync == "always":
                slab.sync()
        if self.fsync == "always" and any(slab.filled == 0 for slab, _ in parts):
            # The names of new files.
            sync_folder(self.folder)
        self._journal.append(entries, sync=self.fsync == "always")
        for slab, part in parts:
            slab.publish(chunks.part(part.start, part.stop), entries[part])
            if slab.filled == part.stop - part.start:
                row.add(slab, 0)
            row.extend(part.stop - part.start)
            if slab not in self._written:
                self._written.append(slab)

    def _parts(self, row: Row, total: int) -> Iterator[tuple[DiskSlab, slice]]:
        """Which of `total` new chunks go to which slab, new ones as needed."""
        size, done = self.slab_size, 0
        while done < total:
            index, used = divmod(row.count + done, size)
            last = row.views[-1].slab if used else self._open_slab(index, "make")
            assert isinstance(last, DiskSlab)
            stop = min(total, done + size - used)
            yield last, slice(done, stop)
            done = stop

    def _open_slab(self, index: int, mode: FileMode) -> DiskSlab:
        assert self._layout is not None
        capacity, verify = self.slab_size, self.verify_reads
        return DiskSlab(
            self._layout, self.folder, index, capacity=capacity, mode=mode, verify=verify
        )

    def _make_files(self) -> Journal:
        assert self._layout is not None
        journal = self._make_journal()
        self._manifest(self._layout).write(self.folder)
        return journal

    def _make_journal(self) -> Journal:
        # Of a memory that was killed before it was one.
        self._drop_unused_files(0)
        return Journal(self.folder, mode="make")

    def _manifest(self, layout: Layout) -> Manifest:
        size = self.slab_size
        return Manifest.of(layout, slab_size=size, fingerprint=self.fingerprint)

    def _start(self, writable: bool) -> None:
        """Read the journal and the landmarks; for a writer, cut off what a killed one left."""
        if writable:
            self._lock = FolderLock(self.folder)
        try:
            self._journal = Journal(self.folder, mode="write" if writable else "read")
            self._rows = [Row()]
            self._load()
            if writable:
                self._journal.truncate(self._journal.count)
                # Who wrote before may have died without a commit; ours vouches for all chunks.
                self._written = [slab for slab, _ in self._disk_views()]
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    def _load(self) -> None:
        """Take in the journal's entries behind what is here."""
        assert self._journal is not None
        row, size = self._rows[0], self.slab_size
        mode: FileMode = "write" if self.writable else "read"
        entries = self._journal.read()
        while len(entries):
            index, used = divmod(row.count, size)
            part, entries = entries[: size - used], entries[size - used :]
            slab = row.views[-1].slab if used else self._open_slab(index, mode)
            assert isinstance(slab, DiskSlab)
            slab.load(part)
            if not used:
                row.add(slab, 0)
            row.extend(len(part))

    def _drop_unused_files(self, first: int) -> None:
        while any(
            (self.folder / f"{name}.{first}.bin").exists() for name in ("records", "landmarks")
        ):
            for name in ("records", "landmarks"):
                (self.folder / f"{name}.{first}.bin").unlink(missing_ok=True)
            first += 1

    def _disk_views(self) -> Iterator[tuple[DiskSlab, int]]:
        for row in self._rows:
            for slab, used in row.views:
                if isinstance(slab, DiskSlab):
                    yield slab, used

    def _check_writable(self) -> None:
        self._check_open()
        if not self.writable:
            raise ValueError(f"{self.folder} is open for reading: open it with writable=True")


def _landmark_bytes(chunks: EncodedChunks) -> np.ndarray:
    """(n, bytes) uint8."""
    return chunks.landmarks.cpu().contiguous().view(torch.uint8).numpy()


def _check_fsync(fsync: str) -> None:
    if fsync not in FSYNC_POLICIES:
        raise ValueError(f"fsync must be one of {FSYNC_POLICIES}, got {fsync!r}")
