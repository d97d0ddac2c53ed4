"""The tables and the figure of benchmarks/length.py, from the JSON of its processes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import format_table, ratio

MILLION = 1 << 20
"""Beyond this many tokens, the growth of the process is told."""

BASE_LENGTH = 1 << 16
"""Times are told relative to those at this length."""

HEADER = [
    *("tokens", "who", "prefill tok/s CPU", "wall", "decode ms", "plain", "landmark"),
    *("search ms", "gather ms", "RSS MiB", "kept MiB", "on disk MiB"),
    *("decode / at base", "decode / Mistral", "decode / Llama", "prefill / at base"),
    *("RSS growth MiB", "landmarks' growth MiB"),
]

COLORS = {
    "DRT device": "#0b6e4f", "DRT host": "#4f8fd0", "DRT disk": "#8a5aa8",
    "Mistral": "#b5452c", "Llama": "#8a7a2a",
}  # fmt: skip

Row = Mapping[str, Any]
Result = Mapping[str, Any]


def short(tokens: int) -> str:
    """1024 -> 1K, 1048576 -> 1M."""
    if tokens % 2**20 == 0:
        return f"{tokens // 2**20}M"
    return f"{tokens // 2**10}K" if tokens % 2**10 == 0 else str(tokens)


def report(results: Sequence[Result]) -> str:
    """The table of one model and the notes that it needs, in Markdown.

    Args:
        results: of the model's processes, one a tier and one with Llama.
    """
    lines = [line for result in results for line in table_rows(result)]
    order = {"DRT device": 0, "DRT host": 1, "DRT disk": 2, "Mistral": 3, "Llama": 4}
    lines.sort(key=lambda line: (line[0], order[line[1]]))
    cells = [[short(line[0]), *line[1:]] for line in lines]
    return "\n".join([format_table(HEADER, cells), "", *notes(results)])


def table_rows(result: Result) -> list[list[Any]]:
    """Lines of the table, milestones as numbers.

    The process with Llama tells of Llama and Mistral, the others of their memory.
    """
    rows = result["rows"]
    if not result["job"]["full_attention"]:
        return [_our_line(row, rows, result["job"]["tier"]) for row in rows]
    return [
        _their_line(row, rows, name)
        for row in rows
        for name in ("Mistral", "Llama")
        if name in row["reading"]
    ]


def _our_line(row: Row, rows: Sequence[Row], tier: str) -> list[Any]:
    base, million = _at(rows, BASE_LENGTH), _at(rows, MILLION)
    kept = row["num_bytes"]["DRT"]
    growth = ["", ""]
    if row["milestone"] > million["milestone"]:
        growth = [
            _mebibytes(row["resident"] - million["resident"]),
            _mebibytes(row["landmark_bytes"] - million["landmark_bytes"]),
        ]
    return [
        *_times(row, "DRT", f"DRT {tier}"),
        f"{median(row['search_ms']):.2f}",
        f"{median(row['gather_ms']):.2f}",
        _mebibytes(row["resident"]),
        _mebibytes(kept["device"] + kept["host"]),
        _mebibytes(kept["disk"]),
        _relative(row, base, _in_mistrals),
        _versus(row, "Mistral"),
        "",
        _relative(row, base, lambda x: tokens_per_second(x, "DRT")),
        *growth,
    ]


def _their_line(row: Row, rows: Sequence[Row], name: str) -> list[Any]:
    """One of a model of transformers; what its ratio says is how much time ours needs of its."""
    whole = [other for other in rows if name in other["reading"] and not _is_cut(other, name)]
    base = _at(whole or rows, BASE_LENGTH)
    kept = row["num_bytes"].get(name)
    versus = _versus(row, name)
    return [
        *_times(row, name, name),
        *("", "", ""),
        _mebibytes(kept["host"]) if kept else "",
        "",
        _relative(row, base, lambda x: decode_ms(x, name)),
        versus if name == "Mistral" else "",
        versus if name == "Llama" else "",
        _relative(row, base, lambda x: tokens_per_second(x, name)),
        *("", ""),
    ]


def _times(row: Row, name: str, label: str) -> list[Any]:
    decoding = row["decoding"].get(name)
    cut = "*" if _is_cut(row, name) else ""
    times = ["", "", ""]
    if decoding is not None:
        times = [f"{median(decoding[kind]):.2f}" for kind in ("mean", "plain", "landmark")]
        times[2] = times[2] if name == "DRT" else ""
    rates = (f"{tokens_per_second(row, name, clock):.0f}{cut}" for clock in ("cpu", "wall"))
    return [row["milestone"], label, *rates, *times]


def tokens_per_second(row: Row, name: str, clock: str = "cpu") -> float | None:
    """Of the stretch that ends at the row."""
    part = row["reading"].get(name)
    return part["tokens"] / part[clock] if part else None


def decode_ms(row: Row, name: str) -> float | None:
    """CPU milliseconds a token, median over the repeats."""
    decoding = row["decoding"].get(name)
    return median(decoding["mean"]) if decoding else None


def _in_mistrals(row: Row) -> float | None:
    """Our decoding in units of Mistral's beside it, which cancels how fast the machine was then."""
    own, other = decode_ms(row, "DRT"), decode_ms(row, "Mistral")
    return own / other if own and other else None


def _versus(row: Row, name: str) -> str:
    """Our decoding relative to another's, both of this process."""
    if name not in row["decoding"]:
        return ""
    samples = {key: row["decoding"][key]["mean"] for key in ("DRT", name)}
    return str(ratio(samples, "DRT", to=name))


