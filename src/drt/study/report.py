"""The page of a study: its table, its comparisons, its pictures, and how they were made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from drt.evaluation.document_losses import pooled_difference
from drt.run_config import read_mapping
from drt.study.config import Column, Curve, StudyConfig, slug
from drt.study.figures import draw_curve, shown_points
from drt.study.jobs import (
    Job,
    check_configuration,
    facts_of,
    hardware_of,
    is_done,
    plan_jobs,
    results_of,
)
from drt.version import __version__

NONE = ""

# A key, a number, or an entry, whose value may be a number with a point.
_STEP = re.compile(r"[^.=]+=\d+\.\d+|[^.]+")


class Results:
    """What has been measured so far.

    Args:
        study: the study.
        folder: where its runs are kept.
    """

    def __init__(self, study: StudyConfig, folder: Path) -> None:
        self.study, self.folder = study, folder
        self.done = {
            row: [seed for seed in study.seeds if is_done(study, Job(row, seed), folder)]
            for row in study.rows
        }
        self._records = {
            (row, seed): results_of(study, Job(row, seed), folder)
            for row, seeds in self.done.items()
            for seed in seeds
        }

    @property
    def is_whole(self) -> bool:
        """Whether every run is done."""
        return all(seeds == self.study.seeds for seeds in self.done.values())

    def record(self, row: str, seed: int, measurement: str) -> dict[str, Any]:
        """What was measured of a run that is done."""
        return self._records[row, seed][measurement]

    def records(self, row: str, measurement: str) -> list[dict[str, Any]]:
        """The same of all seeds that are done."""
        return [self.record(row, seed, measurement) for seed in self.done[row]]

    def facts(self, row: str) -> list[dict[str, Any]]:
        """Size, operations and time of the runs of a row."""
        return [facts_of(Job(row, seed), self.folder) for seed in self.done[row]]


def find(record: Any, path: str) -> Any:
    """What stands in a record at "key.2.key"; None where the record ends before.

    An item of a list is named by its number, or by one of its own entries: "length=4096",
    "depth=0.5".

    Raises:
        ValueError: several items have that entry, or a list is asked for something else.
    """
    for name in _STEP.findall(path):
        if isinstance(record, list) and "=" in name:
            key, _, value = name.partition("=")
            given = [item for item in record if isinstance(item, dict)]
            items = [item for item in given if str(item.get(key)) == value]
            if len(items) > 1:
                raise ValueError(f"{path!r}: {len(items)} items have {name}, which is to be one")
            record = items[0] if items else None
        elif isinstance(record, list):
            if not name.isdecimal():
                raise ValueError(f"{path!r}: {name!r} is no item of a list, as 2 or length=4096 is")
            record = record[int(name)] if int(name) < len(record) else None
        elif isinstance(record, dict):
            record = record.get(name)
        else:
            return None
    return record


def write_page(study: StudyConfig, folder: Path, page: Path, *, command: str) -> None:
    """Write the page and, beside it, its pictures.

    Args:
        study: the study.
        folder: where its runs are kept.
        page: the Markdown file.
        command: what made it, to be shown.

    Raises:
        ValueError: no run is done, a run that is there is not the study's, or a column finds
            nothing in the records of all runs.
    """
    base = read_mapping(Path(study.base))
    for job in plan_jobs(study):
        check_configuration(study, base, job, folder)
    results = Results(study, folder)
    _check_columns(results)
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"# {study.title}", study.about.strip(), _made_by(results, command), _table(results)]
    parts += [_comparisons(results)] if study.comparisons else []
    for title, curve in study.curves.items():
        image = page.with_name(f"{page.stem}-{slug(title)}.png")
        series = {
            row: [find(record, curve.values) for record in results.records(row, curve.measurement)]
            for row in study.rows
            if results.done[row]
        }
        if series:
            draw_curve(image, series, curve=curve, title=title)
            parts.append(f"![{title}]({quote(image.name)})")
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def find_problems(results: Results, *, nothing_is_wrong: bool = True) -> list[str]:
    """What is wrong with columns and pictures, as far as the records of finished runs tell.

    Args:
        results: what has been measured so far.
        nothing_is_wrong: whether it is wrong to find nothing in any record, which a later run may
            have.
    """
    study = results.study
    shown = {f"column {title!r}": each for title, each in study.columns.items()}
    shown |= {f"curve {title!r}": each for title, each in study.curves.items()}
    found = {name: _problem(results, each, nothing_is_wrong) for name, each in shown.items()}
    return [f"{name}{problem}" for name, problem in found.items() if problem]


def _problem(results: Results, shown: Column | Curve, nothing_is_wrong: bool) -> str:
    """What is wrong with a column or a picture, to be said after its name; "" for nothing."""
    path = shown.value if isinstance(shown, Column) else shown.values
    records = [r for row in results.done for r in results.records(row, shown.measurement)]
    try:
        found = [part for record in records if (part := find(record, path)) is not None]
    except ValueError as error:
        return f": {error}"
    if nothing_is_wrong and records and not any(part != [] for part in found):
        there = _what_is_there(records[0], path)
        return f" finds no {path!r} in any record of {shown.measurement!r}, but {there}"
    what = f": {path!r} of {shown.measurement!r} is no"
    part: Any
    for part in found:
        if isinstance(shown, Curve):
            if not _are_points(part, shown):
                return (
                    f"{what} list of points with numbers above 0 as {shown.x!r} and numbers as "
                    f"{shown.y!r}"
                )
            try:
                shown_points(part, shown)
            except ValueError as error:
                return f": {error}"
        elif not isinstance(part, int | float):
            return f"{what} number but a {type(part).__name__}"
    return ""


def _what_is_there(record: Any, path: str) -> str:
    """The keys of a record, or those of a list's items, where a path leads out of it."""
    for name in _STEP.findall(path):
        if not isinstance(below := find(record, name), dict | list):
            break
        record = below
    if isinstance(record, dict):
        return ", ".join(record)
    key = name.partition("=")[0]
    items = [item for item in record if isinstance(item, dict)]
    named = [f"{key}={item[key]}" for item in items if key in item]
    return f"a list of {len(record)}: {', '.join(named or (items[0] if items else []))}"


