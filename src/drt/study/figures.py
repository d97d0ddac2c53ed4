"""Pictures of studies."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from drt.evaluation.pictures import length_axis, pyplot, save, short_length, style
from drt.study.config import Curve


def draw_curve(path: Path, series: dict[str, list[Any]], *, curve: Curve, title: str) -> None:
    """Draw one line a row, the mean over its seeds, with all seeds' range as a shade.

    Args:
        path: where to; its ending chooses the format.
        series: row -> for each seed a list of points, mappings with the curve's keys.
        curve: which keys, and how they are shown.
        title: what stands above.
    """
    figure, axis = pyplot().subplots(figsize=(7, 4.2), dpi=130)
    ticks: set[float] = set()
    for number, (row, seeds) in enumerate(series.items()):
        points = _points(seeds, curve)
        ticks |= set(points)
        right = sorted(points)
        line = style(number)
        axis.plot(right, [fmean(points[x]) for x in right], label=row, **line)
        low, high = ([edge(points[x]) for x in right] for edge in (min, max))
        axis.fill_between(right, low, high, color=line["color"], alpha=0.15, linewidth=0)
    right_label = curve.x_label or curve.x.replace("_", " ")
    axis.set(title=title, xlabel=right_label, ylabel=curve.y.replace("_", " "))
    length_axis(axis, {x: short_length(int(x)) for x in sorted(ticks)})
    if curve.log_y:
        axis.set_yscale("log")
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, path)


def _points(seeds: list[Any], curve: Curve) -> dict[float, list[float]]:
    """x -> the y of each seed; ValueError where a run has several."""
    points: dict[float, list[float]] = {}
    for records in seeds:
        shown = [point for point in records or [] if point.get(curve.y) is not None]
        if len({point[curve.x] for point in shown}) < len(shown):
            raise ValueError(f"several points of a run have one {curve.x}: a curve would mix them")
        for point in shown:
            points.setdefault(point[curve.x], []).append(point[curve.y])
    return points
