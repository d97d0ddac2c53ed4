"""The memory of inference: chunks in preallocated slabs on the model's device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drt.memory.interface import Chunks
from drt.retrieval import Retrieval, retrieval_weights


@dataclass
class _Slab:
    """Storage for a fixed number of chunks; `shared` ones are never written again."""

    landmarks: Tensor  # (B, capacity, E)
    keys: Tensor  # (B, capacity, G, S, D)
    values: Tensor  # (B, capacity, G, S, D)
    used: int = 0
    shared: bool = False

    def copy(self) -> _Slab:
        return _Slab(self.landmarks.clone(), self.keys.clone(), self.values.clone(), self.used)


class SlabMemory:
    """Chunks in slabs of `slab_size`: growing never copies, a fork shares all full slabs.

    Search is exact and tiled by slab, so no score matrix over all chunks exists.

    Args:
        slab_size: chunks per slab and row.
        dtype: storage dtype of keys and values; None = as appended. Landmarks are kept in float32.
    """

    def __init__(self, *, slab_size: int = 256, dtype: torch.dtype | None = None) -> None:
        if slab_size < 1:
            raise ValueError(f"slab_size must be at least 1, got {slab_size}")
        self.slab_size = slab_size
        self.dtype = dtype
        self._slabs: list[_Slab] = []

    def __len__(self) -> int:
        return sum(slab.used for slab in self._slabs)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for landmarks, keys and values."""
        tensors = ((s.landmarks, s.keys, s.values) for s in self._slabs)
        return sum(t.numel() * t.element_size() for group in tensors for t in group)

    def append(self, landmarks: Tensor, keys: Tensor, values: Tensor) -> None:
        """As `ChunkMemory.append`; the chunks leave the autograd graph."""
        landmarks, keys, values = landmarks.detach(), keys.detach(), values.detach()
        done, total = 0, landmarks.shape[1]
        while done < total:
            slab = self._writable_slab(landmarks, keys)
            count = min(total - done, self.slab_size - slab.used)
            source, target = slice(done, done + count), slice(slab.used, slab.used + count)
            slab.landmarks[:, target] = landmarks[:, source]
            slab.keys[:, target] = keys[:, source].transpose(2, 3).to(slab.keys.dtype)
            slab.values[:, target] = values[:, source].transpose(2, 3).to(slab.values.dtype)
            slab.used += count
            done += count

    def _writable_slab(self, landmarks: Tensor, keys: Tensor) -> _Slab:
        if self._slabs and self._slabs[-1].used < self.slab_size:
            if self._slabs[-1].shared:
                self._slabs[-1] = self._slabs[-1].copy()
            return self._slabs[-1]
        batch, _, size, heads, width = keys.shape
        shape = (batch, self.slab_size, heads, size, width)
        dtype = self.dtype or keys.dtype
        slab = _Slab(
            landmarks.new_empty(batch, self.slab_size, landmarks.shape[-1], dtype=torch.float32),
            keys.new_empty(shape, dtype=dtype),
            keys.new_empty(shape, dtype=dtype),
        )
        self._slabs.append(slab)
        return slab

    def search(self, queries: Tensor, limits: Tensor, *, topk: int) -> Retrieval:
        """As `ChunkMemory.search`: exact, one slab of scores at a time."""
        batch, count, width = queries.shape
        best = queries.new_full((batch, count, topk), float("-inf"), dtype=torch.float32)
        indices = limits.new_full((batch, count, topk), -1)
        scaled = queries.float() / math.sqrt(width)
        furthest = int(limits.max()) if count else 0
        for number, slab in enumerate(self._slabs):
            start = number * self.slab_size
            if start >= furthest:
                break
            scores = scaled @ slab.landmarks[:, : slab.used].transpose(1, 2)
            best, indices = _merge(best, indices, scores, start, limits)
        return retrieval_weights(best, indices)

    def gather(self, indices: Tensor) -> Chunks:
        """Copies of the named chunks: M = n * K, one per index; unwritten where it is -1."""
        batch, count, topk = indices.shape
        if not self._slabs:
            raise ValueError("the memory is empty: there is nothing to gather")
        first = self._slabs[0].keys
        flat = indices.reshape(batch, -1)
        shape = (batch, count * topk, *first.shape[2:])
        keys, values = first.new_zeros(shape), first.new_zeros(shape)
        rows = torch.arange(batch, device=flat.device)[:, None].expand_as(flat)
        slab_of = flat // self.slab_size
        for number in slab_of[flat >= 0].unique().tolist():
            here = slab_of == number
            slab, row, within = self._slabs[number], rows[here], flat[here] % self.slab_size
            keys[here] = slab.keys[row, within]
            values[here] = slab.values[row, within]
        local = torch.arange(count * topk, device=flat.device).view(1, count, topk)
        local = local.expand(batch, -1, -1).masked_fill(indices < 0, -1)
        return Chunks(keys.transpose(2, 3), values.transpose(2, 3), local)

    def fork(self) -> SlabMemory:
        """As `ChunkMemory.fork`: full slabs are shared, a part-filled one is copied on write."""
        other = SlabMemory(slab_size=self.slab_size, dtype=self.dtype)
        for slab in self._slabs:
            slab.shared = True
        # A slab object per memory, the same storage: each counts its own `used`.
        other._slabs = [_Slab(s.landmarks, s.keys, s.values, s.used, True) for s in self._slabs]
        return other


def _merge(
    best: Tensor, indices: Tensor, scores: Tensor, start: int, limits: Tensor
) -> tuple[Tensor, Tensor]:
    """Fold one tile of scores, chunks `start` onwards, into the running top-k."""
    tile = scores.shape[-1]
    if start + tile > int(limits.min()):
        number = torch.arange(start, start + tile, device=scores.device)
        scores = scores.masked_fill(number >= limits[:, None], float("-inf"))
    topk = best.shape[-1]
    # A tile that beats no row's k-th best changes nothing: the usual case far into a long text.
    if not bool((scores.amax(-1) > best[..., -1]).any()):
        return best, indices
    tile_best, tile_indices = scores.topk(min(topk, tile), dim=-1)
    tile_indices = (tile_indices + start).masked_fill(tile_best == float("-inf"), -1)
    merged, order = torch.cat([best, tile_best], -1).topk(topk, dim=-1)
    return merged, torch.cat([indices, tile_indices], -1).gather(-1, order)
