"""Floating-point operations, counted as they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from drt.ops.window import choice

Shape = Sequence[int]


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products and attentions in a call.

    PyTorch's counter, which counts what is multiplied: fused attention as if no key were masked,
    recomputed scores in its backward too, nothing elementwise. Two things are told to it: how much
    grouped cross-attention multiplies in its Triton kernels, and attention fused for CPUs.
    Sliding-window attention runs in blocks meanwhile, since the fused ones do not tell their
    window. Code that was compiled before is not seen.

    Args:
        call: what to run and count.
    """
    with _windows_in_blocks(), FlopCounterMode(display=False, custom_mapping=_formulas()) as mode:
        call()
    return mode.get_total_flops()


@contextmanager
def _windows_in_blocks() -> Iterator[None]:
    """Inside, sliding-window attention of no backend by name is "banded"."""
    before = choice.preferred
    choice.preferred = lambda call: ("banded",)
    try:
        yield
    finally:
        choice.preferred = before


def _formulas() -> dict[Any, Callable[..., int]]:
    """What PyTorch's counter does not know, by operator; loaded kernels only."""
    aten = torch.ops.aten
    found: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    for name, formula in (
        ("grouped_cross_attention", cross_attention_flops),
        ("grouped_cross_attention_backward", _cross_attention_backward),
    ):
        if hasattr(torch.ops.drt, name):
            found[getattr(torch.ops.drt, name)] = formula
    return found


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def cross_attention_flops(
    query: Shape,
    key: Shape,
    value: Shape,
    indices: Shape | None,
    weights: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """Of the forward of grouped cross-attention: scores, and sums of values.

    Args:
        query: shape (B, C, Q, H, D).
        key: shape (B, M, S, G, D).
        value: as key.
        indices: shape (B, C, K), or None.
        weights: shape (B, C, K).
    """
    rows, chunks, queries, heads, width = query
    return 4 * rows * chunks * queries * heads * width * weights[-1] * key[2]


def _cross_attention_backward(
    grad: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    indices: Shape | None,
    weights: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """Scores again, and the gradients of weights, values, keys and queries: five products."""
    return cross_attention_flops(query, key, value, indices, weights) // 2 * 5
