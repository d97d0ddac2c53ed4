"""What the tests of the memory share: chunks by seed, and the oracle, plain Python lists."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

LANDMARK_SIZE = 6
SHAPE = (3, 2, 4)


class MadeChunks(NamedTuple):
    landmarks: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor | None = None


def make_chunks(
    counts: Sequence[int], seed: int, *, shape: Sequence[int] = SHAPE, ragged: bool = False
) -> MadeChunks:
    """Random chunks for rows of the given counts; what must not matter is NaN."""
    generator = torch.Generator().manual_seed(seed)
    batch, most, size = len(counts), max(counts, default=0), shape[0]
    landmarks = torch.randn(batch, most, LANDMARK_SIZE, generator=generator)
    keys = torch.randn(batch, most, *shape, generator=generator)
    values = torch.randn(batch, most, *shape, generator=generator)
    if not ragged and len(set(counts)) <= 1:
        return MadeChunks(landmarks, keys, values)
    lengths = torch.randint(1, size + 1, (batch, most), generator=generator)
    lengths = lengths if ragged else torch.full_like(lengths, size)
    lengths[torch.arange(most) >= torch.tensor(counts)[:, None]] = 0
    beyond = (torch.arange(size) >= lengths[:, :, None])[..., None, None]
    nan = float("nan")
    return MadeChunks(
        landmarks.masked_fill(lengths[:, :, None] == 0, nan),
        keys.masked_fill(beyond, nan),
        values.masked_fill(beyond, nan),
        lengths,
    )


@dataclass
class ListMemory:
    """The oracle: each row a list of (landmark, keys, values, length)."""

    rows: list[list[tuple[Tensor, Tensor, Tensor, int]]] = field(default_factory=list)

    def append(self, made: MadeChunks) -> None:
        self.rows = self.rows or [[] for _ in range(made.keys.shape[0])]
        for b, row in enumerate(self.rows):
            for i in range(made.keys.shape[1]):
                size = made.keys.shape[2]
                length = size if made.lengths is None else int(made.lengths[b, i])
                if length:
                    row.append((made.landmarks[b, i], made.keys[b, i], made.values[b, i], length))

    def select_rows(self, rows: Sequence[int]) -> "ListMemory":
        return ListMemory([list(self.rows[row]) for row in rows])

    def scores(self, row: int, query: Tensor, first: int, limit: int) -> list[float]:
        """All scores that a query may see, best first, in float64."""
        visible = self.rows[row][max(first, 0) : max(limit, 0)]
        scale = query.shape[0] ** -0.5
        found = [float(query.double() @ chunk[0].double()) * scale for chunk in visible]
        return sorted(found, reverse=True)


class Oracle(NamedTuple):
    make_chunks: Callable[..., MadeChunks]
    memory: type[ListMemory]


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle(make_chunks, ListMemory)
