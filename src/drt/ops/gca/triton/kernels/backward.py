"""The backward kernels. With p the softmax of a slot, dP = dO V^T and delta = rowsum(p * dP):

    dw = sum over rows and heads of delta          dS = w * p * (dP - delta)
    dq = scale * sum over slots of dS K            dK = scale * dS^T q        dV = (w * p)^T dO

`query_kernel` goes over the slots of a chunk of queries, like the forward, for dq and dw;
`memory_kernel` goes over the chunks of queries that retrieved a chunk of the memory, for dK and dV.
Each number is summed by one program in one order: the same inputs give the same bits.
"""

import triton
import triton.language as tl

from drt.ops.gca.triton.kernels.tile import (
    COUNTS,
    extend_softmax,
    load_rows,
    load_tile,
    load_tokens,
    plane,
    read_slot,
    reciprocal,
    row_scores,
    start_softmax,
    store_rows,
    store_tile,
    zeros,
)


@triton.jit(do_not_specialize=COUNTS)
def query_kernel(
    query, key, value, indices, weights, lengths, grad, d_query, d_weights, row_sums,
    q_b, q_c, q_q, q_h, q_d, k_b, k_m, k_s, k_g, k_d, v_b, v_m, v_s, v_g, v_d,
    o_b, o_c, o_q, o_h, o_d, x_b, x_c, x_q, x_h, x_d, C, Q, G, M, K, num_pairs, scale, factor,
    R: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
    IN_ORDER: tl.constexpr, RAGGED: tl.constexpr, PLUS_ONE: tl.constexpr, PRECISION: tl.constexpr,
    KEEP_SUMS: tl.constexpr,
):
    """dq, and dw in parts (B, C, K, G, PARTS).

    With KEEP_SUMS also what `memory_kernel` must know of chunks that it sees in pieces: `row_sums`
    (2, B, C, K, G, Q * R) are the log2 of each row's softmax sum, and its delta.
    """
    program = tl.program_id(0)
    part, chunk, head = program % PARTS, program // PARTS % C, program // PARTS // C
    g, b = head % G, head // G
    rows, start = Q * R, part * SPAN
    beyond = num_pairs.to(tl.int64) * G * rows
    q_base = plane(query, b, q_b, chunk, q_c, g * R, q_h)
    o_base = plane(grad, b, o_b, chunk, o_c, g * R, o_h)
    queries, grads, sums, first = (), (), (), start
    for t in tl.static_range(len(BLOCKS)):
        queries += (load_rows(q_base, first, rows, q_q, q_h, q_d, R, BLOCKS[t], D, BLOCK_D),)
        grads += (load_rows(o_base, first, rows, o_q, o_h, o_d, R, BLOCKS[t], D, BLOCK_D),)
        sums += (zeros(BLOCKS[t], BLOCK_D),)
        first += BLOCKS[t]
    for k in range(K):
        pair = (b.to(tl.int64) * C + chunk) * K + k
        place, weight, length = read_slot(
            indices, weights, lengths, pair, b, M, S, IN_ORDER, RAGGED
        )
        k_base = plane(key, b, k_b, place, k_m, g, k_g)
        v_base = plane(value, b, v_b, place, v_m, g, v_g)
        new, d_weight, first = (), 0.0, start
        if SPLITS == 1:
            keys = load_tokens(k_base, 0, length, k_s, k_d, BLOCK_S, D, BLOCK_D)
            values = load_tokens(v_base, 0, length, v_s, v_d, BLOCK_S, D, BLOCK_D)
        for t in tl.static_range(len(BLOCKS)):
            if SPLITS == 1:
                scores = row_scores(queries[t], keys, 0, length, scale, BLOCK_S, PRECISION)
                maximum, total = start_softmax(BLOCKS[t], PLUS_ONE)
                powers, maximum, total = extend_softmax(scores, maximum, total, 1)
                probs = powers * reciprocal(total)[:, None]
                d_probs = tl.dot(grads[t], tl.trans(values), input_precision=PRECISION)
                delta = tl.sum(probs * d_probs, 1)
                d_scores = (weight * probs * (d_probs - delta[:, None])).to(keys.dtype)
                new += (tl.dot(d_scores, keys, sums[t], input_precision=PRECISION),)
            else:
                acc, maximum, total, delta = differentiate_long_chunk(
                    queries[t], grads[t], sums[t], k_base, v_base, weight, length,
                    k_s, k_d, v_s, v_d, scale,
                    D, BLOCKS[t], BLOCK_S, SPLITS, BLOCK_D, PLUS_ONE, PRECISION,
                )
                new += (acc,)
            if KEEP_SUMS:
                # A row without keys is never read again; 1 keeps its logarithm finite.
                logarithm = maximum + tl.log2(tl.where(total > 0.0, total, 1.0))
                place = (pair * G + g) * rows
                store_row_sums(row_sums + place, first, rows, logarithm, BLOCKS[t])
                store_row_sums(row_sums + place + beyond, first, rows, delta, BLOCKS[t])
            first += BLOCKS[t]
            d_weight += tl.sum(delta)
        sums = new
        tl.store(d_weights + (pair * G + g) * PARTS + part, d_weight)
    x_base = plane(d_query, b, x_b, chunk, x_c, g * R, x_h)
    first = start
    for t in tl.static_range(len(BLOCKS)):
        d_rows = sums[t] * factor
        store_rows(x_base, first, rows, x_q, x_h, x_d, d_rows, R, BLOCKS[t], D, BLOCK_D)
        first += BLOCKS[t]


