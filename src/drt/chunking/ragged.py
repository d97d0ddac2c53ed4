"""The general layout: rows of any lengths, padding, chunks closed early, documents. By index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drt.chunking.cursor import Cursor, RowPlan
from drt.chunking.layout import SegmentLayout


class _Blocks(NamedTuple):
    """The blocks of one row."""

    number: np.ndarray
    """(P,) block of each position."""
    offset: np.ndarray
    """(P,) place of each position in its block."""
    sources: np.ndarray
    """(NB,) see `SegmentLayout.block_sources`."""
    final: int
    """See `SegmentLayout.final_sources`."""


class RaggedLayout(SegmentLayout):
    """Rows that differ, or whose chunks do.

    Args:
        cursors: where each row stands.
        plans: what each row does.
        columns: per row (n,) int64, the column of the input that each content token is in.
        num_columns: columns T of the input.
        chunk_size: content tokens of a chunk S; None = there are no chunks.
        landmark_starts_block: whether a landmark uses its own retrieval.
        limits: see `SegmentLayout`.
        firsts: see `SegmentLayout`.
        device: where index tensors are wanted.
    """

    def __init__(
        self,
        cursors: Sequence[Cursor],
        plans: Sequence[RowPlan],
        columns: Sequence[np.ndarray],
        *,
        num_columns: int,
        chunk_size: int | None,
        landmark_starts_block: bool,
        limits: Tensor,
        firsts: Tensor | None,
        device: torch.device,
    ) -> None:
        self.device = device
        self._chunk_width = (chunk_size or 0) + 1
        self.limits, self.firsts = limits, firsts
        self.num_columns = num_columns
        self.counts = [plan.num_positions for plan in plans]
        self.num_positions = max(self.counts)
        self.num_closed = max(len(plan.cuts) for plan in plans)
        self.first_positions = [cursor.position for cursor in cursors]
        self._landmarks = self._rows([p.landmark_positions for p in plans], self.num_closed)
        self._index_content(plans, columns, landmark_starts_block)
        self._index_chunks(cursors, plans)
        self._index_blocks([_blocks(plan, landmark_starts_block) for plan in plans])
        starts = _document_starts(cursors, plans, self.num_positions)
        self.document_starts = None if starts is None else self._sent(starts)

    def _rows(self, rows: Sequence[np.ndarray], width: int, fill: int = 0) -> Tensor:
        """Rows of numbers as (B, width) int64 on the device, `fill` at the right."""
        return self._sent(_pad(rows, width, fill))

    def _sent(self, numbers: np.ndarray) -> Tensor:
        """The same on the device, for which the host does not wait."""
        return torch.from_numpy(numbers).to(self.device, non_blocking=True)

    def _index_content(
        self, plans: Sequence[RowPlan], columns: Sequence[np.ndarray], landmark_predicts: bool
    ) -> None:
        """Where each position's embedding comes from, and where each column is predicted."""
        batch = len(plans)
        # The row after all content is the landmark's, and stands for padding too.
        sources = np.full((batch, self.num_positions), batch * self.num_columns)
        predictions = np.zeros((batch, self.num_columns), dtype=np.int64)
        for row, (plan, column) in enumerate(zip(plans, columns, strict=True)):
            positions = plan.content_positions
            sources[row, positions] = row * self.num_columns + column
            if landmark_predicts:
                positions = positions + np.isin(
                    np.arange(1, plan.length + 1), plan.cuts[plan.ended]
                )
            predictions[row, column] = positions
        self._sources = self._sent(sources)
        self._predictions = self._sent(predictions)

    def _index_chunks(self, cursors: Sequence[Cursor], plans: Sequence[RowPlan]) -> None:
        """Where chunks are in [opened, positions], and how many tokens they have."""
        width = self._chunk_width
        most = max(cursor.opened for cursor in cursors)
        left = max(plan.opened for plan in plans)
        lengths = np.zeros((len(plans), self.num_closed), dtype=np.int64)
        closed = np.zeros((len(plans), self.num_closed, width), dtype=np.int64)
        opened = np.zeros((len(plans), left), dtype=np.int64)
        for row, (cursor, plan) in enumerate(zip(cursors, plans, strict=True)):
            ends = most + plan.landmark_positions
            starts = np.concatenate([[most - cursor.opened], ends + 1])
            lengths[row, : len(ends)] = ends - starts[:-1]
            inside = np.minimum(starts[:-1, None] + np.arange(width), ends[:, None])
            closed[row, : len(ends)] = inside
            last = most + plan.num_positions
            # Places that a row with less open does not use may hold anything.
            places = np.arange(last - left, last)
            opened[row] = places.clip(0, most + self.num_positions - 1)
        self._open_width = most
        self.chunk_lengths = torch.from_numpy(lengths)
        self._closed = self._sent(closed)
        self._opened = self._sent(opened)

    def _index_blocks(self, blocks: Sequence[_Blocks]) -> None:
        """Which position fills which place of which block."""
        self.num_blocks = max(len(row.sources) for row in blocks)
        width = max(int(row.offset.max(initial=0)) + 1 for row in blocks)
        # The place after all positions is zero.
        into = np.full((len(blocks), self.num_blocks * width), self.num_positions)
        out_of = []
        for number, row in enumerate(blocks):
            place = row.number * width + row.offset
            into[number, place] = np.arange(len(place))
            out_of.append(place)
        self._block_width = width
        self._into_blocks = self._sent(into)
        self._out_of_blocks = self._rows(out_of, self.num_positions)
        self.block_sources = self._rows([row.sources for row in blocks], self.num_blocks, -1)
        self.final_sources = self._sent(np.array([row.final for row in blocks]))

    def to_positions(self, content: Tensor, landmark: Tensor | None) -> Tensor:
        """See `SegmentLayout`."""
        rows = content.flatten(0, 1)
        rows = torch.cat(
            [rows, rows.new_zeros(1, rows.shape[1]) if landmark is None else landmark[None]]
        )
        return rows.index_select(0, self._sources.flatten()).view(
            *self._sources.shape, rows.shape[1]
        )

    def split_chunks(self, hidden: Tensor, opened: Tensor) -> tuple[Tensor, Tensor]:
        """See `SegmentLayout`."""
        joined = torch.cat([opened[:, opened.shape[1] - self._open_width :], hidden], dim=1)
        closed = _take(joined, self._closed.flatten(1)).unflatten(
            1, (self.num_closed, self._chunk_width)
        )
        return closed, _take(joined, self._opened)

    def take_landmarks(self, hidden: Tensor) -> Tensor:
        """See `SegmentLayout`."""
        return _take(hidden, self._landmarks)

    def take_predictions(self, hidden: Tensor, keep: slice | Tensor) -> Tensor:
        """See `SegmentLayout`."""
        return _take(hidden, self._predictions[:, keep])

    def to_blocks(self, hidden: Tensor) -> Tensor:
        """See `SegmentLayout`."""
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, 1))
        return _take(padded, self._into_blocks).unflatten(1, (self.num_blocks, self._block_width))

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """See `SegmentLayout`."""
        return _take(blocks.flatten(1, 2), self._out_of_blocks)


