"""Pictures of studies."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from drt.evaluation.figure import short_length
from drt.study.config import Curve


def draw_curve(path: Path, series: dict[str, list[Any]], *, curve: Curve, title: str) -> None:
    """Draw one line a row, the mean over its seeds, with all seeds' range as a shade.

    Args:
        path: where to; its ending chooses the format.
        series: row -> for each seed a list of points, mappings with the curve's keys.
        curve: which keys, and how they are shown.
        title: what stands above.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), dpi=130)
    colors = plt.get_cmap("viridis").resampled(max(len(series), 2))
    ticks: set[float] = set()
    for number, (row, seeds) in enumerate(series.items()):
        points = _points(seeds, curve)
        ticks |= set(points)
        right = sorted(points)
        style = {"color": colors(number), "label": row, "marker": "os^Dv*P"[number % 7]}
        axis.plot(right, [fmean(points[x]) for x in right], **style)
        low, high = ([edge(points[x]) for x in right] for edge in (min, max))
        axis.fill_between(right, low, high, color=colors(number), alpha=0.15, linewidth=0)
    axis.set(title=title, xlabel=curve.x.replace("_", " "), ylabel=curve.y.replace("_", " "))
    axis.set_xscale("log", base=2)
    if curve.log_y:
        axis.set_yscale("log")
    shown = sorted(ticks)
    axis.set_xticks(shown, [short_length(int(x)) for x in shown])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _points(seeds: list[Any], curve: Curve) -> dict[float, list[float]]:
    """x -> the y of each seed."""
    points: dict[float, list[float]] = {}
    for records in seeds:
        for point in records or []:
            if point.get(curve.y) is not None:
                points.setdefault(point[curve.x], []).append(point[curve.y])
    return points
