"""Pictures of what changes with length: perplexity, time and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from drt.evaluation.figure import short_length

# Okabe and Ito's colours, which the colour-blind can tell apart; markers tell where they repeat.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "os^Dv*X"

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
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 3.8), dpi=150)
    ticks: dict[float, str] = {}
    for number, (name, record) in enumerate(records.items()):
        rows = [row for row in record["rows"] if row["perplexity"] is not None]
        # A bucket of positions stands at its end, where the next begins.
        places = [row.get("length", row.get("to")) for row in rows]
        ticks |= {place: short_length(place) for place in places}
        axis.plot(places, [row["perplexity"] for row in rows], label=name, **_style(number))
        sure = [row for row in rows if row["perplexity_interval"] is not None]
        spots = [row.get("length", row.get("to")) for row in sure]
        lows, highs = ([row["perplexity_interval"][end] for row in sure] for end in (0, 1))
        color = _style(number)["color"]
        axis.fill_between(spots, lows, highs, color=color, alpha=0.15, linewidth=0)
    place = "position in the document, up to" if modes == ["book"] else "context, tokens"
    axis.set(xlabel=place, ylabel="perplexity a token")
    _finish(axis, ticks)
    axis.legend(frameon=False, fontsize=8)
    _save(plt, figure, path)


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
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 3.8), dpi=150)
    lengths = {row["length"] for record in records.values() for row in record["rows"]}
    for axis, (title, (unit, value)) in zip(axes, panels.items(), strict=True):
        for number, (name, record) in enumerate(records.items()):
            points = [(row["length"], value(row)) for row in record["rows"]]
            known = [(length, found) for length, found in points if found]
            axis.plot([x for x, _ in known], [y for _, y in known], label=name, **_style(number))
        axis.set(title=title, xlabel="tokens read", ylabel=unit)
        _scale(axis)
        _finish(axis, {length: short_length(length) for length in lengths})
    axes[0].legend(frameon=False, fontsize=8)
    _save(plt, figure, path)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _style(number: int) -> dict[str, Any]:
    color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
    return {"color": color, "marker": marker, "markersize": 4}


def _finish(axis: Any, ticks: dict[float, str]) -> None:
    """A base-2 axis of lengths, a light grid, no box."""
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _scale(axis: Any) -> None:
    """A vertical axis from zero, or a logarithmic one with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = [value for line in axis.get_lines() for value in line.get_ydata()]
    if not values or max(values) < _SMALL_RANGE * min(values):
        axis.set_ylim(0, None)
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
