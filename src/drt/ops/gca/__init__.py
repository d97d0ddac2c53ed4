"""Grouped Cross-Attention (arXiv 2410.01651): the operator and its backends."""

from drt.ops.gca.api import default_backend, grouped_cross_attention
from drt.ops.gca.inverse import InverseIndex, invert_indices

__all__ = ["InverseIndex", "default_backend", "grouped_cross_attention", "invert_indices"]
