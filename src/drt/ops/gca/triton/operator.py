"""The kernels as PyTorch operators, `drt::grouped_cross_attention` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from drt.ops import flops
from drt.ops.gca.inverse import InverseIndex, inverse_of_order, invert_indices
from drt.ops.gca.layout import new_memory_gradient
from drt.ops.gca.triton import launch


@torch.library.custom_op("drt::grouped_cross_attention", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    key_lengths: Tensor | None,
    inverse: list[Tensor],
    scale: float,
    softmax_plus_one: bool,
) -> Tensor:
    """Grouped cross-attention; arguments as in `launch.Call`.

    `inverse` are the tensors of an `InverseIndex` for the backward to read; without any it makes
    its own.
    """
    gpu = launch.gpu_of(query.device)
    call = launch.Call(
        query, key, value, indices, weights, key_lengths, scale, softmax_plus_one, gpu
    )
    output = query.new_empty(query.shape)
    with torch.cuda.device_of(query):
        launch.forward_launch(call, output).run()
    return output


@attend.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("drt::grouped_cross_attention_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    key_lengths: Tensor | None,
    inverse: list[Tensor],
    scale: float,
    softmax_plus_one: bool,
    memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and weights; of key and value empty unless `memory`."""
    gpu = launch.gpu_of(query.device)
    call = launch.Call(
        query, key, value, indices, weights, key_lengths, scale, softmax_plus_one, gpu
    )
    d_query, (d_key, d_value) = query.new_empty(query.shape), _memory_gradients(key, value, memory)
    parts, row_sums = launch.new_weight_parts(call), launch.new_row_sums(call)
    with torch.cuda.device_of(query):
        launch.query_launch(call, grad, d_query, parts, row_sums).run()
        if memory:
            lists = InverseIndex(*inverse) if inverse else _invert(call)
            for step in launch.memory_launches(call, grad, row_sums, d_key, d_value, lists):
                step.run()
    return d_query, d_key, d_value, parts.sum((-2, -1))


@attend_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    key_lengths: Tensor | None,
    inverse: list[Tensor],
    scale: float,
    softmax_plus_one: bool,
    memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _memory_gradients(key, value, memory)
    return query.new_empty(query.shape), *gradients, weights.new_empty(weights.shape)


def _memory_gradients(key: Tensor, value: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    if wanted:
        return new_memory_gradient(key), new_memory_gradient(value)
    return key.new_empty(0), value.new_empty(0)


def _invert(call: launch.Call) -> InverseIndex:
    if call.indices is None:
        return inverse_of_order(call.weights)
    return invert_indices(call.indices, call.key.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, inverse, scale, softmax_plus_one = inputs
    ctx.save_for_backward(*tensors, *inverse)
    ctx.options = (scale, softmax_plus_one)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, inverse = saved[:6], list(saved[6:])
    wants = ctx.needs_input_grad[:6]
    query, key, value, indices, weights, key_lengths = tensors
    d_query, d_key, d_value, d_weights = attend_backward(
        grad,
        query,
        key,
        value,
        indices,
        weights,
        key_lengths,
        inverse,
        *ctx.options,
        memory=wants[1] or wants[2],
    )
    found = (d_query, d_key, d_value, None, d_weights, None)
    wanted = (x if want else None for x, want in zip(found, wants, strict=True))
    return *wanted, [None] * len(inverse), None, None


attend.register_autograd(_backward, setup_context=_save)
register_flop_formula(torch.ops.drt.grouped_cross_attention)(flops.cross_attention)
register_flop_formula(torch.ops.drt.grouped_cross_attention_backward)(
    flops.cross_attention_backward
)
