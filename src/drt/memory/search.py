"""Exact search: the k greatest inner products, a tile of landmarks at a time.

No more scores than one tile's are ever held. On a CPU, a tile in which no query's best score beats
its k-th best so far is done with after one pass over it, which is most tiles of a long memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

QUERY_BLOCK = 256
"""Queries that are scored together."""

TILE_BYTES = {"cpu": {4: 1 << 22, 2: 1 << 24}, "cuda": {4: 1 << 26, 2: 1 << 26}}
"""Bytes of the scores of a tile, by device and bytes of a score.

Measured by benchmarks/search.py on a CPU; a GPU wants few large tiles, this size was never run."""

LARGEST_TILE = 1 << 16
"""Landmarks in a tile."""

BLOCK = 32
"""Scores of which the maximum is taken first."""

OVERFETCH = 4
"""Candidates of a bfloat16 scan, as a multiple of k: its scores are rounded to 8 bits."""


class Best(NamedTuple):
    """The best chunks of n queries, best first."""

    scores: Tensor
    """(n, K) float32; -inf where there are fewer than K."""
    indices: Tensor
    """(n, K) int64 positions among all landmarks; -1 where there are fewer than K."""


class Bounds(NamedTuple):
    """Query i may find landmarks firsts[i] .. limits[i] - 1; both (n,) int64 on the CPU."""

    firsts: Tensor
    limits: Tensor


class _Tile(NamedTuple):
    start: int
    stop: int
    pieces: list[Tensor]


def search_tiles(
    segments: Sequence[Tensor], queries: Tensor, bounds: Bounds, *, topk: int, tile: int = 0
) -> Best:
    """The best landmarks of each query by inner product.

    Args:
        segments: (m, L) landmarks, one behind the other.
        queries: (n, L). In bfloat16 the products are bfloat16; else float32.
        bounds: what each query may find.
        topk: how many K.
        tile: landmarks in a tile; 0 = by the number of queries.
    """
    blocks = [
        _search_block(segments, part, Bounds(firsts, limits), topk, tile)
        for part, firsts, limits in zip(
            queries.split(QUERY_BLOCK), *(x.split(QUERY_BLOCK) for x in bounds), strict=True
        )
    ]
    if len(blocks) == 1:
        return blocks[0]
    return Best(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _search_block(
    segments: Sequence[Tensor], queries: Tensor, bounds: Bounds, topk: int, tile: int
) -> Best:
    count = queries.shape[0]
    shape = (count, topk)
    best = Best(
        torch.full(shape, float("-inf"), device=queries.device),
        torch.full(shape, -1, dtype=torch.int64, device=queries.device),
    )
    low, high = (int(bounds.firsts.min()), int(bounds.limits.max())) if count else (0, 0)
    if low >= high or topk == 0:
        return best
    size = min(tile or tile_size(queries), high - low)
    buffer = queries.new_empty(count, size)
    all_open = range(int(bounds.firsts.max()), int(bounds.limits.min()) + 1)
    for part in _tiles(segments, low, high, size):
        # Maxima of bfloat16 take a CPU longer than to widen the scores and take them then.
        scores = _scores(queries, part, buffer).float()
        if part.start not in all_open or part.stop not in all_open:
            _close(scores, part.start, bounds)
        _merge(best, scores, part.start)
    best.indices.masked_fill_(best.scores == float("-inf"), -1)
    return best


def tile_size(queries: Tensor) -> int:
    """Landmarks in a tile for (n, L) queries."""
    kind = "cpu" if queries.device.type == "cpu" else "cuda"
    wanted = TILE_BYTES[kind][queries.itemsize] // (queries.itemsize * queries.shape[0])
    return min(LARGEST_TILE, wanted)


def _tiles(segments: Sequence[Tensor], low: int, high: int, size: int) -> Iterator[_Tile]:
    """Landmarks low .. high - 1 in tiles of up to `size`, each of pieces of segments."""
    pieces: list[Tensor] = []
    start = 0
    position = tile_start = low
    for segment in segments:
        stop = start + segment.shape[0]
        while position < min(stop, high):
            end = min(stop, high, tile_start + size)
            whole = position == start and end == stop
            pieces.append(segment if whole else segment[position - start : end - start])
            position = end
            if position in (tile_start + size, high):
                yield _Tile(tile_start, position, pieces)
                tile_start, pieces = position, []
        start = stop


def _scores(queries: Tensor, part: _Tile, buffer: Tensor) -> Tensor:
    """(n, tile) inner products, in the buffer."""
    scores = buffer[:, : part.stop - part.start]
    start = 0
    for piece in part.pieces:
        stop = start + piece.shape[0]
        piece = piece if piece.dtype == queries.dtype else piece.to(queries.dtype)
        torch.mm(queries, piece.t(), out=scores[:, start:stop])
        start = stop
    return scores


def _close(scores: Tensor, start: int, bounds: Bounds) -> None:
    """Make what a query may not find -inf."""
    numbers = torch.arange(start, start + scores.shape[1], device=scores.device)
    firsts, limits = (x.to(scores.device)[:, None] for x in bounds)
    scores.masked_fill_((numbers < firsts) | (numbers >= limits), float("-inf"))


def _merge(best: Best, scores: Tensor, start: int) -> None:
    """Fold one tile of scores into the running best, in place."""
    # Of strided blocks: their maxima cost hardly more than reading the tile.
    blocks = scores.unflatten(1, (BLOCK if scores.shape[1] % BLOCK == 0 else 1, -1))
    maxima = blocks.amax(1)
    rows = slice(None)
    if scores.device.type == "cpu":
        # Elsewhere the question would make the processor wait for the device.
        rows = (maxima.amax(1) > best.scores[:, -1]).nonzero().squeeze(1)
        if len(rows) == 0:
            return
    values, positions = _top(blocks, maxima, rows, best.scores.shape[1])
    values = torch.cat([best.scores[rows], values], 1)
    indices = torch.cat([best.indices[rows], positions + start], 1)
    values, order = values.topk(best.scores.shape[1], dim=1)
    best.scores[rows], best.indices[rows] = values, indices.gather(1, order)


def _top(blocks: Tensor, maxima: Tensor, rows: Tensor | slice, topk: int) -> tuple[Tensor, Tensor]:
    """The greatest `topk` scores of some rows of a tile, and where in it they are.

    The k greatest are in the k blocks whose maxima are greatest.

    Args:
        blocks: (n, height, width) scores; block j is all [:, :, j], score (i, j) the tile's number
            i * width + j.
        maxima: (n, width).
        rows: which rows.
        topk: how many, or all there are.
    """
    height, width = blocks.shape[1:]
    chosen = maxima[rows].topk(min(topk, width), dim=1).indices
    if height == 1:
        return maxima[rows].gather(1, chosen), chosen
    index = chosen[:, None].expand(-1, height, -1)
    lines = torch.arange(height, device=index.device)[:, None]
    which = torch.arange(len(blocks), device=index.device)[rows]
    kept = blocks[which[:, None, None], lines, index]
    positions = lines * width + index
    values, order = kept.flatten(1).topk(min(topk, height * width), dim=1)
    return values, positions.flatten(1).gather(1, order)


def rescored(segments: Sequence[Tensor], queries: Tensor, found: Best, *, topk: int) -> Best:
    """The best `topk` of each query's candidates by their float32 inner products.

    Args:
        segments: (m, L) landmarks, one behind the other.
        queries: (n, L) float32.
        found: (n, J) candidates.
        topk: how many K, at most J.
    """
    if not segments:
        return Best(found.scores[:, :topk], found.indices[:, :topk])
    blocks = zip(queries.split(QUERY_BLOCK), found.indices.split(QUERY_BLOCK), strict=True)
    best = [_rescored_block(segments, part, indices, topk) for part, indices in blocks]
    return best[0] if len(best) == 1 else Best(*map(torch.cat, zip(*best, strict=True)))


def _rescored_block(
    segments: Sequence[Tensor], queries: Tensor, indices: Tensor, topk: int
) -> Best:
    wanted, inverse = indices.clamp(min=0).unique(return_inverse=True)
    scores = (queries @ _rows(segments, wanted).float().t()).gather(1, inverse)
    best, order = scores.masked_fill(indices < 0, float("-inf")).topk(topk, dim=1)
    return Best(best, indices.gather(1, order))


def _rows(segments: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """(m, L) landmarks at ascending positions."""
    ends = torch.tensor([0] + [segment.shape[0] for segment in segments]).cumsum(0)
    borders = torch.searchsorted(wanted, ends.to(wanted.device)).tolist()
    starts = ends.tolist()
    parts = [
        segment[wanted[low:high] - start]
        for segment, start, low, high in zip(
            segments, starts[:-1], borders[:-1], borders[1:], strict=True
        )
        if low < high
    ]
    return torch.cat(parts)
