"""Causal retrieval: landmark scores, Gumbel top-k, and the weights that carry the gradient.

Source: arXiv 2410.01651, section 3; the equations are in docs/method.md. C landmarks have C x C
scores. They are computed a tile at a time, forward and again in backward, so that no more than
`SCORE_BYTES` of them are ever held. A row of up to 2,048 chunks is one tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drt.ops.gca import InverseIndex
from drt.precision import sum_dtype, without_autocast

SCORE_BYTES = 1 << 24
"""Bytes of a tile of float32 scores, of all rows of a batch together.

Working memory is a few times that. Small enough for the caches of a CPU, where it was chosen; it
was never run on a GPU."""

ALIGNMENT = 256
"""Tiles begin and end at multiples of this many landmarks, or at the last one."""


class Retrieval(NamedTuple):
    """What n landmarks of each row retrieved, best first when there was no noise."""

    indices: Tensor
    """(B, n, K) int64 chunk numbers, -1 where there were fewer than K candidates."""
    weights: Tensor
    """(B, n, K) softmax of the scores over the retrieved chunks; 0 at -1."""
    scores: Tensor
    """(B, n, K) landmark scores without noise; -inf at -1."""


class RetrievedChunks(NamedTuple):
    """What grouped cross-attention reads: a pool of chunks and, per block of queries, which."""

    keys: Tensor
    """(M, S, G, D), shared by all rows."""
    values: Tensor
    """(M, S, G, D)."""
    lengths: Tensor | None
    """(M,) int64 content tokens of each chunk; None = S."""
    indices: Tensor
    """(B, num_blocks, K) int64 into the M chunks, -1 = none."""
    weights: Tensor
    """(B, num_blocks, K)."""
    in_order: bool = False
    """Whether the slots hold the chunks 0, 1, ... of M = B * num_blocks * K in turn; an empty one,
    of index -1, then holds some chunk with weight 0."""
    inverse: InverseIndex | None = None
    """Of the indices, for the backward of all layers that attend to them; None = not needed."""


def gumbel_noise(like: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the shape, dtype and device of `like`."""
    return torch.empty_like(like).exponential_(generator=generator).log_().neg_()


def retrieval_weights(scores: Tensor, indices: Tensor) -> Retrieval:
    """Softmax over the retrieved chunks.

    Args:
        scores: (..., K) noise-free scores; anything where `indices` is -1.
        indices: (..., K) int64 chunk numbers, -1 = none.

    Returns:
        The `Retrieval`; a row that retrieved nothing has weights 0 and a zero gradient.
    """
    none = indices < 0
    masked = scores.masked_fill(none, float("-inf"))
    # A row of -inf has no softmax: give it finite scores first, and weights 0 after.
    finite = masked.masked_fill(none.all(-1, keepdim=True), 0.0)
    return Retrieval(indices, finite.softmax(-1).masked_fill(none, 0.0), masked)


def retrieve_chunks(
    queries: Tensor,
    landmarks: Tensor,
    limits: Tensor,
    *,
    topk: int,
    firsts: Tensor | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    score_bytes: int = SCORE_BYTES,
) -> Retrieval:
    """Choose the top-k candidates of each query; gradients flow through the scores of the chosen.

    Args:
        queries: (B, n, L) of any floating dtype; scores are float32, or float64 for float64.
        landmarks: (B, M, L).
        limits: (B, n) int64 on the CPU; a query may retrieve chunks below its limit.
        topk: chunks to retrieve K.
        firsts: (B, n) int64 on the CPU, the first chunk that it may retrieve; None = 0.
        noise: scale of the Gumbel noise; it moves the choice and never the weights.
        generator: source of the noise; None = torch's default generator.
        score_bytes: bytes of a tile of float32 scores.

    Returns:
        The `Retrieval`, best first by score plus noise.
    """
    firsts = torch.zeros_like(limits) if firsts is None else firsts
    search = _Search(limits, firsts, topk, noise, generator, score_bytes)
    scores, indices = _ChosenScores.apply(queries, landmarks, search)
    return retrieval_weights(scores, indices)


class _Tile(NamedTuple):
    """Some queries and some landmarks."""

    queries: slice
    landmarks: slice
    all_candidates: bool
    """Whether each of the queries may retrieve each of the landmarks."""


class _Found(NamedTuple):
    """The best candidates of n queries, (B, n, up to K) each, best first."""

    keys: Tensor
    """What they were chosen by: scores with noise, -inf at what is no candidate."""
    scores: Tensor
    indices: Tensor


