"""What every chunk memory can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from drt.retrieval import Retrieval


class Chunks(NamedTuple):
    """A pool of M chunks, and where in it each of the asked-for ones stands."""

    keys: Tensor
    """(M, S, G, D), head-major in storage: `keys.transpose(1, 2)` is contiguous."""
    values: Tensor
    """(M, S, G, D), stored like the keys."""
    lengths: Tensor | None
    """(M,) int64 content tokens of each chunk, 1 to S; None when all have S."""
    indices: Tensor
    """(B, n, K) int64 into the M chunks, -1 = none."""


class ChunkMemory(Protocol):
    """Per row, a growing list of chunks: landmark (L,), keys and values (S, G, D), a length."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Chunks of each row; empty before the first append."""
        ...

    def __len__(self) -> int:
        """Chunks of all rows together."""
        ...

    def append(
        self, landmarks: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None = None
    ) -> None:
        """Add up to n chunks to each row.

        Args:
            landmarks: (B, n, L).
            keys: (B, n, S, G, D).
            values: (B, n, S, G, D).
            lengths: (B, n) int64 on the CPU, content tokens of each chunk; 0 = this row has no
                such chunk, and then none after it either. None = all have S.
        """
        ...

    def search(
        self, queries: Tensor, limits: Tensor, *, topk: int, firsts: Tensor | None = None
    ) -> Retrieval:
        """The best chunks of each query, by inner product / sqrt(L), exactly.

        Args:
            queries: (B, n, L).
            limits: (B, n) int64 on the CPU; query i of a row may retrieve chunks below its limit.
            topk: chunks to retrieve K.
            firsts: (B, n) int64 on the CPU, the first chunk it may retrieve; None = 0.
        """
        ...

    def gather(self, indices: Tensor) -> Chunks:
        """The chunks named by (B, n, K) chunk numbers, in a form that attention can read."""
        ...

    def select_rows(self, rows: Sequence[int]) -> ChunkMemory:
        """A memory whose row i goes on from this one's row `rows[i]`, sharing what is there."""
        ...

    def fork(self) -> ChunkMemory:
        """A memory with the same rows that grows on its own from here."""
        ...
