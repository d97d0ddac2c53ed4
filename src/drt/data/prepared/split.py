"""Prepared tokens read back: any stretch of a split, and its documents one after another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from drt.data.prepared.format import (
    END,
    MANIFEST_FILE,
    NUM_MEASURES,
    Manifest,
    Shard,
    shard_files,
)
from drt.data.tokenization import tokenizer_fingerprint

_MAX_MAPPED = 64
"""Shards that a split keeps mapped at a time: each mapping holds a file open, and processes may not
open a thousand."""


class PreparedDocument(NamedTuple):
    """A document of a prepared split."""

    number: int
    """Its number in the split."""
    name: str
    """What it is called."""
    tokens: np.ndarray
    """Its token ids, (num_tokens,), in the dtype on disk, read-only; with its end token, if any."""
    num_bytes: int
    """UTF-8 bytes of its text."""
    num_words: int
    """Words of its text, separated by white space."""


class PreparedSplit:
    """A split that `drt data prepare` has written.

    Token files are mapped when they are first read from, and not sent to other processes: each
    worker of a data loader maps them for itself.

    Args:
        folder: the split's folder.
        tokenizer: what the tokens must have been made with; None = whatever made them.

    Raises:
        ValueError: there is no such split, it is not complete, a file is missing or has another
            size, or another tokenizer made the tokens.
    """

    def __init__(
        self, folder: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if not self.manifest.complete:
            raise ValueError(f"{folder} is not complete: run the same `drt data prepare` again")
        if tokenizer is not None:
            self._check_tokenizer(tokenizer)
        shards = self.manifest.shards
        for number, shard in enumerate(shards):
            check_sizes(self.folder, number, shard, self.manifest.plan.dtype)
        self._token_starts = _starts([shard.tokens for shard in shards])
        self._document_starts = _starts([shard.documents for shard in shards])
        self._tokens: dict[int, np.ndarray] = {}
        self._documents: dict[int, np.ndarray] = {}
        self._names: tuple[int, list[str]] = (-1, [])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": {}, "_documents": {}, "_names": (-1, [])}

    @property
    def num_tokens(self) -> int:
        """Tokens of the split."""
        return int(self._token_starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return int(self._document_starts[-1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The token ids from `start` up to `stop`, (stop - start,), in the dtype on disk.

        Raises:
            ValueError: the split has no such stretch.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens {start} to {stop} are not in 0 to {self.num_tokens}")
        parts = []
        for shard in _overlapping(self._token_starts, start, stop):
            first, last = (int(each) for each in self._token_starts[shard : shard + 2])
            mapped = self._tokens.get(shard)
            if mapped is None:
                path = self.folder / shard_files(shard).tokens
                dtype = self.manifest.plan.dtype
                mapped = _keep(self._tokens, shard, np.memmap(path, dtype=dtype, mode="r"))
            parts.append(mapped[max(start, first) - first : min(stop, last) - first])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty(0, self.manifest.plan.dtype), *parts])

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, (num_documents,) int64."""
        ends = [self._measures(shard)[END] for shard in range(len(self.manifest.shards))]
        return np.diff(np.concatenate(ends), prepend=0)

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """For each token from `start` up to `stop` the number of its document, int64."""
        parts = [np.empty(0, np.int64)]
        for shard in _overlapping(self._token_starts, start, stop):
            first, last = (int(each) for each in self._token_starts[shard : shard + 2])
            places = np.arange(max(start, first), min(stop, last))
            inside = self._measures(shard)[END].searchsorted(places, side="right")
            parts.append(inside + self._document_starts[shard])
        return np.concatenate(parts)

    def documents(self) -> Iterator[PreparedDocument]:
        """All documents in order."""
        for number in range(self.num_documents):
            yield self.document(number)

    def document(self, number: int) -> PreparedDocument:
        """A document by its number.

        Raises:
            ValueError: there is no such document.
        """
        if not 0 <= number < self.num_documents:
            raise ValueError(f"document {number} is not among the {self.num_documents}")
        shard = int(self._document_starts.searchsorted(number, side="right")) - 1
        inside = number - int(self._document_starts[shard])
        measures = self._measures(shard)
        start = int(measures[END, inside - 1] if inside else self._token_starts[shard])
        end, num_bytes, num_words = (int(each) for each in measures[:, inside])
        name = self._shard_names(shard)[inside]
        return PreparedDocument(number, name, self.tokens(start, end), num_bytes, num_words)

    def _measures(self, shard: int) -> np.ndarray:
        """What documents.<n>.npy holds, (3, documents)."""
        measures = self._documents.get(shard)
        if measures is None:
            measures = _keep(self._documents, shard, load_documents(self.folder, shard))
        return measures

    def _shard_names(self, shard: int) -> list[str]:
        if self._names[0] != shard:
            lines = (self.folder / shard_files(shard).names).read_text().splitlines()
            self._names = (shard, [json.loads(line) for line in lines])
        return self._names[1]

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        made, given = self.manifest.plan.tokenizer, tokenizer_fingerprint(tokenizer)
        if made != given:
            raise ValueError(
                f"{self.folder} was prepared with another tokenizer: "
                f"its fingerprint is {made}, not {given}"
            )


def _keep(kept: dict[int, np.ndarray], shard: int, mapped: np.ndarray) -> np.ndarray:
    """Keep a shard's mapping; the oldest of too many goes."""
    if len(kept) >= _MAX_MAPPED:
        del kept[next(iter(kept))]
    kept[shard] = mapped
    return mapped


def load_documents(folder: Path, shard: int) -> np.ndarray:
    """The measures of a shard's documents, (3, documents) int64, mapped.

    Raises:
        ValueError: the file is not such an array.
    """
    path = folder / shard_files(shard).documents
    try:
        measures = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if measures.ndim != 2 or len(measures) != NUM_MEASURES or measures.dtype != np.int64:
        raise ValueError(f"{path} is damaged: it holds {measures.dtype} of shape {measures.shape}")
    return measures


def check_sizes(folder: Path, number: int, shard: Shard, dtype: np.dtype) -> None:
    """Raise ValueError where a file of a shard is missing, or tokens or documents are cut short."""
    files = shard_files(number)
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
    size, wanted = (folder / files.tokens).stat().st_size, shard.tokens * dtype.itemsize
    if size != wanted:
        raise ValueError(f"{folder / files.tokens} has {size} bytes, not {wanted}")
    if load_documents(folder, number).shape[1] != shard.documents:
        raise ValueError(f"{folder / files.documents} does not hold {shard.documents} documents")


def split_folders(path: Path) -> list[Path]:
    """The folders of splits at a path: itself, or those directly inside.

    Raises:
        ValueError: there is none.
    """
    if (path / MANIFEST_FILE).is_file():
        return [path]
    folders = sorted(file.parent for file in path.glob(f"*/{MANIFEST_FILE}"))
    if not folders:
        raise ValueError(f"{path} holds no prepared tokens: no {MANIFEST_FILE} in it or below")
    return folders


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _overlapping(starts: np.ndarray, start: int, stop: int) -> range:
    """The shards that hold some of `start` up to `stop`."""
    if start == stop:
        return range(0)
    first = int(starts.searchsorted(start, side="right")) - 1
    return range(first, int(starts.searchsorted(stop, side="left")))
