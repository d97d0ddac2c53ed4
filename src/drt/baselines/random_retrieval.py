"""Chunks chosen at random among the causal candidates, each set of K as likely as any other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from drt.retrieval import Retrieval, retrieval_weights

# Draws are from 0 .. 2^62 - 1: their remainders by any number of chunks are as good as uniform.
_DRAW_BITS = 62


def draw_freely(count: Tensor, *, topk: int, generator: torch.Generator | None) -> Tensor:
    """Draws for `retrieve_at_random` from a generator, other ones at each call.

    Args:
        count: (B, n) int64, candidates of each landmark.
        topk: chunks to retrieve K.
        generator: the source; None = torch's default.

    Returns:
        (B, n, K) int64 on the CPU, from 0 to 2^62 - 1.
    """
    device = torch.device("cpu") if generator is None else generator.device
    shape = (*count.shape, topk)
    return torch.randint(1 << _DRAW_BITS, shape, generator=generator, device=device).cpu()


def draw_by_count(count: Tensor, *, topk: int, seed: int, group: int) -> Tensor:
    """Draws that the seed, the group and the number of candidates decide, and nothing else.

    A landmark has as many candidates as chunks of its document came before (and lie outside of its
    window, where those inside are excluded), however its row is cut, padded or batched.

    Args:
        count: (B, n) int64 on the CPU, candidates of each landmark.
        topk: chunks to retrieve K.
        seed: any number.
        group: number of the retrieval group.

    Returns:
        (B, n, K) int64 on the CPU, from 0 to 2^62 - 1.
    """
    key = _mixed(np.array([seed & (1 << 64) - 1], dtype=np.uint64))
    for part in (np.array([group]), count.numpy()[..., None], np.arange(topk)):
        key = _mixed(key + part.astype(np.uint64))
    return torch.from_numpy((key >> np.uint64(64 - _DRAW_BITS)).astype(np.int64))


def _mixed(key: np.ndarray) -> np.ndarray:
    """One step of the splitmix64 generator: uint64 to uint64, all bits on all bits."""
    key = key + np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ key >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ key >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return key ^ key >> np.uint64(31)


def retrieve_at_random(draws: Tensor, count: Tensor, firsts: Tensor | None) -> Tensor:
    """A uniformly random set of min(K, count) of each landmark's candidates.

    Floyd's algorithm: one draw a chunk, whatever the number of candidates.

    Args:
        draws: (B, n, K) int64, from 0 to 2^62 - 1, uniform.
        count: (B, n) int64, candidates of each landmark; below 1 there are none.
        firsts: (B, n) int64, the first candidate; None = 0.

    Returns:
        (B, n, K) int64 chunk numbers, -1 at the right where there are fewer than K.
    """
    topk = draws.shape[-1]
    chosen = torch.full_like(draws, -1)
    for slot in range(topk):
        # Of the candidates 0 .. last one is added: the drawn one, or `last` if that was taken.
        last = count - topk + slot
        drawn = draws[..., slot] % (last + 1).clamp_min(1)
        taken = (chosen == drawn[..., None]).any(-1)
        chosen[..., slot] = torch.where(taken, last, drawn).masked_fill(last < 0, -1)
    if firsts is not None:
        chosen = torch.where(chosen < 0, -1, chosen + firsts[..., None])
    return chosen.flip(-1)


def weigh_uniformly(indices: Tensor) -> Retrieval:
    """The `Retrieval` of (B, n, K) chunks of equal weights, 0 at -1; scores 0."""
    return retrieval_weights(torch.zeros(indices.shape, device=indices.device), indices)
