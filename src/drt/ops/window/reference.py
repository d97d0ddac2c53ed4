"""Sliding-window attention with a dense mask: the oracle for every other backend."""

import torch
from torch import Tensor

from drt.precision import sum_dtype, without_autocast


def reference_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    first_keys: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend with a dense mask; `first_keys` are none of them after the query's own key.

    Scores and softmax are float32, or float64 for float64 inputs.
    """
    compute = sum_dtype(query)
    ratio = query.shape[2] // key.shape[2]
    with without_autocast(query.device.type):
        key, value = (x.to(compute).repeat_interleave(ratio, dim=2) for x in (key, value))
        scores = scale * torch.einsum("bthd,bnhd->bhtn", query.to(compute), key)
        # (T, N) distances from each query back to each key
        num_queries, num_keys = scores.shape[-2:]
        position = torch.arange(num_keys, device=query.device)
        distance = position[num_keys - num_queries :, None] - position
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.to(compute)[:, None, None] * distance
        hidden = (distance < 0) | (distance >= window)
        if first_keys is not None:
            # (B, 1, T, N)
            hidden = hidden | (position < first_keys[:, None, :, None])
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        if first_keys is not None:
            # Changes no number, but keeps gradients with values that overflow out of the softmax.
            probs = probs.masked_fill(hidden, 0.0)
        return torch.einsum("bhtn,bnhd->bthd", probs, value).to(query.dtype)
