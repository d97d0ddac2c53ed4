"""Floating-point operations, counted as they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.utils.flop_counter import FlopCounterMode

from drt.ops.flops import CPU_ATTENTION
from drt.ops.window import choice


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products and attentions in a call.

    PyTorch's counter, which counts what is multiplied: fused attention as if no key were masked,
    recomputed scores in its backward too, nothing elementwise; formulas of our operators are in
    `drt.ops.flops`. Sliding-window attention runs in blocks meanwhile, since the fused ones do not
    tell their window. Code that was compiled before is not seen.

    Args:
        call: what to run and count.
    """
    with _windows_in_blocks(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as mode:
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
