"""How much faster are the CPU operators with more threads than with one?

    python benchmarks/threads.py [--threads N] [--quick] [--json PATH]

Wall-clock time, because threads are what is measured: the machine must be idle, and the shortest of
several runs counts. One thread and several take turns.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import hardware_line, parser, print_table, write_json
from drt.ops.gca import grouped_cross_attention
from drt.ops.window import sliding_window_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WINDOW = 512


def cross_attention(dtype: torch.dtype, *, chunks: int, kv_heads: int) -> Callable[[], Tensor]:
    """A call of grouped cross-attention: S 64, K 8, H 12, D 64."""
    memory = torch.randn(2, 1, chunks, kv_heads, 64, 64, dtype=dtype).transpose(-2, -3)
    query = torch.randn(1, chunks, 64, 12, 64, dtype=dtype, requires_grad=True)
    key, value = (x.detach().requires_grad_() for x in memory)
    indices = torch.randint(0, chunks, (1, chunks, 8))
    weights = torch.randn(1, chunks, 8).softmax(-1).requires_grad_()
    return lambda: grouped_cross_attention(query, key, value, indices, weights)


def window_attention(dtype: torch.dtype, *, tokens: int) -> Callable[[], Tensor]:
    """A call of sliding-window attention: W 512, H 12, D 64."""
    tensors = (torch.randn(1, tokens, 12, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    query, key, value = tensors
    return lambda: sliding_window_attention(query, key, value, window=WINDOW)


def forward(operator: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        operator()


def forward_backward(operator: Callable[[], Tensor]) -> None:
    output = operator()
    output.backward(torch.ones_like(output))


def shortest(call: Callable[[], object], *, threads: int, repeats: int) -> dict[int, float]:
    """Seconds of the shortest run with one thread and with several."""
    found = dict.fromkeys((1, threads), float("inf"))
    for number in range(repeats + 1):
        for count in found:
            torch.set_num_threads(count)
            start = time.perf_counter()
            call()
            # The first round warms up.
            if number > 0:
                found[count] = min(found[count], time.perf_counter() - start)
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = arguments.parse_args()
    if options.threads < 1:
        arguments.error(f"--threads must be at least 1, got {options.threads}")
    chunks, repeats = (16, 2) if options.quick else (128, 9)
    print(hardware_line())
    results: dict[str, Any] = {}
    rows = []
    for precision, dtype in DTYPES.items():
        operators = {
            f"grouped cross-attention, G {kv_heads}": cross_attention(
                dtype, chunks=chunks, kv_heads=kv_heads
            )
            for kv_heads in (12, 4)
        }
        operators["sliding window"] = window_attention(dtype, tokens=chunks * 32)
        for name, operator in operators.items():
            for run in (forward, forward_backward):
                seconds = shortest(
                    lambda run=run, operator=operator: run(operator),
                    threads=options.threads,
                    repeats=repeats,
                )
                case = f"{precision} {name}, {run.__name__.replace('_', '+')}"
                results[case] = seconds
                speedup = seconds[1] / seconds[options.threads]
                rows.append([case, f"{seconds[1] * 1e3:.1f}", f"{speedup:.2f}"])
    print_table(
        f"One thread over {options.threads}, wall-clock, shortest of {repeats}",
        ["case", "one thread, ms", f"speed of {options.threads} threads"],
        rows,
    )
    write_json(options.json, {"threads": options.threads, "seconds": results})


if __name__ == "__main__":
    main()
