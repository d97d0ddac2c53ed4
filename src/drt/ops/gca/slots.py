"""What a call of the blocked backend reads: its slots, and the memory as rows of numbers."""

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """The retrieval of one call without what is unused: N' of its N = B * C chunks of queries.

    A slot is unused if its index is -1 or its chunk has length 0. Chunks of queries that use none
    are dropped, the others sorted by falling number of used slots, and used slots come first. An
    unused slot among used ones has weight 0 and reads what the first slot of its chunk of queries
    reads: nothing that the chunk does not read anyway can then reach its output, without any mask.
    """

    order: Tensor | None
    """(N') int64: the chunk of queries in [0, N); None if all of them are kept in order."""
    position: Tensor | None
    """(N', K) int64: where a slot was among the K of its chunk; None with `order`."""
    batch: Tensor
    """(N') int64 in [0, B): the row."""
    chunks: Tensor
    """(N', K) int64 in [0, M): the chunk of the memory to read."""
    weights: Tensor
    """(N', K) in the accumulation dtype."""
    counts: list[int]
    """(N') used slots, falling."""
    hidden: Tensor | None
    """(N', K, S) bool: tokens past the end of their chunk; None without lengths."""
    ragged: list[bool]
    """(N') whether `hidden` is set somewhere."""
    itself: bool
    """Chunk c of a row retrieves chunk c of its memory and nothing else: no index is needed."""

    def add_to(self, total: Tensor, part: Tensor) -> None:
        """Add (N', K) numbers in the order of the slots to (N, K), leaving out unused slots."""
        if self.order is None or self.position is None:
            total += part
        else:
            used = torch.arange(part.shape[1]) < torch.tensor(self.counts)[:, None]
            part = part.masked_fill(~used, 0.0)
            total.index_put_((self.order[:, None], self.position), part, accumulate=True)


class Rows(NamedTuple):
    """A memory as rows of S * D numbers, one per chunk and key/value head."""

    rows: Tensor
    """(number of rows, S * D), a view if the memory is head-major."""
    index: Tensor
    """(N', G, K) int64: the row of each slot and head."""


def resolve_slots(
    indices: Tensor, weights: Tensor, key_lengths: Tensor | None, *, key: Tensor, dtype: torch.dtype
) -> Slots:
    """Work out the slots of a call once.

    Args:
        indices: (B, C, K) int64 in [-1, M), with K and M positive.
        weights: (B, C, K) floating.
        key_lengths: (B, M) int64 in [0, S], or None if every chunk has S tokens.
        key: (B, M, S, G, D), for its shape.
        dtype: the accumulation dtype.
    """
    num_rows, per_row, topk = indices.shape
    memory_chunks, size = key.shape[1:3]
    batch = torch.arange(num_rows).repeat_interleave(per_row)
    chunks, slot_weights = indices.flatten(0, 1), weights.to(dtype).flatten(0, 1)
    used = chunks >= 0
    if key_lengths is not None:
        used &= key_lengths[batch[:, None], chunks.clamp(min=0)] > 0
    order = position = None
    counts = [topk] * len(batch)
    if not bool(used.all()):
        order, position, used, counts = _sort(used)
        batch, chunks = batch[order], chunks[order[:, None], position]
        chunks = torch.where(used, chunks, chunks[:, :1])
        slot_weights = slot_weights[order[:, None], position].masked_fill(~used, 0.0)
    hidden, ragged = None, [False] * len(batch)
    if key_lengths is not None:
        hidden = torch.arange(size) >= key_lengths[batch[:, None], chunks][..., None]
        ragged = hidden.flatten(1).any(-1).tolist()
    itself = order is None and topk == 1 and per_row == memory_chunks
    itself = itself and bool((indices[..., 0] == torch.arange(per_row)).all())
    return Slots(order, position, batch, chunks, slot_weights, counts, hidden, ragged, itself)


def _sort(used: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Order and position as in `Slots`, `used` in that order, and its counts, from (N, K) bool."""
    counts, order = used.sum(-1).sort(descending=True, stable=True)
    kept = int(counts.count_nonzero())
    counts, order = counts[:kept], order[:kept]
    used, position = used[order].sort(descending=True, stable=True)
    return order, position, used, counts.tolist()


def head_major_rows(memory: Tensor, batch: Tensor, chunks: Tensor) -> Rows:
    """View a (B, M, S, G, D) memory as rows, and find those of (N', K) chunks in (N') rows.

    A memory whose (S, D) planes are not contiguous is copied: what is retrieved if that is less
    than the memory, else the memory.
    """
    if not has_contiguous_planes(memory):
        if chunks.numel() < memory.shape[0] * memory.shape[1]:
            memory = memory[batch[:, None], chunks].flatten(0, 1)[None]
            batch = torch.zeros_like(batch)
            chunks = torch.arange(chunks.numel()).view_as(chunks)
        memory = memory.transpose(2, 3).contiguous().transpose(2, 3)
    plane = memory.shape[2] * memory.shape[4]
    outer = (0, 1, 3)
    # In planes; the stride of a dimension of size 1 may be anything, and is multiplied by 0.
    steps = [memory.stride(dim) // plane for dim in outer]
    last = sum(step * (memory.shape[dim] - 1) for step, dim in zip(steps, outer, strict=True))
    per_head = torch.arange(memory.shape[3])[:, None] * steps[2]
    index = (batch[:, None] * steps[0] + chunks * steps[1])[:, None] + per_head
    return Rows(memory.as_strided((last + 1, plane), (plane, 1)), index)


def has_contiguous_planes(memory: Tensor) -> bool:
    """Whether (S, D) is contiguous and a whole number of such planes apart everywhere."""
    size, width = memory.shape[2], memory.shape[4]
    inner = (width == 1 or memory.stride(4) == 1) and (size == 1 or memory.stride(2) == width)
    apart = (memory.stride(dim) for dim in (0, 1, 3) if memory.shape[dim] > 1)
    return inner and all(stride % (size * width) == 0 for stride in apart)
