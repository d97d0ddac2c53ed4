"""What a folder of prepared tokens holds, and how its manifest is written and read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drt.data.reading import written_format
from drt.memory.files import write_whole

FORMAT = "drt-tokens"
VERSION = 1
MANIFEST_FILE = "manifest.json"
# What `write_whole` leaves behind where it is killed.
TEMPORARY_FILE = f"{MANIFEST_FILE}.new"

# What two bytes can tell apart; larger vocabularies take four.
NARROW_VOCABULARY = 1 << 16

# Rows of documents.<n>.npy.
END, BYTES, WORDS = 0, 1, 2
NUM_MEASURES = 3


class Position(NamedTuple):
    """A place between documents of a source."""

    file: int
    """Number of the file, in the order of the source."""
    row: int
    """Number of the row in it."""


@dataclass(frozen=True)
class Plan:
    """All that the content of a split's folder follows from, known before anything is read."""

    split: str
    """The split's name."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int
    """One more than the largest token id."""
    end_token: int | None
    """The id that follows each document; None = nothing does."""
    shard_tokens: int
    """Tokens with which a shard is full; it ends with the document that reaches them."""
    source: dict[str, Any]
    """What is read, as its source describes it."""

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens on disk: little-endian, two bytes where the vocabulary allows."""
        return np.dtype("<u2" if self.vocab_size <= NARROW_VOCABULARY else "<u4")

    def check_equal(self, other: Plan, folder: Path) -> None:
        """Raise ValueError that names what differs, unless nothing does."""
        for item in fields(self):
            found, wanted = getattr(self, item.name), getattr(other, item.name)
            if found != wanted:
                raise ValueError(
                    f"{folder} holds another corpus: its {item.name} is {found}, not {wanted}; "
                    "choose another folder, or remove this one"
                )


@dataclass(frozen=True)
class Shard:
    """Three files that are whole: tokens, documents and names."""

    documents: int
    """Documents with text."""
    empty_documents: int
    """Documents without; they are left out."""
    tokens: int
    """Tokens, those at the ends of documents among them."""
    bytes: int
    """UTF-8 bytes of the texts."""
    words: int
    """Words of the texts, separated by white space."""
    next: Position
    """Where in the source the following shard begins."""
    sha256: dict[str, str]
    """Digest of each file, by its name."""


def _splits_near(folder: Path) -> str:
    """What may have been meant by a split that is not there."""
    if inside := _splits_in(folder):
        return f", but the splits {', '.join(inside)}: name one, as {folder / inside[0]}"
    there = _splits_in(folder.parent)
    if not there:
        return ""
    return (
        f"; {folder.parent} has {', '.join(there)}. `drt data prepare --hold-out-one-in N` makes a "
        "validation split of texts that have none"
    )


def _splits_in(folder: Path) -> list[str]:
    # Memories have a file of that name too.
    found = (file.parent for file in folder.glob(f"*/{MANIFEST_FILE}"))
    return sorted(split.name for split in found if written_format(split) == FORMAT)


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says; written anew whenever a shard is whole."""

    plan: Plan
    """What was asked for."""
    complete: bool = False
    """Whether the source was read to its end."""
    shards: tuple[Shard, ...] = field(default_factory=tuple)
    """The shards in order."""

    def total(self, name: str) -> int:
        """The sum over the shards of `documents`, `tokens`, `bytes`, `words`, ..."""
        return sum(getattr(shard, name) for shard in self.shards)

    def content(self) -> dict[str, Any]:
        """All fields, the format and the totals, as JSON has them."""
        names = ("documents", "empty_documents", "tokens", "bytes", "words")
        totals = {name: self.total(name) for name in names}
        head = {"format": FORMAT, "version": VERSION, "dtype": self.plan.dtype.name}
        return {**head, "complete": self.complete, **totals, **asdict(self)}

    def write(self, folder: Path) -> None:
        """Write the manifest: it is there in full or not at all."""
        write_whole(folder / MANIFEST_FILE, json.dumps(self.content(), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            ValueError: there is none, or one that this version cannot read.
        """
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no prepared tokens: it has no {MANIFEST_FILE}"
                f"{_splits_near(folder)}"
            )
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not of prepared tokens: format is not {FORMAT!r}")
        if content.get("version") != VERSION:
            version = content.get("version")
            raise ValueError(f"{path}: format version {version!r}, only {VERSION} is known")
        try:
            shards = [
                Shard(**{**shard, "next": Position(*shard["next"])}) for shard in content["shards"]
            ]
            return Manifest(Plan(**content["plan"]), bool(content["complete"]), tuple(shards))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


class ShardFiles(NamedTuple):
    """The names of a shard's files."""

    tokens: str
    """Token ids, one after another."""
    documents: str
    """int64 (3, documents): end in tokens, counted through the split; bytes; words."""
    names: str
    """The name of each document, a JSON string a line."""


def shard_files(number: int) -> ShardFiles:
    """The names of the files of a shard."""
    return ShardFiles(
        f"tokens.{number:05d}.bin", f"documents.{number:05d}.npy", f"names.{number:05d}.jsonl"
    )


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The right to write to a folder, until the context or the process ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        message = "another process is preparing this split"
        raise BlockingIOError(error.errno, message, str(folder)) from error
    try:
        yield
    finally:
        os.close(descriptor)
