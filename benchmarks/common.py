"""What the benchmarks share: interleaved timing, peak memory, tables, the hardware line."""

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from drt import hardware

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


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--quick", action="store_true", help="smaller sizes, fewer repeats")
    arguments.add_argument("--json", type=Path, metavar="PATH", help="also write all samples here")
    arguments.add_argument("--worker", metavar="JOB", help=argparse.SUPPRESS)
    return arguments


def measure(
    variants: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """CPU seconds of this process for each variant, one sample a round, the variants in turn."""
    for _ in range(warmup):
        for variant in variants.values():
            variant()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    gc.disable()
    for _ in range(repeats):
        for name, variant in variants.items():
            start = time.process_time()
            variant()
            samples[name].append(time.process_time() - start)
    gc.enable()
    return samples


def measure_cuda(
    variants: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of the CUDA device for each variant, one sample a round, the variants in turn.

    Warming up compiles kernels and fills caches. A sample is what the device's clock counts between
    two events around the call, after all earlier work: where the host is slower than the device,
    it is the host's time.
    """
    for _ in range(warmup):
        for variant in variants.values():
            variant()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    gc.disable()
    for _ in range(repeats):
        for name, variant in variants.items():
            samples[name].append(_cuda_seconds(variant))
    gc.enable()
    return samples


def _cuda_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ratio(samples: Mapping[str, Sequence[float]], name: str, *, to: str) -> Ratio:
    """Time of one variant relative to another."""
    rounds = [mine / other for mine, other in zip(samples[name], samples[to], strict=True)]
    middle = statistics.median(samples[name]) / statistics.median(samples[to])
    return Ratio(middle, min(rounds), max(rounds))


def peak_bytes(call: Callable[[], object]) -> int:
    """Resident bytes that a call needs at its peak beyond what the process held before.

    Linux with glibc. Whatever the process does in other threads counts too.
    """
    before = resident_bytes()
    # Sets the kernel's high-water mark back to the present.
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return _status("VmHWM") - before


def resident_bytes() -> int:
    """Resident bytes of this process without garbage. Linux with glibc."""
    gc.collect()
    # Pages that the allocator kept from earlier work are nobody's.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


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
