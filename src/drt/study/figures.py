"""Pictures of studies."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from drt.evaluation.pictures import length_axis, pyplot, save, short_length, style
from drt.study.config import Curve


def draw_curve(path: Path, series: dict[str, list[Any]], *, curve: Curve, title: str) -> None:
    """Draw one line a row, the mean over its seeds, with bars to the lowest and the highest.

    Rows stand a little beside each other, so that their bars can be told apart.

    Args:
        path: where to; its ending chooses the format.
        series: row -> for each seed a list of points, mappings with the curve's keys.
        curve: which keys, and how they are shown.
        title: what stands above.

    Raises:
        ValueError: several points of a run have one place on the axis that goes right.
    """
    figure, axis = pyplot().subplots(figsize=(8, 4.2), dpi=130)
    ticks: set[float] = set()
    for number, (row, seeds) in enumerate(series.items()):
        points = _points(seeds, curve)
        ticks |= set(points)
        right = sorted(points)
        aside = 1 + 0.04 * (number - (len(series) - 1) / 2)
        means = [fmean(points[x]) for x in right]
        # The mean of equal values may round to one beside them.
        below = [max(mean - min(points[x]), 0) for mean, x in zip(means, right, strict=True)]
        above = [max(max(points[x]) - mean, 0) for mean, x in zip(means, right, strict=True)]
        axis.errorbar(
            [x * aside for x in right],
            means,
            yerr=[below, above],
            label=row,
            capsize=3,
            elinewidth=1,
            **style(number),
        )
    x_label = curve.x_label or curve.x.replace("_", " ")
    y_label = curve.y_label or curve.y.replace("_", " ")
    axis.set(title=title, xlabel=x_label, ylabel=y_label)
    length_axis(axis, {x: short_length(int(x)) if x == int(x) else f"{x:g}" for x in sorted(ticks)})
    if curve.log_y:
        axis.set_yscale("log")
        for ticks_of in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks_of("{x:g}")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    save(figure, path)


def _points(seeds: list[Any], curve: Curve) -> dict[float, list[float]]:
    """x -> the y of each seed."""
    points: dict[float, list[float]] = {}
    for records in seeds:
        for point in shown_points(records or [], curve):
            points.setdefault(point[curve.x], []).append(point[curve.y])
    return points


def shown_points(points: list[dict[str, Any]], curve: Curve) -> list[dict[str, Any]]:
    """The points of a run that have a place on the axis that goes up.

    Raises:
        ValueError: several have one place on the other.
    """
    shown = [point for point in points if point.get(curve.y) is not None]
    if len({point[curve.x] for point in shown}) < len(shown):
        raise ValueError(f"several points of a run have one {curve.x}: a curve would mix them")
    return shown
