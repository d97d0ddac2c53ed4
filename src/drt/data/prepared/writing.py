"""One split written as shards, so that a writer that was killed goes on from the last whole one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from drt.data.prepared.encoding import Encoded, Encoding, encode_pieces
from drt.data.prepared.format import (
    BYTES,
    MANIFEST_FILE,
    NUM_MEASURES,
    TEMPORARY_FILE,
    WORDS,
    Manifest,
    Plan,
    Shard,
    digest,
    locked,
    shard_files,
)
from drt.data.prepared.pieces import Piece
from drt.data.prepared.sources import START, Source
from drt.memory.files import sync_folder


class Progress(NamedTuple):
    """How far a split is."""

    split: str
    """Which split."""
    documents: int
    """Documents written, now and before."""
    tokens: int
    """Tokens written, now and before."""


class ShardWriter:
    """The files of a shard, while they grow.

    Args:
        folder: the split's folder.
        number: the shard's number.
        plan: what the split is to be.
        tokens_before: tokens of the shards before it.
    """

    def __init__(self, folder: Path, number: int, plan: Plan, tokens_before: int) -> None:
        self._folder, self._files, self._plan = folder, shard_files(number), plan
        self._before = tokens_before
        self._stream: BinaryIO = (folder / self._files.tokens).open("wb")
        self._sha256 = hashlib.sha256()
        self._names: list[str] = []
        self._measures: list[tuple[int, int, int]] = []
        self._open = (0, 0)
        self._document_start = 0
        self._ends_inside_word = False
        self.tokens = 0
        self.empty_documents = 0
        self.next = START

    @property
    def documents(self) -> int:
        """Whole documents with text in the shard."""
        return len(self._measures)

    def add(self, piece: Piece, encoded: Encoded) -> None:
        """Write the tokens of a piece, and its document's measures where it ends."""
        self._write(encoded.tokens)
        num_bytes, num_words = self._open
        # The word that the cut went through was counted before.
        num_words += encoded.num_words - self._ends_inside_word
        self._open = (num_bytes + encoded.num_bytes, num_words)
        self._ends_inside_word = piece.splits_word
        if piece.is_last:
            self._end_document(piece)

    def _end_document(self, piece: Piece) -> None:
        (num_bytes, num_words), self._open = self._open, (0, 0)
        self.next = piece.next
        if self.tokens == self._document_start:
            self.empty_documents += 1
            return
        if self._plan.end_token is not None:
            self._write(np.array([self._plan.end_token], dtype=self._plan.dtype))
        self._measures.append((self._before + self.tokens, num_bytes, num_words))
        self._names.append(piece.name)
        self._document_start = self.tokens

    def _write(self, tokens: np.ndarray) -> None:
        data = tokens.tobytes()
        self._stream.write(data)
        self._sha256.update(data)
        self.tokens += len(tokens)

    def finish(self) -> Shard:
        """Bring the files to the medium; what they hold."""
        # A measure of all documents lies together, to be searched without a copy.
        measures = np.ascontiguousarray(
            np.array(self._measures, dtype="<i8").reshape(-1, NUM_MEASURES).T
        )
        sync(self._stream)
        with (self._folder / self._files.documents).open("wb") as file:
            np.save(file, measures, allow_pickle=False)
            sync(file)
        with (self._folder / self._files.names).open("wb") as file:
            file.write("".join(json.dumps(name) + "\n" for name in self._names).encode())
            sync(file)
        sync_folder(self._folder)
        sha256 = {name: digest(self._folder / name) for name in self._files[1:]}
        return Shard(
            documents=self.documents,
            empty_documents=self.empty_documents,
            tokens=self.tokens,
            bytes=int(measures[BYTES].sum()),
            words=int(measures[WORDS].sum()),
            next=self.next,
            sha256={self._files.tokens: self._sha256.hexdigest(), **sha256},
        )

    def close(self) -> None:
        """Close what is open."""
        self._stream.close()


