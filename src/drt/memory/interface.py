"""What every chunk memory can do."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from drt.retrieval import Retrieval


class Chunks(NamedTuple):
    """Chunks and where in them each of the asked-for ones stands."""

    keys: Tensor
    """(B, M, S, G, D), head-major in storage: `keys.transpose(2, 3)` is contiguous."""
    values: Tensor
    """(B, M, S, G, D), stored like the keys."""
    indices: Tensor
    """(B, n, K) int64 into the M chunks, -1 = none."""


class ChunkMemory(Protocol):
    """A growing, per-row list of chunks: landmark (E,), keys and values (S, G, D)."""

    def __len__(self) -> int:
        """Chunks held per row."""
        ...

    def append(self, landmarks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add n chunks to each row: (B, n, E), (B, n, S, G, D) and (B, n, S, G, D)."""
        ...

    def search(self, queries: Tensor, limits: Tensor, *, topk: int) -> Retrieval:
        """Best chunks of each query: (B, n, E) queries, (n,) limits -> a `Retrieval`."""
        ...

    def gather(self, indices: Tensor) -> Chunks:
        """The chunks named by (B, n, K) indices, in a form that attention can read."""
        ...

    def fork(self) -> ChunkMemory:
        """A memory with the same chunks that grows on its own from here."""
        ...
