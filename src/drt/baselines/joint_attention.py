"""Chunked cross-attention: one softmax over all tokens of all retrieved chunks.

Source: RETRO (arXiv 2112.04426) and RPT (arXiv 2306.13421). Of a query q that retrieved the chunks
j with tokens t,

    e_jt = u_j exp(q . k_jt / sqrt(D))       o = sum_jt e_jt v_jt / (b + sum_jt e_jt)

with b = 1 for softmax-plus-one, else 0. There u_j = 1: how well a chunk matched says nothing, and a
retriever gets no gradient. Where it is to learn, u_j = w_j, its weight: log w_j is added to the
scores of the chunk's tokens, and the softmax passes the gradient on. Plain operators of PyTorch,
not yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from drt.configuration import DRTConfig
from drt.layers import GroupedCrossAttention
from drt.precision import sum_dtype
from drt.retrieval import RetrievedChunks


class JointCrossAttention(GroupedCrossAttention):
    """As `GroupedCrossAttention`, with one softmax over all retrieved tokens.

    Args:
        config: the model's.
        weighted: whether the retrieval weights enter, as log w_j.
    """

    def __init__(self, config: DRTConfig, *, weighted: bool) -> None:
        super().__init__(config)
        self.weighted = weighted

    def forward(self, blocks: Tensor, chunks: RetrievedChunks) -> Tensor:
        """(B, num_blocks, Q, E) -> (B, num_blocks, Q, E)."""
        query = self.q_proj(blocks).unflatten(-1, (-1, self.head_dim)).flatten(0, 1)
        out = joint_cross_attention(
            query, chunks, weighted=self.weighted, softmax_plus_one=self.softmax_plus_one
        )
        return self.o_proj(out.flatten(-2)).view(blocks.shape)


def joint_cross_attention(
    query: Tensor, chunks: RetrievedChunks, *, weighted: bool, softmax_plus_one: bool
) -> Tensor:
    """Attend from each block of queries to its retrieved chunks with one softmax.

    Backward gathers the chunks and computes the probabilities again: of a layer only the inputs
    are kept. Scores are rounded to the query's dtype; the softmax is float32 (float64 for float64).

    Args:
        query: (N, Q, H, D), the queries of all blocks of all rows.
        chunks: what the N blocks retrieved; slots of index -1 or weight 0 are empty.
        weighted: whether log w_j is added to the scores of chunk j.
        softmax_plus_one: whether there is an implicit key of score and value zero, one for all.

    Returns:
        (N, Q, H, D); 0 for a block that retrieved nothing.
    """
    indices, weights = chunks.indices.flatten(0, 1), chunks.weights.flatten(0, 1)
    bias = _bias(indices, weights.to(sum_dtype(query)), chunks, weighted, softmax_plus_one)
    keys, values = (x.to(query.dtype).transpose(1, 2) for x in (chunks.keys, chunks.values))
    inputs = (query, keys, values, indices.clamp_min(0), bias)
    # What a compiled graph keeps is for its compiler to choose.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out = checkpoint(_attend, *inputs, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(out, Tensor)
        return out
    return _attend(*inputs)


def _bias(
    indices: Tensor,
    weights: Tensor,
    chunks: RetrievedChunks,
    weighted: bool,
    softmax_plus_one: bool,
) -> Tensor:
    """(N, K * S + 1) what is added to the scores of all tokens, and to 0, the implicit key's."""
    empty = (indices < 0) | (weights <= 0)
    # The logarithm of an empty slot's 0 would have no gradient.
    logs = weights.masked_fill(empty, 1.0).log() if weighted else torch.zeros_like(weights)
    size = chunks.keys.shape[1]
    bias = logs.masked_fill(empty, float("-inf"))[..., None].expand(-1, -1, size)
    if chunks.lengths is not None:
        lengths = chunks.lengths[indices.clamp_min(0)]
        unused = torch.arange(size, device=lengths.device) >= lengths[..., None]
        bias = bias.masked_fill(unused, float("-inf"))
    bias = bias.flatten(1)
    if softmax_plus_one:
        return pad(bias, (0, 1))
    # A block without chunks still needs something to attend to: its value is 0, as its output.
    implicit = torch.zeros_like(bias[:, :1])
    return torch.cat([bias, implicit.masked_fill(~empty.all(-1, keepdim=True), -torch.inf)], 1)


def _attend(query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, bias: Tensor) -> Tensor:
    """(N, Q, H, D) queries, (M, G, S, D) memory, (N, K) indices of it -> (N, Q, H, D)."""
    count, length, heads, width = query.shape
    # Query heads of one key/value head stand as more queries of it: (N, G, R * Q, D).
    per_kv_head = heads // keys.shape[1]
    folded = query.transpose(1, 2).reshape(count, keys.shape[1], per_kv_head * length, width)
    scores = folded * width**-0.5 @ _gathered(keys, indices).mT
    scores = pad(scores.to(bias.dtype), (0, 1)) + bias[:, None, None]
    probabilities = scores.softmax(-1)[..., :-1].to(query.dtype)
    out = probabilities @ _gathered(values, indices)
    return out.view(count, heads, length, width).transpose(1, 2)


def _gathered(memory: Tensor, indices: Tensor) -> Tensor:
    """(M, G, S, D) at (N, K) -> (N, G, K * S, D)."""
    kv_heads, _, width = memory.shape[1:]
    rows = indices[:, None] * kv_heads + torch.arange(kv_heads, device=memory.device)[:, None]
    found = memory.flatten(0, 1).index_select(0, rows.flatten())
    return found.view(len(indices), kv_heads, -1, width)
