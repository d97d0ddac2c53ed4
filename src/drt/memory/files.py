"""The files of a memory folder: the lock, and reads and writes in full."""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

FsyncPolicy = Literal["commit", "never", "always"]
""""always": every append is on the medium when it returns; "commit": at `commit()` and `close()`;
"never": when the operating system likes. A killed process loses nothing in any of the three."""

FileMode = Literal["read", "write", "make"]
""""write" and "make" read too; "make" is content with a file that is there."""

_FLAGS = {"read": os.O_RDONLY, "write": os.O_RDWR, "make": os.O_RDWR | os.O_CREAT}

FSYNC_POLICIES = ("commit", "never", "always")


class MemoryFormatError(ValueError):
    """A memory folder that is damaged, or not what was asked for.

    Args:
        message: names the file and what is wrong with it.
        chunk: number of the damaged chunk, if it is one.
    """

    def __init__(self, message: str, *, chunk: int | None = None) -> None:
        super().__init__(message)
        self.chunk = chunk


def sync_folder(folder: Path) -> None:
    """Bring the names of files in a folder to the medium."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Inside, an OSError of writing says which file it is of."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where there is none, and bring their names to the medium.

    Raises:
        FileExistsError: a file is where a folder is to be.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        with named_errors(each):
            sync_folder(each.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there in full or as it was, under `NAME.new` until then."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


class BinaryFile:
    """A file read and written at positions, in full or with an error that says what is wrong.

    It is closed when the last reference to it goes.

    Args:
        path: the file.
        mode: what it is opened for.
        chunk: the first one that the file holds, for the error.

    Raises:
        MemoryFormatError: it is not there and is not to be made.
    """

    def __init__(self, path: Path, *, mode: FileMode, chunk: int | None = None) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, _FLAGS[mode], 0o644)
        except FileNotFoundError as error:
            raise MemoryFormatError(f"{path} is missing", chunk=chunk) from error
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._descriptor).st_size

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer of bytes; MemoryFormatError if the file ends before."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            if count == 0:
                wanted = offset + len(buffer)
                raise MemoryFormatError(f"{self.path} is cut short: {self.size} of {wanted} bytes")
            done += count

    def write(self, data: memoryview, offset: int) -> None:
        """Write all bytes; OSError if that cannot be done."""
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._descriptor, data[done:], offset + done)
            except OSError as error:
                what = f"cannot write {len(data)} bytes: {error.strerror}"
                kept = "what was appended before is kept; appending can go on once there is room"
                raise OSError(error.errno, f"{what}; {kept}", str(self.path)) from error

    def truncate(self, size: int) -> None:
        """Cut the file to so many bytes, if it is longer."""
        if self.size > size:
            os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        """Bring the content to the medium."""
        os.fsync(self._descriptor)


class FolderLock:
    """The right to write to a folder; it ends with `release` or with the process.

    Raises:
        BlockingIOError: somebody else holds it.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            message = f"another writer has the memory open (process {holder})"
            raise BlockingIOError(error.errno, message, str(folder)) from error
        # On a full disk the lock holds all the same, only nameless.
        with contextlib.suppress(OSError):
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n")
            self._file.flush()

    def release(self) -> None:
        """Let another writer in."""
        with contextlib.suppress(OSError):
            self._file.close()
