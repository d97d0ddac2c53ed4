"""Sliding-window attention by PyTorch's variable-length FlashAttention, which knows windows.

The rows of a batch are its sequences, laid end to end. It aligns queries and keys of a sequence at
their ends, as we do, and counts in its window the keys to the left of a query without the query's
own.
"""

from collections.abc import Collection
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drt.ops.gpu import CAPABILITY, is_capable
from drt.ops.window.call import Call

_DTYPES = (torch.float16, torch.bfloat16)
# Limits of the FlashAttention kernels.
_MULTIPLE_OF, _LARGEST_WIDTH = 8, 256


class Packed(NamedTuple):
    """Arguments of `varlen_attn`, in its order, and its window."""

    query: Tensor
    """(B * T, H, D)."""
    key: Tensor
    """(B * N, G, D), or H heads where they were expanded."""
    value: Tensor
    """As key."""
    query_borders: Tensor
    """(B + 1,) int32: where each row begins, and the end."""
    key_borders: Tensor
    """(B + 1,) int32."""
    num_queries: int
    """T, the longest row."""
    num_keys: int
    """N, the longest row."""
    window_size: tuple[int, int]
    """Keys to the left and to the right of a query's own; -1 to the left = all."""


def varlen_unavailable(call: Call) -> str | None:
    """Why FlashAttention cannot serve this call, or None; see `Backend.unavailable`."""
    dtype, device, width = call.query.dtype, call.query.device, call.query.shape[-1]
    if call.is_empty:
        return "there is no query; use backend='banded'"
    if device.type != "cuda":
        return f"it runs on CUDA tensors and query is on {device}; use backend='banded'"
    if dtype not in _DTYPES:
        return f"it takes float16 and bfloat16, query is {dtype}; use backend='flex' or 'banded'"
    if call.alibi_slopes is not None:
        return "it has no ALiBi; use backend='flex' or 'banded'"
    if call.first_keys is not None:
        # They could be sequences, but how many only the host's reading them would tell.
        return "it cannot hide keys before first_keys; use backend='flex' or 'banded'"
    if width % _MULTIPLE_OF or width > _LARGEST_WIDTH:
        return (
            f"D is {width}, it takes multiples of {_MULTIPLE_OF} up to {_LARGEST_WIDTH};"
            " use backend='banded'"
        )
    if not _runs_on(device.index):
        return (
            f"it needs a PyTorch with FlashAttention and a GPU of compute capability"
            f" {CAPABILITY[0]}.{CAPABILITY[1]}; use backend='flex' or 'banded'"
        )
    return None


@torch.compiler.assume_constant_result
def _runs_on(device_index: int | None) -> bool:
    built = torch.backends.cuda.is_flash_attention_available()
    return built and is_capable(device_index)


def varlen_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    first_keys: None,
    alibi_slopes: None,
    scale: float,
) -> Tensor:
    """Attend with FlashAttention: scores and softmax in float32, nothing of size T x N."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = query.shape[2] != key.shape[2]
    shares_heads = grouped and _takes_groups()
    packed = pack(query, key, value, window=window, expand_heads=grouped and not shares_heads)
    options: dict[str, Any] = {"enable_gqa": True} if shares_heads else {}
    out = varlen_attn(*packed[:-1], scale=scale, window_size=packed.window_size, **options)
    assert isinstance(out, Tensor)
    return out.view(query.shape)


@torch.compiler.assume_constant_result
def _takes_groups() -> bool:
    """Whether this PyTorch lets query heads share a key head; 2.11 does not, 2.12 does."""
    return "enable_gqa" in _parameters()


# Beneath and not upon what `torch.compile` takes for a constant: it would look through the cache.
@cache
def _parameters() -> Collection[str]:
    from torch.nn.attention.varlen import varlen_attn

    return signature(varlen_attn).parameters


def pack(query: Tensor, key: Tensor, value: Tensor, *, window: int, expand_heads: bool) -> Packed:
    """Lay the rows of a batch end to end.

    Args:
        query: (B, T, H, D), B and T at least 1.
        key: (B, N, G, D).
        value: (B, N, G, D).
        window: in positions, a position's own among them.
        expand_heads: whether each query head gets a copy of its key and value head.
    """
    if expand_heads:
        ratio = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(ratio, dim=2) for x in (key, value))
    num_queries, num_keys = query.shape[1], key.shape[1]
    left = window - 1 if window < num_keys else -1
    return Packed(
        *(x.flatten(0, 1) for x in (query, key, value)),
        query_borders=_borders(query),
        key_borders=_borders(key),
        num_queries=num_queries,
        num_keys=num_keys,
        window_size=(left, 0),
    )


def _borders(rows: Tensor) -> Tensor:
    batch, length = rows.shape[:2]
    return torch.arange(batch + 1, dtype=torch.int32, device=rows.device) * length
