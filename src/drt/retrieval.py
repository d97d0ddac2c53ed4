"""Causal retrieval: landmark scores, Gumbel top-k, and the weights that carry the gradient.

Source: arXiv 2410.01651, section 3; the equations are in docs/method.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def gumbel_noise(like: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the shape, dtype and device of `like`."""
    return -torch.empty_like(like).exponential_(generator=generator).log()


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


def select_chunks(
    scores: Tensor,
    limits: Tensor,
    *,
    topk: int,
    firsts: Tensor | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Retrieval:
    """Choose the top-k candidates of each landmark among all chunks.

    Args:
        scores: (B, n, M) float scores of M chunks for n landmarks.
        limits: (B, n) int64; a landmark may retrieve chunks below its limit.
        topk: chunks to retrieve K.
        firsts: (B, n) int64, the first chunk that it may retrieve; None = 0.
        noise: scale of the Gumbel noise; it moves the choice and never the weights.
        generator: source of the noise; None = torch's default generator.
    """
    num_chunks = scores.shape[-1]
    number = torch.arange(num_chunks, device=scores.device)
    candidate = number < limits.to(scores.device)[..., None]
    if firsts is not None:
        candidate &= number >= firsts.to(scores.device)[..., None]
    keys = scores.detach()
    if noise > 0:
        keys = keys + noise * gumbel_noise(keys, generator=generator)
    keys = keys.masked_fill(~candidate, float("-inf"))
    best, indices = keys.topk(min(topk, num_chunks), dim=-1)
    chosen = scores.gather(-1, indices)
    indices = indices.masked_fill(best == float("-inf"), -1)
    missing = (0, topk - indices.shape[-1])
    chosen = torch.nn.functional.pad(chosen, missing)
    indices = torch.nn.functional.pad(indices, missing, value=-1)
    return retrieval_weights(chosen, indices)
