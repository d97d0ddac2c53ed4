"""Grouped Cross-Attention (arXiv 2410.01651): the operator and its backends."""

from drt.ops.gca.api import grouped_cross_attention

__all__ = ["grouped_cross_attention"]
