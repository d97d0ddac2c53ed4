"""What to do about a damaged memory folder."""

from __future__ import annotations

from pathlib import Path

from drt.memory.disk import DiskMemory
from drt.memory.files import FolderLock, MemoryFormatError
from drt.memory.journal import Journal
from drt.memory.manifest import Manifest


def repair_memory(folder: str | Path) -> int:
    """Cut a memory folder back to the chunks before its first damaged one, for good.

    A power cut can damage what was appended since the last `commit()`; a killed process cannot.

    Args:
        folder: of the memory; the manifest and the journal must be there.

    Returns:
        The number of chunks that are left; all of them are intact.

    Raises:
        MemoryFormatError: no manifest, or no journal.
        BlockingIOError: somebody is writing to it.
    """
    folder = Path(folder)
    Manifest.read(folder)
    lock = FolderLock(folder)
    try:
        journal = Journal(folder, mode="write")
        while True:
            try:
                with DiskMemory.open(folder) as memory:
                    memory.verify()
                    return len(memory)
            except MemoryFormatError as error:
                if error.chunk is None:
                    raise
                journal.truncate(error.chunk)
                journal.sync()
    finally:
        lock.release()
