"""Pictures of needle scores: a map of length by depth, or a curve by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drt.evaluation.pictures import length_axis, pyplot, save, short_length, style


def draw(models: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw exact match: a map for each model if needles were at given depths, else curves.

    Args:
        models: name -> mappings of `NeedleScore`.
        path: where to; its ending chooses the format.

    Raises:
        ValueError: there are no scores.
    """
    models = {name: rows for name, rows in models.items() if rows}
    if not models:
        raise ValueError("there are no scores to draw")
    by_depth = any(row["depth"] is not None for rows in models.values() for row in rows)
    count = len(models) if by_depth else 1
    size = (5.2 * count, 3.8)
    figure, axes = pyplot().subplots(1, count, figsize=size, dpi=150, squeeze=False)
    if by_depth:
        for axis, (name, rows) in zip(axes[0], models.items(), strict=True):
            image = _draw_map(axis, name, rows)
        figure.colorbar(image, ax=axes[0].tolist(), label="exact match")
    else:
        _draw_curves(axes[0][0], models)
        figure.tight_layout()
    save(figure, path, bbox_inches="tight")


def _draw_map(axis: Any, name: str, rows: list[dict[str, Any]]) -> Any:
    """Lengths from left to right, depths from the start of the context (top) to its end."""
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    found = {(row["depth"], row["length"]): row["exact_match"] for row in rows}
    grid = [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    image = axis.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(title=name, xlabel="context, tokens", ylabel="depth of the needle")
    for y, values in enumerate(grid):
        for x, value in enumerate(values):
            # Viridis is dark where it is low.
            color = "black" if value > 0.6 else "white"
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7)
    return image


def _draw_curves(axis: Any, models: dict[str, list[dict[str, Any]]]) -> None:
    """Exact match by length, with its 95 % interval as a band."""
    ticks = sorted({row["length"] for rows in models.values() for row in rows})
    for number, (name, rows) in enumerate(models.items()):
        line = style(number)
        lengths = [row["length"] for row in rows]
        axis.plot(lengths, [row["exact_match"] for row in rows], label=name, **line)
        lows, highs = zip(*(row["exact_match_interval"] for row in rows), strict=True)
        axis.fill_between(lengths, lows, highs, color=line["color"], alpha=0.15, linewidth=0)
    length_axis(axis, {tick: short_length(tick) for tick in ticks})
    axis.set(xlabel="context, tokens", ylabel="exact match", ylim=(-0.04, 1.04))
    axis.legend(frameon=False, fontsize=8)
