"""Pictures of what changes with length: perplexity, time and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from drt.evaluation.pictures import from_zero, length_axis, pyplot, save, short_length, style

# Values that differ by less than this factor are drawn from zero: noise must not look like growth.
_SMALL_RANGE = 5

Records = dict[str, dict[str, Any]]


def draw_perplexity(records: Records, path: Path) -> None:
    """Draw perplexity with its 95 % intervals, by context length, or of books by position.

    Args:
        records: what `PerplexityTask.evaluate` returned, by the name of the model; of one mode.
        path: where to; its ending chooses the format.

    Raises:
        ValueError: there are no records, or they are of several modes.
    """
    modes = sorted({record["mode"] for record in records.values()})
    if len(modes) != 1:
        raise ValueError(f"a figure needs records of one mode, got {modes}")
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 3.8), dpi=150)
    ticks: dict[float, str] = {}
    for number, (name, record) in enumerate(records.items()):
        rows = [row for row in record["rows"] if row["perplexity"] is not None]
        # A bucket of positions stands at its end, where the next begins.
        places = [row.get("length", row.get("to")) for row in rows]
        ticks |= {place: short_length(place) for place in places}
        axis.plot(places, [row["perplexity"] for row in rows], label=name, **style(number))
        sure = [row for row in rows if row["perplexity_interval"] is not None]
        spots = [row.get("length", row.get("to")) for row in sure]
        lows, highs = ([row["perplexity_interval"][end] for row in sure] for end in (0, 1))
        color = style(number)["color"]
        axis.fill_between(spots, lows, highs, color=color, alpha=0.15, linewidth=0)
    place = "position in the document, up to" if modes == ["book"] else "context, tokens"
    axis.set(xlabel=place, ylabel="perplexity a token")
    length_axis(axis, ticks)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, path)


def draw_cost(records: Records, path: Path) -> None:
    """Draw reading, decoding, peak memory and what is held, by length.

    Args:
        records: what `CostTask.evaluate` returned, by the name of the model.
        path: where to; its ending chooses the format.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("there are no records to draw")
    panels: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
        "Reading": ("tokens / s", lambda row: row["tokens_per_second"]),
        "Decoding": ("ms / token", lambda row: row["decode_ms"]),
        "Peak memory": ("MiB", lambda row: row["peak_bytes"] and row["peak_bytes"] / 2**20),
        "Held": ("MiB", lambda row: sum(row["held_bytes"].values()) / 2**20),
    }
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 3.8), dpi=150)
    lengths = {row["length"] for record in records.values() for row in record["rows"]}
    for axis, (title, (unit, value)) in zip(axes, panels.items(), strict=True):
        for number, (name, record) in enumerate(records.items()):
            points = [(row["length"], value(row)) for row in record["rows"]]
            known = [(length, found) for length, found in points if found]
            axis.plot([x for x, _ in known], [y for _, y in known], label=name, **style(number))
        axis.set(title=title, xlabel="tokens read", ylabel=unit)
        _scale(axis)
        length_axis(axis, {length: short_length(length) for length in lengths})
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, path)


def _scale(axis: Any) -> None:
    """A vertical axis from zero, or a logarithmic one with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = [value for line in axis.get_lines() for value in line.get_ydata()]
    if not values or max(values) < _SMALL_RANGE * min(values):
        from_zero(axis)
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
