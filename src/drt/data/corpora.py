"""Corpora: named documents as tokens, in a split to train on and a split that is held out."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from drt.data.reading import TextDocument, read_installed_text, read_path
from drt.data.tokenization import encode, vocabulary_size

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, Split] = ("train", "held_out")

HELD_OUT_ONE_IN = 20
DEFAULT_MAX_BYTES = 16 * 2**20

# A haystack of fewer tokens would be one text over and over.
MIN_SPLIT_TOKENS = 512

# Where a split by document is not possible, this share of every document, its end, is held out.
HELD_OUT_TAIL = 0.1


@dataclass(frozen=True)
class Document:
    """A text as tokens."""

    name: str
    """What the document is called in its corpus; its split follows from it."""
    tokens: np.ndarray
    """Its token ids, shape (num_tokens,), in the narrowest integers that hold the vocabulary."""


class Corpus:
    """Documents as tokens, in a split for training and a split that training never sees."""

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerBase,
        *,
        min_split_tokens: int = MIN_SPLIT_TOKENS,
    ) -> None:
        """Split ``documents`` by ``split_documents``.

        Args:
            documents: the documents, with distinct names.
            tokenizer: the tokenizer that made their tokens.
            min_split_tokens: how many tokens each split must have.

        Raises:
            ValueError: two documents have one name, or there is too little text for the two splits.
        """
        self.tokenizer = tokenizer
        self._documents = split_documents(documents, min_split_tokens=min_split_tokens)
        self._ends = {split: _ends(self._documents[split]) for split in SPLITS}

    def documents(self, split: Split) -> tuple[Document, ...]:
        """The documents of ``split``, in the order of their names."""
        return self._documents[_checked(split)]

    def num_tokens(self, split: Split) -> int:
        """How many tokens ``split`` has."""
        return int(self._ends[_checked(split)][-1])

    def haystack(self, rng: np.random.Generator, num_tokens: int, split: Split) -> np.ndarray:
        """Return tokens of ``split``: documents in random order, each from a random start.

        The first document is drawn by its length, so that in short haystacks every token of the
        split is as likely as every other. When all documents are used they are gone through again,
        in another order from other starts.

        Args:
            rng: the source of the order and the starts.
            num_tokens: the length of the haystack, 0 or more; it may exceed that of the split.
            split: ``"train"`` or ``"held_out"``.

        Returns:
            Token ids, int64, shape (num_tokens,).

        Raises:
            ValueError: ``num_tokens`` is negative or there is no such split.
        """
        documents, ends = self.documents(split), self._ends[split]
        if num_tokens < 0:
            raise ValueError(f"num_tokens is {num_tokens}; it must be 0 or more")
        haystack = np.empty(num_tokens, dtype=np.int64)
        position = int(rng.integers(ends[-1]))
        first = int(ends.searchsorted(position, side="right"))
        # Counted from the end of the document, whose start is not at hand.
        filled = _copy(documents[first].tokens[position - int(ends[first]) :], haystack, 0)
        walk = _endless_walk(rng, first, len(documents))
        next(walk)
        while filled < num_tokens:
            tokens = documents[next(walk)].tokens
            filled = _copy(tokens[rng.integers(len(tokens)) :], haystack, filled)
        return haystack


def split_documents(
    documents: Iterable[Document], *, min_split_tokens: int = MIN_SPLIT_TOKENS
) -> dict[Split, tuple[Document, ...]]:
    """Split documents by the sha256 of their names: one in 20 is held out.

    If those have fewer than ``min_split_tokens`` tokens, more documents join them in the order of
    their sha256. If that leaves too little for training (one book, say), every document is cut
    instead and its last tenth held out.

    Raises:
        ValueError: two documents have one name, or there is too little text for the two splits.
    """
    filled = [document for document in documents if len(document.tokens)]
    by_name = {document.name: document for document in filled}
    if len(by_name) < len(filled):
        raise ValueError(f"{len(filled)} documents have only {len(by_name)} different names")
    held_out = {name for name in by_name if _digest(name) % HELD_OUT_ONE_IN == 0}
    for name in sorted(by_name, key=_digest):
        if _num_tokens(by_name[held] for held in held_out) >= min_split_tokens:
            break
        held_out.add(name)
    ordered = [by_name[name] for name in sorted(by_name)]
    splits: dict[Split, tuple[Document, ...]] = {
        "train": tuple(document for document in ordered if document.name not in held_out),
        "held_out": tuple(document for document in ordered if document.name in held_out),
    }
    if _num_tokens(splits["train"]) < min_split_tokens:
        splits = _cut(ordered)
    for split in SPLITS:
        if _num_tokens(splits[split]) < min_split_tokens:
            raise ValueError(
                f"too little text: {len(filled)} documents with {_num_tokens(filled)} tokens leave "
                f"{_num_tokens(splits[split])} tokens for the {split} split, "
                f"which needs {min_split_tokens}"
            )
    return splits


def load_corpus(
    path: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Corpus:
    """Load a corpus from a file or a folder, or the text that comes with Python.

    Args:
        path: a text file (UTF-8); a ``.jsonl`` file whose rows have a string ``text`` (and may have
            an ``id``, which then names the document); either with ``.xz`` added; a folder, of which
            every such file is read; or ``None`` for Python's documentation topics and the sources
            of its standard library.
        tokenizer: turns the texts into tokens.
        max_bytes: how many bytes of text are read at most. The files of a folder take equal shares.

    Raises:
        ValueError: nothing is at ``path``, nothing in it can be read, a row has no text, or there
            is too little text for two splits.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}; it must be 1 or more")
    if path is None:
        texts = read_installed_text(max_bytes=max_bytes)
    else:
        texts = read_path(Path(path), max_bytes=max_bytes)
    return corpus_from_texts(texts, tokenizer)


