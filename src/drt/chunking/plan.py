"""From where rows stand and what is given to them, to the layout of a segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drt.chunking.cursor import Cursor, RowPlan, advance, chunk_starts, plan_row
from drt.chunking.grid import GridLayout
from drt.chunking.layout import SegmentLayout
from drt.chunking.ragged import RaggedLayout


class ChunkRules(NamedTuple):
    """What a model asks of every layout."""

    chunk_size: int | None
    """Content tokens of a chunk S; None = there are neither chunks nor landmarks."""
    landmark_starts_block: bool
    """Whether a landmark uses its own retrieval, or leaves it to the position after it."""
    excluded_window: int = 0
    """Chunks wholly inside this many positions are no candidates; 0 = all earlier chunks are."""


class Marks(NamedTuple):
    """What is known of the columns of a segment besides their tokens."""

    content: np.ndarray | None = None
    """(B, T) bool, False at padding, which may be anywhere; None = no padding."""
    chunk_ends: np.ndarray | None = None
    """(B, T) bool, where a chunk closes although it is not full; None = nowhere."""
    document_ids: np.ndarray | None = None
    """(B, T) int64; tokens of different documents do not see each other; None = one document."""


_NONE = np.empty(0, dtype=np.int64)


def plan_segment(
    cursors: Sequence[Cursor],
    num_columns: int,
    *,
    rules: ChunkRules,
    marks: Marks,
    device: torch.device,
) -> tuple[SegmentLayout, list[Cursor]]:
    """Lay out a segment.

    Args:
        cursors: where each row stands.
        num_columns: columns T of the segment.
        rules: the model's.
        marks: padding, chunk ends and documents of the columns.
        device: where index tensors are wanted.

    Returns:
        The layout, and where each row stands after the segment.
    """
    if all(mark is None for mark in marks) and all(
        stays_open(c, num_columns, rules) for c in cursors
    ):
        return _open_segment(cursors, num_columns, rules, device)
    columns = _columns(len(cursors), num_columns, marks.content)
    plans = [
        plan_row(
            cursor,
            len(columns[row]),
            chunk_size=rules.chunk_size,
            ends=_pick(marks.chunk_ends, row, columns[row]),
            document_ids=_pick(marks.document_ids, row, columns[row]),
        )
        for row, cursor in enumerate(cursors)
    ]
    limits, firsts = _candidates(cursors, plans, rules.excluded_window)
    after = [
        advance(cursor, plan, window=rules.excluded_window)
        for cursor, plan in zip(cursors, plans, strict=True)
    ]
    shared = {
        "chunk_size": rules.chunk_size,
        "landmark_starts_block": rules.landmark_starts_block,
        "limits": limits,
        "firsts": firsts,
        "device": device,
    }
    if _is_grid(cursors, plans, num_columns, rules.chunk_size):
        return GridLayout(cursors, plans[0], **shared), after
    return RaggedLayout(cursors, plans, columns, num_columns=num_columns, **shared), after


def stays_open(cursor: Cursor, length: int, rules: ChunkRules) -> bool:
    """Whether nothing but content comes in this segment: the usual step of decoding."""
    if cursor.closing or cursor.first_position:
        return False
    return rules.chunk_size is None or cursor.opened + length < rules.chunk_size


def advance_open(cursor: Cursor, length: int, rules: ChunkRules) -> Cursor:
    """Where a row stands after a segment in which it `stays_open`."""
    opened = length if rules.chunk_size is not None else 0
    return cursor._replace(tokens=cursor.tokens + length, opened=cursor.opened + opened)


def _open_segment(
    cursors: Sequence[Cursor], length: int, rules: ChunkRules, device: torch.device
) -> tuple[SegmentLayout, list[Cursor]]:
    opened = length if rules.chunk_size is not None else 0
    plan = RowPlan(length, _NONE, _NONE, opened, _NONE, None)
    layout = GridLayout(
        cursors,
        plan,
        chunk_size=rules.chunk_size,
        landmark_starts_block=rules.landmark_starts_block,
        limits=torch.empty(len(cursors), 0, dtype=torch.int64),
        firsts=None,
        device=device,
    )
    return layout, [advance_open(cursor, length, rules) for cursor in cursors]


def _columns(batch: int, num_columns: int, content: np.ndarray | None) -> list[np.ndarray]:
    """Per row, the columns that hold content."""
    if content is None:
        return [np.arange(num_columns)] * batch
    return [np.flatnonzero(row) for row in content]


def _pick(mark: np.ndarray | None, row: int, columns: np.ndarray) -> np.ndarray | None:
    return None if mark is None else mark[row, columns]


def _is_grid(
    cursors: Sequence[Cursor], plans: Sequence[RowPlan], num_columns: int, chunk_size: int | None
) -> bool:
    """Whether all rows do the same, and that is what the grid does."""
    if any(len(plan.documents) or c.first_position for c, plan in zip(cursors, plans, strict=True)):
        return False
    if any(plan.length != num_columns for plan in plans):
        return False
    if not any(len(plan.cuts) for plan in plans):
        return True
    assert chunk_size is not None
    opened = cursors[0].opened
    grid = np.arange(chunk_size - opened, num_columns + 1, chunk_size)
    alike = all(cursor.opened == opened for cursor in cursors)
    return alike and all(np.array_equal(plan.cuts, grid) for plan in plans)


def _candidates(
    cursors: Sequence[Cursor], plans: Sequence[RowPlan], window: int
) -> tuple[Tensor, Tensor | None]:
    """`SegmentLayout.limits` and `.firsts`."""
    shape = (len(plans), max(len(plan.cuts) for plan in plans))
    limits, firsts = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, (cursor, plan) in enumerate(zip(cursors, plans, strict=True)):
        closed = len(plan.cuts)
        if not closed:
            continue
        limit = cursor.chunks + np.arange(closed)
        if window:
            # Chunks that begin before the landmark's window; those not remembered do.
            starts = chunk_starts(cursor, plan)
            reach = cursor.position + plan.landmark_positions - window + 1
            outside = np.searchsorted(starts, reach, side="left")
            limit = np.minimum(limit, cursor.chunks - len(cursor.recent_starts) + outside)
        limits[row, :closed] = limit
        firsts[row, :closed] = _first_chunks(cursor, plan)
    return torch.from_numpy(limits), torch.from_numpy(firsts) if firsts.any() else None


def _first_chunks(cursor: Cursor, plan: RowPlan) -> np.ndarray:
    """(C,) the first chunk of the document that each closed chunk belongs to."""
    begins = cursor.chunks + np.searchsorted(plan.cuts, plan.documents, side="right")
    # A landmark belongs to the document of the token before it.
    number = np.searchsorted(plan.documents, plan.cuts, side="left")
    return np.concatenate([[cursor.first_chunk], begins])[number]