def _check_columns(results: Results) -> None:
    """Refuse what would be a table of nothing."""
    if not any(results.done.values()):
        raise ValueError(f"no run of this study is done in {results.folder}")
    if problems := find_problems(results, nothing_is_wrong=results.is_whole):
        raise ValueError("; ".join(problems))


def _are_points(points: Any, curve: Curve) -> bool:
    """Whether all have a place on the axis that goes right, and some one on the other."""
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        return False
    right = [point.get(curve.x) for point in points]
    up = [point[curve.y] for point in points if point.get(curve.y) is not None]
    return (
        all(isinstance(x, int | float) and x > 0 for x in right)
        and all(isinstance(y, int | float) for y in up)
        and (not points or any(curve.y in point for point in points))
    )


def _made_by(results: Results, command: str) -> str:
    seeds = ", ".join(map(str, results.study.seeds))
    made = f"Made by `{command}`, {date.today().isoformat()}, drt {__version__}; seeds {seeds}."
    measured_on = dict.fromkeys(
        each
        for row, done in results.done.items()
        for seed in done
        for each in hardware_of(results.study, Job(row, seed), results.folder)
    )
    whole = NONE
    if not results.is_whole:
        whole = (
            " **Not all runs are done: rows are means over other seeds, and none is marked as the "
            "best; comparisons are of the seeds that both models have.**"
        )
    return f"{made} Measured on {'; '.join(measured_on)}.{whole}"


def _table(results: Results) -> str:
    study = results.study
    titles = [title.replace("|", "\\|") for title in study.columns]
    head = ["model", "parameters", "cost", "training, s", "seeds", *titles]
    rows = []
    best = {title: _best(results, column) for title, column in study.columns.items()}
    for row in study.rows:
        cells = [row.replace("|", "\\|"), *_facts(results, row)]
        for title, column in study.columns.items():
            cells.append(_cell(results, row, column, is_best=row in best[title]))
        rows.append(cells)
    note = (
        "Means over the seeds, in brackets the lowest and the highest where there are several; "
        "the paper's figure, of its own size and data, behind a bar. The best mean is bold, once "
        "all runs are done, of rows that have it of all seeds. "
        "Cost: operations of training on a token, of those of the first row. Training seconds are "
        "wall time beside other runs."
    )
    return f"{_markdown(head, rows)}\n\n{note}"


