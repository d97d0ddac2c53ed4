"""Which backend of sliding-window attention is fastest on a CUDA device? See `window.py`.

Every backend that serves a call, forward and forward+backward, at window 512, in float16 and
bfloat16, with and without ALiBi, at two lengths and two shapes of heads: 12 of width 64, and 32 of
width 128 that share 8 key heads. Against PyTorch's scaled_dot_product_attention over the whole row
with a causal mask: another function, full attention without ALiBi, and what one would call without
this library. All take and return (B, T, H, D). CUDA events, variants in turn.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from common import hardware_line, measure_cuda, print_table, ratio, write_json
from drt.ops.window import BACKENDS, sliding_window_attention
from drt.ops.window.call import Call
from drt.testing import assert_within_budget

WINDOW = 512
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PASSES = ("forward", "forward+backward")
CANDIDATES = ("banded", "flex", "varlen")
BASELINE = "sdpa full causal"

Attend = Callable[..., Tensor]


class Shape(NamedTuple):
    """Heads H, key heads G, width D."""

    heads: int
    kv_heads: int
    width: int


SHAPES = (Shape(12, 12, 64), Shape(32, 8, 128))


class Case(NamedTuple):
    shape: Shape
    precision: str
    alibi: bool

    def __str__(self) -> str:
        heads, kv_heads, width = self.shape
        bias = ", ALiBi" if self.alibi else ""
        return f"H {heads} G {kv_heads} D {width} {self.precision}{bias}"

    def inputs(self, length: int) -> list[Tensor]:
        """Query, key and value, which want gradients."""
        heads, kv_heads, width = self.shape
        generator = torch.Generator("cuda").manual_seed(0)
        return [
            torch.randn(1, length, count, width, device="cuda", generator=generator)
            .to(DTYPES[self.precision])
            .requires_grad_()
            for count in (heads, kv_heads, kv_heads)
        ]

    def slopes(self) -> Tensor | None:
        if not self.alibi:
            return None
        return torch.logspace(-8, 0, self.shape.heads, base=2.0, device="cuda")

    def backends(self) -> dict[str, Attend]:
        """The candidates that serve these calls; says why others do not."""
        query, key, value = self.inputs(2 * WINDOW)
        slopes = self.slopes()
        call = Call(query, key, value, WINDOW, None, slopes, 1.0)
        found: dict[str, Attend] = {}
        for name in CANDIDATES:
            reason = BACKENDS[name].unavailable(call)
            if reason is None:
                found[name] = partial(
                    sliding_window_attention, window=WINDOW, alibi_slopes=slopes, backend=name
                )
            else:
                print(f"{self}: no {name}: {reason}", flush=True)
        return found


CASES = [
    Case(shape, precision, alibi)
    for shape in SHAPES
    for precision in DTYPES
    for alibi in (False, True)
]


def full_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    grouped = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def forward(attend: Attend, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        attend(*inputs)


def forward_backward(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients; the query stands in for the gradient of the output."""
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, inputs[0].detach())]


def check_correctness(case: Case, backends: Mapping[str, Attend]) -> None:
    """All backends compute the same, before any clock starts; a length that ends in a block."""
    inputs = case.inputs(1100)
    reference = partial(
        sliding_window_attention, window=WINDOW, alibi_slopes=case.slopes(), backend="reference"
    )
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = forward_backward(reference, exact)
    # The reference rounds its inputs, its output and its gradients, and nothing in between.
    plain = forward_backward(reference, inputs)
    for name, attend in backends.items():
        results = forward_backward(attend, inputs)
        for actual, expected, rounded in zip(results, truth, plain, strict=True):
            # Kernels also round probabilities, `banded` scores too, and both their gradients.
            assert_within_budget(actual, expected, baseline=rounded, factor=8.0, name=name)


def time_case(case: Case, length: int, *, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Samples of every backend and of full attention, by pass."""
    # A model has one case; here, all would soon exceed PyTorch's limit of recompilations.
    torch._dynamo.reset()
    backends = case.backends()
    check_correctness(case, backends)
    inputs = case.inputs(length)
    variants = {**backends, BASELINE: full_causal}
    results = {}
    for name, run_pass in zip(PASSES, (forward, forward_backward), strict=True):
        calls = {key: partial(run_pass, attend, inputs) for key, attend in variants.items()}
        results[name] = measure_cuda(calls, repeats=repeats)
    return results


def report(length: int, results: Mapping[str, Any], *, repeats: int) -> None:
    rows = []
    for case, by_pass in results.items():
        for name, samples in by_pass.items():
            medians = {key: median(samples[key]) for key in CANDIDATES if key in samples}
            versus = [
                ratio(samples, key, to=BASELINE) if key in medians else "-" for key in CANDIDATES
            ]
            fastest = min(medians, key=medians.__getitem__)
            milliseconds = 1e3 * median(samples[BASELINE])
            rows.append([f"{case} {name}", *versus, fastest, f"{milliseconds:.2f}"])
    print_table(
        f"Time relative to full causal SDPA at B 1, T {length}, W {WINDOW}; medians of {repeats} "
        "(range of single rounds)",
        ["case", *CANDIDATES, "fastest", "SDPA ms"],
        rows,
    )


def run(*, quick: bool, json_path: Path | None) -> None:
    """Measure, print tables, and write the samples where a path is given.

    Raises:
        RuntimeError: if there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("--device cuda needs a CUDA device, and PyTorch finds none")
    print(hardware_line(), flush=True)
    lengths, repeats = ([8192], 10) if quick else ([8192, 16384], 50)
    results: dict[str, Any] = {}
    for length in lengths:
        by_case = {str(case): time_case(case, length, repeats=repeats) for case in CASES}
        report(length, by_case, repeats=repeats)
        results[str(length)] = by_case
    write_json(json_path, results)
