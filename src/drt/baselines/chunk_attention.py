"""Attention of each position and head to chunks of its own choice, linear in the positions.

Gathering K chunks for every position and head would cost S times what the positions themselves do.
Instead the pairs of a query and a chunk are sorted by chunk and cut into tiles, each a few queries
of one chunk, so that a chunk is read once for many queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drt.precision import sum_dtype, without_autocast

# Queries of a tile: more of them share what is read, fewer leave less of it empty.
_TILE = 64


class Found(NamedTuple):
    """The k chunks that each query retrieved, in the order of the text, what is missing first."""

    scores: Tensor
    """(B, P, H, k) float32 or float64, -inf where there was no candidate."""
    indices: Tensor
    """(B, P, H, k) int64, -1 where there was no candidate."""


def search_landmarks(
    query: Tensor, landmarks: Tensor, num_candidates: Tensor, *, topk: int
) -> Found:
    """Find the chunks whose landmarks score highest: r = <q, l> / sqrt(D), in full precision.

    Args:
        query: (B, P, H, D) floating.
        landmarks: (B, G, C, D) floating, C at least 1; query head h reads head h // (H // G).
        num_candidates: (P,) int64, a query may retrieve the chunks below this number.
        topk: chunks to retrieve; k is at most C.

    Returns:
        The scores, differentiable, and the chunks.
    """
    batch, count, heads, width = query.shape
    kv_heads, chunks = landmarks.shape[1:3]
    compute = sum_dtype(query)
    with without_autocast(query.device.type):
        rows = query.to(compute).view(batch, count, kv_heads, -1, width).permute(0, 2, 3, 1, 4)
        products = rows.flatten(2, 3) @ landmarks.to(compute).mT * width**-0.5
        scores = products.view(batch, kv_heads, heads // kv_heads, count, chunks)
        missing = torch.arange(chunks, device=query.device) >= num_candidates[:, None]
        scores = scores.masked_fill(missing, float("-inf"))
        best, indices = scores.topk(min(topk, chunks), dim=-1)
    indices = indices.masked_fill(best.isneginf(), -1)
    indices, order = indices.sort(dim=-1)
    best = best.gather(-1, order)
    # (B, G, R, P, k) to (B, P, H, k)
    return Found(*(x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in (best, indices)))


def attend_to_chunks(query: Tensor, indices: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend from each query to one chunk: softmax_t(<q, k_jt> / sqrt(D)) v_j.

    Args:
        query: (B, P, H, k, D) floating, one for each chunk that is attended to.
        indices: (B, P, H, k) int64 in [-1, C), the chunks; -1 = none.
        key: (B, G, C, S, D); query head h reads head h // (H // G).
        value: as `key`.

    Returns:
        (B, P, H, k, D) in the dtype of `query`; finite and of no meaning where there is no chunk.
    """
    kv_heads, chunks, _, width = key.shape[1:]
    tiles = _sort_into_tiles(_numbers(indices, kv_heads, chunks), key.shape[0] * kv_heads * chunks)
    flat = query.reshape(-1, width)
    rows = flat.new_zeros(tiles.chunks.numel() * tiles.size, width).index_copy(
        0, tiles.places, flat
    )
    keys, values = (
        x.to(query.dtype).flatten(0, 2).index_select(0, tiles.chunks) for x in (key, value)
    )
    scores = rows.view(-1, tiles.size, width) @ keys.mT * width**-0.5
    probs = scores.softmax(-1, dtype=sum_dtype(scores)).to(values.dtype)
    out = (probs @ values).view(-1, width).index_select(0, tiles.places)
    return out.view(query.shape).to(query.dtype)


def _numbers(indices: Tensor, kv_heads: int, chunks: int) -> Tensor:
    """(B, P, H, k) chunks to (N,) numbers of the (B * G * C) chunks; one past the last = none."""
    batch, _, heads, _ = indices.shape
    row = torch.arange(batch, device=indices.device)[:, None, None, None]
    head = torch.arange(heads, device=indices.device)[:, None] // (heads // kv_heads)
    number = (row * kv_heads + head) * chunks + indices
    return number.masked_fill(indices < 0, batch * kv_heads * chunks).flatten()


class _Tiles(NamedTuple):
    """Where each pair goes; a tile holds `size` pairs of one chunk, or fewer."""

    size: int
    places: Tensor
    """(N,) int64: tile * size + place in it."""
    chunks: Tensor
    """(tiles,) int64: the chunk of each tile."""


@torch.no_grad()
def _sort_into_tiles(number: Tensor, chunks: int) -> _Tiles:
    """Tiles for (N,) pairs of these chunk numbers, in [0, chunks].

    As many tiles as could be needed, whatever the numbers, so that the host need not wait for them.
    """
    pairs = number.numel()
    size = min(_TILE, 1 << max(pairs // chunks, 1).bit_length() - 1)
    count = (pairs + min(pairs, chunks + 1) * (size - 1)) // size
    ordered, order = number.sort()
    ends = torch.searchsorted(ordered, torch.arange(chunks + 1, device=number.device), right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tile_ends = ((ends - starts + size - 1) // size).cumsum(0)
    first_tile = torch.cat([tile_ends.new_zeros(1), tile_ends[:-1]])
    rank = torch.arange(pairs, device=number.device) - starts[ordered]
    places = torch.empty_like(order)
    places[order] = first_tile[ordered] * size + rank
    tile = torch.arange(count, device=number.device)
    owner = torch.searchsorted(tile_ends, tile, right=True)
    # Tiles that nobody needs, and that of pairs without a chunk, read any.
    return _Tiles(size, places, owner.clamp_max(chunks - 1))
