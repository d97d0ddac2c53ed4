"""How fast is banded sliding-window attention, against what one would call instead?

    python benchmarks/window.py [--quick] [--json PATH] [--device cpu|cuda]

One row, window 512, 12 heads of width 64, forward and forward+backward in fp32 and bf16, against
PyTorch's scaled_dot_product_attention (SDPA) called on blocks of 512 queries with 1024 keys, on
blocks of 128 queries with 640 keys, on the whole row with a causal mask (which is another function:
full attention), and on the whole row with a dense mask of the window. All variants take and return
(B, T, H, D). One torch thread, CPU time of the process, variants in turn.

With `--device cuda` it is another benchmark, `window_cuda.py`: which backend is fastest there?
"""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import window_cuda
from common import (
    ALLOCATORS,
    PASSES,
    forward_backward,
    full_causal,
    hardware_line,
    measure,
    parser,
    print_table,
    ratio,
    run_worker,
    write_json,
)
from drt.ops.window import sliding_window_attention
from drt.testing import assert_within_budget

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WINDOW, HEADS, WIDTH = 512, 12, 64
# A dense mask costs memory and time by the square of the length.
LONGEST_DENSE = 2048

Variant = Callable[[Tensor, Tensor, Tensor], Tensor]


def banded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sliding_window_attention(query, key, value, window=WINDOW, backend="banded")


def sdpa_blocks(query: Tensor, key: Tensor, value: Tensor, *, block: int) -> Tensor:
    """SDPA on blocks of queries, each with the block and the WINDOW keys before it."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    outputs = []
    for first in range(0, query.shape[2], block):
        last = min(first + block, query.shape[2])
        start = max(first - WINDOW, 0)
        mask = window_mask(last - first, last - start, query.dtype)
        keys, values = key[:, :, start:last], value[:, :, start:last]
        outputs.append(
            scaled_dot_product_attention(query[:, :, first:last], keys, values, attn_mask=mask)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def dense_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sdpa_blocks(query, key, value, block=query.shape[1])


@lru_cache
def window_mask(num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """(num_queries, num_keys), to add; the queries are the last of the keys. Not on the clock."""
    position = torch.arange(num_keys)
    distance = position[num_keys - num_queries :, None] - position
    outside = (distance < 0) | (distance >= WINDOW)
    return torch.zeros(num_queries, num_keys, dtype=dtype).masked_fill_(outside, float("-inf"))


VARIANTS: dict[str, Variant] = {
    "banded": banded,
    "sdpa 512x1024": partial(sdpa_blocks, block=512),
    "sdpa 128x640": partial(sdpa_blocks, block=128),
    "sdpa full causal": full_causal,
    "sdpa dense mask": dense_mask,
}


def make_inputs(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, HEADS, WIDTH)
    query, key, value = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    )
    return query, key, value


def check_correctness() -> None:
    """All variants of the window compute the same, before any clock starts."""
    same = [name for name in VARIANTS if name != "sdpa full causal"]
    for dtype in DTYPES.values():
        inputs = make_inputs(1100, dtype)
        query, key, value = (x.detach().double().requires_grad_() for x in inputs)
        truth = forward_backward(dense_mask, (query, key, value))
        baseline = forward_backward(VARIANTS["sdpa 512x1024"], inputs)
        for name in same:
            precise = forward_backward(VARIANTS[name], (query, key, value))
            for actual, expected in zip(precise, truth, strict=True):
                # The same sums in another order, in float64.
                torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        results = forward_backward(banded, inputs)
        for actual, expected, plain in zip(results, truth, baseline, strict=True):
            # SDPA keeps scores and probabilities of bf16 inputs in float32, banded rounds both: at
            # three roundings for one, four times leaves a third.
            assert_within_budget(actual, expected, baseline=plain, factor=4.0)


def time_variants(*, length: int, repeats: int) -> dict[str, Any]:
    """Samples of every variant, by precision and pass."""
    variants = {
        name: variant
        for name, variant in VARIANTS.items()
        if name != "sdpa dense mask" or length <= LONGEST_DENSE
    }
    results: dict[str, Any] = {}
    for precision, dtype in DTYPES.items():
        inputs = make_inputs(length, dtype)
        for name, run in PASSES.items():
            calls = {key: partial(run, variant, inputs) for key, variant in variants.items()}
            results[f"{precision} {name}"] = measure(calls, repeats=repeats)
    return results


def gflops(seconds: list[float], *, length: int, case: str) -> float:
    """Rate of the median over the pairs inside the window; the backward counts 5 products."""
    pairs = sum(min(position + 1, WINDOW) for position in range(length))
    products = 4 * pairs * HEADS * WIDTH * (3.5 if "backward" in case else 1.0)
    return products / median(seconds) / 1e9


def report(length: int, results: Mapping[str, Any], *, repeats: int) -> None:
    others = [name for name in next(iter(results.values()))["default"] if name != "banded"]
    rows = []
    for case, by_allocator in results.items():
        for allocator, samples in by_allocator.items():
            versus = (ratio(samples, "banded", to=name) for name in others)
            rate = gflops(samples["banded"], length=length, case=case)
            milliseconds = 1e3 * median(samples["banded"])
            rows.append([case, allocator, *versus, f"{milliseconds:.0f}", f"{rate:.0f}"])
    print_table(
        f"Time of banded relative to ... at B 1, T {length}, W {WINDOW}, H {HEADS}, D {WIDTH}; "
        f"medians of {repeats} (range of single rounds)",
        ["case", "allocator", *(f"/ {name}" for name in others), "ms", "GFLOP/s"],
        rows,
    )


def main() -> None:
    options = parser(__doc__, has_workers=True)
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = options.parse_args()
    if arguments.device == "cuda":
        window_cuda.run(quick=arguments.quick, json_path=arguments.json)
        return
    torch.set_num_threads(1)
    if arguments.worker is not None:
        print(json.dumps(time_variants(**json.loads(arguments.worker))))
        return
    print(hardware_line(), flush=True)
    check_correctness()
    lengths, repeats = ([2048], 3) if arguments.quick else ([2048, 8192], 7)
    results: dict[str, Any] = {}
    for length in lengths:
        job = {"length": length, "repeats": repeats}
        by_allocator = {
            name: run_worker(job, environment=environment)
            for name, environment in ALLOCATORS.items()
        }
        cases = by_allocator["default"]
        results[str(length)] = {
            case: {name: by_allocator[name][case] for name in by_allocator} for case in cases
        }
        report(length, results[str(length)], repeats=repeats)
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
