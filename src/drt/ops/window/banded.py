"""Sliding-window attention as a loop over blocks of queries: the backend for every device.

Inside, heads are folded into the batch (X = B * G) and the R = H // G query heads that share a
key head are folded into the rows: queries are (X, T * R, D), keys and values (X, N, D), so a
block of queries and the keys in its reach are plain slices and each product is one bmm. Products
are written with `out=` or in place, because autocast leaves those in the dtype of their operands.

In a compiled graph the loop is one operator, forward and backward: traced, it would be unrolled for
one length of the rows, and compiled again for each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

from drt.ops import flops
from drt.ops.tracing import is_traced
from drt.ops.window.plan import (
    Band,
    Block,
    Plan,
    blocks,
    hidden_keys,
    make_plan,
    parts,
)
from drt.precision import sum_dtype, uses_autocast

_softmax_backward = torch.ops.aten._softmax_backward_data.default

# Without gradient, up to so many queries are one product over all keys, with nothing cut up.
DECODE_QUERIES = 4


def banded_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    first_keys: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend block by block; the backward recomputes the probabilities of each block.

    Scores of float16 and bfloat16 inputs are summed in float32 and rounded once to the input dtype
    before the softmax, which is float32 inside. Key and value gradients are summed over blocks in
    float32 (float64 for float64 inputs). Of `first_keys`, none is after the query's own key; only
    blocks in which they hide a key pay for them (all blocks, where the host cannot read them).
    Differentiable once.
    """
    band = Band(window, scale, alibi_slopes, first_keys)
    wants_grad = query.requires_grad or key.requires_grad or value.requires_grad
    if torch.is_grad_enabled() and wants_grad:
        if is_traced(query):
            return attend(query, key, value, *band)
        return _BandedAttention.apply(query, key, value, band)
    if _is_plain_step(query, band):
        return _attend_from_one(query, key, value, scale)
    if query.shape[1] <= DECODE_QUERIES:
        return _decode(query, key, value, band)
    if torch.compiler.is_compiling():
        return attend(query, key, value, *band)
    return _forward(query, key, value, band)


class _BandedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, band: Band) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.band = band
        return _forward(query, key, value, band)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacked once: under gradient checkpointing a second look would recompute the layer.
        return *_backward(grads[0], ctx.saved_tensors, ctx.band, ctx.needs_input_grad), None


@torch.library.custom_op("drt::banded_window_attention", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    scale: float,
    alibi_slopes: Tensor | None,
    first_keys: Tensor | None,
) -> Tensor:
    """`_BandedAttention` as one operator of a compiled graph; the last four are a `Band`."""
    return _forward(query, key, value, Band(window, scale, alibi_slopes, first_keys))


@attend.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return _empty(query)