@triton.jit
def differentiate_long_chunk(
    queries, grads, acc, k_base, v_base, weight, length, k_s, k_d, v_s, v_d, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr, PLUS_ONE: tl.constexpr, PRECISION: tl.constexpr,
):
    """`acc` plus dS K of one row tile; its softmax's maximum and sum, and delta."""
    maximum, total = start_softmax(BLOCK, PLUS_ONE)
    delta = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        first = split * BLOCK_S
        keys = load_tokens(k_base, first, length, k_s, k_d, BLOCK_S, D, BLOCK_D)
        values = load_tokens(v_base, first, length, v_s, v_d, BLOCK_S, D, BLOCK_D)
        scores = row_scores(queries, keys, first, length, scale, BLOCK_S, PRECISION)
        before = maximum
        powers, maximum, total = extend_softmax(scores, maximum, total, 1)
        d_probs = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        delta = delta * tl.exp2(before - maximum) + tl.sum(powers * d_probs, 1)
    inverse = reciprocal(total)
    delta *= inverse
    for split in range(SPLITS):
        first = split * BLOCK_S
        keys = load_tokens(k_base, first, length, k_s, k_d, BLOCK_S, D, BLOCK_D)
        values = load_tokens(v_base, first, length, v_s, v_d, BLOCK_S, D, BLOCK_D)
        scores = row_scores(queries, keys, first, length, scale, BLOCK_S, PRECISION)
        probs = tl.exp2(scores - maximum[:, None]) * inverse[:, None]
        d_probs = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        d_scores = (weight * probs * (d_probs - delta[:, None])).to(keys.dtype)
        acc = tl.dot(d_scores, keys, acc, input_precision=PRECISION)
    return acc, maximum, total, delta


@triton.jit
def store_row_sums(base, first, rows, sums, BLOCK: tl.constexpr):
    """Write one number a row."""
    row = first + tl.arange(0, BLOCK)
    tl.store(base + row, sums, mask=row < rows)


