"""How the banded backend cuts up a call: parts of the batch, blocks of queries, bias of a block."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drt.precision import sum_dtype

# Blocks start and end at multiples of this: odd row lengths cost 10 % in bfloat16.
_ALIGNMENT = 16
# Bytes of one tile of scores, per thread. Measured on a core with 1 MB of L2 cache, where 2-byte
# products want larger tiles because each call into their library costs more.
TILE_BYTES = {2: 1 << 20, 4: 1 << 19, 8: 1 << 19}
# Elsewhere each call costs a kernel launch, so tiles are as large as memory allows.
_ACCELERATOR_TILE_BYTES = 1 << 28


class Band(NamedTuple):
    """What a call asks for, tensors of the graph aside."""

    window: int
    scale: float
    alibi_slopes: Tensor | None
    first_keys: Tensor | None
    """(B, T) in [0, p] for the query at key position p."""


class Plan(NamedTuple):
    """How a call is computed: `block` queries at a time, `max_heads` of the X at a time.

    `bias` (G, block * R, halo + block) is added to the scores of a block and of the `halo` keys
    before it; it is -inf where a query does not reach. `first_keys` as in `Band`, of the rows of
    a part.
    """

    block: int
    halo: int
    max_heads: int
    scale: float
    bias: Tensor
    first_keys: Tensor | None


class Block(NamedTuple):
    """One step: rows of the folded queries, the keys in their reach, and its part of the bias.

    `hidden` (B, n, m) bool says which of its first m keys lie before the first keys of its n
    queries; None where none does.
    """

    rows: slice
    keys: slice
    bias: Tensor
    hidden: Tensor | None


def make_plan(query: Tensor, key: Tensor, band: Band) -> Plan:
    """Choose block and parts from the window, the dtype and the device: as measured on CPUs."""
    num_queries, ratio, kv_heads = query.shape[1], query.shape[2] // key.shape[2], key.shape[2]
    itemsize = query.element_size()
    if query.device.type == "cpu":
        # A wider block multiplies more that is masked; a narrower one makes smaller products.
        low, high, share = (32, 128, 2) if itemsize == 2 else (32, 64, 4)
        tile_bytes = TILE_BYTES[itemsize] * _num_threads()
    else:
        low, high, share = 128, 1024, 1
        tile_bytes = _ACCELERATOR_TILE_BYTES
    block = min(max(band.window // share, low), high) // _ALIGNMENT * _ALIGNMENT
    block = min(block, max(num_queries, 1))
    halo = -(-min(band.window - 1, key.shape[1]) // _ALIGNMENT) * _ALIGNMENT
    head_bytes = ratio * block * (halo + block) * itemsize
    bias = _band_bias(query, kv_heads, band, block, halo)
    max_heads = max(1, tile_bytes // head_bytes)
    return Plan(block, halo, max_heads, band.scale, bias, band.first_keys)


@torch.compiler.assume_constant_result
def _num_threads() -> int:
    return torch.get_num_threads()


def _band_bias(query: Tensor, kv_heads: int, band: Band, block: int, halo: int) -> Tensor:
    """(G, block * R, halo + block), dtype of `query`: see `Plan`."""
    compute = sum_dtype(query)
    ratio = query.shape[2] // kv_heads
    # float32 counts positions exactly up to 2 ** 24
    position = torch.arange(halo + block, dtype=compute, device=query.device)
    distance = position[halo:, None] - position
    outside = (distance < 0) | (distance >= band.window)
    mask = torch.zeros_like(distance).masked_fill_(outside, float("-inf"))
    if band.alibi_slopes is None:
        bias = mask[:, None].to(query.dtype).expand(kv_heads, -1, ratio, -1)
    else:
        slopes = band.alibi_slopes.to(compute).view(kv_heads, 1, ratio, 1)
        bias = torch.addcmul(mask[:, None], slopes, distance[:, None], value=-1).to(query.dtype)
    return bias.flatten(1, 2)


def parts(tensors: Sequence[Tensor | None], plan: Plan) -> Iterator[tuple[list[Any], Plan]]:
    """Cut query, key and tensors of their shapes into groups of heads whose tiles fit a cache."""
    key = tensors[1]
    assert key is not None
    batch, _, kv_heads, _ = key.shape
    row_step = _even_step(batch, plan.max_heads // kv_heads)
    head_step = _even_step(kv_heads, plan.max_heads)
    for row in range(0, batch, row_step):
        rows = slice(row, row + row_step)
        first_keys = None if plan.first_keys is None else plan.first_keys[rows]
        for first in range(0, kv_heads, head_step):
            last = min(first + head_step, kv_heads)
            part = [None if x is None else _take(x, rows, first, last, kv_heads) for x in tensors]
            yield part, plan._replace(bias=plan.bias[first:last], first_keys=first_keys)


def _take(x: Tensor, rows: slice, first: int, last: int, kv_heads: int) -> Tensor:
    ratio = x.shape[2] // kv_heads
    return x[rows, :, first * ratio : last * ratio]


def _even_step(total: int, limit: int) -> int:
    """Size of the parts when `total` is cut into as few parts of at most `limit` as can be."""
    num_parts = -(-total // max(limit, 1))
    return -(-total // max(num_parts, 1)) or 1


def blocks(query: Tensor, key: Tensor, plan: Plan) -> Iterator[Block]:
    """Steps over the queries of a part, first to last."""
    num_queries, num_cached = query.shape[1], key.shape[1] - query.shape[1]
    ratio = query.shape[2] // key.shape[2]
    for first in range(0, num_queries, plan.block):
        last = min(first + plan.block, num_queries)
        # the key at column 0 of the bias
        origin = num_cached + first - plan.halo
        start, stop = max(origin, 0), num_cached + last
        bias = plan.bias[:, : (last - first) * ratio, start - origin : stop - origin]
        first_keys = None if plan.first_keys is None else plan.first_keys[:, first:last]
        hidden = None if first_keys is None else hidden_keys(first_keys, start, stop)
        yield Block(slice(first * ratio, last * ratio), slice(start, stop), bias, hidden)


def hidden_keys(first_keys: Tensor, start: int, stop: int) -> Tensor | None:
    """Which of the keys from `start` on lie before the (B, n) first keys: `hidden` of `Block`.

    First keys are below `stop`.
    """
    if can_read(first_keys):
        # No key from the last first key on is hidden.
        stop = int(first_keys.max())
    if stop <= start:
        return None
    return torch.arange(start, stop, device=first_keys.device) < first_keys[..., None]


def can_read(tensor: Tensor) -> bool:
    """Whether the host can look at the numbers now: without waiting, or leaving a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
