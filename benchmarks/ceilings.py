"""What the hardware can do at the most, measured: matrix products and memory traffic."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from devices import sample

# Square products. Beyond these a rate changes little, and a CPU takes long.
CUDA_SIZES, CPU_SIZES = (4096, 8192, 16384), (1024, 2048)
# Several times the last level of cache.
CUDA_BYTES, CPU_BYTES = 1 << 31, 1 << 28


class Ceilings(NamedTuple):
    """Rates that no operator exceeds by much."""

    flops: dict[str, float]
    """By precision, multiplications and additions a second of the best square product."""
    bandwidth: float
    """Bytes a second, read and written, of the best of a copy and a sum."""


def measure_ceilings(
    precisions: dict[str, torch.dtype], device: torch.device, *, repeats: int
) -> Ceilings:
    """Measure both on a device; a rate is that of the fastest call.

    Args:
        precisions: dtypes of the products, by name.
        device: where.
        repeats: calls of each kind.
    """
    sizes = CUDA_SIZES if device.type == "cuda" else CPU_SIZES
    flops = {
        name: max(_product_rate(size, dtype, device, repeats) for size in sizes)
        for name, dtype in precisions.items()
    }
    return Ceilings(flops, _bandwidth(device, repeats))


def _product_rate(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return _rate(2.0 * size**3, partial(torch.mm, left, right, out=out), device, repeats)


def _bandwidth(device: torch.device, repeats: int) -> float:
    size = CUDA_BYTES if device.type == "cuda" else CPU_BYTES
    source = torch.ones(size // 4, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    moved = (2 * source.nbytes, source.nbytes)
    calls: Sequence[Callable[[], object]] = (copy, source.sum)
    return max(
        _rate(count, call, device, repeats) for count, call in zip(moved, calls, strict=True)
    )


def _rate(count: float, call: Callable[[], object], device: torch.device, repeats: int) -> float:
    return count / min(sample({"call": call}, device, repeats=repeats)["call"])
