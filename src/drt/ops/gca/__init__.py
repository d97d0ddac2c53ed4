"""Grouped Cross-Attention (arXiv 2410.01651): the operator and its backends."""

from drt.ops.gca.api import grouped_cross_attention, wants_inverse
from drt.ops.gca.inverse import InverseIndex, invert_indices

__all__ = ["InverseIndex", "grouped_cross_attention", "invert_indices", "wants_inverse"]
