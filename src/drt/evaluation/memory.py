"""Peak memory of this process, over its life and since a moment."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

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
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in kilobytes.
    return peak if sys.platform == "darwin" else peak * 1024


def life_peak_rss() -> int:
    """Peak resident bytes over the process's life, resets or not."""
    return max(_before_resets[0], peak_rss())
