"""What `indices=None` stands for."""

import torch
from torch import Tensor


def in_order(weights: Tensor) -> Tensor:
    """(B, C, K) int64: chunk c of queries retrieves chunks c * K, c * K + 1, ... of the memory."""
    count, topk = weights.shape[1:]
    order = torch.arange(count * topk, device=weights.device).view(1, count, topk)
    return order.expand(weights.shape)
