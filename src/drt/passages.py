"""What was read, beside a memory: its tokens, and where in which source each chunk stood.

`tokens.bin` holds a uint32 a token, `chunks.bin` a fixed record a chunk, `sources.jsonl` a line a
source. All three only grow; what stands behind the counts that a saved state names is dropped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from drt.memory.files import named_errors

TOKENS_FILE, CHUNKS_FILE, SOURCES_FILE = "tokens.bin", "chunks.bin", "sources.jsonl"
_TOKEN = np.dtype("<u4")
_CHUNK = np.dtype(
    [("token", "<i8"), ("start", "<i8"), ("end", "<i8"), ("length", "<i4"), ("source", "<i4")]
)


class Passage(NamedTuple):
    """A chunk as text of a source."""

    source: str
    """File, or file:row."""
    start: int
    """Byte of the source's text at which the chunk begins."""
    end: int
    """Byte at which it ends."""
    token_ids: np.ndarray
    """(n,) its tokens."""


class PassageLog:
    """The passages of one folder; open for writing or for reading.

    Args:
        folder: where the memory is.
        writable: whether to append.
    """

    def __init__(self, folder: Path, *, writable: bool = False) -> None:
        self.folder = folder
        self._modes = "a+b" if writable else "rb"
        if not writable and not (folder / CHUNKS_FILE).is_file():
            raise ValueError(f"{folder} holds no passages: it was not made by drt read")
        # Kept open as long as the log is.
        self._tokens = (folder / TOKENS_FILE).open(self._modes)
        self._chunks = (folder / CHUNKS_FILE).open(self._modes)
        self._sources = (folder / SOURCES_FILE).open(self._modes)

        # Of the sources, as far as passages have been asked for.
        self._names: list[str] = []

    @property
    def num_tokens(self) -> int:
        """Tokens in the log."""
        return os.fstat(self._tokens.fileno()).st_size // _TOKEN.itemsize

    @property
    def num_chunks(self) -> int:
        """Chunks in the log."""
        return os.fstat(self._chunks.fileno()).st_size // _CHUNK.itemsize

    def sources(self) -> list[str]:
        """The names of all sources."""
        self._sources.flush()
        try:
            return [json.loads(line)["name"] for line in self._lines()]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / SOURCES_FILE} is damaged: {error}") from error

    def add_source(self, name: str) -> None:
        """Begin a source."""
        self._write(self._sources, (json.dumps({"name": name}) + "\n").encode())

    def add_tokens(self, token_ids: np.ndarray) -> None:
        """Append (n,) tokens."""
        self._write(self._tokens, token_ids.astype(_TOKEN).tobytes())

    def add_chunk(self, *, token: int, length: int, start: int, end: int, source: int) -> None:
        """Append a chunk.

        Args:
            token: number of its first token in the log.
            length: its tokens.
            start: byte of the source's text at which it begins.
            end: byte at which it ends.
            source: number of the source.
        """
        record = np.array((token, start, end, length, source), dtype=_CHUNK)
        self._write(self._chunks, record.tobytes())

    def _write(self, file: Any, data: bytes) -> None:
        with named_errors(Path(file.name)):
            file.write(data)

    def commit(self) -> None:
        """Bring everything to the medium."""
        for file in (self._tokens, self._chunks, self._sources):
            with named_errors(Path(file.name)):
                file.flush()
                os.fsync(file.fileno())

    def check_holds(self, *, num_tokens: int, num_chunks: int, num_sources: int) -> None:
        """Raise ValueError if the log is shorter than the state that it goes with."""
        if num_tokens > self.num_tokens or num_chunks > self.num_chunks:
            raise ValueError(
                f"{self.folder} logs {self.num_tokens} tokens and {self.num_chunks} chunks, its "
                f"state has {num_tokens} and {num_chunks}: {TOKENS_FILE} or {CHUNKS_FILE} was cut"
            )
        found = len(self._lines())
        if num_sources > found:
            raise ValueError(
                f"{self.folder} logs {found} sources, its state has {num_sources}: "
                f"{SOURCES_FILE} was cut"
            )

    def _lines(self) -> list[bytes]:
        """The lines of the sources; what follows the last line end is no whole line."""
        return (self.folder / SOURCES_FILE).read_bytes().split(b"\n")[:-1]

    def truncate(self, *, num_tokens: int, num_chunks: int, num_sources: int) -> None:
        """Drop what stands behind these counts.

        Raises:
            ValueError: the log is shorter.
        """
        self.check_holds(num_tokens=num_tokens, num_chunks=num_chunks, num_sources=num_sources)
        lines = self._lines()[:num_sources]
        self._tokens.truncate(num_tokens * _TOKEN.itemsize)
        self._chunks.truncate(num_chunks * _CHUNK.itemsize)
        self._sources.truncate(sum(len(line) + 1 for line in lines))

    def passage(self, chunk: int) -> Passage:
        """The text of a chunk.

        Raises:
            ValueError: the log has none.
        """
        record = self._record(chunk)
        size = _TOKEN.itemsize
        count, first = int(record["length"]) * size, int(record["token"]) * size
        ids = np.frombuffer(os.pread(self._tokens.fileno(), count, first), _TOKEN)
        if len(self._names) <= int(record["source"]):
            self._names = self.sources()
        if len(ids) != int(record["length"]) or len(self._names) <= int(record["source"]):
            raise ValueError(
                f"{self.folder} has no text of chunk {chunk}: {TOKENS_FILE} or {SOURCES_FILE} "
                "was cut"
            )
        name = self._names[int(record["source"])]
        return Passage(name, int(record["start"]), int(record["end"]), ids.astype(np.int64))

    def _record(self, chunk: int) -> np.void:
        data = os.pread(self._chunks.fileno(), _CHUNK.itemsize, chunk * _CHUNK.itemsize)
        if len(data) < _CHUNK.itemsize:
            raise ValueError(f"{self.folder} logs no chunk {chunk}, but {self.num_chunks} chunks")
        return np.frombuffer(data, _CHUNK)[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in (self._tokens, self._chunks, self._sources):
            file.close()
