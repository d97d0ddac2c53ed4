"""Grouped cross-attention as the equation reads: the oracle, for any device and floating dtype."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from drt.ops.gca.order import in_order
from drt.precision import sum_dtype


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    *,
    key_lengths: Tensor | None,
    scale: float,
    softmax_plus_one: bool,
) -> Tensor:
    """Same contract as `grouped_cross_attention`, arguments already validated.

    Everything is computed in float32 (float64 for float64 inputs) and rounded once at the end.
    """
    (rows, num_chunks, size, kv_heads), device = key.shape[:4], query.device
    if indices is None:
        indices = in_order(weights)
    accumulate = sum_dtype(query)
    if key_lengths is None:
        key_lengths = indices.new_full((rows, num_chunks), size)

    # One more chunk of length 0 stands for "none": index -1 reads it, and M may be 0.
    lengths = pad(key_lengths, (0, 1))
    hidden = torch.arange(size, device=device) >= lengths[..., None]  # (B, M + 1, S)
    batch = torch.arange(rows, device=device)[:, None, None]

    def gather(memory: Tensor) -> Tensor:
        """(B, M, S, G, D) -> (B, C, K, S, G, D), unused tokens filled: they may hold NaN."""
        memory = pad(memory, (0, 0, 0, 0, 0, 0, 0, 1)).to(accumulate)
        return memory.masked_fill(hidden[..., None, None], 0.0)[batch, indices]

    slot_weights = weights.to(accumulate).masked_fill(lengths[batch, indices] == 0, 0.0)
    per_kv_head = query.shape[3] // kv_heads
    queries = query.to(accumulate).unflatten(3, (kv_heads, per_kv_head))
    scores = torch.einsum("bcqgrd,bcksgd->bcgrqks", queries, gather(key)) * scale
    # The lowest finite score, not -inf: a slot without tokens then has a softmax (and weight 0).
    unseen = hidden[batch, indices][:, :, None, None, None]
    scores = scores.masked_fill(unseen, torch.finfo(accumulate).min)
    if softmax_plus_one:
        # The implicit key of score 0 and value 0.
        probabilities = pad(scores, (0, 1)).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    values = slot_weights[..., None, None, None] * gather(value)
    output = torch.einsum("bcgrqks,bcksgd->bcqgrd", probabilities, values)
    return output.flatten(3, 4).to(query.dtype)
