"""Part of `operators.py`: one query and its retrieved chunks, as decoding replays it on CUDA."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from common import measure_cuda, print_table, ratio
from drt.ops.gca import grouped_cross_attention
from drt.testing import assert_within_budget
from gca_variants import Inputs, Sizes, make_inputs

CALLS = 50
"""Calls in one graph, so that launching it does not count."""

TRITON = "triton"
BASELINE = "SDPA"


def slots_sdpa(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """SDPA over retrieved chunks that lie in order, the slots as a batch; one chunk of queries."""
    topk, grouped = weights.shape[2], query.shape[3] != key.shape[3]
    queries = query[0].transpose(1, 2).expand(topk, -1, -1, -1)
    keys, values = key[0].transpose(1, 2), value[0].transpose(1, 2)
    outputs = scaled_dot_product_attention(queries, keys, values, enable_gqa=grouped)
    outputs = outputs * weights[0, 0, :, None, None, None].to(query.dtype)
    return outputs.sum(0).transpose(0, 1)[None, None]


def make_step(sizes: Sizes, device: torch.device) -> Inputs:
    """One query, and a memory of the K chunks that it retrieved and no others."""
    step = sizes._replace(chunks=sizes.topk, num_queries=1)
    inputs = make_inputs(torch.bfloat16, step, device=device)
    query, weights = inputs.query[:, :1], inputs.weights[:, :1]
    return inputs._replace(query=query.detach(), weights=weights.detach())


def variants_of(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    query, key, value, _, weights = (tensor.detach() for tensor in inputs)
    attend = partial(grouped_cross_attention, query, key, value, None, weights)
    return {
        TRITON: partial(attend, backend="triton"),
        BASELINE: partial(slots_sdpa, query, key, value, weights),
    }


def check_step(inputs: Inputs) -> None:
    """Both agree with the reference in float64."""
    query, key, value, _, weights = inputs.to_float64()
    exact = partial(grouped_cross_attention, query, key, value, None, weights)
    found = {name: call() for name, call in variants_of(inputs).items()}
    truth = exact(backend="reference").detach()
    for name, result in found.items():
        # Of rounding probabilities, results and weights, in different places.
        assert_within_budget(result, truth, baseline=found[BASELINE], factor=4.0, name=name)


def captured(call: Callable[[], Tensor]) -> Callable[[], object]:
    """Replays `CALLS` calls as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for _ in range(CALLS):
            call()
    return graph.replay


def report_decoding(shapes: Sequence[Sizes], *, repeats: int) -> dict[str, Any]:
    """Samples in seconds a call, by case and variant; prints the table."""
    results: dict[str, Any] = {}
    rows = []
    for shape in shapes:
        for topk in (8, 16):
            inputs = make_step(shape._replace(topk=topk), torch.device("cuda"))
            check_step(inputs)
            calls = {name: captured(call) for name, call in variants_of(inputs).items()}
            samples = {
                name: [taken / CALLS for taken in found]
                for name, found in measure_cuda(calls, repeats=repeats).items()
            }
            case = f"H {shape.heads} G {shape.kv_heads} D {shape.width} K {topk}"
            results[case] = samples
            times = [f"{1e6 * median(samples[name]):.1f}" for name in (TRITON, BASELINE)]
            rows.append([case, *times, ratio(samples, BASELINE, to=TRITON)])
    print_table(
        f"Decoding, bf16: Q 1, S 64, chunks in order, microseconds a call; {CALLS} calls in a CUDA "
        "graph, keys and values in the cache",
        ["case", TRITON, BASELINE, f"{BASELINE} / {TRITON}"],
        rows,
    )
    return results
