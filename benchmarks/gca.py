"""How fast and how large is the blocked grouped cross-attention, against what one would write?

    python benchmarks/gca.py [--quick] [--json PATH]

Three questions: time against (i) one SDPA call over all retrieved chunks and a weighted sum and
(ii) one grouped einsum; peak memory of the same three; time against full causal attention and a
sliding window on long rows. One torch thread, CPU time of the process, variants in turn.
"""

import json
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import (
    ALLOCATORS,
    PASSES,
    forward_backward,
    full_causal,
    hardware_line,
    measure,
    parser,
    peak_bytes,
    print_table,
    ratio,
    run_worker,
    write_json,
)
from drt.ops.gca import grouped_cross_attention
from drt.ops.window import sliding_window_attention
from drt.testing import assert_within_budget
from gca_variants import Sizes, chunk_sdpa, grouped_einsum, make_inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WINDOW = 512


def blocked(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return grouped_cross_attention(query, key, value, indices, weights, backend="blocked")


OPERATORS = {"blocked": blocked, "chunk sdpa": chunk_sdpa, "grouped einsum": grouped_einsum}


def check_correctness() -> None:
    """All variants compute the same, before any clock starts."""
    for dtype in DTYPES.values():
        inputs = make_inputs(dtype, Sizes(chunks=4))
        doubles = inputs.to_float64()
        truth = forward_backward(chunk_sdpa, doubles)
        baseline = forward_backward(chunk_sdpa, inputs)
        for operator in (blocked, grouped_einsum):
            for precise, expected in zip(forward_backward(operator, doubles), truth, strict=True):
                # The same sums in another order, in float64.
                torch.testing.assert_close(precise, expected, rtol=1e-10, atol=1e-10)
        results = forward_backward(blocked, inputs)
        for actual, expected, plain in zip(results, truth, baseline, strict=True):
            assert_within_budget(actual, expected, baseline=plain)


def time_operators(*, chunks: int, repeats: int) -> dict[str, Any]:
    """Samples of every variant, by precision and pass."""
    results: dict[str, Any] = {}
    for precision, dtype in DTYPES.items():
        inputs = make_inputs(dtype, Sizes(chunks=chunks))
        for name, run in PASSES.items():
            variants = {key: partial(run, value, inputs) for key, value in OPERATORS.items()}
            results[f"{precision} {name}"] = measure(variants, repeats=repeats)
    return results


def peak_memory(*, chunks: int, precision: str, operator: str, passes: str) -> float:
    """Peak above the inputs, in query tensors."""
    run, function = PASSES[passes], OPERATORS[operator]
    # What libraries allocate once is not the operator's.
    run(function, make_inputs(DTYPES[precision], Sizes(chunks=4)))
    inputs = make_inputs(DTYPES[precision], Sizes(chunks=chunks))
    return peak_bytes(partial(run, function, inputs)) / inputs.query.nbytes


def window_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sliding_window_attention(query, key, value, window=WINDOW)


def time_long_rows(*, tokens: int, repeats: int) -> dict[str, Any]:
    """Samples of GCA, a sliding window of as many keys, and full attention, with 4 heads."""
    results: dict[str, Any] = {}
    for precision, dtype in DTYPES.items():
        chunked = make_inputs(dtype, Sizes(chunks=tokens // 64, heads=4, kv_heads=4))
        row = tuple(
            tensor.detach().reshape(1, tokens, 4, 64).requires_grad_() for tensor in chunked[:3]
        )
        for name, run in PASSES.items():
            variants = {
                "blocked": partial(run, blocked, chunked),
                "sliding window": partial(run, window_attention, row),
                "full causal": partial(run, full_causal, row),
            }
            results[f"{precision} {name}"] = measure(variants, repeats=repeats)
    return results


WORKERS = {"time": time_operators, "memory": peak_memory, "long": time_long_rows}


def gflops(seconds: list[float], *, chunks: int, passes: str) -> float:
    """Rate of the medians; the backward counts 5 products, the forward 2."""
    forward_products = 4 * chunks * 64 * (8 * 64) * 12 * 64
    products = forward_products * (3.5 if passes == "forward+backward" else 1.0)
    return products / sorted(seconds)[len(seconds) // 2] / 1e9


def report_times(chunks: int, repeats: int) -> dict[str, Any]:
    results, rows = {}, []
    for allocator, environment in ALLOCATORS.items():
        job = {"job": "time", "chunks": chunks, "repeats": repeats}
        results[allocator] = run_worker(job, environment=environment)
        for case, samples in results[allocator].items():
            rate = gflops(samples["blocked"], chunks=chunks, passes=case.split()[1])
            versus = (ratio(samples, "blocked", to=name) for name in list(OPERATORS)[1:])
            rows.append([allocator, case, *versus, f"{rate:.0f}"])
    print_table(
        f"Time of blocked relative to ... at B 1, C {chunks}, S 64, K 8, H 12, D 64; medians of "
        f"{repeats} (range of single rounds)",
        ["allocator", "case", *(f"/ {name}" for name in list(OPERATORS)[1:]), "GFLOP/s"],
        rows,
    )
    return results


def report_memory(chunks: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for precision in DTYPES:
        for passes in PASSES:
            peaks = results.setdefault(f"{precision} {passes}", {})
            for operator in OPERATORS:
                job = {"chunks": chunks, "precision": precision, "operator": operator}
                job |= {"job": "memory", "passes": passes}
                peaks[operator] = run_worker(job, environment={})
    print_table(
        f"Peak memory above the inputs at C {chunks}, in query tensors",
        ["case", *OPERATORS],
        [[case, *(f"{peak:.1f}" for peak in peaks.values())] for case, peaks in results.items()],
    )
    return results


def report_long_rows(lengths: list[int], repeats: int) -> dict[str, Any]:
    results, rows = {}, []
    for tokens in lengths:
        job = {"job": "long", "tokens": tokens, "repeats": repeats}
        results[str(tokens)] = run_worker(job, environment={})
        for case, samples in results[str(tokens)].items():
            others = (ratio(samples, name, to="blocked") for name in list(samples)[1:])
            rows.append([f"{tokens // 1024}K", case, *others])
    print_table(
        f"Time relative to blocked grouped cross-attention (S 64, K 8), H 4, D 64; medians of "
        f"{repeats} (range of single rounds)",
        ["tokens", "case", f"sliding window {WINDOW}", "full causal"],
        rows,
    )
    return results


def main() -> None:
    arguments = parser(__doc__, has_workers=True).parse_args()
    torch.set_num_threads(1)
    if arguments.worker is not None:
        job = json.loads(arguments.worker)
        print(json.dumps(WORKERS[job.pop("job")](**job)))
        return
    print(hardware_line(), flush=True)
    check_correctness()
    chunks, repeats = (64, 3) if arguments.quick else (256, 5)
    results = {
        "time": report_times(chunks, repeats),
        "memory": report_memory(chunks),
        "long": report_long_rows([4096] if arguments.quick else [4096, 16384], repeats),
    }
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
