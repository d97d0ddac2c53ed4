"""Which chunks each block of a segment attends to, and which the next segment goes on with."""

from __future__ import annotations

import torch
from torch import Tensor

from drt.chunking import SegmentLayout
from drt.memory import ChunkMemory, Chunks
from drt.ops.gca import invert_indices, wants_inverse
from drt.retrieval import Retrieval, RetrievedChunks
from drt.state import CurrentRetrieval, DRTState


def chunks_of_blocks(
    group: int,
    retrieval: Retrieval,
    layout: SegmentLayout,
    memory: ChunkMemory,
    state: DRTState | None,
) -> RetrievedChunks | None:
    """The chunks that each block of the segment attends to; the state keeps what holds after it.

    A block goes on with the retrieval that was current before the segment, uses what a landmark of
    the segment retrieved, or, where a document begins, nothing.
    """
    current = None if state is None else state.current[group]
    if layout.num_closed == 0 and layout.num_blocks == 1:
        return None if current is None else current.chunks
    pool, numbers = _candidates(retrieval, memory, current)
    if state is not None:
        held = _of_sources(pool._replace(indices=numbers), layout.final_sources[:, None]).indices
        last = _of_sources(pool, layout.final_sources[:, None])
        state.current[group] = CurrentRetrieval(held, _compact(last))
    return _with_inverse(_of_sources(pool, layout.block_sources))


def _with_inverse(chunks: RetrievedChunks) -> RetrievedChunks:
    """The same with what the backward of each layer would work out by itself otherwise."""
    if not (torch.is_grad_enabled() and chunks.keys.requires_grad and wants_inverse(chunks.keys)):
        return chunks
    # The blocks of all rows read one pool.
    indices = chunks.indices.flatten(0, 1)[None]
    return chunks._replace(inverse=invert_indices(indices, chunks.keys.shape[0]))


def _candidates(
    retrieval: Retrieval, memory: ChunkMemory, current: CurrentRetrieval | None
) -> tuple[RetrievedChunks, Tensor]:
    """The current retrieval and then those of the landmarks, and their (B, 1 + C, K) numbers."""
    if current is None:
        before = retrieval.indices.new_full(
            (len(retrieval.indices), 1, retrieval.indices.shape[2]), -1
        )
        kept = retrieval.weights.new_zeros(before.shape)
    else:
        before, kept = current.numbers, current.chunks.weights
    numbers = torch.cat([before, retrieval.indices], 1)
    weights = torch.cat([kept, retrieval.weights], 1)
    if current is None or retrieval.indices.shape[1] != 1:
        return RetrievedChunks(*memory.gather(numbers), weights), numbers
    # One landmark, as in decoding: what is held need not be fetched again.
    held, new = current.chunks, memory.gather(retrieval.indices)
    moved = torch.where(new.indices < 0, -1, new.indices + len(held.keys))
    pool = RetrievedChunks(
        _join(held.keys, new.keys),
        _join(held.values, new.values),
        _join_lengths(held, new),
        torch.cat([held.indices, moved], 1),
        weights,
    )
    return pool, numbers


def _join(first: Tensor, second: Tensor) -> Tensor:
    """(M, S, G, D) one after the other, head-major as they are."""
    return torch.cat([first.transpose(1, 2), second.transpose(1, 2)]).transpose(1, 2)


def _join_lengths(first: RetrievedChunks, second: Chunks) -> Tensor | None:
    if first.lengths is None and second.lengths is None:
        return None
    size = first.keys.shape[1]
    full = [x.keys.new_full((len(x.keys),), size, dtype=torch.int64) for x in (first, second)]
    pairs = zip((first.lengths, second.lengths), full, strict=True)
    return torch.cat([whole if lengths is None else lengths for lengths, whole in pairs])


def _of_sources(chunks: RetrievedChunks, sources: Tensor) -> RetrievedChunks:
    """The retrievals (B, NB, K) that the (NB,) or (B, NB) `sources` name; -1 names none."""
    if sources.dim() == 1:
        sources = sources[None]
    batch, _, topk = chunks.indices.shape
    index = sources.expand(batch, -1)[..., None].expand(-1, -1, topk)
    place = index.clamp_min(0)
    return chunks._replace(
        indices=chunks.indices.gather(1, place).masked_fill(index < 0, -1),
        weights=chunks.weights.gather(1, place).masked_fill(index < 0, 0.0),
    )


def _compact(chunks: RetrievedChunks) -> RetrievedChunks:
    """Only the chunks that are in use, B * K of them in the order of use.

    Whether a slot is empty is not asked, as the host would have to wait for the answer: an empty
    one holds some chunk, with weight 0.
    """
    none = chunks.indices < 0
    flat = chunks.indices.flatten().clamp_min(0)
    order = torch.arange(len(flat), device=flat.device).view(chunks.indices.shape)
    return RetrievedChunks(
        chunks.keys.transpose(1, 2)[flat].transpose(1, 2),
        chunks.values.transpose(1, 2)[flat].transpose(1, 2),
        None if chunks.lengths is None else chunks.lengths[flat],
        order.masked_fill(none, -1),
        chunks.weights,
        in_order=True,
    )