@triton.jit(do_not_specialize=COUNTS)
def memory_kernel(
    query, key, value, weights, lengths, grad, d_key, d_value, d_partial, row_sums,
    order, starts, sources, segments, partials,
    q_b, q_c, q_q, q_h, q_d, k_b, k_m, k_s, k_g, k_d, v_b, v_m, v_s, v_g, v_d,
    o_b, o_c, o_q, o_h, o_d, x_b, x_m, x_s, x_g, x_d, y_b, y_m, y_s, y_g, y_d,
    C, Q, G, M, K, num_sources, num_segments, num_pairs, num_partials, scale, factor,
    R: tl.constexpr, S: tl.constexpr, D: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, FULL: tl.constexpr, TAIL_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr, PLUS_ONE: tl.constexpr, PRECISION: tl.constexpr,
):
    """dK and dV of one tile of a chunk, from one segment of the list of those who retrieved it.

    FULL tiles of BLOCK_ROWS rows cover a chunk of queries but for its last, at most TAIL_ROWS. The
    lists are an `InverseIndex`. What a list of one segment gives is written to the gradients, that
    of the segments of a longer one to `d_partial` (2, num_partials, G, S, D) float32.
    """
    program = tl.program_id(0)
    split, segment = program % SPLITS, program // SPLITS % num_segments
    g = program // SPLITS // num_segments
    source = tl.load(sources + segment)
    if source < num_sources:
        b, place, token = source // M, source % M, split * BLOCK_S
        number = segment - tl.load(segments + source)
        begin = tl.load(starts + source) + number * SEGMENT
        count = tl.minimum(tl.load(starts + source + 1) - begin, SEGMENT)
        length = S
        if RAGGED:
            length = tl.load(lengths + source).to(tl.int32)
        k_base = plane(key, b, k_b, place, k_m, g, k_g)
        v_base = plane(value, b, v_b, place, v_m, g, v_g)
        keys = load_tokens(k_base, token, length, k_s, k_d, BLOCK_S, D, BLOCK_D)
        values = load_tokens(v_base, token, length, v_s, v_d, BLOCK_S, D, BLOCK_D)
        q_base = plane(query, b, q_b, g * R, q_h, g, 0)
        o_base = plane(grad, b, o_b, g * R, o_h, g, 0)
        d_keys, d_values = zeros(BLOCK_S, BLOCK_D), zeros(BLOCK_S, BLOCK_D)
        for i in range(count * FULL):
            pair = tl.load(order + begin + i // FULL)
            d_keys, d_values = add_rows(
                d_keys, d_values, keys, values, weights, row_sums, pair, g, i % FULL, token, length,
                q_base, q_c, q_q, q_h, q_d, o_base, o_c, o_q, o_h, o_d, C, Q * R, G, K, num_pairs,
                scale, R, D, BLOCK_ROWS, BLOCK_ROWS, BLOCK_S, SPLITS, BLOCK_D, PLUS_ONE, PRECISION,
            )
        if TAIL_ROWS > 0:
            for i in range(count):
                pair = tl.load(order + begin + i)
                d_keys, d_values = add_rows(
                    d_keys, d_values, keys, values, weights, row_sums, pair, g, FULL, token, length,
                    q_base, q_c, q_q, q_h, q_d, o_base, o_c, o_q, o_h, o_d, C, Q * R, G, K,
                    num_pairs, scale,
                    R, D, TAIL_ROWS, BLOCK_ROWS, BLOCK_S, SPLITS, BLOCK_D, PLUS_ONE, PRECISION,
                )
        d_keys *= factor
        tokens = token + tl.arange(0, BLOCK_S)
        exists = tokens < S
        if tl.load(segments + source + 1) - tl.load(segments + source) == 1:
            x_base = plane(d_key, b, x_b, place, x_m, g, x_g)
            y_base = plane(d_value, b, y_b, place, y_m, g, y_g)
            store_tile(x_base, tokens.to(tl.int64) * x_s, x_d, exists, d_keys, D, BLOCK_D)
            store_tile(y_base, tokens.to(tl.int64) * y_s, y_d, exists, d_values, D, BLOCK_D)
        else:
            slot = (tl.load(partials + source) + number).to(tl.int64)
            offsets = ((slot * G + g) * S + tokens) * D
            store_tile(d_partial, offsets, 1, exists, d_keys, D, BLOCK_D)
            offsets += num_partials.to(tl.int64) * G * S * D
            store_tile(d_partial, offsets, 1, exists, d_values, D, BLOCK_D)


@triton.jit
def add_rows(
    d_keys, d_values, keys, values, weights, row_sums, pair, g, tile, token, length,
    q_base, q_c, q_q, q_h, q_d, o_base, o_c, o_q, o_h, o_d, C, rows, G, K, num_pairs, scale,
    R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
    PLUS_ONE: tl.constexpr, PRECISION: tl.constexpr,
):
    """dK / factor and dV plus what BLOCK rows from row tile * STEP on of one slot give."""
    first, chunk = tile * STEP, (pair // K % C).to(tl.int64)
    # An unused slot may hold any weight, NaN too.
    weight = tl.where(length > 0, tl.load(weights + pair), 0.0)
    queries = load_rows(q_base + chunk * q_c, first, rows, q_q, q_h, q_d, R, BLOCK, D, BLOCK_D)
    grads = load_rows(o_base + chunk * o_c, first, rows, o_q, o_h, o_d, R, BLOCK, D, BLOCK_D)
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
    seen = token + tl.arange(0, BLOCK_S) < length
    scores = tl.where(seen[:, None], scores, float("-inf"))
    d_probs = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
    if SPLITS == 1:
        maximum, total = start_softmax(BLOCK, PLUS_ONE)
        powers, maximum, total = extend_softmax(scores, maximum, total, 0)
        probs = powers * reciprocal(total)[None, :]
        delta = tl.sum(probs * d_probs, 0)
    else:
        row = first + tl.arange(0, BLOCK)
        place = (pair.to(tl.int64) * G + g) * rows + row
        total = tl.load(row_sums + place, mask=row < rows, other=0.0)
        place += num_pairs.to(tl.int64) * G * rows
        delta = tl.load(row_sums + place, mask=row < rows, other=0.0)
        probs = tl.exp2(scores - total[None, :])
    weighted = weight * probs
    d_values = tl.dot(weighted.to(grads.dtype), grads, d_values, input_precision=PRECISION)
    d_scores = (weighted * (d_probs - delta[None, :])).to(queries.dtype)
    d_keys = tl.dot(d_scores, queries, d_keys, input_precision=PRECISION)
    return d_keys, d_values


@triton.jit(do_not_specialize=COUNTS)
def reduce_kernel(
    d_partial, d_key, d_value, segments, partials,
    x_b, x_m, x_s, x_g, x_d, y_b, y_m, y_s, y_g, y_d, G, M, num_sources, num_partials,
    S: tl.constexpr, D: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Sum the segments of a chunk that has several, first to last."""
    program = tl.program_id(0)
    split, source = program % SPLITS, program // SPLITS % num_sources
    g = program // SPLITS // num_sources
    count = tl.load(segments + source + 1) - tl.load(segments + source)
    if count > 1:
        b, place = source // M, source % M
        tokens = split * BLOCK_S + tl.arange(0, BLOCK_S)
        exists = tokens < S
        slot = tl.load(partials + source).to(tl.int64)
        beyond = num_partials.to(tl.int64) * G * S * D
        d_keys, d_values = zeros(BLOCK_S, BLOCK_D), zeros(BLOCK_S, BLOCK_D)
        for i in range(count):
            offsets = (((slot + i) * G + g) * S + tokens) * D
            d_keys += load_tile(d_partial, offsets, 1, exists, D, BLOCK_D)
            d_values += load_tile(d_partial, offsets + beyond, 1, exists, D, BLOCK_D)
        x_base = plane(d_key, b, x_b, place, x_m, g, x_g)
        y_base = plane(d_value, b, y_b, place, y_m, g, y_g)
        store_tile(x_base, tokens.to(tl.int64) * x_s, x_d, exists, d_keys, D, BLOCK_D)
        store_tile(y_base, tokens.to(tl.int64) * y_s, y_d, exists, d_values, D, BLOCK_D)