def _relative(row: Row, base: Row, value: Callable[[Row], float | None]) -> str:
    own, other = value(row), value(base)
    return f"{own / other:.2f}" if own and other else ""


def _at(rows: Sequence[Row], length: int) -> Row:
    """The row of a milestone, or the first one if it was not reached."""
    return next((row for row in rows if row["milestone"] == length), rows[0])


def _is_cut(row: Row, name: str) -> bool:
    wanted = row["reading"]["DRT"]["tokens"] + row["milestone"] - row["length"]
    return row["reading"][name]["tokens"] < wanted


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}" if count >= 100 * 2**20 else f"{count / 2**20:.1f}"


def notes(results: Sequence[Result]) -> list[str]:
    """What to know of the table: bases, cuts, agreement, reloading."""
    first = results[0]["rows"]
    base, million = (short(_at(first, x)["milestone"]) for x in (BASE_LENGTH, MILLION))
    lines = [
        f"Base: {base}; our decoding is compared with it in units of Mistral's beside it. "
        f"Growth since {million}. Decoding and retrieval: medians, milliseconds of CPU."
    ]
    for result in results:
        budget = result["job"]["budget"]
        for row in result["rows"]:
            lines += [
                f"* {name} at {short(row['milestone'])}, {_process(result)}: cut short after "
                f"{budget:.0f} s, {part['tokens']} tokens of the stretch read."
                for name, part in row["reading"].items()
                if _is_cut(row, name)
            ]
        found = ", ".join(f"{name} {value:.1e}" for name, value in result["deviations"].items())
        lines.append(f"{_process(result)}: logits after segments against one forward: {found}.")
        for when, seconds in result["reload"].items():
            text = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
            lines.append(f"{_process(result)}, after the last row, {when}: {text}.")
    return ["\n\n".join(lines)]


SMALL_RANGE = 5
"""Panels whose values differ by less than this factor begin at zero."""


def _process(result: Result) -> str:
    return "beside Llama" if result["job"]["full_attention"] else result["job"]["tier"]


def draw(models: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Four panels for each model, one model a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shape = (len(models), 4)
    figure, axes = plt.subplots(*shape, figsize=(18, 4 * shape[0]), dpi=130, squeeze=False)
    for (name, results), line in zip(models.items(), axes, strict=True):
        for axis, (title, unit, series) in zip(line, _panels(results), strict=True):
            for label, style, points in series:
                color = COLORS[label.partition(",")[0]]
                # On a CPU the host's line lies on the device's.
                width = 3.5 if "device" in label else 1.5
                axis.plot(
                    *zip(*points, strict=True), style,
                    color=color, label=label, linewidth=width, markersize=4,
                )  # fmt: skip
            _finish(axis, f"{name}: {title}", unit, results)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


Point = tuple[int, float]
Series = tuple[str, str, list[Point]]


def _panels(results: Sequence[Result]) -> list[tuple[str, str, list[Series]]]:
    """Title, unit and lines of each panel."""
    panels: list[tuple[str, str, list[Series]]] = [
        ("prefill", "tokens / s of CPU", _of_all(results, tokens_per_second)),
        ("decoding", "CPU ms / token", _of_all(results, decode_ms)),
        ("retrieval", "CPU ms", []),
        ("memory", "MiB", []),
    ]
    for result in results:
        if result["job"]["full_attention"]:
            panels[3][2].extend(
                (f"{name}, cache", "o--", _points(result, lambda x, n=name: _kept(x, n)))
                for name in ("Mistral", "Llama")
            )
            continue
        label = f"DRT {result['job']['tier']}"
        for what, style in (("search_ms", "o-"), ("gather_ms", "o--")):
            points = _points(result, lambda x, what=what: median(x[what]))
            panels[2][2].append((f"{label}, {what[:-3]}", style, points))
        resident = _points(result, lambda x: x["resident"] / 2**20)
        panels[3][2].append((f"{label}, RSS", "o-", resident))
        kept = _points(result, lambda x: sum(x["num_bytes"]["DRT"].values()) / 2**20)
        panels[3][2].append((f"{label}, kept", "o--", kept))
    return panels


def _of_all(results: Sequence[Result], value: Callable[[Row, str], float | None]) -> list[Series]:
    """A line for each memory, for Mistral and for Llama."""
    series: list[Series] = [
        (f"DRT {result['job']['tier']}", "o-", _points(result, lambda x: value(x, "DRT")))
        for result in results
        if not result["job"]["full_attention"]
    ]
    for name in ("Mistral", "Llama"):
        # Several processes may tell of it; one is enough.
        lines = [_points(result, lambda x, n=name: value(x, n)) for result in results]
        series.append((name, "o--", max(lines, key=len)))
    return [line for line in series if line[2]]


def _points(result: Result, value: Callable[[Row], float | None]) -> list[Point]:
    pairs = [(row["length"], value(row)) for row in result["rows"]]
    return [(length, found) for length, found in pairs if found is not None]


def _kept(row: Row, name: str) -> float | None:
    kept = row["num_bytes"].get(name)
    return kept["host"] / 2**20 if kept else None


def _finish(axis: Any, title: str, unit: str, results: Sequence[Result]) -> None:
    lengths = sorted({row["length"] for result in results for row in result["rows"]})
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    axis.set(title=title, ylabel=unit, xlabel="tokens read")
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [short(length) for length in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    values = [value for line in axis.get_lines() for value in line.get_ydata()]
    if max(values) < SMALL_RANGE * min(values):
        # Noise must not look like growth.
        axis.set_ylim(0, None)
    else:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7)
