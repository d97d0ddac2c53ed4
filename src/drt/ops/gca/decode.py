"""Decoding on CPU: a few queries, and a memory that holds what they retrieve and nothing else.

Each (S, D) plane of the memory, one per retrieved chunk and key/value head, is one matrix of a
batched GEMM, read where it lies: no index, and no copy of keys or values.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from drt.ops.gca.blocks import Options
from drt.ops.gca.order import in_order
from drt.precision import sum_dtype

# With more queries, products with the keys of all slots at once are worth the copy of the keys.
_MAX_QUERIES = 4


def lies_in_order(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor | None, key_lengths: Tensor | None
) -> bool:
    """Whether `attend_in_order` can serve a call; reads indices and lengths only.

    The queries must be few, keys and values head-major without gaps, no chunk of length 0, and
    chunk c of queries must have retrieved the chunks c * K, c * K + 1, ..., c * K + K - 1 of M =
    C * K.
    """
    if query.shape[2] > _MAX_QUERIES:
        return False
    if not all(memory.transpose(2, 3).is_contiguous() for memory in (key, value)):
        return False
    if key_lengths is not None and not bool(key_lengths.all()):
        return False
    if indices is None:
        return True
    return key.shape[1] == indices.shape[1] * indices.shape[2] and torch.equal(
        indices, in_order(indices)
    )


def attend_in_order(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    key_lengths: Tensor | None,
    options: Options,
) -> Tensor:
    """Same contract as `blocked`, without gradient, for tensors that `lies_in_order` accepts.

    The results of the two GEMMs with the memory are rounded to query's dtype; the softmax and the
    sum over slots are float32 (float64 for float64 inputs).
    """
    (batch, count, num_queries, heads, width), (size, kv_heads) = query.shape, key.shape[2:4]
    topk, per_kv_head = weights.shape[2], heads // kv_heads
    # (B * C * K * G, S, D): the G planes of a slot after each other
    keys, values = (memory.transpose(2, 3).view(-1, size, width) for memory in (key, value))
    rows = query.unflatten(3, (kv_heads, per_kv_head)).transpose(2, 3)
    # (B * C * K * G, Q * R, D)
    rows = rows[:, :, None].expand(-1, -1, topk, -1, -1, -1, -1).reshape(len(keys), -1, width)
    scores = query.new_empty(*rows.shape[:2], size)
    torch.baddbmm(scores, rows, keys.mT, beta=0, alpha=options.scale, out=scores)
    hidden = None
    if key_lengths is not None:
        # (B * C * K, S)
        hidden = torch.arange(size) >= key_lengths.flatten()[:, None]
        scores.view(len(hidden), -1, size).masked_fill_(hidden[:, None], float("-inf"))
    p = _softmax(scores, options).to(query.dtype)
    results = torch.bmm(p, values)
    if hidden is not None and not bool(results.isfinite().all()):
        # 0 * NaN is not 0: what lies past the end of a chunk must not be read after all.
        values = values.view(len(hidden), -1, size, width)
        values = values.masked_fill(hidden[:, None, :, None], 0.0).view_as(keys)
        results = torch.bmm(p, values)
    wide = sum_dtype(query)
    results = results.view(batch * count, topk, -1).to(wide)
    output = torch.bmm(weights.to(wide).reshape(-1, 1, topk), results)
    output = output.view(batch, count, kv_heads, num_queries, per_kv_head, width)
    return output.transpose(2, 3).reshape(query.shape).to(query.dtype)


def _softmax(scores: Tensor, options: Options) -> Tensor:
    wide = sum_dtype(scores)
    if not options.softmax_plus_one:
        return torch.softmax(scores, -1, dtype=wide)
    # The implicit key of score 0 and value 0.
    return torch.softmax(pad(scores, (0, 1)), -1, dtype=wide)[..., :-1]
