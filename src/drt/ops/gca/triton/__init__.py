"""Grouped cross-attention in Triton: retrieved chunks are read by index, inside the kernels."""
