"""What a layout tells the model about one segment; `grid.py` and `ragged.py` are the two kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class SegmentLayout(ABC):
    """Which position of a segment is content, landmark or padding, and who shares a retrieval.

    A row's positions stand at the left of P columns; padding, where rows differ, at the right.
    """

    num_columns: int
    """Columns T of the content that the segment was given."""
    num_positions: int
    """Columns of positions P: content and landmarks of the fullest row."""
    counts: list[int]
    """Positions of each row."""
    first_positions: list[int]
    """Position, counted from the start of the row, of each row's first one here."""
    num_closed: int
    """Landmarks C of the row that has most."""
    chunk_lengths: Tensor | None
    """(B, C) int64 on the CPU, content tokens of the closed chunks, 0 = none; None = all S."""
    limits: Tensor
    """(B, C) int64 on the CPU; a landmark may retrieve chunks below this number."""
    firsts: Tensor | None
    """(B, C) int64 on the CPU, the first chunk it may retrieve; None = 0."""
    document_starts: Tensor | None
    """(B, P) int64, the position where each position's document begins; None = the row's."""
    num_blocks: int
    """Blocks NB that the positions fall into."""
    block_sources: Tensor
    """(NB,) or (B, NB) int64: 0 = the retrieval before the segment, c + 1 = that of landmark c,
    -1 = none."""
    final_sources: Tensor
    """(1,) or (B,) int64, as `block_sources`: the retrieval that holds after the segment."""

    @property
    def is_even(self) -> bool:
        """Whether every row has P positions."""
        return min(self.counts) == max(self.counts)

    @abstractmethod
    def to_positions(self, content: Tensor, landmark: Tensor | None) -> Tensor:
        """Put content and landmarks where they belong: (B, T, E) -> (B, P, E).

        Args:
            content: (B, T, E) embeddings of the columns.
            landmark: (E,) what landmarks and padding get; None = zeros, where none are landmarks.
        """

    @abstractmethod
    def split_chunks(self, hidden: Tensor, opened: Tensor) -> tuple[Tensor, Tensor]:
        """Cut positions into the chunks they close and what stays open.

        Args:
            hidden: (B, P, E) outputs at this segment's positions.
            opened: (B, n, E) outputs of the open chunks so far, at the right.

        Returns:
            closed (B, C, S + 1, E), each landmark right after its content, and the new opened.
        """

    @abstractmethod
    def take_landmarks(self, hidden: Tensor) -> Tensor:
        """(B, P, E) -> (B, C, E); anything where a row has fewer."""

    @abstractmethod
    def take_predictions(self, hidden: Tensor, keep: slice | Tensor) -> Tensor:
        """(B, P, E) -> (B, t, E): where the token after each of the kept columns is predicted.

        A token's own position; where landmarks use their retrieval at once, a token that is known
        to end its chunk leaves the prediction to the landmark. Anything at columns of padding.
        """

    @abstractmethod
    def to_blocks(self, hidden: Tensor) -> Tensor:
        """(B, P, E) -> (B, NB, Q, E), zeros where a block is not filled."""

    @abstractmethod
    def from_blocks(self, blocks: Tensor) -> Tensor:
        """(B, NB, Q, E) -> (B, P, E): the inverse of `to_blocks`."""
