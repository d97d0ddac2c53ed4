"""The arithmetic of the blocked backend.

A block of n chunks gathers the keys of all its slots straight into the layout of one batched GEMM,
(n * G, K * S, D) against queries (n * G, R * Q, D) with R = H // G, takes the softmax over each S,
folds the slot weights into its denominator and multiplies with the gathered values. The backward
recomputes the probabilities p of a block and, with g the gradient of the output and P_k = g V_k^T,
uses

    dS_k = w_k p_k (P_k - rowsum(p_k P_k)),  dq = scale sum_k dS_k K_k,  dK_k = scale dS_k^T q,
    dV_k = w_k p_k^T g,  dw_k = <V_k, p_k^T g>.

It all holds for softmax-plus-one too, since the value of its extra key is zero.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drt.ops.gca.slots import Rows, has_contiguous_planes, head_major_rows, resolve_slots
from drt.precision import sum_dtype

# Bytes per thread of one block's scores, and of its gathered keys: about a level-two cache.
_TILE_BYTES = 3 << 19


class Options(NamedTuple):
    """The arguments of a call that are not tensors."""

    scale: float
    softmax_plus_one: bool


class Gradients(NamedTuple):
    """Where gradients go, shaped as the inputs; None for an input that wants none."""

    query: Tensor | None
    """(B, C, Q, H, D) in query's dtype, overwritten."""
    key: Tensor | None
    """(B, M, S, G, D) in key's dtype, overwritten; contiguous, or its transpose(2, 3) is."""
    value: Tensor | None
    """(B, M, S, G, D), as key."""
    weights: Tensor | None
    """(B, C, K) in the accumulation dtype, added to."""


class _Block(NamedTuple):
    """Consecutive chunks of queries in the order of the slots, and as many slots as they use."""

    span: slice
    """Of the N' sorted chunks."""
    chunks: slice | Tensor
    """Of the N chunks of the caller."""
    size: int
    topk: int
    ragged: bool


