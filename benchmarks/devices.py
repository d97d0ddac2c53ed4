"""Benchmarks that run on a CPU and on a CUDA device: which clock, which memory, what fits."""

import argparse
import gc
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch

from common import cpu_seconds, cuda_seconds, measure, measure_cuda, peak_bytes


def add_option(arguments: argparse.ArgumentParser) -> None:
    """`--device`."""
    arguments.add_argument(
        "--device", choices=["cpu", "cuda"], help="default cuda if there is one, else cpu"
    )


def choose(name: str | None) -> torch.device:
    """The device of this name, or the best one; on a CPU, one thread.

    Raises:
        RuntimeError: if a CUDA device is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda needs a CUDA device, and PyTorch finds none")
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(1)
    return torch.device("cpu")


def clock(device: torch.device) -> str:
    """What a sample is, in words."""
    if device.type == "cuda":
        return "time between CUDA events"
    return "one torch thread, CPU time of the process"


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, on the clock of the device."""
    return cuda_seconds(call) if device.type == "cuda" else cpu_seconds(call)


def sample(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    budget: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of each variant, in turn, after a warm-up; see `common.measure`."""
    if not variants:
        return {}
    run = measure_cuda if device.type == "cuda" else measure
    return run(variants, repeats=repeats, budget=budget)


def peak_above(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call needs at its peak beyond what was held before, on the device."""
    if device.type != "cuda":
        return peak_bytes(call)
    release()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def release() -> None:
    """Give back what nobody uses, before something large."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Runnable(NamedTuple):
    """Variants that ran once, and why the others did not."""

    variants: dict[str, Callable[[], object]]
    failures: dict[str, str]


def runnable(
    variants: Mapping[str, Callable[[], object]], *, foreign: Collection[str] = ()
) -> Runnable:
    """Run each variant once; what does not fit is an entry of the table and not a crash.

    Args:
        variants: by name.
        foreign: names of variants of other libraries, of which any error is an entry.
    """
    able, failures = {}, {}
    for name, variant in variants.items():
        reason = _failure(variant, any_error=name in foreign)
        if reason is None:
            able[name] = variant
        else:
            failures[name] = reason
            release()
    return Runnable(able, failures)


def _failure(call: Callable[[], object], *, any_error: bool) -> str | None:
    try:
        call()
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        if not any_error:
            raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"
    return None
