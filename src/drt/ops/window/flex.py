"""Sliding-window attention by FlexAttention, for which PyTorch writes and compiles a GPU kernel.

What is ours is three things: who sees whom (`mask_mod`), the bias (`score_mod`), and which blocks
of 128 queries and 128 keys have anything to compute (`window_block_mask`), worked out from the
first and last key of each query and never from a T x N mask.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drt.ops.gpu import has_triton
from drt.ops.window.call import Call
from drt.precision import sum_dtype, without_autocast

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# The block size that the kernels of FlexAttention are tuned for.
_BLOCK = 128
# Limits of its GPU kernels: the narrowest tile of a tensor core, and shared memory.
_WIDTHS = (16, 256)
# A model asks for one or two shapes at a time. A block mask has 4 bytes for each pair of blocks,
# four times: 256 KB for 16,384 queries and keys.
_KEPT_MASKS = 16


def flex_unavailable(call: Call) -> str | None:
    """Why FlexAttention cannot serve this call, or None; see `Backend.unavailable`."""
    device, width = call.query.device.type, call.query.shape[-1]
    if call.is_empty:
        return "there is no query; use backend='banded'"
    if device == "cpu":
        if call.wants_grad:
            return "FlexAttention has no backward on CPU; use backend='banded', or torch.no_grad()"
        return None
    if device != "cuda":
        return f"query is on {call.query.device}, it runs on CUDA and CPU; use backend='banded'"
    if call.query.dtype == torch.float64:
        return "its GPU kernels do not take float64; use backend='banded'"
    if not _WIDTHS[0] <= width <= _WIDTHS[1]:
        return f"D is {width}, its GPU kernels take {_WIDTHS[0]} to {_WIDTHS[1]}; use 'banded'"
    if not has_triton():
        return "it compiles its GPU kernels with triton; pip install triton, or use 'banded'"
    return None


def flex_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    first_keys: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend with a compiled kernel on CUDA; on CPU uncompiled, with all T x N scores, for tests.

    Inside `torch.compile` it is compiled with the rest, on any device. Scores and softmax are
    float32, probabilities are rounded to the input dtype for their product with the values.
    The first call of each kind of shapes compiles for seconds; past as many kinds as
    `torch._dynamo.config.recompile_limit`, PyTorch raises `FailOnRecompileLimitHit`.
    """
    if query.device.type == "cpu":
        # FlexAttention refuses leaves that require a gradient on CPU even where none is asked for.
        query, key, value = (x.detach() for x in (query, key, value))
    score_mod = None
    if alibi_slopes is not None:
        num_cached = cached_keys(query.shape[1], key.shape[1], query.device)
        score_mod = alibi_score(alibi_slopes.to(sum_dtype(query)), num_cached)
    # Autocast would round float32 inputs, here and in no other backend.
    with without_autocast(query.device.type):
        out = _flex_attention(query.device.type)(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            score_mod=score_mod,
            block_mask=_block_mask(query, key.shape[1], window, first_keys),
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
    return out.transpose(1, 2).contiguous()


def _flex_attention(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cpu" or torch.compiler.is_compiling():
        return flex_attention
    return _compiled()


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Without fullgraph, past the limit of recompilations it would run uncompiled, unnoticed.
    return torch.compile(flex_attention, fullgraph=True)


def cached_keys(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """() int64, N - T: how many keys stand before that of the first query.

    As a tensor it is the same to a compiled kernel whatever its value. As a number it would be a
    constant of the kernel, or a symbol, which the compiler for CPUs puts in wrongly.
    """
    return torch.full((), num_keys - num_queries, dtype=torch.int64, device=device)


def alibi_score(slopes: Tensor, num_cached: Tensor) -> Callable[..., Tensor]:
    """The score modification of ALiBi: `slopes[h]` less for each position of distance."""

    def modify(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[head] * (query + num_cached - key)

    return modify


def window_mask(
    num_cached: Tensor, window: int, first_keys: Tensor | None
) -> Callable[..., Tensor]:
    """Whether query t, which is key t + `num_cached`, sees a key; see `Call.first_keys`."""

    def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + num_cached - key
        return (distance >= 0) & (distance < window)

    if first_keys is None:
        return within

    def within_and_shown(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return within(batch, head, query, key) & (key >= first_keys[batch, query])

    return within_and_shown


def _block_mask(
    query: Tensor, num_keys: int, window: int, first_keys: Tensor | None
) -> "BlockMask":
    sizes = (query.shape[1], num_keys, window)
    # What is made inside a graph, or of tensors without numbers, belongs to nobody else.
    if first_keys is None and type(query) is Tensor and not torch.compiler.is_compiling():
        return _kept_block_mask(*sizes, query.device)
    return window_block_mask(*sizes, first_keys=first_keys, device=query.device)


@lru_cache(maxsize=_KEPT_MASKS)
def _kept_block_mask(
    num_queries: int, num_keys: int, window: int, device: torch.device
) -> "BlockMask":
    # Tensors made in inference mode could not be used in training.
    with torch.inference_mode(False):
        return window_block_mask(num_queries, num_keys, window, first_keys=None, device=device)


def window_block_mask(
    num_queries: int,
    num_keys: int,
    window: int,
    *,
    first_keys: Tensor | None,
    device: torch.device,
) -> "BlockMask":
    """Which blocks of keys each block of queries reads, and which of those need no mask.

    Args:
        num_queries: T, the last T of the keys.
        num_keys: N.
        window: in positions.
        first_keys: see `Call.first_keys`.
        device: of the result.

    Returns:
        A block mask of (B or 1, 1, T, N) with the `window_mask` of these arguments. Where first
        keys fall along a row, it may list blocks in which nothing is seen.
    """
    from torch.nn.attention.flex_attention import BlockMask

    own = torch.arange(num_keys - num_queries, num_keys, device=device)[None]
    lowest = own - (window - 1)
    if first_keys is not None:
        lowest = torch.maximum(lowest, first_keys)
    (own_min, own_max), (lowest_min, lowest_max) = _range(own), _range(lowest)
    start = torch.arange(0, num_keys, _BLOCK, device=device)
    reached = (start <= own_max) & (start + _BLOCK > lowest_min)
    whole = (start + _BLOCK - 1 <= own_min) & (start >= lowest_max)
    # A block that the end of the queries cuts off gets a mask; none of whole keys is cut off.
    whole[:, num_queries // _BLOCK :] = False
    num_cached = cached_keys(num_queries, num_keys, device)
    return BlockMask.from_kv_blocks(
        *_listed(reached & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=window_mask(num_cached, window, first_keys),
        seq_lengths=(num_queries, num_keys),
    )


def _range(positions: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) to the smallest and the largest of each block of queries, (B, rows, 1) each."""
    num_rows = -(-positions.shape[1] // _BLOCK)
    place = torch.arange(num_rows * _BLOCK, device=positions.device)
    # The last block is filled with copies of the last query.
    filled = positions[:, place.clamp(max=positions.shape[1] - 1)].unflatten(1, (num_rows, _BLOCK))
    return filled.amin(-1, keepdim=True), filled.amax(-1, keepdim=True)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, rows, columns) bool to the number of blocks in each row, and their columns first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    columns = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return counts[:, None], columns.to(torch.int32)[:, None]
