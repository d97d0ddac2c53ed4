"""Whether every byte of a prepared split is what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from drt.data.prepared.format import BYTES, END, WORDS, Manifest, Shard, digest, shard_files
from drt.data.prepared.split import PreparedSplit, load_documents

# Token ids are read in blocks of this many, so that a large shard takes little memory.
BLOCK_TOKENS = 1 << 24


def verify_split(folder: str | Path) -> Manifest:
    """Read all of a split and compare it with its manifest.

    Returns:
        The manifest.

    Raises:
        ValueError: the split is not complete, or the first thing that is wrong with it.
    """
    split = PreparedSplit(folder)
    before = 0
    for number, shard in enumerate(split.manifest.shards):
        _check_digests(split.folder, number, shard)
        _check_documents(split.folder, number, shard, before)
        _check_ids(split, before, before + shard.tokens)
        before += shard.tokens
    return split.manifest


def _check_digests(folder: Path, number: int, shard: Shard) -> None:
    if sorted(shard.sha256) != sorted(shard_files(number)):
        raise ValueError(f"{folder}: the manifest lists other files than those of shard {number}")
    for name, wanted in shard.sha256.items():
        if digest(folder / name) != wanted:
            raise ValueError(f"{folder / name} is damaged: its sha256 is not that of the manifest")


def _check_documents(folder: Path, number: int, shard: Shard, before: int) -> None:
    measures = load_documents(folder, number)
    path = folder / shard_files(number).documents
    ends = np.concatenate([[before], measures[END]])
    if (np.diff(ends) < 1).any() or ends[-1] != before + shard.tokens:
        raise ValueError(f"{path}: documents do not end one after another up to the shard's end")
    if measures[BYTES].sum() != shard.bytes or measures[WORDS].sum() != shard.words:
        raise ValueError(f"{path}: bytes or words are not those of the manifest")
    names = (folder / shard_files(number).names).read_bytes().count(b"\n")
    if names != shard.documents:
        raise ValueError(f"{folder}: shard {number} has {names} names, {shard.documents} documents")


def _check_ids(split: PreparedSplit, start: int, stop: int) -> None:
    limit = split.manifest.plan.vocab_size
    for first in range(start, stop, BLOCK_TOKENS):
        largest = int(split.tokens(first, min(first + BLOCK_TOKENS, stop)).max())
        if largest >= limit:
            raise ValueError(f"{split.folder}: token id {largest}, the vocabulary has {limit}")
