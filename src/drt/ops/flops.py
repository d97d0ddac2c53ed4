"""Operations of attention, for `torch.utils.flop_counter.FlopCounterMode`.

Operators of ours register these where they are defined. They are counted as PyTorch counts its own
attention: a multiplication and an addition are two operations, every key that a query may look at
counts whether or not it is masked, and the backward is five products, as it computes the scores
once more. What PyTorch runs on CPUs it leaves out: `CPU_ATTENTION` is the missing mapping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5

Shape = tuple[int, ...]
"""Formulas are given the shapes in place of tensors."""


def cross_attention(
    query: Shape,
    key: Shape,
    value: Shape,
    indices: Shape | None,
    weights: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """Of grouped cross-attention: each query of (B, C, Q, H, D) with K chunks of S keys."""
    batch, chunks, queries, heads, width = query
    product = 2 * batch * chunks * queries * heads * width * weights[-1] * key[2]
    return FORWARD_PRODUCTS * product


def cross_attention_backward(grad: Shape, *inputs: Any, **_: Any) -> int:
    """Of its backward, which is given the gradient before the inputs."""
    return cross_attention(*inputs) * BACKWARD_PRODUCTS // FORWARD_PRODUCTS


def window_attention(
    query: Shape, key: Shape, value: Shape, window: int, *_: Any, **__: Any
) -> int:
    """Of sliding-window attention: each query of (B, T, H, D) with the keys in its window."""
    batch, num_queries, heads, width = query
    product = 2 * batch * num_queries * heads * width * min(window, key[1])
    return FORWARD_PRODUCTS * product


def window_attention_backward(grad: Shape, *inputs: Any, **_: Any) -> int:
    """Of its backward, which is given the gradient before the inputs."""
    return window_attention(*inputs) * BACKWARD_PRODUCTS // FORWARD_PRODUCTS


def _attention_on_cpu(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_on_cpu_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_on_cpu_backward,
}
"""`custom_mapping` of a counter; not registered, as PyTorch may bring formulas of its own."""