def sync(stream: BinaryIO) -> None:
    """Bring what was written to the medium."""
    stream.flush()
    os.fsync(stream.fileno())


def prepare_split(
    folder: Path,
    plan: Plan,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_processes: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Write a split, or go on writing it, or find that it is there already.

    The files depend on the plan and the texts alone: not on the number of processes, nor on how
    often the writer was killed.

    Args:
        folder: the split's folder.
        plan: what it is to be.
        source: its documents.
        tokenizer: that of the plan.
        num_processes: how many processes tokenize.
        on_progress: called after each piece.

    Raises:
        ValueError: the folder holds another corpus or something else, or a text cannot be read.
        BlockingIOError: another process writes to the folder.
        OSError: writing failed; what was whole is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        manifest = check_folder(folder, plan) or Manifest(plan)
        if manifest.complete:
            return manifest
        try:
            manifest.write(folder)
            for written in _write_shards(
                folder,
                manifest,
                source,
                Encoding(tokenizer, plan.dtype),
                num_processes=num_processes,
                on_progress=on_progress,
            ):
                written.write(folder)
                manifest = written
        except OSError as error:
            kept = f"{len(manifest.shards)} whole shards are kept; the same command goes on"
            what = f"{error.strerror or error}; {kept}"
            raise OSError(error.errno, what, error.filename or str(folder)) from error
        if not manifest.total("documents"):
            # Not in the way of another try.
            _remove_rest(folder, 0)
            (folder / MANIFEST_FILE).unlink()
            chosen = plan.source.get("selection")
            raise ValueError(
                f"there is no text for the split {plan.split}"
                + (f", {chosen} of the documents" if chosen else "")
            )
        _remove_rest(folder, len(manifest.shards))
        manifest = replace(manifest, complete=True)
        manifest.write(folder)
    return manifest


def check_folder(folder: Path, plan: Plan) -> Manifest | None:
    """What was begun in a folder, None for nothing; ValueError if it is not of this plan."""
    if (folder / MANIFEST_FILE).exists():
        manifest = Manifest.read(folder)
        manifest.plan.check_equal(plan, folder)
        return manifest
    # A writer that was killed before its first manifest may leave this.
    if folder.exists() and any(path.name != TEMPORARY_FILE for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no prepared tokens")
    return None


def _write_shards(
    folder: Path,
    manifest: Manifest,
    source: Source,
    encoding: Encoding,
    *,
    num_processes: int,
    on_progress: Callable[[Progress], None] | None,
) -> Iterator[Manifest]:
    """Yield the manifest anew with each shard that is whole."""
    plan = manifest.plan
    pieces = source.read(manifest.shards[-1].next if manifest.shards else START)
    # Not summed anew with each piece: there may be thousands of shards.
    documents, tokens = manifest.total("documents"), manifest.total("tokens")
    writer = ShardWriter(folder, len(manifest.shards), plan, tokens)
    try:
        for piece, encoded in encode_pieces(pieces, encoding, num_processes=num_processes):
            writer.add(piece, encoded)
            if on_progress is not None:
                done = documents + writer.documents, tokens + writer.tokens
                on_progress(Progress(plan.split, *done))
            if piece.is_last and writer.tokens >= plan.shard_tokens:
                manifest = replace(manifest, shards=(*manifest.shards, writer.finish()))
                yield manifest
                writer.close()
                documents, tokens = manifest.total("documents"), manifest.total("tokens")
                writer = ShardWriter(folder, len(manifest.shards), plan, tokens)
        if writer.documents or writer.empty_documents:
            yield replace(manifest, shards=(*manifest.shards, writer.finish()))
    finally:
        writer.close()


def _remove_rest(folder: Path, num_shards: int) -> None:
    """Remove the files of the last shard, which got no document."""
    for name in shard_files(num_shards):
        (folder / name).unlink(missing_ok=True)