@torch.library.custom_op("drt::banded_window_attention_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    scale: float,
    alibi_slopes: Tensor | None,
    first_keys: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; empty where `wants` says that none is wanted."""
    band = Band(window, scale, alibi_slopes, first_keys)
    found = _backward(grad, (query, key, value), band, wants)
    d_query, d_key, d_value = (query.new_empty(0) if x is None else x for x in found)
    return d_query, d_key, d_value


@attend_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    scale: float,
    alibi_slopes: Tensor | None,
    first_keys: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = zip((query, key, value), wants, strict=True)
    d_query, d_key, d_value = (_empty(x) if want else x.new_empty(0) for x, want in wanted)
    return d_query, d_key, d_value


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, window, scale, alibi_slopes, first_keys = inputs
    ctx.save_for_backward(query, key, value, alibi_slopes, first_keys)
    ctx.window, ctx.scale = window, scale


def _attend_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, alibi_slopes, first_keys = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:3])
    found = attend_backward(
        grad, query, key, value, ctx.window, ctx.scale, alibi_slopes, first_keys, wants
    )
    wanted = (x if want else None for x, want in zip(found, wants, strict=True))
    return *wanted, None, None, None, None


attend.register_autograd(_attend_backward, setup_context=_save)
register_flop_formula(torch.ops.drt.banded_window_attention)(flops.window_attention)
register_flop_formula(torch.ops.drt.banded_window_attention_backward)(
    flops.window_attention_backward
)


def _is_plain_step(query: Tensor, band: Band) -> bool:
    """Whether one position sees all keys that the caller has left, in full precision."""
    if query.shape[1] != 1 or band.alibi_slopes is not None or band.first_keys is not None:
        return False
    # For one query, bfloat16 is four times as slow on CPU; autocast would choose it.
    wide = query.dtype in (torch.float32, torch.float64)
    return wide and not uses_autocast(query.device.type)


def _attend_from_one(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The query heads that share a key head are the queries of one call."""
    batch, _, heads, width = query.shape
    rows = query.view(batch, key.shape[2], -1, width)
    out = scaled_dot_product_attention(
        rows, key.transpose(1, 2), value.transpose(1, 2), scale=scale
    )
    return out.reshape(batch, 1, heads, width)


def _decode(query: Tensor, key: Tensor, value: Tensor, band: Band) -> Tensor:
    batch, num_queries, heads, _ = query.shape
    num_keys, kv_heads = key.shape[1:3]
    ratio = heads // kv_heads
    rows, keys, values = (_fold(x, kv_heads) for x in (query, key, value))
    scores = _product(rows, keys.mT, scale=band.scale)
    _add_band(scores.view(batch, kv_heads, num_queries, ratio, num_keys), band)
    if band.first_keys is not None:
        _hide(scores, hidden_keys(band.first_keys, 0, num_keys), float("-inf"))
    out = _empty(query)
    _unfold_into(out, _product(_softmax(scores), values), kv_heads)
    return out


def _add_band(scores: Tensor, band: Band) -> None:
    """Mask and bias scores (B, G, T, R, N) of a call in place, with as few operations as can be."""
    _, kv_heads, num_queries, ratio, num_keys = scores.shape
    # The caller drops keys out of reach, so a single query sees all that are left.
    if num_queries == 1 and band.alibi_slopes is None:
        return
    position = torch.arange(num_keys, dtype=sum_dtype(scores), device=scores.device)
    distance = position[num_keys - num_queries :, None, None] - position
    if band.alibi_slopes is not None:
        scores -= band.alibi_slopes.to(distance.dtype).view(kv_heads, 1, ratio, 1) * distance
    if num_queries > 1:
        scores.masked_fill_((distance < 0) | (distance >= band.window), float("-inf"))


def _forward(query: Tensor, key: Tensor, value: Tensor, band: Band) -> Tensor:
    out = _empty(query)
    for part, plan in parts((query, key, value, out), make_plan(query, key, band)):
        _forward_part(*part, plan=plan)
    return out


def _backward(
    grad: Tensor, inputs: Sequence[Tensor], band: Band, wants: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of query, key and value that are wanted."""
    query, key, value = inputs
    results = [_empty(x) if want else None for x, want in zip(inputs, wants, strict=False)]
    tensors = (query, key, value, grad, *results)
    for part, plan in parts(tensors, make_plan(query, key, band)):
        _backward_part(*part, plan=plan)
    return results


def _forward_part(query: Tensor, key: Tensor, value: Tensor, out: Tensor, *, plan: Plan) -> None:
    kv_heads = key.shape[2]
    q, k, v = (_fold(x, kv_heads).contiguous() for x in (query, key, value))
    out_rows = torch.empty_like(q)
    for block in blocks(query, key, plan):
        probs = _probabilities(q, k, block, plan.scale)
        out_rows[:, block.rows] = _product(probs, v[:, block.keys])
    _unfold_into(out, out_rows, kv_heads)


def _backward_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    *,
    plan: Plan,
) -> None:
    """Write the gradients; None stands for one that is not wanted."""
    kv_heads = key.shape[2]
    q, k, v, do = (_fold(x, kv_heads).contiguous() for x in (query, key, value, grad_out))
    dq = None if grad_query is None else torch.empty_like(q)
    dk, dv = (None if x is None else _accumulator(k) for x in (grad_key, grad_value))
    for block in blocks(query, key, plan):
        rows, keys, _, hidden = block
        probs = _probabilities(q, k, block, plan.scale)
        if dv is not None:
            dv[:, keys] += _product(probs.mT, do[:, rows])
        if dq is None and dk is None:
            continue
        dp = _product(do[:, rows], v[:, keys].mT)
        # Products with hidden values may overflow, and 0 * inf is not 0.
        _hide(dp, hidden, 0.0)
        ds = _softmax_backward(dp, probs, -1, probs.dtype)
        if dq is not None:
            dq[:, rows] = _product(ds, k[:, keys], scale=plan.scale)
        if dk is not None:
            dk[:, keys] += _product(ds.mT, q[:, rows], scale=plan.scale)
    for out, folded in ((grad_query, dq), (grad_key, dk), (grad_value, dv)):
        _unfold_into(out, folded, kv_heads)


def _probabilities(queries: Tensor, keys: Tensor, block: Block, scale: float) -> Tensor:
    rows, columns = queries[:, block.rows], keys[:, block.keys]
    scores = rows.new_empty(rows.shape[0], rows.shape[1], columns.shape[1])
    _per_row(scores, block.bias).copy_(block.bias)
    scores.baddbmm_(rows, columns.mT, alpha=scale)
    # After the product, as hidden keys may make it overflow.
    _hide(scores, block.hidden, float("-inf"))
    return _softmax(scores)


def _hide(scores: Tensor, hidden: Tensor | None, fill: float) -> None:
    """Fill (X, n * R, N) scores where (B, n, m) is set for their first m columns, in place."""
    if hidden is None:
        return
    batch, num_queries, num_columns = hidden.shape
    (heads, num_rows, _), ratio = scores.shape, scores.shape[1] // num_queries
    per_row = scores.view(batch, heads // batch, num_rows // ratio, ratio, -1)
    per_row[..., :num_columns].masked_fill_(hidden[:, None, :, None], fill)


def _per_row(scores: Tensor, bias: Tensor) -> Tensor:
    """View (X, ...) as (B, G, ...)."""
    return scores.view(scores.shape[0] // bias.shape[0], *bias.shape)


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1, out=torch.empty_like(scores))


def _product(left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
    out = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


def _accumulator(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=sum_dtype(like), device=like.device)


def _empty(like: Tensor) -> Tensor:
    """Uninitialised and contiguous, whatever the strides of `like`."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _fold(x: Tensor, num_outer: int) -> Tensor:
    """(B, L, G * R, D) to (B * G, L * R, D) with G = `num_outer`; no copy where strides allow."""
    batch, length, heads, width = x.shape
    ratio = heads // num_outer
    x = x.view(batch, length, num_outer, ratio, width).transpose(1, 2)
    return x.reshape(batch * num_outer, length * ratio, width)


def _unfold_into(out: Tensor | None, rows: Tensor | None, num_outer: int) -> None:
    """Inverse of `_fold`; nothing happens where no result is wanted."""
    if out is None or rows is None:
        return
    batch, length, heads, width = out.shape
    ratio = heads // num_outer
    rows = rows.view(batch, num_outer, length, ratio, width).transpose(1, 2)
    out.view(batch, length, num_outer, ratio, width).copy_(rows)
