"""What all pictures share: colours, axes of lengths, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which the colour-blind can tell apart; markers tell where they repeat.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "os^Dv*XP"


def pyplot() -> Any:
    """matplotlib's pyplot, which draws to files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def style(number: int) -> dict[str, Any]:
    """Colour and marker of a line; of more lines than colours no two are alike either."""
    color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
    return {"color": color, "marker": marker, "markersize": 4}


def length_axis(axis: Any, ticks: dict[float, str]) -> None:
    """A base-2 axis of lengths with these ticks, a light grid, no box."""
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def from_zero(axis: Any) -> None:
    """A vertical axis from zero, with room for the marker of the largest of its points."""
    axis.set_ylim(0, 1.06 * axis.dataLim.y1 if axis.get_lines() else None)


def save(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure to a file, whose ending chooses the format, and let it go."""
    figure.savefig(path, **options)
    pyplot().close(figure)


def short_length(tokens: int) -> str:
    """1024 -> 1K, 1048576 -> 1M."""
    if tokens % 2**20 == 0:
        return f"{tokens // 2**20}M"
    return f"{tokens // 2**10}K" if tokens % 2**10 == 0 else str(tokens)
