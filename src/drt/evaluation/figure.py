"""The picture of a run: accuracy, time and memory by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drt.evaluation.pictures import from_zero, length_axis, pyplot, save, short_length

_COLORS = {"drt": "#0b6e4f", "baseline": "#b5452c"}
_LABELS = {"drt": "DRT", "baseline": "sliding window"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw results.json's content to a PNG or SVG file.

    Args:
        results: the content of results.json.
        path: where to; its ending chooses the format.
    """
    figure, (accuracy, seconds, memory) = pyplot().subplots(1, 3, figsize=(13, 3.8), dpi=150)
    for name, model in results["models"].items():
        _draw_accuracy(accuracy, name, model)
        single = model["single"]
        lengths = [row["length"] for row in single]
        style = {"color": _COLORS.get(name), "label": _LABELS.get(name, name), "marker": "o"}
        seconds.plot(lengths, [row["seconds_per_example"] for row in single], **style)
        peaks = [row["peak_rss_bytes"] for row in single]
        if all(peaks):
            memory.plot(lengths, [peak / 2**30 for peak in peaks], **style)
    accuracy.axvline(results["train_length"], color="0.6", linestyle=":", zorder=0)
    accuracy.annotate(
        "training length", (results["train_length"], 0.5), rotation=90, color="0.4", fontsize=8,
        ha="right", va="center",
    )  # fmt: skip
    accuracy.set(title="Needles answered exactly", ylabel="exact match", ylim=(-0.04, 1.04))
    seconds.set(title="Time for one context", ylabel="seconds", yscale="log")
    memory.set(title="Peak memory of the process", ylabel="GiB")
    from_zero(memory)
    lengths = [row["length"] for row in next(iter(results["models"].values()))["single"]]
    for axis in (accuracy, seconds, memory):
        length_axis(axis, {length: short_length(length) for length in lengths})
        axis.set_xlabel("context, tokens")
    accuracy.legend(frameon=False, fontsize=8, loc="center right")
    figure.tight_layout()
    save(figure, path)


def _draw_accuracy(axis: Any, name: str, model: dict[str, Any]) -> None:
    for task, line in (("single", "-"), ("multi", "--")):
        rows = model[task]
        label = (
            f"{_LABELS.get(name, name)}, {'one needle' if task == 'single' else 'several needles'}"
        )
        axis.plot(
            [row["length"] for row in rows],
            [row["exact_match"] for row in rows],
            color=_COLORS.get(name),
            linestyle=line,
            marker="o",
            label=label,
        )
