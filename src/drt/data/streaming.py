"""Texts of any size, piece by piece: files, folders, JSON lines, standard input."""

from __future__ import annotations

import codecs
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from drt.data.reading import check_distinct, is_rows, list_text_files, parse_row, unpacked

STDIN = "-"
PIECE_BYTES = 1 << 20


class TextPiece(NamedTuple):
    """A part of a text, never empty, in whole characters."""

    source: str
    """What the text is called: its file, or file:row."""
    start: int
    """Bytes of the text before this piece."""
    text: str
    """The piece."""
    is_last: bool
    """Whether the text ends with it."""


class TextInput(NamedTuple):
    """One file or stream to be read."""

    name: str
    """Its path as given, or "-" for standard input."""
    size: int | None
    """Bytes on disk; None for standard input."""


def list_inputs(paths: list[str]) -> list[TextInput]:
    """The files that are meant, folders opened up, in the order given and then by name.

    Raises:
        ValueError: a path that is not there, a folder without text, a .json file, or the same file
            twice.
    """
    inputs: list[TextInput] = []
    for path in paths:
        if path == STDIN:
            inputs.append(TextInput(STDIN, None))
            continue
        if not Path(path).exists():
            raise ValueError(f"there is no file or folder {path}")
        files = list_text_files(Path(path))
        inputs += [TextInput(str(file), file.stat().st_size) for file in files]
    check_distinct(Path(item.name) for item in inputs)
    return inputs


class InputStream:
    """The texts of one input, from a place on.

    Args:
        item: what to read.
        source: the text to begin with, as named by an earlier pass; None = the first one.
        start: bytes of that text to leave out; a place where an earlier pass began a piece.
    """

    def __init__(self, item: TextInput, *, source: str | None = None, start: int = 0) -> None:
        self.item = item
        self._source, self._start = source, start
        # Closed when the last piece has been taken.
        self._raw: Any = sys.stdin.buffer if item.name == STDIN else open(item.name, "rb")  # noqa: SIM115

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the file so far, as they are on disk."""
        # A pipe does not tell.
        return self._raw.tell() if self.item.name != STDIN and self._raw.seekable() else 0

    def __iter__(self) -> Iterator[TextPiece]:
        """The pieces in order.

        Raises:
            ValueError: bytes that are not UTF-8, a row without text, or a broken xz file.
        """
        name = self.item.name
        try:
            with unpacked(self._raw, Path(name)) as stream:
                if is_rows(Path(name)):
                    yield from self._rows(stream)
                else:
                    skip(stream, self._start)
                    yield from _pieces(stream.read, name, self._start)
        finally:
            if name != STDIN:
                self._raw.close()

    def _rows(self, stream: BinaryIO) -> Iterator[TextPiece]:
        name, waiting = self.item.name, self._source is not None
        for number, line in enumerate(stream, start=1):
            source = f"{name}:{number}"
            if not line.strip() or (waiting and source != self._source):
                continue
            _, text = parse_row(line, Path(name), number)
            start = self._start if waiting else 0
            waiting = False
            row = memoryview(text.encode())[start:]
            yield from _pieces(_reader(row), source, start)
        if waiting:
            raise ValueError(f"{name} ends before {self._source}, the place to go on from")


def skip(stream: BinaryIO, count: int) -> None:
    """Leave out bytes of a stream that may not be able to seek."""
    if count and stream.seekable() and not isinstance(stream, lzma.LZMAFile):
        here = stream.tell()
        skipped = min(stream.seek(0, 2) - here, count)
        stream.seek(here + skipped)
        count -= skipped
    while count:
        got = len(stream.read(min(count, PIECE_BYTES)))
        if not got:
            raise ValueError(f"the text ends {count} bytes before the place to go on from")
        count -= got


def _reader(data: memoryview) -> Callable[[int], bytes]:
    position = 0

    def read(count: int) -> bytes:
        nonlocal position
        part = bytes(data[position : position + count])
        position += len(part)
        return part

    return read


def _pieces(read: Callable[[int], bytes], source: str, start: int) -> Iterator[TextPiece]:
    """Cut a stream into pieces that end with a line, where there is one, and whole characters."""
    held = b""
    while True:
        # Always so many bytes from where a piece begins: a second pass cuts at the same places.
        data = held + read(PIECE_BYTES - len(held))
        following = b"" if len(data) < PIECE_BYTES else read(1)
        is_last = not following
        end = len(data) if is_last else _cut(data)
        text = _decode(data[:end], source, start)
        if text:
            yield TextPiece(source, start, text, is_last)
        if is_last:
            return
        held, start = data[end:] + following, start + end


def _cut(data: bytes) -> int:
    """Where a piece of these bytes may end."""
    line = data.rfind(b"\n") + 1
    if line:
        return line
    # No line end in a mebibyte: whole characters then.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data)
    return len(data) - len(decoder.getstate()[0])


def _decode(data: bytes, source: str, start: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = start + error.start
        raise ValueError(f"{source} is not UTF-8 text: {error.reason} at byte {place}") from error
