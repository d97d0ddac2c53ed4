"""Where landmarks go: content tokens, positions, chunks and blocks of one segment.

A *segment* is the run of content tokens given to one forward; a row may be read in any number of
them. *Content* counts tokens, *positions* count tokens and landmarks. A *block* is the run of
positions that share one retrieval: S + 1 of them, a landmark and S tokens.
Everything downstream reads the layout and does no arithmetic of its own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SegmentLayout:
    """The regular grid: a landmark closes every `chunk_size` content tokens.

    All rows of a batch share the layout. Index tensors are int64, on the CPU or on `device`.
    """

    start: int
    """Content tokens of the row before this segment."""
    length: int
    """Content tokens of this segment, 0 or more."""
    chunk_size: int
    """Content tokens of a chunk S."""
    landmark_starts_block: bool = False
    """Whether a landmark uses its own retrieval, or leaves it to the position after it."""
    device: torch.device | None = None
    """Where the index tensors live; None = CPU."""

    @classmethod
    def without_landmarks(cls, start: int, length: int) -> SegmentLayout:
        """The layout of a model that retrieves nothing: one chunk that never closes."""
        return cls(start, length, chunk_size=sys.maxsize)

    @property
    def first_chunk(self) -> int:
        """Chunks closed before this segment, so the number of the first one closed in it."""
        return self.start // self.chunk_size

    @property
    def open_before(self) -> int:
        """Content tokens of the chunk that was open when this segment began."""
        return self.start % self.chunk_size

    @property
    def num_closed(self) -> int:
        """Chunks that this segment closes, each with a landmark."""
        return (self.start + self.length) // self.chunk_size - self.first_chunk

    @property
    def num_positions(self) -> int:
        """Positions P of this segment: its content and its landmarks."""
        return self.length + self.num_closed

    @property
    def first_position(self) -> int:
        """Position, counted from the start of the row, of the segment's first token."""
        return self.start + self.first_chunk

    @property
    def num_blocks(self) -> int:
        """Blocks that the segment's positions fall into; partly filled ones count."""
        if self.num_positions == 0:
            return 0
        return -(-(self._offset_in_block + self.num_positions) // (self.chunk_size + 1))

    @property
    def _offset_in_block(self) -> int:
        return (self.open_before + self.landmark_starts_block) % (self.chunk_size + 1)

    @cached_property
    def content_positions(self) -> Tensor:
        """(length,) position in the segment of each content token."""
        index = torch.arange(self.length, device=self.device)
        return index + (self.open_before + index) // self.chunk_size

    @cached_property
    def landmark_positions(self) -> Tensor:
        """(num_closed,) position in the segment of each landmark."""
        order = torch.arange(1, self.num_closed + 1, device=self.device)
        return order * (self.chunk_size + 1) - 1 - self.open_before

    @cached_property
    def prediction_positions(self) -> Tensor:
        """(length,) position whose output predicts the token after each content token.

        The token's own position; where landmarks use their retrieval at once, the last token of a
        chunk leaves the prediction to its landmark.
        """
        if not self.landmark_starts_block:
            return self.content_positions
        index = torch.arange(self.length, device=self.device)
        closes = (self.open_before + index) % self.chunk_size == self.chunk_size - 1
        return self.content_positions + closes

    def insert_landmarks(self, content: Tensor, landmark: Tensor) -> Tensor:
        """(B, length, E) content embeddings and the (E,) landmark -> (B, P, E) positions."""
        if self.num_closed == 0:
            return content
        rows = landmark.expand(content.shape[0], self.num_positions, -1)
        return rows.index_copy(1, self.content_positions, content)

    def split_chunks(self, hidden: Tensor, opened: Tensor) -> tuple[Tensor, Tensor]:
        """Cut positions into the chunks they close and what stays open.

        Args:
            hidden: (B, P, E) outputs at this segment's positions.
            opened: (B, open_before, E) outputs at the open chunk's earlier positions.

        Returns:
            closed (B, num_closed, S + 1, E), the landmark last, and the new open (B, n, E).
        """
        joined = torch.cat([opened, hidden], dim=1) if opened.shape[1] else hidden
        width = self.chunk_size + 1
        cut = self.num_closed * width
        closed = joined[:, :cut].unflatten(1, (self.num_closed, width))
        return closed, joined[:, cut:]

    def to_blocks(self, hidden: Tensor) -> Tensor:
        """(B, P, E) positions -> (B, num_blocks, Q, E), zeros where a block is not filled."""
        if self.num_blocks <= 1:
            return hidden.unsqueeze(1)
        width = self.chunk_size + 1
        after = self.num_blocks * width - self._offset_in_block - self.num_positions
        padded = F.pad(hidden, (0, 0, self._offset_in_block, after))
        return padded.view(hidden.shape[0], self.num_blocks, width, -1)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """(B, num_blocks, Q, E) -> (B, P, E): the inverse of `to_blocks`."""
        flat = blocks.flatten(1, 2)
        if self.num_blocks <= 1:
            return flat
        return flat[:, self._offset_in_block : self._offset_in_block + self.num_positions]
