"""What the benchmarks share: interleaved timing, passes, peak memory, tables, the hardware line."""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from drt import hardware
from drt.evaluation import memory
from drt.evaluation.memory import peak_growth

# glibc gives every block above 32 MB back to the kernel and pays page faults for the next one.
# With these it keeps them, as tuned installations and other allocators do.
PAGES_KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
ALLOCATORS: dict[str, Mapping[str, str]] = {"default": {}, "pages kept": PAGES_KEPT}


class Ratio(NamedTuple):
    """How long one variant takes relative to another, measured in the same rounds."""

    median: float
    """Ratio of the medians."""
    low: float
    """Smallest ratio of one round."""
    high: float
    """Largest ratio of one round."""

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def parser(description: str | None, *, has_workers: bool = False) -> argparse.ArgumentParser:
    """The options that every benchmark has; one that calls `run_worker` has another."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--quick", action="store_true", help="smaller sizes, fewer repeats")
    arguments.add_argument("--json", type=Path, metavar="PATH", help="also write all samples here")
    if has_workers:
        arguments.add_argument("--worker", metavar="JOB", help=argparse.SUPPRESS)
    return arguments


def measure(
    variants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    budget: float = float("inf"),
) -> dict[str, list[float]]:
    """CPU seconds of this process for each variant, one sample a round, the variants in turn.

    Args:
        variants: by name.
        repeats: rounds.
        warmup: rounds before those.
        budget: wall seconds after which no third or later round begins.
    """
    return _rounds(variants, cpu_seconds, repeats=repeats, warmup=warmup, budget=budget)


def measure_cuda(
    variants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 3,
    budget: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of the CUDA device for each variant, otherwise as `measure`.

    Warming up compiles kernels and fills caches. A sample is what the device's clock counts between
    two events around the call, after all earlier work: where the host is slower than the device,
    it is the host's time.
    """
    return _rounds(variants, cuda_seconds, repeats=repeats, warmup=warmup, budget=budget)


def _rounds(
    variants: Mapping[str, Callable[[], object]],
    seconds: Callable[[Callable[[], object]], float],
    *,
    repeats: int,
    warmup: int,
    budget: float,
) -> dict[str, list[float]]:
    for _ in range(warmup):
        for variant in variants.values():
            variant()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    gc.disable()
    for number in range(repeats):
        if number >= 2 and time.perf_counter() - start > budget:
            break
        for name, variant in variants.items():
            samples[name].append(seconds(variant))
    gc.enable()
    return samples


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of this process for one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def cuda_seconds(call: Callable[[], object]) -> float:
    """Seconds between the events before and after one call, on the CUDA device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def forward(operator: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Call without gradients."""
    with torch.no_grad():
        operator(*inputs)


def forward_backward(operator: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the inputs that want one.

    The first input, as large as the output, stands in for the gradient of the output.
    """
    output = operator(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    grad = inputs[0].detach().view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, wanted, grad)]


PASSES: dict[str, Callable[..., object]] = {
    "forward": forward,
    "forward+backward": forward_backward,
}


def full_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's full causal attention on (B, T, H, D); keys and values may have fewer heads."""
    grouped = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def ratio(samples: Mapping[str, Sequence[float]], name: str, *, to: str) -> Ratio:
    """Time of one variant relative to another."""
    rounds = [mine / other for mine, other in zip(samples[name], samples[to], strict=True)]
    middle = statistics.median(samples[name]) / statistics.median(samples[to])
    return Ratio(middle, min(rounds), max(rounds))


def peak_bytes(call: Callable[[], object]) -> int:
    """Resident bytes that a call needs at its peak beyond what the process held before; Linux."""
    found = peak_growth(call, torch.device("cpu"))
    assert found is not None
    return found


def resident_bytes() -> int:
    """Resident bytes of this process without garbage; Linux."""
    found = memory.resident_bytes()
    assert found is not None
    return found


def run_worker(job: Mapping[str, Any], *, environment: Mapping[str, str]) -> Any:
    """Run this script again with `--worker JOB` and return what it printed last, as JSON."""
    command = [sys.executable, sys.argv[0], "--worker", json.dumps(job)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def hardware_line() -> str:
    """Processor, threads and versions, as everywhere in this project."""
    return hardware.describe()


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table under its title."""
    print(f"\n{title}\n\n{format_table(header, rows)}", flush=True)


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write results under the hardware line, if a path was given."""
    if path is not None:
        path.write_text(json.dumps({"hardware": hardware_line(), **results}, indent=1) + "\n")
