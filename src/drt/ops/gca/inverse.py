"""Who retrieved a chunk: the inverse of an index tensor, for gradients of the memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SEGMENT = 32
"""Slots of a list that one program goes through; longer lists are shared by several."""


class InverseIndex(NamedTuple):
    """The slots that read each of the B * M chunks of the memory ("sources"), in a fixed order.

    Slots are numbered (b * C + c) * K + k. A list longer than `SEGMENT` is cut into segments, so
    that a chunk everybody retrieves does not hold up the rest; a chunk nobody retrieves has one
    empty segment. Everything is int32 on the indices' device, of sizes known without looking at
    the numbers.
    """

    order: Tensor
    """(B * C * K,) slots by source, unused ones last."""
    starts: Tensor
    """(B * M + 1,) where in `order` the list of a source begins."""
    sources: Tensor
    """(num_segments,) the source of each segment; B * M for those not needed."""
    segments: Tensor
    """(B * M + 1,) the first segment of each source."""
    partials: Tensor
    """(B * M + 1,) segments before this source that share a list with others."""

    @property
    def num_partials(self) -> int:
        """Segments that share a list with others, at most: a list of n > 32 has under n / 16."""
        return self.order.shape[0] * 2 // SEGMENT


def invert_indices(indices: Tensor, num_chunks: int) -> InverseIndex:
    """Work out the lists, once for all layers that share a retrieval; the host does not wait.

    Args:
        indices: (B, C, K) int64 in [-1, M).
        num_chunks: M, chunks of the memory of a row.
    """
    batch, num_sources = indices.shape[0], indices.shape[0] * num_chunks
    row = torch.arange(batch, device=indices.device)[:, None, None] * num_chunks
    found = torch.where(indices < 0, num_sources, indices + row).flatten()
    found, order = found.sort(stable=True)
    source = torch.arange(num_sources + 1, device=indices.device)
    starts = torch.searchsorted(found, source)
    counts = starts.diff()
    parts = ((counts + SEGMENT - 1) // SEGMENT).clamp(min=1)
    segments, partials = _begins(parts), _begins(torch.where(parts > 1, parts, 0))
    number = torch.arange(num_sources + len(found) // SEGMENT, device=indices.device)
    sources = torch.searchsorted(segments, number, right=True) - 1
    return InverseIndex(*(x.int() for x in (order, starts, sources, segments, partials)))


def _begins(sizes: Tensor) -> Tensor:
    """(n,) sizes -> (n + 1,) where each begins, and the end."""
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def inverse_of_order(weights: Tensor) -> InverseIndex:
    """What `invert_indices` gives for the indices that `in_order(weights)` stands for."""
    number = torch.arange(weights.numel() + 1, device=weights.device, dtype=torch.int32)
    return InverseIndex(number[:-1], number, number[:-1], number, torch.zeros_like(number))
