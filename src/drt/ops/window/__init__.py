"""Causal attention over a sliding window of key positions."""

from drt.ops.window.api import BACKENDS, sliding_window_attention

__all__ = ["BACKENDS", "sliding_window_attention"]
