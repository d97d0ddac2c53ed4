"""The regular layout: all rows alike, a landmark after every S tokens. Everything is a view."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from drt.chunking.cursor import Cursor, RowPlan
from drt.chunking.layout import SegmentLayout


class GridLayout(SegmentLayout):
    """Rows of one length whose landmarks stand on the grid, and at the same places.

    Rows may have read different amounts before; where no chunk closes, chunks may be open at
    different places.

    Args:
        cursors: where each row stands.
        plan: what every row does.
        chunk_size: content tokens of a chunk S; None = there are no chunks.
        landmark_starts_block: whether a landmark uses its own retrieval.
        limits: see `SegmentLayout`.
        firsts: see `SegmentLayout`.
        device: where index tensors are wanted.
    """

    document_starts = None
    chunk_lengths = None

    def __init__(
        self,
        cursors: Sequence[Cursor],
        plan: RowPlan,
        *,
        chunk_size: int | None,
        landmark_starts_block: bool,
        limits: Tensor,
        firsts: Tensor | None,
        device: torch.device,
    ) -> None:
        self.chunk_size = chunk_size or 0
        self.device = device
        self.landmark_starts_block = landmark_starts_block
        self.limits, self.firsts = limits, firsts
        self.open_before = cursors[0].opened
        self.num_columns = plan.length
        self.num_closed = len(plan.cuts)
        self.num_positions = plan.num_positions
        self.counts = [plan.num_positions] * len(cursors)
        self.first_positions = [cursor.position for cursor in cursors]

    @property
    def num_blocks(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Blocks that the positions fall into, the first one even if it is empty."""
        if self.num_closed == 0:
            return 1
        return -(-(self._offset_in_block + self.num_positions) // (self.chunk_size + 1))

    @property
    def _offset_in_block(self) -> int:
        return self.open_before + self.landmark_starts_block

    @property
    def block_sources(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(NB,) the blocks use the retrievals in turn."""
        return torch.arange(self.num_blocks, device=self.device)

    @property
    def final_sources(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(1,) the last landmark's retrieval holds on."""
        return torch.full((1,), self.num_closed, device=self.device)

    @cached_property
    def content_positions(self) -> Tensor:
        """(T,) position of each content token."""
        index = torch.arange(self.num_columns, device=self.device)
        if self.num_closed == 0:
            return index
        return index + (self.open_before + index) // self.chunk_size

    @property
    def _landmark_slice(self) -> slice:
        return slice(self.chunk_size - self.open_before, None, self.chunk_size + 1)

    def to_positions(self, content: Tensor, landmark: Tensor | None) -> Tensor:
        """See `SegmentLayout`."""
        if self.num_closed == 0:
            return content
        assert landmark is not None
        rows = landmark.expand(content.shape[0], self.num_positions, -1)
        return rows.index_copy(1, self.content_positions, content)

    def split_chunks(self, hidden: Tensor, opened: Tensor) -> tuple[Tensor, Tensor]:
        """See `SegmentLayout`."""
        joined = torch.cat([opened, hidden], dim=1) if opened.shape[1] else hidden
        width = self.chunk_size + 1
        cut = self.num_closed * width
        closed = joined[:, :cut].unflatten(1, (self.num_closed, width))
        return closed, joined[:, cut:]

    def take_landmarks(self, hidden: Tensor) -> Tensor:
        """See `SegmentLayout`."""
        if self.num_closed == 0:
            return hidden[:, :0]
        return hidden[:, self._landmark_slice]

    def take_predictions(self, hidden: Tensor, keep: slice | Tensor) -> Tensor:
        """See `SegmentLayout`."""
        if self.num_closed == 0:
            return hidden[:, keep]
        positions = self.content_positions
        if self.landmark_starts_block:
            index = torch.arange(self.num_columns, device=self.device)
            closes = (self.open_before + index) % self.chunk_size == self.chunk_size - 1
            positions = positions + closes
        return hidden.index_select(1, positions[keep])

    def to_blocks(self, hidden: Tensor) -> Tensor:
        """See `SegmentLayout`."""
        if self.num_blocks == 1:
            return hidden.unsqueeze(1)
        if self._is_short:
            first = self._in_first_block
            width = max(first, self.num_positions - first)
            parts = hidden[:, :first], hidden[:, first:]
            return torch.stack([F.pad(x, (0, 0, 0, width - x.shape[1])) for x in parts], dim=1)
        width = self.chunk_size + 1
        after = self.num_blocks * width - self._offset_in_block - self.num_positions
        padded = F.pad(hidden, (0, 0, self._offset_in_block, after))
        return padded.view(hidden.shape[0], self.num_blocks, width, -1)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """See `SegmentLayout`."""
        if self.num_blocks > 1 and self._is_short:
            first = self._in_first_block
            rest = self.num_positions - first
            return torch.cat([blocks[:, 0, :first], blocks[:, 1, :rest]], dim=1)
        flat = blocks.flatten(1, 2)
        if self.num_blocks == 1:
            return flat
        return flat[:, self._offset_in_block : self._offset_in_block + self.num_positions]

    @property
    def _is_short(self) -> bool:
        """Whether whole blocks would be mostly padding: a landmark met in decoding."""
        return self.num_blocks == 2 and 2 * self.num_positions <= self.chunk_size

    @property
    def _in_first_block(self) -> int:
        return self.chunk_size + 1 - self._offset_in_block