@dataclass(frozen=True, eq=False)
class _Search:
    """All of a search but its vectors."""

    limits: Tensor
    firsts: Tensor
    topk: int
    noise: float
    generator: torch.Generator | None
    score_bytes: int

    def blocks(self, num_landmarks: int) -> Iterator[list[_Tile]]:
        """For one block of queries after the other, tiles that hold all of its candidates."""
        batch, count = self.limits.shape
        # As many queries as go with all landmarks, or a square.
        cells = max(self.score_bytes // (4 * max(batch, 1)), 1)
        height = max(cells // max(num_landmarks, 1), math.isqrt(cells))
        for begin in range(0, count, height):
            rows = slice(begin, min(begin + height, count))
            width = cells // (rows.stop - rows.start)
            yield list(self._tiles(rows, width, num_landmarks))

    def _tiles(self, rows: slice, width: int, num_landmarks: int) -> Iterator[_Tile]:
        # On the CPU, so that nothing waits for the device.
        limits, firsts = self.limits[:, rows], self.firsts[:, rows]
        if limits.numel() == 0:
            return
        width = width // ALIGNMENT * ALIGNMENT or width
        low = max(int(firsts.min()), 0) // ALIGNMENT * ALIGNMENT
        high = min(-(-int(limits.max()) // ALIGNMENT) * ALIGNMENT, num_landmarks)
        for start in range(low, high, width):
            stop = min(start + width, high)
            everything = int(firsts.max()) <= start and stop <= int(limits.min())
            yield _Tile(rows, slice(start, stop), everything)


class _ChosenScores(torch.autograd.Function):
    """(B, n, L) queries and (B, M, L) landmarks to (B, n, K) noise-free scores and chunk numbers.

    Backward makes the sparse gradient of a tile dense: two products that add in one fixed order,
    where adding row by row would need atomics.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, landmarks: Tensor, search: _Search
    ) -> tuple[Tensor, Tensor]:
        device, shape = queries.device, (*queries.shape[:2], search.topk)
        scores = torch.zeros(shape, dtype=sum_dtype(queries), device=device)
        indices = torch.full(shape, -1, dtype=torch.int64, device=device)
        firsts = search.firsts.to(device, non_blocking=True)[..., None]
        limits = search.limits.to(device, non_blocking=True)[..., None]
        vectors = queries.to(scores.dtype), landmarks.to(scores.dtype)
        with without_autocast(device.type):
            for tiles in search.blocks(landmarks.shape[1]):
                if tiles:
                    parts = [_search_tile(*vectors, firsts, limits, tile, search) for tile in tiles]
                    found = _best(parts, search.topk)
                    place = (slice(None), tiles[0].queries, slice(found.keys.shape[-1]))
                    scores[place] = found.scores
                    indices[place] = found.indices.masked_fill(found.keys == -math.inf, -1)
        ctx.save_for_backward(queries, landmarks, indices)
        ctx.search = search
        ctx.mark_non_differentiable(indices)
        return scores, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _none: Tensor) -> tuple[Tensor, Tensor, None]:
        queries, landmarks, indices = ctx.saved_tensors
        vectors = queries.to(grad.dtype), landmarks.to(grad.dtype)
        grads = [torch.zeros_like(x) for x in vectors]
        grad = grad / math.sqrt(queries.shape[-1])
        with without_autocast(queries.device.type):
            for tile in chain.from_iterable(ctx.search.blocks(landmarks.shape[1])):
                slopes = _dense(grad, indices, tile)
                grads[0][:, tile.queries] += slopes @ vectors[1][:, tile.landmarks]
                grads[1][:, tile.landmarks] += (vectors[0][:, tile.queries].mT @ slopes).mT
        return grads[0].to(queries.dtype), grads[1].to(landmarks.dtype), None


def _search_tile(
    queries: Tensor, landmarks: Tensor, firsts: Tensor, limits: Tensor, tile: _Tile, search: _Search
) -> _Found:
    """The best of one tile; `firsts` and `limits` are (B, n, 1) on the device."""
    start, stop = tile.landmarks.start, tile.landmarks.stop
    scores = queries[:, tile.queries] @ landmarks[:, tile.landmarks].mT
    scores /= math.sqrt(queries.shape[-1])
    keys = scores
    if search.noise > 0:
        keys = gumbel_noise(scores, generator=search.generator).mul_(search.noise).add_(scores)
    if not tile.all_candidates:
        number = torch.arange(start, stop, device=scores.device)
        closed = (number < firsts[:, tile.queries]) | (number >= limits[:, tile.queries])
        keys = keys.masked_fill(closed, float("-inf"))
    best, index = keys.topk(min(search.topk, stop - start), dim=-1)
    return _Found(best, scores.gather(-1, index), index + start)


def _best(parts: list[_Found], topk: int) -> _Found:
    """The best of the tiles of a block."""
    if len(parts) == 1:
        return parts[0]
    keys, scores, indices = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    keys, order = keys.topk(min(topk, keys.shape[-1]), dim=-1)
    return _Found(keys, scores.gather(-1, order), indices.gather(-1, order))


def _dense(grad: Tensor, indices: Tensor, tile: _Tile) -> Tensor:
    """The gradient of a tile's scores, zero but at the chosen, from that of the chosen."""
    start, stop = tile.landmarks.start, tile.landmarks.stop
    local, part = indices[:, tile.queries] - start, grad[:, tile.queries]
    outside = (local < 0) | (local >= stop - start)
    slopes = part.new_zeros(*part.shape[:2], stop - start)
    return slopes.scatter_add_(-1, local.masked_fill(outside, 0), part.masked_fill(outside, 0.0))
