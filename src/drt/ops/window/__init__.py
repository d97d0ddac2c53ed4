"""Causal attention over a sliding window of key positions."""

from drt.ops.window.api import sliding_window_attention
from drt.ops.window.choice import BACKENDS

__all__ = ["BACKENDS", "sliding_window_attention"]