def corpus_from_texts(texts: Iterable[TextDocument], tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Return the corpus of named texts."""
    dtype = np.min_scalar_type(vocabulary_size(tokenizer) - 1)
    documents = [
        Document(name=text.name, tokens=encode(tokenizer, text.text, dtype=dtype)) for text in texts
    ]
    return Corpus(documents, tokenizer)


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), "big")


def _num_tokens(documents: Iterable[Document]) -> int:
    return sum(len(document.tokens) for document in documents)


def _cut(documents: list[Document]) -> dict[Split, tuple[Document, ...]]:
    borders = [round(len(document.tokens) * (1 - HELD_OUT_TAIL)) for document in documents]
    pairs = list(zip(documents, borders, strict=True))
    parts: dict[Split, list[Document]] = {
        "train": [Document(name=each.name, tokens=each.tokens[:end]) for each, end in pairs],
        "held_out": [Document(name=each.name, tokens=each.tokens[end:]) for each, end in pairs],
    }
    return {split: tuple(part for part in parts[split] if len(part.tokens)) for split in SPLITS}


def _ends(documents: tuple[Document, ...]) -> np.ndarray:
    return np.cumsum([len(document.tokens) for document in documents])


def _endless_walk(rng: np.random.Generator, first: int, count: int) -> Iterator[int]:
    """Yield all of 0 to ``count - 1``, from ``first`` on, then all in another order, and so on.

    Steps of a random size that shares no factor with ``count`` meet every number, and unlike a
    permutation they cost nothing before the first step: a short haystack needs a few documents of
    perhaps a hundred thousand.
    """
    while True:
        step = int(rng.integers(1, count + 1))
        while gcd(step, count) != 1:
            step = int(rng.integers(1, count + 1))
        for number in range(count):
            yield (first + number * step) % count
        first = int(rng.integers(count))


def _copy(tokens: np.ndarray, target: np.ndarray, filled: int) -> int:
    """Copy ``tokens`` to ``target[filled:]`` as far as they fit; return where the copy ends."""
    end = min(filled + len(tokens), len(target))
    target[filled:end] = tokens[: end - filled]
    return end


def _checked(split: Split) -> Split:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {SPLITS}")
    return split
