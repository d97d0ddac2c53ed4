"""Memory of this process and of a device: what is held, and peaks since a moment."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# Resetting the system's peak loses the one before: the highest seen so far is kept here.
_before_resets = [0]


def reset_peak_rss() -> bool:
    """Start a new peak; False where the system cannot (only Linux can)."""
    _before_resets[0] = life_peak_rss()
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """Peak resident bytes since the last successful reset, else over the process's life."""
    found = _status("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in kilobytes.
    return peak if sys.platform == "darwin" else peak * 1024


def life_peak_rss() -> int:
    """Peak resident bytes over the process's life, resets or not."""
    return max(_before_resets[0], peak_rss())


def resident_bytes() -> int | None:
    """Resident bytes of this process without garbage; None where the system does not tell."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        # Pages that glibc kept from earlier work are nobody's.
        trim(0)
    return _status("VmRSS")


def peak_growth(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call needs at its peak beyond what was held before.

    Args:
        call: what to run. Whatever other threads do meanwhile counts too.
        device: a GPU counts what PyTorch allocates there, anything else resident memory.

    Returns:
        None where the system's peak cannot be reset (only Linux can).
    """
    before = resident_bytes()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - allocated
    resettable = reset_peak_rss()
    call()
    return max(peak_rss() - before, 0) if resettable and before is not None else None


def _status(field: str) -> int | None:
    """A line of the system's account of this process, in bytes."""
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
