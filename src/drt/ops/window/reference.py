"""Sliding-window attention with a dense mask: the oracle for every other backend."""

import torch
from torch import Tensor


def reference_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    alibi_slopes: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend with a (T, N) mask; scores and softmax are float32, or float64 for float64 inputs."""
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    ratio = query.shape[2] // key.shape[2]
    with torch.autocast(query.device.type, enabled=False):
        key, value = (x.to(compute).repeat_interleave(ratio, dim=2) for x in (key, value))
        scores = scale * torch.einsum("bthd,bnhd->bhtn", query.to(compute), key)
        # (T, N) distances from each query back to each key
        num_queries, num_keys = scores.shape[-2:]
        position = torch.arange(num_keys, device=query.device)
        distance = position[num_keys - num_queries :, None] - position
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.to(compute)[:, None, None] * distance
        scores = scores.masked_fill((distance < 0) | (distance >= window), float("-inf"))
        return torch.einsum("bhtn,bnhd->bthd", scores.softmax(-1), value).to(query.dtype)