def _facts(results: Results, row: str) -> list[str]:
    """Parameters, cost, seconds and number of seeds."""
    facts, first = results.facts(row), results.facts(next(iter(results.study.rows)))
    if not facts:
        return [NONE, NONE, NONE, "0"]
    cost = NONE
    if first and facts[0]["flops_per_token"] and first[0]["flops_per_token"]:
        cost = f"{facts[0]['flops_per_token'] / first[0]['flops_per_token']:.2f}"
    seconds = fmean(each["seconds"] for each in facts)
    return [f"{facts[0]['parameters']:,}", cost, f"{seconds:,.0f}", str(len(facts))]


def _values(results: Results, row: str, column: Column) -> list[float]:
    found = [find(each, column.value) for each in results.records(row, column.measurement)]
    return [float(value) for value in found if value is not None]


def _best(results: Results, column: Column) -> set[str]:
    """The rows whose mean is bold: none as long as rows are means over other seeds."""
    if not results.is_whole:
        return set()
    found = {row: _values(results, row, column) for row in results.study.rows}
    means = {row: fmean(v) for row, v in found.items() if len(v) == len(results.done[row])}
    finite = {row: mean for row, mean in means.items() if math.isfinite(mean)}
    # A figure that all rows share, as that of the first sentences of documents, marks none.
    if len(set(means.values())) < 2 or not finite:
        return set()
    choose = min if column.better == "lower" else max
    return {row for row, mean in finite.items() if mean == choose(finite.values())}


def _cell(results: Results, row: str, column: Column, *, is_best: bool) -> str:
    values, places = _values(results, row, column), column.decimals
    shown = NONE
    if values:
        shown = f"{fmean(values):.{places}f}"
        shown = f"**{shown}**" if is_best else shown
    if len(values) > 1:
        shown += f" [{min(values):.{places}f}, {max(values):.{places}f}]"
    if values and len(values) < len(results.done[row]):
        shown += f" ({len(values)} of {len(results.done[row])} seeds)"
    if row in column.paper:
        shown += f" \\| {column.paper[row]:g}"
    return shown.strip()


def _comparisons(results: Results) -> str:
    """Ratios of perplexities on the same documents, seed by seed, a table a measurement."""
    parts = [
        _comparison_table(results, name)
        for name, measurement in results.study.measurements.items()
        if measurement.task == "perplexity"
    ]
    if not any(parts):
        return NONE
    note = (
        "Ratios of perplexities, the first model's over the second's, with 95 % intervals over "
        "documents by paired bootstrap; of all seeds the geometric mean, over documents and seeds. "
        "Intervals are widened where documents or seeds are few, as Student's t is: of two seeds "
        "they say little. Below 1 the first predicts better."
    )
    return "\n\n".join([*(part for part in parts if part), note])


def _comparison_table(results: Results, measurement: str) -> str:
    lines = []
    for first, second in results.study.comparisons:
        name = f"{first} / {second}".replace("|", "\\|")
        pairs = dict(_pairs(results, first, second, measurement))
        lines += [(name, str(seed), pooled_difference([pair])) for seed, pair in pairs.items()]
        if len(pairs) > 1:
            lines.append((name, "all", pooled_difference(list(pairs.values()))))
    if not lines:
        return NONE
    # Where a model was measured at fewer lengths, cells stay empty.
    counts = {row["label"]: row["num_documents"] for _, _, rows in lines for row in rows}
    cells = []
    for name, seed, rows in lines:
        ratios = {row["label"]: _ratio(row) for row in rows}
        cells.append([name, seed, *(ratios.get(label, NONE) for label in counts)])
    head = [f"{label} ({count} documents)" for label, count in counts.items()]
    return _markdown([measurement, "seed", *head], cells)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _pairs(
    results: Results, first: str, second: str, measurement: str
) -> Iterator[tuple[int, tuple[dict[str, Any], dict[str, Any]]]]:
    """The records of both rows, for each seed that both have."""
    for seed in results.done[first]:
        if seed in results.done[second]:
            one, other = (results.record(row, seed, measurement) for row in (first, second))
            yield seed, (one, other)


def _ratio(row: dict[str, Any]) -> str:
    if row["interval"] is None:
        return f"{row['ratio']:.4f}"
    low, high = row["interval"]
    return f"{row['ratio']:.4f} [{low:.4f}, {high:.4f}]"