class BlockedPass:
    """One call, its chunks of queries flattened to N = B * C, and the tiles its blocks reuse.

    Arguments as in `grouped_cross_attention`, none of them empty. Of a block of n chunks that use
    k slots, queries are tiles (n * G, R * Q, D), scores (n * G, R * Q, k * S), memory
    (n * G, k * S, D).
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        indices: Tensor,
        weights: Tensor,
        key_lengths: Tensor | None,
        options: Options,
    ) -> None:
        self.S, self.G, self.D = key.shape[2:]
        self.Q, self.R = query.shape[2], query.shape[3] // self.G
        self.options = options
        self.dtype, self.wide = query.dtype, sum_dtype(query)
        self.slots = resolve_slots(indices, weights, key_lengths, key=key, dtype=self.wide)
        self.query = self._flat(query)
        self.layouts: dict[tuple[int, ...], Rows] = {}
        self.keys, self.values = self._rows(key), self._rows(value)
        self.buffers: dict[str, Tensor] = {}

    def forward(self, output: Tensor) -> None:
        """Fill the contiguous (B, C, Q, H, D) output."""
        target = self._target(output)
        for block in self._blocks():
            query = self._load("query", block, self.query)
            p = self._probabilities(block, query, self.slots.weights)
            # The keys are not needed any more: their tile takes the values.
            values = self._gather("key", block, self.values)
            result = torch.bmm(p, values, out=self._tile("result", query.shape))
            self._store(block, result, target)

    def backward(self, grad: Tensor, found: Gradients) -> None:
        """Fill `found` from the (B, C, Q, H, D) gradient of the output."""
        source = self._flat(grad)
        d_query = None if found.query is None else self._target(found.query)
        d_key, d_value = self._accumulator(found.key), self._accumulator(found.value)
        d_weights = None if found.weights is None else torch.zeros_like(self.slots.weights)
        for block in self._blocks():
            query = self._load("query", block, self.query)
            g = self._load("gradient", block, source)
            p = self._probabilities(block, query, None)
            values = self._gather("value", block, self.values)
            wide = self._widened("wide value", values)
            if d_value is not None or d_weights is not None:
                self._backward_values(block, p, g, wide, d_value, d_weights)
            if d_query is not None or d_key is not None:
                self._weigh(block, wide)
                weighted = wide if wide is values else values.copy_(wide)
                self._backward_scores(block, p, g, query, weighted, d_query, d_key)
        self._finish(d_key, found.key)
        self._finish(d_value, found.value)
        if found.weights is not None and d_weights is not None:
            self.slots.add_to(found.weights.flatten(0, 1), d_weights)

    def _probabilities(self, block: _Block, query: Tensor, weights: Tensor | None) -> Tensor:
        """The softmax over each S, times the slot weights if given; leaves the tile "key"."""
        keys = self._gather("key", block, self.keys)
        tile = self._tile("score", (*query.shape[:2], block.topk * self.S))
        # Powers of two are several times cheaper than powers of e, and the GEMM scales for free.
        alpha = self.options.scale / math.log(2.0)
        torch.baddbmm(tile, query, keys.mT, beta=0, alpha=alpha, out=tile)
        wide = self._widened("wide score", tile)
        scores = wide.view(block.size, self.G, -1, block.topk, self.S)
        if block.ragged:
            # No slot is hidden altogether: those without tokens are unused.
            scores.masked_fill_(self._hidden(block)[:, None, None], -math.inf)
        top = scores.amax(-1, keepdim=True)
        total = scores.sub_(top).exp2_().sum(-1, keepdim=True)
        if self.options.softmax_plus_one:
            # An overflow to infinity here makes the probabilities 0, which they then are.
            total += top.neg_().exp2_()
        factor = total.reciprocal_()
        if weights is not None:
            factor *= weights[block.span, None, None, : block.topk, None]
        scores *= factor
        return tile if tile is wide else tile.copy_(wide)

    def _backward_values(
        self,
        block: _Block,
        p: Tensor,
        g: Tensor,
        values: Tensor,
        d_value: Rows | Tensor | None,
        d_weights: Tensor | None,
    ) -> None:
        """Gradients of the values and of the slot weights, both from p^T g."""
        product = torch.bmm(p.mT, g, out=self._tile("memory gradient", values.shape))
        wide = self._widened("wide gradient", product)
        if d_weights is not None:
            terms = torch.mul(wide, values, out=self._tile("wide score", values.shape, self.wide))
            terms = terms.view(block.size, self.G, block.topk, -1)
            torch.sum(terms, (1, 3), out=d_weights[block.span, : block.topk])
        if d_value is not None:
            self._scatter(block, self._weigh(block, wide), d_value)

    def _backward_scores(
        self,
        block: _Block,
        p: Tensor,
        g: Tensor,
        query: Tensor,
        weighted_values: Tensor,
        d_query: Tensor | None,
        d_key: Rows | Tensor | None,
    ) -> None:
        """Gradients of the queries and the keys; overwrites the tile "key"."""
        scale = self.options.scale
        d_scores = torch.bmm(g, weighted_values.mT, out=self._tile("score gradient", p.shape))
        per_slot = d_scores.view(-1, self.S)
        torch.ops.aten._softmax_backward_data.out(
            per_slot, p.view(-1, self.S), -1, self.dtype, grad_input=per_slot
        )
        keys = self._tile("key", weighted_values.shape)
        if d_query is not None:
            result = self._tile("result", query.shape)
            torch.baddbmm(result, d_scores, keys, beta=0, alpha=scale, out=result)
            self._store(block, result, d_query)
        if d_key is not None:
            torch.baddbmm(keys, d_scores.mT, query, beta=0, alpha=scale, out=keys)
            self._scatter(block, self._widened("wide gradient", keys), d_key)

    def _blocks(self) -> Iterator[_Block]:
        """As many chunks at a time as fit a tile, spread evenly."""
        slots, start = self.slots, 0
        while start < len(slots.counts):
            topk, left = slots.counts[start], len(slots.counts) - start
            widest = self.G * max(self.R * self.Q, self.D) * self.dtype.itemsize
            fitting = max(1, _TILE_BYTES * torch.get_num_threads() // (topk * self.S * widest))
            size = math.ceil(left / math.ceil(left / fitting))
            span = slice(start, start + size)
            chunks = span if slots.order is None else slots.order[span]
            yield _Block(span, chunks, size, topk, any(slots.ragged[span]))
            start += size

    def _flat(self, tensor: Tensor) -> Tensor:
        """(B, C, Q, H, D) -> (N, G, R, Q, D), a view wherever B and C merge."""
        return tensor.flatten(0, 1).unflatten(2, (self.G, self.R)).permute(0, 2, 3, 1, 4)

    def _target(self, tensor: Tensor) -> Tensor:
        """`_flat`, with zeros where no slot is used."""
        flat = self._flat(tensor)
        return flat if len(self.slots.counts) == len(flat) else flat.zero_()

    def _tile(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """A tile in the buffer of that name, which holds what was last put there."""
        numel = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < numel:
            self.buffers[name] = torch.empty(numel, dtype=dtype or self.dtype)
        return self.buffers[name][:numel].view(shape)

    def _widened(self, name: str, tile: Tensor) -> Tensor:
        """The tile in the accumulation dtype: itself, or a copy in the buffer of that name."""
        if tile.dtype == self.wide:
            return tile
        return self._tile(name, tile.shape, self.wide).copy_(tile)

    def _load(self, name: str, block: _Block, source: Tensor) -> Tensor:
        """A block of (N, G, R, Q, D) as (n * G, R * Q, D)."""
        shape = (block.size, self.G, self.R, self.Q, self.D)
        return self._tile(name, shape).copy_(source[block.chunks]).view(-1, self.R * self.Q, self.D)

    def _store(self, block: _Block, tile: Tensor, target: Tensor) -> None:
        """The reverse of `_load`."""
        target[block.chunks] = tile.view(block.size, self.G, self.R, self.Q, self.D)

    def _rows(self, memory: Tensor) -> Rows | Tensor:
        """What `_gather` and `_scatter` take: rows and indices, or (N, G, S, D) read in order."""
        if self.slots.itself:
            return memory.transpose(2, 3).flatten(0, 1)
        # Keys, values and their gradients mostly share one layout, and then one index.
        known = self.layouts.get(memory.stride())
        if known is not None:
            return known._replace(rows=memory.as_strided(known.rows.shape, known.rows.stride()))
        found = head_major_rows(memory, self.slots.batch, self.slots.chunks)
        if has_contiguous_planes(memory):
            self.layouts[memory.stride()] = found
        return found

    def _gather(self, name: str, block: _Block, memory: Rows | Tensor) -> Tensor:
        """The memory tile of a block, 0 past the end of a chunk."""
        slots = self._tile(name, (block.size, self.G, block.topk, self.S, self.D))
        if isinstance(memory, Tensor):
            slots.squeeze(2).copy_(memory[block.span])
        else:
            index = memory.index[block.span, :, : block.topk].flatten()
            torch.index_select(memory.rows, 0, index, out=slots.view(len(index), -1))
        if block.ragged:
            slots.masked_fill_(self._hidden(block)[:, None, :, :, None], 0.0)
        return slots.view(-1, block.topk * self.S, self.D)

    def _scatter(self, block: _Block, tile: Tensor, memory: Rows | Tensor) -> None:
        """Add a memory tile to what the block reads."""
        if isinstance(memory, Tensor):
            memory[block.span] = tile.view(block.size, self.G, self.S, self.D)
        else:
            index = memory.index[block.span, :, : block.topk].flatten()
            memory.rows.index_add_(0, index, tile.view(len(index), -1))

    def _hidden(self, block: _Block) -> Tensor:
        """(n, k, S) bool."""
        assert self.slots.hidden is not None
        return self.slots.hidden[block.span, : block.topk]

    def _weigh(self, block: _Block, tile: Tensor) -> Tensor:
        """Multiply a memory tile by the slot weights, in place."""
        weights = self.slots.weights[block.span, None, : block.topk, None]
        tile.view(block.size, self.G, block.topk, -1).mul_(weights)
        return tile

    def _accumulator(self, gradient: Tensor | None) -> Rows | Tensor | None:
        """What to scatter to: the gradient itself if it is precise enough and laid out for it."""
        if gradient is None or self.slots.itself:
            return None if gradient is None else self._rows(gradient)
        if not self._accumulates(gradient):
            head_major = gradient.transpose(2, 3).shape
            gradient = torch.empty(head_major, dtype=self.wide).transpose(2, 3)
        return self._rows(gradient.zero_())

    def _accumulates(self, gradient: Tensor) -> bool:
        return gradient.dtype == self.wide and has_contiguous_planes(gradient)

    def _finish(self, memory: Rows | Tensor | None, gradient: Tensor | None) -> None:
        """Copy what was accumulated into the gradient, unless it is the gradient."""
        if gradient is not None and isinstance(memory, Rows) and not self._accumulates(gradient):
            head_major = gradient.transpose(2, 3)
            head_major.copy_(memory.rows.view(head_major.shape))
