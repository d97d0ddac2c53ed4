"""The public function of sliding-window attention: argument checks and choice of backend."""

import torch
from torch import Tensor

from drt.ops.window.call import Call
from drt.ops.window.choice import choose
from drt.ops.window.plan import can_read

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    first_keys: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from each position to itself and the `window - 1` positions before it.

    The query at key position p sees the keys j with p - window < j <= p, and with `first_keys` f
    only those with j >= min(f_p, p):

        out_p = sum_j softmax_j(scale * <q_p, k_j> - slope_h * (p - j)) v_j

    The T queries belong to the last T of the N keys; the N - T keys before those are a cache.
    Keys that no query reaches are never read. Query head h uses key/value head h // (H // G).

    Args:
        query: (B, T, H, D), float16, bfloat16, float32 or float64; T may be 0.
        key: (B, N, G, D) with N >= T and H a multiple of G; dtype and device of `query`.
        value: as `key`.
        window: width in positions, at least 1; 1 means that a position sees only itself.
        first_keys: (B, T) int64 in [0, N), device of `query`: the first of the N keys that a query
            may see, for rows whose keys begin with unused places and for documents packed into
            one row. A query always sees at least its own key: a first key after that counts as
            that. Hidden keys and values may hold any finite numbers, and get no gradient. None
            means 0 throughout.
        alibi_slopes: (H,) floating point, without gradient: the score falls by this much for
            each position of distance. None means no such bias.
        scale: factor of the dot products; D ** -0.5 when None.
        backend: "banded" (blocks of queries over the keys in their reach, any device), "flex"
            (FlexAttention, compiled on CUDA; on CPU uncompiled and without gradient, for tests),
            "varlen" (FlashAttention: CUDA, float16 and bfloat16, neither ALiBi nor first keys) or
            "reference" (dense mask, differentiable twice). Only "flex" on CPU and "reference" make
            a T x N tensor. None means the first that serves this call in an order that
            `drt.ops.window.choice.preferred` states: on CPU "banded".

    Returns:
        (B, T, H, D), contiguous, dtype of `query`.

    Raises:
        ValueError: if a shape, dtype, device, the window or the backend is not as above, and for
            first keys out of range on CPU; elsewhere, where reading them would make the host wait,
            such first keys count as the nearest that is in range.
        RuntimeError: if the backend that was asked for cannot serve these tensors.
    """
    _check_shapes(query, key, value)
    _check_kinds(query, key, value)
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 position")
    if first_keys is not None:
        _check_first_keys(first_keys, query, key)
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, query)
    reach = query.shape[1] + window - 1
    dropped = max(key.shape[1] - reach, 0)
    if dropped:
        key, value = key[:, dropped:], value[:, dropped:]
    if first_keys is not None:
        first_keys = _renumber(first_keys, dropped=dropped, kept=key.shape[1])
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    call = Call(query, key, value, window, first_keys, alibi_slopes, factor)
    return choose(backend, call).run(
        query,
        key,
        value,
        window=window,
        first_keys=first_keys,
        alibi_slopes=alibi_slopes,
        scale=factor,
    )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(f"query must be (B, T, H, D), key and value (B, N, G, D); got {shapes}")
    batch, num_queries, heads, width = query.shape
    key_batch, num_keys, kv_heads, key_width = key.shape
    if (batch, width) != (key_batch, key_width):
        raise ValueError(f"query, key and value must agree in B and D; got {shapes}")
    if num_queries > num_keys:
        raise ValueError(f"{num_queries} queries (T) need as many keys, N is {num_keys}")
    if min(width, heads, kv_heads) < 1 or heads % kv_heads:
        raise ValueError(
            f"H = {heads} must be a positive multiple of G = {kv_heads}, and D = {width} at least 1"
        )


def _check_kinds(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must share one dtype of {_DTYPES};"
            f" got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            "query, key and value must be on one device;"
            f" got {query.device}, {key.device}, {value.device}"
        )


def _check_first_keys(first_keys: Tensor, query: Tensor, key: Tensor) -> None:
    if first_keys.shape != query.shape[:2] or first_keys.dtype != torch.int64:
        raise ValueError(
            f"first_keys must be int64 of shape (B, T) = {tuple(query.shape[:2])};"
            f" got {first_keys.dtype} {tuple(first_keys.shape)}"
        )
    if first_keys.device != query.device:
        raise ValueError(f"first_keys are on {first_keys.device}, query on {query.device}")
    if first_keys.numel() == 0 or not can_read(first_keys):
        return
    lowest, highest = (int(x) for x in torch.aminmax(first_keys))
    if lowest < 0 or highest >= key.shape[1]:
        raise ValueError(
            f"first_keys must be in [0, {key.shape[1] - 1}]; got values in [{lowest}, {highest}]"
        )


def _renumber(first_keys: Tensor, *, dropped: int, kept: int) -> Tensor | None:
    """First keys among those kept, none of them after the key of the query itself."""
    if first_keys.numel() == 0:
        return None
    own = torch.arange(kept - first_keys.shape[1], kept, device=first_keys.device)
    return torch.minimum((first_keys - dropped).clamp_(min=0), own)


def _check_slopes(alibi_slopes: Tensor, query: Tensor) -> None:
    if alibi_slopes.shape != query.shape[2:3] or not alibi_slopes.is_floating_point():
        raise ValueError(
            f"alibi_slopes must be floating point of shape ({query.shape[2]},);"
            f" got {alibi_slopes.dtype} {tuple(alibi_slopes.shape)}"
        )
    if alibi_slopes.device != query.device:
        raise ValueError(f"alibi_slopes are on {alibi_slopes.device}, query on {query.device}")
    if alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes require a gradient, which no backend computes")