def _take(hidden: Tensor, index: Tensor) -> Tensor:
    """(B, P, E) at (B, n) -> (B, n, E); a row of no positions gives zeros."""
    batch, count, width = hidden.shape
    if count == 0:
        return hidden.new_zeros(*index.shape, width)
    # Of the ways to say this, the fastest on CPU, forward and backward.
    first = torch.arange(batch, device=hidden.device)[:, None] * count
    return hidden.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, width)


def _pad(rows: Sequence[np.ndarray], width: int, fill: int) -> np.ndarray:
    padded = np.full((len(rows), width), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def _blocks(plan: RowPlan, landmark_starts_block: bool) -> _Blocks:
    """Cut a row into blocks: at each retrieval and at each new document."""
    landmarks = plan.landmark_positions
    heads = landmarks if landmark_starts_block else landmarks + 1
    documents = plan.position_of(plan.documents)
    # What holds from each position on; a document that begins there ends the retrieval.
    holds = {int(head): number + 1 for number, head in enumerate(heads)}
    holds.update(dict.fromkeys(documents.tolist(), -1))
    starts = np.array(sorted(start for start in holds if start < plan.num_positions), np.int64)
    position = np.arange(plan.num_positions)
    number = np.searchsorted(starts, position, side="right")
    begins = np.concatenate([[0], starts])
    sources = np.array([0, *(holds[int(start)] for start in starts)], dtype=np.int64)
    final = holds[max(holds)] if holds else 0
    return _Blocks(number, position - begins[number], sources, final)


def _document_starts(
    cursors: Sequence[Cursor], plans: Sequence[RowPlan], num_positions: int
) -> np.ndarray | None:
    """See `SegmentLayout.document_starts`."""
    rows = zip(cursors, plans, strict=True)
    if not any(len(plan.documents) or cursor.first_position for cursor, plan in rows):
        return None
    starts = np.zeros((len(plans), num_positions), dtype=np.int64)
    for row, (cursor, plan) in enumerate(zip(cursors, plans, strict=True)):
        begins = np.concatenate([[-1], plan.position_of(plan.documents)])
        number = np.searchsorted(begins[1:], np.arange(num_positions), side="right")
        absolute = np.concatenate([[cursor.first_position], cursor.position + begins[1:]])
        starts[row] = absolute[number]
    return starts
