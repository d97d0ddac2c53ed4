"""How near does grouped cross-attention come to what the hardware can do, and how fast are others?

    python benchmarks/operators.py [--device cpu|cuda] [--quick] [--json PATH]

Forward, and forward with backward, of the backend that the device would get: "triton" on CUDA,
"blocked" on a CPU. Beside it, in turn and in one process:

* chunk SDPA: PyTorch's attention to each retrieved chunk, gathered, and a weighted sum;
* grouped einsum: one product on each side of the softmax, over gathered chunks;
* full causal: PyTorch's attention (FlashAttention, where it chooses that) to all tokens, as many as
  there are queries;
* window 512: `sliding_window_attention`, as the model's other attention;
* NSA, MoBA: of flash-linear-attention, where it is installed.

Each chunk of queries retrieves K random chunks before it. Q 65 is what the model runs: a block
holds a landmark too. Before any clock starts, ours and the plain forms agree with float64. Ceilings
are measured in the same run. On CUDA, also decoding: one query, its chunks in order, in a CUDA
graph. On a CPU the sizes are small, so that the run takes a minute or two.

This file is not called kernels.py because transformers looks for a package of that name.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import devices
from ceilings import Ceilings, measure_ceilings
from common import (
    PASSES,
    forward_backward,
    full_causal,
    hardware_line,
    parser,
    print_table,
    ratio,
    write_json,
)
from drt.ops.gca import grouped_cross_attention
from drt.ops.gca.inverse import invert_indices
from drt.ops.window import sliding_window_attention
from drt.testing import assert_within_budget
from fla_variants import NSA_GROUP, moba, nsa
from gca_variants import (
    Inputs,
    Sizes,
    causal_indices,
    chunk_sdpa,
    grouped_einsum,
    make_inputs,
)
from operators_decode import report_decoding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WINDOW = 512
OURS = "ours"
SHARED = "ours, lists given"
FOREIGN = ("NSA", "MoBA")
BASELINES = ("chunk SDPA", "grouped einsum", "full causal", f"window {WINDOW}", *FOREIGN)

SHAPES = (
    Sizes(chunks=0, heads=12, kv_heads=12, width=64),
    Sizes(chunks=0, heads=12, kv_heads=4, width=64),
    Sizes(chunks=0, heads=32, kv_heads=8, width=128),
)
NSA_SHAPE = Sizes(chunks=0, heads=NSA_GROUP, kv_heads=1, width=64)
"""The smallest that NSA takes."""


class Case(NamedTuple):
    """One line of the tables."""

    precision: str
    sizes: Sizes

    def __str__(self) -> str:
        x = self.sizes
        shape = f"H {x.heads} G {x.kv_heads} D {x.width}"
        return f"{self.precision} {shape} K {x.topk} Q {x.num_queries} C {x.chunks}"

    @property
    def forward_flops(self) -> float:
        """Two products over all queries and retrieved tokens."""
        x = self.sizes
        return 4.0 * x.chunks * x.num_queries * x.topk * x.chunk_size * x.heads * x.width

    def flops(self, passes: str) -> float:
        """The backward counts five products, one of them again, against two."""
        return self.forward_flops * (3.5 if passes == "forward+backward" else 1.0)

    def least_bytes(self, passes: str) -> float:
        """Every tensor once a pass: q, o, K, V; backward q, do, K, V, dq, dK, dV."""
        x = self.sizes
        query = x.chunks * x.num_queries * x.heads * x.width
        memory = x.chunks * x.chunk_size * x.kv_heads * x.width
        numbers = 2 * query + 2 * memory
        if passes == "forward+backward":
            numbers += 3 * query + 4 * memory
        return float(numbers * DTYPES[self.precision].itemsize)


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """What is measured."""
    if device.type != "cuda":
        counts, topks, precisions = ([16] if quick else [64], [8], list(DTYPES))
    elif quick:
        counts, topks, precisions = [256, 1024], [8], ["bf16"]
    else:
        counts, topks, precisions = [64, 256, 1024, 4096], [8, 16], ["bf16"]
    grid = [
        shape._replace(chunks=count, topk=topk)
        for shape in SHAPES
        for topk in topks
        for count in counts
    ]
    grid += [SHAPES[0]._replace(chunks=count, num_queries=65) for count in counts]
    if device.type == "cuda":
        grid += [NSA_SHAPE._replace(chunks=count) for count in counts]
    return [Case(precision, sizes) for precision in precisions for sizes in grid]


def ours(device: torch.device) -> Callable[..., Tensor]:
    """The backend under test, by name: another one would be a failure and not a result."""
    backend = "triton" if device.type == "cuda" else "blocked"
    return partial(grouped_cross_attention, backend=backend)


def check_correctness(case: Case, device: torch.device) -> None:
    """On four chunks all variants agree with float64, before any clock starts."""
    inputs = make_inputs(DTYPES[case.precision], case.sizes._replace(chunks=4), device=device)
    exact = inputs.to_float64()
    truth = forward_backward(chunk_sdpa, exact)
    reference = partial(grouped_cross_attention, backend="reference")
    for operator in (grouped_einsum, reference):
        for precise, expected in zip(forward_backward(operator, exact), truth, strict=True):
            # The same sums in another order, in float64.
            torch.testing.assert_close(precise, expected, rtol=1e-9, atol=1e-9)
    plain = forward_backward(chunk_sdpa, inputs)
    results = forward_backward(ours(device), inputs)
    for actual, expected, baseline in zip(results, truth, plain, strict=True):
        # Both round the probabilities once; which one rounds its sums more differs.
        assert_within_budget(actual, expected, baseline=baseline, factor=4.0, name=str(case))


def is_deterministic(case: Case, device: torch.device) -> bool:
    """Whether two runs, forward and backward, give the same bits."""
    inputs = make_inputs(DTYPES[case.precision], case.sizes, device=device)
    first, second = (forward_backward(ours(device), inputs) for _ in range(2))
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


Call = tuple[Callable[..., Tensor], Sequence[Tensor]]


def operators(case: Case, device: torch.device) -> tuple[dict[str, Call], dict[str, str]]:
    """Every variant with its inputs, and why others are none."""
    sizes, dtype = case.sizes, DTYPES[case.precision]
    inputs = make_inputs(dtype, sizes, device=device)
    inputs = inputs._replace(indices=causal_indices(inputs.indices))
    row = rows_of(inputs, sizes.chunks * sizes.num_queries)
    window = partial(sliding_window_attention, window=WINDOW)
    found: dict[str, Call] = {
        OURS: (ours(device), inputs),
        "chunk SDPA": (chunk_sdpa, inputs),
        "grouped einsum": (grouped_einsum, inputs),
        "full causal": (full_causal, row),
        f"window {WINDOW}": (window, row),
    }
    if device.type != "cuda":
        return found, dict.fromkeys(FOREIGN, "needs CUDA")
    lists = invert_indices(inputs.indices, sizes.chunks)
    found[SHARED] = (partial(ours(device), inverse=lists), inputs)
    row = rows_of(inputs, sizes.chunks * sizes.chunk_size)
    others = {"NSA": nsa(sizes, inputs.indices, dtype=dtype), "MoBA": moba(sizes, device)}
    missing = {name: other for name, other in others.items() if isinstance(other, str)}
    found |= {name: (x, row) for name, x in others.items() if not isinstance(x, str)}
    return found, missing


def rows_of(inputs: Inputs, tokens: int) -> tuple[Tensor, ...]:
    """Query, key and value (1, tokens, heads, D) of an attention over all tokens."""
    return tuple(
        torch.randn(1, tokens, *x.shape[3:], dtype=x.dtype, device=x.device, requires_grad=True)
        for x in inputs[:3]
    )


def run_case(
    case: Case, device: torch.device, *, repeats: int, budget: float
) -> list[dict[str, Any]]:
    """Samples of every variant, a dictionary for each pass."""
    check_correctness(case, device)
    found, missing = operators(case, device)
    results = []
    for passes, run in PASSES.items():
        calls = {name: partial(run, *call) for name, call in found.items()}
        able = devices.runnable(calls, foreign=FOREIGN)
        samples = devices.sample(able.variants, device, repeats=repeats, budget=budget)
        results.append(
            {
                "case": str(case),
                **case.sizes._asdict(),
                "precision": case.precision,
                "passes": passes,
                "flops": case.flops(passes),
                "least_bytes": case.least_bytes(passes),
                "seconds": samples,
                "failures": {**missing, **able.failures},
            }
        )
    devices.release()
    return results


def report_ratios(results: Sequence[dict[str, Any]], device: torch.device) -> None:
    """What others take relative to ours; those that never ran are named below the table."""
    names = [SHARED, *BASELINES] if device.type == "cuda" else list(BASELINES)
    absent = {x: {result["failures"].get(x) for result in results} for x in FOREIGN}
    absent = {x: why for x, why in absent.items() if None not in why}
    names = [x for x in names if x not in absent]
    rows = []
    for result in results:
        samples, failures = result["seconds"], result["failures"]
        others = [failures.get(x) or ratio(samples, x, to=OURS) for x in names]
        milliseconds = f"{1e3 * median(samples[OURS]):.3g}"
        rows.append([f"{result['case']} {result['passes']}", milliseconds, *others])
    print_table(
        "Time relative to ours at B 1, S 64: the others take so many times as long; medians "
        f"(range of single rounds); {devices.clock(device)}",
        ["case", "ours ms", *names],
        rows,
    )
    for name, reasons in absent.items():
        print(f"{name}: {', '.join(sorted(filter(None, reasons)))}", flush=True)


def report_rates(results: Sequence[dict[str, Any]]) -> None:
    """How near ours comes to the floor that the ceilings set."""
    rows = []
    for result in results:
        found = result["rates"]
        rows.append(
            [
                f"{result['case']} {result['passes']}",
                f"{found['flops'] / 1e9:,.0f} ({found['of_flops']:.0%})",
                f"{found['bytes'] / 1e9:,.1f} ({found['of_bandwidth']:.0%})",
                f"{1e3 * found['compute_floor']:.3g} / {1e3 * found['memory_floor']:.3g}",
                found["bound"],
            ]
        )
    header = ["case", "GFLOP/s (of ceiling)", "GB/s, least bytes (of ceiling)"]
    print_table(
        "Ours against the ceilings of this run",
        [*header, "floor ms: compute / memory", "bound"],
        rows,
    )


def rates(result: dict[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """What ours achieved, its shares of the ceilings, and which floor is the higher."""
    taken = median(result["seconds"][OURS])
    compute = result["flops"] / ceilings.flops[result["precision"]]
    memory = result["least_bytes"] / ceilings.bandwidth
    return {
        "flops": result["flops"] / taken,
        "bytes": result["least_bytes"] / taken,
        "of_flops": compute / taken,
        "of_bandwidth": memory / taken,
        "compute_floor": compute,
        "memory_floor": memory,
        "bound": "compute" if compute > memory else "memory",
    }


def options() -> argparse.ArgumentParser:
    arguments = parser(__doc__)
    devices.add_option(arguments)
    arguments.add_argument("--repeats", type=int, default=20, help="at the most; default 20")
    arguments.add_argument(
        "--budget-seconds", type=float, default=5.0, help="of one pass of a case; default 5"
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = options().parse_args(argv)
    device = devices.choose(arguments.device)
    print(hardware_line(), flush=True)
    repeats = min(arguments.repeats, 3) if arguments.quick else arguments.repeats
    todo = cases(device, quick=arguments.quick)
    precisions = {case.precision: DTYPES[case.precision] for case in todo}
    ceilings = measure_ceilings(precisions, device, repeats=repeats)
    products = ", ".join(f"{name} {x / 1e9:,.0f}" for name, x in ceilings.flops.items())
    print(f"ceilings: GFLOP/s {products}; GB/s {ceilings.bandwidth / 1e9:,.1f}", flush=True)
    found: dict[str, Any] = {"device": device.type, "ceilings": ceilings._asdict()}
    found |= {"cases": [], "deterministic": {}, "decoding": None}
    for case in todo:
        results = run_case(case, device, repeats=repeats, budget=arguments.budget_seconds)
        for result in results:
            result["rates"] = rates(result, ceilings)
        found["cases"] += results
        found["deterministic"][str(case)] = is_deterministic(case, device)
        # A run that is cut short has not been for nothing.
        write_json(arguments.json, found)
    report_ratios(found["cases"], device)
    report_rates(found["cases"])
    same = found["deterministic"]
    print(f"\nforward+backward twice, the same bits: {sum(same.values())} of {len(same)} cases")
    if device.type == "cuda":
        found["decoding"] = report_decoding(SHAPES, repeats=repeats)
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
