"""Inputs of grouped cross-attention, and what one would write without this library.

B rows, C chunks of Q queries, M chunks of S tokens in memory, K retrieved for each chunk of
queries, H query heads, G key/value heads, D width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Sizes(NamedTuple):
    """Sizes of one call with one row (B 1) and as many chunks in memory as there are of queries."""

    chunks: int
    num_queries: int = 64
    chunk_size: int = 64
    topk: int = 8
    heads: int = 12
    kv_heads: int = 12
    width: int = 64


class Inputs(NamedTuple):
    """Arguments of `grouped_cross_attention`, in order."""

    query: Tensor
    key: Tensor
    value: Tensor
    indices: Tensor
    weights: Tensor

    def to_float64(self) -> "Inputs":
        """The same numbers, exactly, as leaves of their own."""
        return Inputs(
            *(
                x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
                for x in self
            )
        )


def make_inputs(dtype: torch.dtype, sizes: Sizes, *, device: torch.device | None = None) -> Inputs:
    """Every chunk retrieves K of all C chunks; the memory is head-major; all want gradients."""
    count, num_queries, size, topk, heads, kv_heads, width = sizes
    place = torch.device("cpu") if device is None else device
    generator = torch.Generator(place).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=place)

    def memory() -> Tensor:
        return normal(1, count, kv_heads, size, width).transpose(2, 3).requires_grad_()

    scores = torch.randn(1, count, topk, generator=generator, device=place)
    return Inputs(
        normal(1, count, num_queries, heads, width).requires_grad_(),
        memory(),
        memory(),
        torch.randint(0, count, (1, count, topk), generator=generator, device=place),
        scores.softmax(-1).requires_grad_(),
    )


def causal_indices(indices: Tensor) -> Tensor:
    """As many random chunks before each chunk, with repetition; itself for the first one.

    As in a text, early chunks are then retrieved more often than late ones.

    Args:
        indices: (1, C, K) int64, for shape and device.
    """
    count = indices.shape[1]
    generator = torch.Generator(indices.device).manual_seed(0)
    drawn = torch.rand(indices.shape, generator=generator, device=indices.device)
    before = torch.arange(count, device=indices.device)[None, :, None]
    return torch.minimum((drawn * before).long(), (before - 1).clamp(min=0))


def gathered(memory: Tensor, indices: Tensor) -> Tensor:
    """(B, M, S, G, D) -> (B, C, K, G, S, D)."""
    batch = torch.arange(memory.shape[0], device=memory.device)[:, None, None]
    return memory.transpose(2, 3)[batch, indices]


def chunk_sdpa(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, weights: Tensor
) -> Tensor:
    """SDPA over each retrieved chunk, then the weighted sum; the K slots of a chunk are heads."""
    keys, values = (gathered(x, indices).flatten(0, 1).flatten(1, 2) for x in (key, value))
    topk, heads = indices.shape[2], query.shape[3]
    queries = query.transpose(2, 3)[:, :, None].expand(-1, -1, topk, -1, -1, -1)
    queries = queries.flatten(0, 1).flatten(1, 2)
    grouped = heads != key.shape[3]
    outputs = scaled_dot_product_attention(queries, keys, values, enable_gqa=grouped)
    outputs = outputs.unflatten(1, (topk, heads)).unflatten(0, indices.shape[:2])
    weights = weights.to(query.dtype)[..., None, None, None]
    return (outputs * weights).sum(2).transpose(2, 3)


def grouped_einsum(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, weights: Tensor
) -> Tensor:
    """All slots of a chunk in one product on each side of the softmax."""
    keys, values = gathered(key, indices), gathered(value, indices)
    queries = (query * query.shape[-1] ** -0.5).unflatten(3, (key.shape[3], -1))
    scores = torch.einsum("bcqgrd,bckgsd->bcgrqks", queries, keys)
    weights = weights.to(query.dtype)[:, :, None, None, None, :, None]
    out = torch.einsum("bcgrqks,bckgsd->bcqgrd", scores.softmax(-1) * weights, values)
    return out.flatten(3, 4)
