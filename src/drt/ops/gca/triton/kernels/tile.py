"""What the kernels share: addresses, loads, and the softmax of one tile.

A program works on the queries of one chunk and one key/value head: its `rows` are the Q positions
times the R query heads that read this head, row r being position r // R and head r % R of them.
Offsets are 64 bits wide: a memory of 16M tokens has more than 2 ** 31 numbers.
"""

import triton
import triton.language as tl

# Counts that change from call to call. A kernel would be compiled anew for those that are 1 or
# multiples of 16; and one that is 1 would be a Python number, without a type.
COUNTS = ("C", "M", "num_pairs", "num_sources", "num_segments", "num_partials")
# Below every score but finite, so that a row without any key has exp2(-inf - LOWEST) = 0.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def plane(base, first, first_stride, second, second_stride, third, third_stride):
    """Pointer to what three numbers name, in 64 bits."""
    base += first.to(tl.int64) * first_stride
    base += second.to(tl.int64) * second_stride
    return base + third.to(tl.int64) * third_stride


@triton.jit
def row_offsets(first, stride_q, stride_h, R: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) offsets of the rows from `first` on."""
    row = first + tl.arange(0, BLOCK)
    return (row // R).to(tl.int64) * stride_q + (row % R).to(tl.int64) * stride_h


@triton.jit
def load_tile(base, offsets, stride_d, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(n, BLOCK_D) numbers at n offsets, 0 where there is nothing."""
    dims = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if BLOCK_D != D:
        mask = mask & (dims < D)[None, :]
    pointers = base + (offsets[:, None] + (dims.to(tl.int64) * stride_d)[None, :])
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(base, offsets, stride_d, exists, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of `load_tile`."""
    dims = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if BLOCK_D != D:
        mask = mask & (dims < D)[None, :]
    pointers = base + (offsets[:, None] + (dims.to(tl.int64) * stride_d)[None, :])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(
    base, first, rows, stride_q, stride_h, stride_d,
    R: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """(BLOCK, BLOCK_D) rows from `first` on."""
    exists = first + tl.arange(0, BLOCK) < rows
    offsets = row_offsets(first, stride_q, stride_h, R, BLOCK)
    return load_tile(base, offsets, stride_d, exists, D, BLOCK_D)


@triton.jit
def store_rows(
    base, first, rows, stride_q, stride_h, stride_d, tile,
    R: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The reverse of `load_rows`."""
    exists = first + tl.arange(0, BLOCK) < rows
    offsets = row_offsets(first, stride_q, stride_h, R, BLOCK)
    store_tile(base, offsets, stride_d, exists, tile, D, BLOCK_D)


@triton.jit
def load_tokens(
    base, first, length, stride_s, stride_d,
    BLOCK_S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """(BLOCK_S, BLOCK_D) keys or values of a chunk of so many tokens, from token `first` on."""
    token = first + tl.arange(0, BLOCK_S)
    return load_tile(base, token.to(tl.int64) * stride_s, stride_d, token < length, D, BLOCK_D)


@triton.jit
def read_slot(
    indices, weights, lengths, pair, b, M,
    S: tl.constexpr, IN_ORDER: tl.constexpr, RAGGED: tl.constexpr,
):
    """Chunk of the memory, weight and number of tokens of a retrieved slot; unused: 0 tokens.

    `pair` counts the slots of all B rows; the slot belongs to row `b`, whose memory has M chunks.
    """
    if IN_ORDER:
        place = pair - b.to(tl.int64) * M
        length = S
    else:
        index = tl.load(indices + pair)
        place = tl.maximum(index, 0).to(tl.int64)
        length = tl.where(index < 0, 0, S)
    if RAGGED:
        length = tl.minimum(length, tl.load(lengths + b.to(tl.int64) * M + place)).to(tl.int32)
    # An unused slot may hold any weight, NaN too.
    weight = tl.where(length > 0, tl.load(weights + pair), 0.0)
    return place, weight, length


@triton.jit
def start_softmax(SHAPE: tl.constexpr, PLUS_ONE: tl.constexpr):
    """Maximum and sum before the first key; with plus one, after the implicit key of score 0."""
    if PLUS_ONE:
        return tl.zeros([SHAPE], tl.float32), tl.full([SHAPE], 1.0, tl.float32)
    return tl.full([SHAPE], LOWEST, tl.float32), tl.zeros([SHAPE], tl.float32)


@triton.jit
def extend_softmax(scores, maximum, total, KEY_AXIS: tl.constexpr):
    """exp2(scores - maximum) with the maximum of all keys so far, that maximum, and their sum.

    `scores` are in units of log2 and -inf where there is no key; keys lie along KEY_AXIS.
    """
    highest = tl.maximum(maximum, tl.max(scores, KEY_AXIS))
    powers = tl.exp2(scores - tl.expand_dims(highest, KEY_AXIS))
    total = total * tl.exp2(maximum - highest) + tl.sum(powers, KEY_AXIS)
    return powers, highest, total


@triton.jit
def reciprocal(total):
    """1 / total, and 0 where there was no key at all."""
    return tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)


@triton.jit
def row_scores(queries, keys, first, length, scale, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr):
    """(rows, BLOCK_S) scores of a tile of keys that begins with token `first` of its chunk."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    seen = first + tl.arange(0, BLOCK_S) < length
    return tl.where(seen[None, :], scores, float("-inf"))


@triton.jit
def zeros(N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(N, BLOCK_D) float32."""
    return tl.zeros((N, BLOCK_D), tl.float32)
