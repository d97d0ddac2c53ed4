"""A row of a memory: a list of views of slabs, cheap to copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from drt.memory.slabs import EncodedChunks, RamSlab, Slab

FIRST_CAPACITY = 16
"""Chunks of the first slab of a row, and of one behind a slab that another row has gone on in."""

_POSITION_BITS = 32
_POSITIONS = (1 << _POSITION_BITS) - 1


class View(NamedTuple):
    """The first `used` chunks of a slab, which may hold more of another row's."""

    slab: Slab
    used: int


class Place(NamedTuple):
    """Chunks of one slab that are to be read."""

    slab: Slab
    positions: np.ndarray
    """(m,) int64, ascending."""


class Row:
    """Chunks 0 .. count - 1 of one row."""

    def __init__(self, views: list[View] | None = None) -> None:
        self.views = views or []
        self.count = sum(view.used for view in self.views)
        self.next_capacity = FIRST_CAPACITY
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    def copy(self) -> Row:
        """A row with the same chunks that grows on its own, in slabs that start small again."""
        return Row(list(self.views))

    def prefix(self, count: int) -> Row:
        """A row with the first `count` chunks that grows on its own."""
        views = []
        for slab, used in self.views:
            if count > 0:
                views.append(View(slab, min(used, count)))
            count -= used
        return Row(views)

    def append(
        self, chunks: EncodedChunks, new_slab: Callable[[int], RamSlab], largest: int
    ) -> None:
        """Add chunks in the slab at the end where this row may, and in new ones."""
        done, total = 0, len(chunks.lengths)
        while done < total:
            slab = self._open_slab(total - done, new_slab, largest)
            count = min(total - done, slab.capacity - slab.filled)
            slab.append(chunks.part(done, done + count))
            self.extend(count)
            done += count

    def _open_slab(self, wanted: int, new_slab: Callable[[int], RamSlab], largest: int) -> RamSlab:
        if self.views:
            slab, used = self.views[-1]
            # More in it than this row uses: another row has gone on there.
            if isinstance(slab, RamSlab) and used == slab.filled < slab.capacity:
                return slab
            if used < slab.capacity:
                # The rest is a fork's, which may be gone already: doubling after each would grow
                # without end.
                self.next_capacity = FIRST_CAPACITY
        capacity = min(largest, max(self.next_capacity, wanted))
        self.next_capacity = 2 * capacity
        slab = new_slab(capacity)
        self.add(slab, 0)
        return slab

    def add(self, slab: Slab, used: int) -> None:
        """Go on in another slab."""
        self.views.append(View(slab, used))
        self.count += used
        self._index = None

    def extend(self, count: int) -> None:
        """Use `count` chunks more of the last slab."""
        slab, used = self.views[-1]
        self.views[-1] = View(slab, used + count)
        self.count += count

    def keys(self, numbers: np.ndarray) -> np.ndarray:
        """(m,) int64 that name each chunk by slab and position, the same in all rows; -1 = none.

        Args:
            numbers: (m,) int64 chunk numbers of this row, -1 = none.

        Raises:
            ValueError: a number beyond the row's chunks.
        """
        if len(numbers) and (numbers.max() >= self.count or numbers.min() < -1):
            wrong = numbers[(numbers >= self.count) | (numbers < -1)][0]
            raise ValueError(f"chunk number {wrong}: the row has {self.count} chunks")
        if not self.views:
            return numbers
        if self._index is None:
            used = np.array([0] + [view.used for view in self.views[:-1]])
            slabs = np.array([view.slab.number for view in self.views])
            self._index = np.cumsum(used), slabs
        starts, slabs = self._index
        which = np.searchsorted(starts, numbers, side="right") - 1
        keys = (slabs[which] << _POSITION_BITS) | (numbers - starts[which])
        return np.where(numbers < 0, -1, keys)

    def blocks(self, size: int) -> Iterator[EncodedChunks]:
        """All chunks in order, up to `size` at a time, with records in host memory."""
        for slab, used in self.views:
            for start in range(0, used, size):
                positions = np.arange(start, min(start + size, used))
                yield read_chunks(Place(slab, positions))


def places(rows: list[Row], keys: np.ndarray) -> Iterator[Place]:
    """What to read for (M,) ascending keys of `Row.keys`, slab by slab."""
    numbers, positions = keys >> _POSITION_BITS, keys & _POSITIONS
    borders = np.flatnonzero(np.diff(numbers)) + 1
    slabs = {view.slab.number: view.slab for row in rows for view in row.views}
    for group, number in zip(np.split(positions, borders), numbers[[0, *borders]], strict=True):
        yield Place(slabs[int(number)], group)


def read_chunks(place: Place) -> EncodedChunks:
    """Copies of the chunks at one place, with records in host memory."""
    slab, positions = place
    device = slab.records.device if isinstance(slab, RamSlab) else torch.device("cpu")
    records = torch.empty(len(positions), slab.record_bytes, dtype=torch.uint8, device=device)
    slab.read(positions, records)
    landmarks = slab.landmarks[torch.from_numpy(positions).to(slab.landmarks.device)]
    return EncodedChunks(landmarks, records.cpu(), slab.lengths[positions])
