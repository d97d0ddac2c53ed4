"""Grouped cross-attention on CPU: a few chunks at a time, so that every temporary stays in cache.

This file is the autograd function, and the same as an operator for compiled graphs; `blocks.py` is
the arithmetic of a block, `slots.py` what a block reads; `decode.py` is a shorter way for a few
queries without gradient. Only the inputs are kept for the backward.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from drt.ops import flops
from drt.ops.gca.blocks import BlockedPass, Gradients, Options
from drt.ops.gca.decode import attend_in_order, lies_in_order
from drt.ops.gca.layout import new_memory_gradient
from drt.ops.gca.order import in_order
from drt.ops.tracing import is_traced
from drt.precision import sum_dtype

# Bytes of the float32 accumulators for the gradients of a lower-precision memory; a memory that
# needs more is taken through the backward a few heads at a time.
_ACCUMULATOR_BYTES = 8 << 20


def blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    *,
    key_lengths: Tensor | None,
    scale: float,
    softmax_plus_one: bool,
) -> Tensor:
    """Same contract as `grouped_cross_attention`, arguments already validated, on CPU.

    The results of GEMMs, scores among them, are rounded to query's dtype; sums inside a GEMM, the
    softmax and the accumulation of gradients are float32 (float64 for float64 inputs).
    """
    if is_traced(query):
        # What a block reads depends on the numbers of the indices, which no graph knows.
        return attend(query, key, value, indices, weights, key_lengths, scale, softmax_plus_one)
    options = Options(scale, softmax_plus_one)
    inputs = (query, key, value, weights)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    has_work = _has_work(query, key, weights)
    if has_work and not wants_grad and lies_in_order(query, key, value, indices, key_lengths):
        return attend_in_order(query, key, value, weights, key_lengths, options)
    if indices is None:
        indices = in_order(weights)
    return _Blocked.apply(  # pyright: ignore[reportReturnType]
        query, key, value, indices, weights, key_lengths, options
    )


class _Inputs(NamedTuple):
    """The arguments of `BlockedPass`."""

    query: Tensor
    key: Tensor
    value: Tensor
    indices: Tensor
    weights: Tensor
    key_lengths: Tensor | None
    options: Options


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        indices: Tensor,
        weights: Tensor,
        key_lengths: Tensor | None,
        options: Options,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, indices, weights, key_lengths)
        ctx.options = options
        return _forward(_Inputs(query, key, value, indices, weights, key_lengths, options))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wants = ctx.needs_input_grad
        inputs = _Inputs._make((*ctx.saved_tensors, ctx.options))
        found = _backward(inputs, grads[0], (*wants[:3], wants[4]))
        return found.query, found.key, found.value, None, found.weights, None, None


@torch.library.custom_op("drt::blocked_cross_attention", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    softmax_plus_one: bool,
) -> Tensor:
    """`_Blocked` as one operator of a compiled graph; arguments as of `blocked`."""
    indices = in_order(weights) if indices is None else indices
    options = Options(scale, softmax_plus_one)
    return _forward(_Inputs(query, key, value, indices, weights, key_lengths, options))


@attend.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("drt::blocked_cross_attention_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    softmax_plus_one: bool,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and weights; empty where `wants` says that none is wanted."""
    indices = in_order(weights) if indices is None else indices
    options = Options(scale, softmax_plus_one)
    inputs = _Inputs(query, key, value, indices, weights, key_lengths, options)
    found = _backward(inputs, grad, wants)
    d_query, d_key, d_value, d_weights = (query.new_empty(0) if x is None else x for x in found)
    return d_query, d_key, d_value, d_weights


@attend_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    softmax_plus_one: bool,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape if wants[0] else 0),
        new_memory_gradient(key) if wants[1] else query.new_empty(0),
        new_memory_gradient(value) if wants[2] else query.new_empty(0),
        weights.new_empty(weights.shape) if wants[3] else query.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, scale, softmax_plus_one = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (scale, softmax_plus_one)


def _attend_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wants = [*needs[:3], needs[4]]
    found = attend_backward(grad, *ctx.saved_tensors, *ctx.options, wants)
    query, key, value, weights = (x if want else None for x, want in zip(found, wants, strict=True))
    return query, key, value, None, weights, None, None, None


attend.register_autograd(_attend_backward, setup_context=_save)
register_flop_formula(torch.ops.drt.blocked_cross_attention)(flops.cross_attention)
register_flop_formula(torch.ops.drt.blocked_cross_attention_backward)(
    flops.cross_attention_backward
)


def _forward(inputs: _Inputs) -> Tensor:
    output = inputs.query.new_empty(inputs.query.shape)
    if not _has_work(inputs.query, inputs.key, inputs.indices):
        return output.zero_()
    BlockedPass(*inputs).forward(output)
    return output


def _backward(inputs: _Inputs, grad: Tensor, wants: Sequence[bool]) -> Gradients:
    """The gradients of query, key, value and weights that are wanted, in their dtypes."""
    query, key, value, indices, weights, *_ = inputs
    found = Gradients(
        query.new_empty(query.shape) if wants[0] else None,
        new_memory_gradient(key) if wants[1] else None,
        new_memory_gradient(value) if wants[2] else None,
        weights.new_zeros(weights.shape, dtype=sum_dtype(query)) if wants[3] else None,
    )
    if _has_work(query, key, indices):
        _backward_in_stripes(inputs, grad, found)
    else:
        for gradient in found:
            if gradient is not None:
                gradient.zero_()
    if found.weights is None:
        return found
    return found._replace(weights=found.weights.to(weights.dtype))


def _has_work(query: Tensor, key: Tensor, indices: Tensor) -> bool:
    return query.numel() > 0 and key.numel() > 0 and indices.numel() > 0


def _backward_in_stripes(inputs: _Inputs, grad: Tensor, found: Gradients) -> None:
    """Run the backward on as many heads at a time as there is room to accumulate."""
    query, key, value = inputs[:3]
    kv_heads, stripe = key.shape[3], _heads_per_stripe(key)
    per_kv_head = query.shape[3] // kv_heads
    for first in range(0, kv_heads, stripe):
        kv = slice(first, first + stripe)
        heads = slice(kv.start * per_kv_head, kv.stop * per_kv_head)
        part = Gradients(
            None if found.query is None else found.query[..., heads, :],
            None if found.key is None else found.key[..., kv, :],
            None if found.value is None else found.value[..., kv, :],
            found.weights,
        )
        work = inputs._replace(
            query=query[..., heads, :], key=key[..., kv, :], value=value[..., kv, :]
        )
        BlockedPass(*work).backward(grad[..., heads, :], part)


def _heads_per_stripe(key: Tensor) -> int:
    """The largest divisor of G whose accumulators, for keys and values, fit."""
    kv_heads, wide = key.shape[3], sum_dtype(key)
    if key.dtype == wide:
        return kv_heads
    fitting = _ACCUMULATOR_BYTES * kv_heads // (2 * key.numel() * wide.itemsize)
    divisors = (count for count in range(1, kv_heads + 1) if kv_heads % count == 0)
    return max(count for count in divisors if count <= max(fitting, 1))
