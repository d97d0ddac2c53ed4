"""The forward kernel: one program per chunk of queries and key/value head, slot after slot.

    output = sum over slots of w * softmax(scale * q K^T) V

Keys and values of a slot are loaded once for all rows of the program. A chunk that fits one tile
has its softmax in one piece; a longer one is passed over twice. Nothing is saved for the backward.
"""

import triton
import triton.language as tl

from drt.ops.gca.triton.kernels.tile import (
    COUNTS,
    extend_softmax,
    load_rows,
    load_tokens,
    plane,
    read_slot,
    reciprocal,
    row_scores,
    start_softmax,
    store_rows,
    zeros,
)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    query, key, value, indices, weights, lengths, output,
    q_b, q_c, q_q, q_h, q_d, k_b, k_m, k_s, k_g, k_d, v_b, v_m, v_s, v_g, v_d,
    o_b, o_c, o_q, o_h, o_d, C, Q, G, M, K, scale,
    R: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
    IN_ORDER: tl.constexpr, RAGGED: tl.constexpr, PLUS_ONE: tl.constexpr, PRECISION: tl.constexpr,
):
    """A program takes SPAN rows in tiles of sizes BLOCKS; PARTS programs share a chunk."""
    # Chunks innermost: programs that run together read one head's memory, which then stays in L2.
    program = tl.program_id(0)
    part, chunk, head = program % PARTS, program // PARTS % C, program // PARTS // C
    g, b = head % G, head // G
    rows, start = Q * R, part * SPAN
    q_base = plane(query, b, q_b, chunk, q_c, g * R, q_h)
    queries, sums, first = (), (), start
    for t in tl.static_range(len(BLOCKS)):
        queries += (load_rows(q_base, first, rows, q_q, q_h, q_d, R, BLOCKS[t], D, BLOCK_D),)
        sums += (zeros(BLOCKS[t], BLOCK_D),)
        first += BLOCKS[t]
    for k in range(K):
        pair = (b.to(tl.int64) * C + chunk) * K + k
        place, weight, length = read_slot(
            indices, weights, lengths, pair, b, M, S, IN_ORDER, RAGGED
        )
        k_base = plane(key, b, k_b, place, k_m, g, k_g)
        v_base = plane(value, b, v_b, place, v_m, g, v_g)
        new = ()
        if SPLITS == 1:
            keys = load_tokens(k_base, 0, length, k_s, k_d, BLOCK_S, D, BLOCK_D)
            values = load_tokens(v_base, 0, length, v_s, v_d, BLOCK_S, D, BLOCK_D)
            for t in tl.static_range(len(BLOCKS)):
                scores = row_scores(queries[t], keys, 0, length, scale, BLOCK_S, PRECISION)
                maximum, total = start_softmax(BLOCKS[t], PLUS_ONE)
                powers, maximum, total = extend_softmax(scores, maximum, total, 1)
                probs = (powers * (weight * reciprocal(total))[:, None]).to(values.dtype)
                new += (tl.dot(probs, values, sums[t], input_precision=PRECISION),)
        else:
            for t in tl.static_range(len(BLOCKS)):
                new += (
                    attend_long_chunk(
                        queries[t], sums[t], k_base, v_base, weight, length, k_s, k_d, v_s, v_d,
                        scale, D, BLOCKS[t], BLOCK_S, SPLITS, BLOCK_D, PLUS_ONE, PRECISION,
                    ),
                )
        sums = new
    o_base = plane(output, b, o_b, chunk, o_c, g * R, o_h)
    first = start
    for t in tl.static_range(len(BLOCKS)):
        store_rows(o_base, first, rows, o_q, o_h, o_d, sums[t], R, BLOCKS[t], D, BLOCK_D)
        first += BLOCKS[t]


@triton.jit
def attend_long_chunk(
    queries, acc, k_base, v_base, weight, length, k_s, k_d, v_s, v_d, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr, PLUS_ONE: tl.constexpr, PRECISION: tl.constexpr,
):
    """`acc` plus what one row tile reads from a chunk of SPLITS tiles."""
    maximum, total = start_softmax(BLOCK, PLUS_ONE)
    for split in range(SPLITS):
        first = split * BLOCK_S
        keys = load_tokens(k_base, first, length, k_s, k_d, BLOCK_S, D, BLOCK_D)
        scores = row_scores(queries, keys, first, length, scale, BLOCK_S, PRECISION)
        _, maximum, total = extend_softmax(scores, maximum, total, 1)
    factor = weight * reciprocal(total)
    for split in range(SPLITS):
        first = split * BLOCK_S
        keys = load_tokens(k_base, first, length, k_s, k_d, BLOCK_S, D, BLOCK_D)
        values = load_tokens(v_base, first, length, v_s, v_d, BLOCK_S, D, BLOCK_D)
        scores = row_scores(queries, keys, first, length, scale, BLOCK_S, PRECISION)
        probs = tl.exp2(scores - maximum[:, None]) * factor[:, None]
        acc = tl.dot(probs.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc
