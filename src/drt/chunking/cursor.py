"""Where one row stands between two segments, and what the next segment does to it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Cursor(NamedTuple):
    """Where a row stands: what has been read of it, and what is open."""

    tokens: int = 0
    """Content tokens read."""
    chunks: int = 0
    """Chunks closed, each by a landmark."""
    opened: int = 0
    """Content tokens of the open chunk."""
    closing: bool = False
    """Whether the open chunk ends here: its landmark comes before the next token."""
    document: int | None = None
    """Id of the document being read; None = there are no documents."""
    first_chunk: int = 0
    """First chunk of that document."""
    first_position: int = 0
    """First position of that document."""
    recent_starts: tuple[int, ...] = ()
    """First positions of the last closed chunks, those that began inside the window."""

    @property
    def position(self) -> int:
        """The next position: tokens and landmarks so far."""
        return self.tokens + self.chunks


class RowPlan(NamedTuple):
    """What one row does in one segment; positions are relative to the segment's first."""

    length: int
    """Content tokens n."""
    cuts: np.ndarray
    """(C,) int64, rising: how many of the n tokens stand before each landmark."""
    ended: np.ndarray
    """(C,) bool: whether the token before a landmark was known to end its chunk when it was read.
    Not so where what comes next decides it: another document, or `Cursor.closing`."""
    opened: int
    """Content tokens of the chunk that is open after the segment."""
    documents: np.ndarray
    """(d,) int64, rising: the tokens that begin a document."""
    last_document: int | None
    """Id of the document that the last token is in."""

    @property
    def num_positions(self) -> int:
        """Positions of the row in the segment."""
        return self.length + len(self.cuts)

    @property
    def content_positions(self) -> np.ndarray:
        """(n,) position of each token."""
        return self.position_of(np.arange(self.length))

    @property
    def landmark_positions(self) -> np.ndarray:
        """(C,) position of each landmark."""
        return self.cuts + np.arange(len(self.cuts))

    def position_of(self, tokens: np.ndarray) -> np.ndarray:
        """Position of the tokens with these numbers."""
        return tokens + np.searchsorted(self.cuts, tokens, side="right")


_NONE = np.empty(0, dtype=np.int64)


def plan_row(
    cursor: Cursor,
    length: int,
    *,
    chunk_size: int | None,
    ends: np.ndarray | None = None,
    document_ids: np.ndarray | None = None,
) -> RowPlan:
    """Find the landmarks of a row in a segment.

    Args:
        cursor: where the row stands.
        length: content tokens of the segment.
        chunk_size: tokens after which a chunk closes by itself; None = there are no chunks.
        ends: (length,) bool; a chunk also closes after these tokens.
        document_ids: (length,) int64; a chunk also closes where the document changes.
    """
    documents, last = _documents(cursor, document_ids)
    if chunk_size is None:
        return RowPlan(length, _NONE, _NONE.astype(np.bool_), 0, documents, last)
    if ends is None and not len(documents) and not cursor.closing:
        cuts = np.arange(chunk_size - cursor.opened, length + 1, chunk_size)
        ended = np.ones(len(cuts), np.bool_)
    else:
        cuts, ended = _cuts(cursor, length, chunk_size, ends, documents)
    opened = length - int(cuts[-1]) if len(cuts) else cursor.opened + length
    return RowPlan(length, cuts, ended, opened, documents, last)


def _cuts(
    cursor: Cursor, length: int, chunk_size: int, ends: np.ndarray | None, documents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`RowPlan.cuts` and `.ended` where not only the grid decides."""
    breaks = np.zeros(length + 1, dtype=np.bool_)
    if ends is not None:
        breaks[1:] = ends
    breaks[documents] = True
    breaks[0] |= cursor.closing
    token = np.arange(length)
    # The first token of the run that each token is in; a run begins at a break.
    run = np.maximum.accumulate(np.where(breaks[:length], token, -cursor.opened))
    ended = np.zeros_like(breaks)
    ended[1:] = (token + 1 - run) % chunk_size == 0
    if ends is not None:
        ended[1:] |= ends
    closes = breaks | ended
    closes[0] &= cursor.opened > 0
    cuts = np.flatnonzero(closes)
    return cuts, ended[cuts]


def _documents(cursor: Cursor, ids: np.ndarray | None) -> tuple[np.ndarray, int | None]:
    """Which tokens begin a document, and the id of the last one."""
    if ids is None or not len(ids):
        return _NONE, cursor.document
    starts = np.flatnonzero(ids[1:] != ids[:-1]) + 1
    if cursor.tokens and cursor.document != int(ids[0]):
        starts = np.concatenate([[0], starts])
    return starts.astype(np.int64), int(ids[-1])


def advance(cursor: Cursor, plan: RowPlan, *, window: int) -> Cursor:
    """Where the row stands after the segment.

    Args:
        cursor: where it stood before.
        plan: what the segment does.
        window: positions for which the starts of chunks are remembered.
    """
    tokens, chunks = cursor.tokens + plan.length, cursor.chunks + len(plan.cuts)
    first_chunk, first_position = cursor.first_chunk, cursor.first_position
    if len(plan.documents):
        token = plan.documents[-1:]
        first_chunk = cursor.chunks + int(np.searchsorted(plan.cuts, token[0], side="right"))
        first_position = cursor.position + int(plan.position_of(token)[0])
    recent = cursor.recent_starts
    if len(plan.cuts) or recent:
        starts = chunk_starts(cursor, plan)
        recent = tuple(starts[starts > tokens + chunks - window].tolist())
    return Cursor(
        tokens=tokens,
        chunks=chunks,
        opened=plan.opened,
        document=plan.last_document,
        first_chunk=first_chunk,
        first_position=first_position,
        recent_starts=recent,
    )


def chunk_starts(cursor: Cursor, plan: RowPlan) -> np.ndarray:
    """First positions, from the start of the row, of the recent chunks and of those closed here."""
    recent = np.array(cursor.recent_starts, dtype=np.int64)
    if not len(plan.cuts):
        return recent
    # The open chunk has no landmark inside, so it began this many positions ago.
    own = np.empty(len(plan.cuts), dtype=np.int64)
    own[0] = cursor.position - cursor.opened
    own[1:] = cursor.position + plan.landmark_positions[:-1] + 1
    return np.concatenate([recent, own])
