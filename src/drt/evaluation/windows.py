"""Which tokens of a split are predicted, and from how many before them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from drt.data.prepared import PreparedSplit


class Excerpt(NamedTuple):
    """The beginning of a document, or all of it."""

    document: int
    """Number of the document in its split."""
    num_tokens: int
    """Tokens from the document's start."""


class Window(NamedTuple):
    """A stretch of a document that a model reads from nothing, and is scored on a part of."""

    document: int
    """Number of the document in its split."""
    start: int
    """Its first token in the document."""
    first: int
    """The first token that is scored; it has `first - start` before it."""
    stop: int
    """Where it ends; all tokens from `first` are scored."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are read."""
        return self.stop - self.start

    @property
    def num_scored(self) -> int:
        """Tokens that are scored."""
        return self.stop - self.first


def choose_excerpts(
    split: PreparedSplit,
    *,
    min_tokens: int,
    longest: int,
    max_documents: int | None = None,
    max_document_tokens: int | None = None,
    max_tokens: int | None = None,
) -> list[Excerpt]:
    """Choose what is read of a split; the same choice each time.

    Args:
        split: what to choose from.
        min_tokens: shorter documents are left out.
        longest: at least one excerpt must have so many tokens.
        max_documents: so many of the others, evenly spaced in their order; None = all.
        max_document_tokens: of each document at most so many tokens; None = all.
        max_tokens: so many tokens in all, in equal shares, of which what short documents leave
            goes to the others; None = all.

    Raises:
        ValueError: no excerpt has `longest` tokens.
    """
    sizes = split.document_lengths()
    if max_document_tokens is not None:
        sizes = np.minimum(sizes, max_document_tokens)
    found = int(sizes.max(initial=0))
    numbers = np.flatnonzero(sizes >= min_tokens)
    if max_documents is not None:
        numbers = numbers[spread(len(numbers), max_documents)]
    sizes = sizes[numbers]
    if max_tokens is not None:
        sizes = shares(sizes, max_tokens)
    # With nothing long enough, what there is says how far off it is.
    found = int(sizes.max()) if len(sizes) else found
    if found < longest:
        raise ValueError(
            f"{longest:,} tokens of one document are needed, but the longest of {split.folder} "
            f"has {found:,} within max_documents, max_document_tokens and max_tokens"
        )
    chosen = zip(numbers.tolist(), sizes.tolist(), strict=True)
    # A single token is predicted by nothing.
    return [Excerpt(number, size) for number, size in chosen if size > 1]


def cut_windows(excerpts: list[Excerpt], length: int) -> list[Window]:
    """Cut excerpts into windows of `length` tokens; all tokens but the first of each are scored.

    What remains at the end of an excerpt is a shorter window, if it has two tokens.
    """
    return [
        Window(excerpt.document, start, start + 1, min(start + length, excerpt.num_tokens))
        for excerpt in excerpts
        for start in range(0, excerpt.num_tokens - 1, length)
    ]


def choose_targets(
    excerpts: list[Excerpt], *, longest: int, stride: int, max_targets: int
) -> list[Window]:
    """Choose stretches of `stride` tokens that have `longest - stride` tokens before them.

    They do not overlap, are shared out over the excerpts as equally as these allow, and are evenly
    spaced in each.

    Args:
        excerpts: what to choose from.
        longest: tokens of the longest context, the stretch included.
        stride: tokens of a stretch.
        max_targets: at most so many stretches.

    Returns:
        Windows of `longest` tokens, in the order of the documents.
    """
    before = longest - stride
    rooms = [max(excerpt.num_tokens - before, 0) // stride for excerpt in excerpts]
    counts = shares(np.array(rooms, dtype=np.int64), max_targets).tolist()
    windows = []
    for excerpt, room, count in zip(excerpts, rooms, counts, strict=True):
        for number in spread(room, count).tolist():
            first = before + number * stride
            windows.append(Window(excerpt.document, number * stride, first, first + stride))
    return windows


def shorten(windows: list[Window], length: int) -> list[Window]:
    """The same scored tokens with less before them: windows of `length` tokens."""
    return [window._replace(start=window.stop - length) for window in windows]


def spread(count: int, chosen: int) -> np.ndarray:
    """Evenly spaced numbers from 0 up to `count`, (min(chosen, count),) int64, ascending."""
    chosen = min(chosen, count)
    return (2 * np.arange(chosen, dtype=np.int64) + 1) * count // max(2 * chosen, 1)


def shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """Share `total` out so that nobody gets more than its size, and otherwise all alike.

    Args:
        sizes: (n,) int64, what each can take.
        total: what there is.

    Returns:
        (n,) int64, of sum min(total, sum of sizes). Of what cannot be divided, one each goes to
        some that are evenly spaced.
    """
    if sizes.sum() <= total:
        return sizes
    low, high = 0, int(sizes.max())
    while high - low > 1:
        middle = (low + high) // 2
        fits = np.minimum(sizes, middle).sum() <= total
        low, high = (middle, high) if fits else (low, middle)
    given = np.minimum(sizes, low)
    wanting = np.flatnonzero(sizes > low)
    given[wanting[spread(len(wanting), total - int(given.sum()))]] += 1
    return given
