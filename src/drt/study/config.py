"""What a study is: rows of models, measurements, and the columns of its table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from drt.run_config import RunConfig, apply_override, build, overlay, read_mapping
from drt.shipped import find_shipped


@dataclass(frozen=True)
class Measurement:
    """What is measured of every run."""

    task: str
    """A task of `drt eval`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Its settings, where they are not its defaults."""


@dataclass(frozen=True)
class Column:
    """A column of the table: one figure of one measurement."""

    measurement: str
    """Whose record it is taken from."""
    value: str
    """Where the figure is in the record, with dots between: keys, and of lists the number of an
    item or one of its entries, "length=4096"."""
    better: Literal["lower", "higher"] = "lower"
    """Which figure is the better one."""
    decimals: int = 3
    """Decimals that are shown."""
    paper: dict[str, float] = field(default_factory=dict)
    """The paper's figures, by row."""


@dataclass(frozen=True)
class Curve:
    """A picture: a figure over lengths or positions, one line a row."""

    measurement: str
    """Whose record it is taken from."""
    values: str
    """Where in the record a list of mappings is, one a point; "" = the record itself is that."""
    x: str
    """The key of a point that goes right."""
    y: str
    """The key of a point that goes up."""
    x_label: str | None = None
    """What the axis that goes right is called; None = the key."""
    y_label: str | None = None
    """What the axis that goes up is called; None = the key."""
    log_y: bool = False
    """Whether the axis that goes up is logarithmic."""


@dataclass(frozen=True)
class StudyConfig:
    """Models that are trained on the same data for as many steps, and measured alike."""

    title: str
    """The title of the page."""
    base: str
    """The run configuration that rows change: a file beside this one or one folder up, or the name
    of a shipped one."""
    rows: dict[str, dict[str, Any]]
    """By name, what each row changes of the base; `initial: {row: NAME}` begins with another row.
    With another model_type, the fields that both kinds have carry over."""
    measurements: dict[str, Measurement]
    """By name, what is measured of every run."""
    columns: dict[str, Column]
    """By title, the columns of the table."""
    pretrained: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same of runs that rows begin with, and that are neither measured nor shown."""
    runs: str | None = None
    """What the folder of the runs is called, which studies with rows of the same names may share;
    None = as the study's file."""
    about: str = ""
    """What the page says first, in Markdown."""
    parameters: dict[str, str] = field(default_factory=dict)
    """Values for {name} in all texts below; given on the command line as name=value."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of every row."""
    exceptions: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """By row and measurement, settings that are others for that row."""
    comparisons: list[list[str]] = field(default_factory=list)
    """Pairs of rows that are compared seed by seed, the first with the second."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """By title, the pictures."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows is empty: a study needs at least one")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds, default=-1) < 0:
            raise ValueError(f"seeds must be different numbers of 0 or more, got {self.seeds}")
        # Rows and pictures that a file name does not tell apart would overwrite each other.
        check_slugs("rows", [*self.rows, *self.pretrained])
        check_slugs("curves", self.curves)
        self._check_shown()
        for row, changed in self.exceptions.items():
            if row not in self.rows or changed.keys() - self.measurements.keys():
                raise ValueError(
                    f"an exception names a row and its measurements, got {row!r}: {list(changed)}"
                )
        for pair in self.comparisons:
            if len(pair) != 2 or any(name not in self.rows for name in pair):
                raise ValueError(f"a comparison names two rows, got {pair}")
        if self.comparisons and all(m.task != "perplexity" for m in self.measurements.values()):
            raise ValueError("comparisons are of perplexities, and no measurement is of any")
        for name, changes in self.trained.items():
            if own := {"seed", "output_dir"} & changes.keys():
                raise ValueError(f"row {name!r} sets {min(own)}, which the study sets itself")
            self._check_initial(name)

    def _check_shown(self) -> None:
        """Refuse columns and curves of measurements and rows that there are not."""
        for title, shown in {**self.columns, **self.curves}.items():
            if shown.measurement not in self.measurements:
                raise ValueError(
                    f"{title!r} shows {shown.measurement!r}, which is not among the measurements: "
                    f"{', '.join(self.measurements)}"
                )
        for title, column in self.columns.items():
            unknown = column.paper.keys() - self.rows.keys()
            if unknown:
                raise ValueError(
                    f"{title!r} has figures of the paper for {', '.join(sorted(unknown))}, "
                    "which is no row"
                )

    def _check_initial(self, name: str) -> None:
        """Refuse a row that begins with no row, or in the end with itself."""
        seen, source = [name], self.initial_row(name)
        while source is not None:
            if source not in self.trained:
                raise ValueError(f"row {seen[-1]!r} begins with {source!r}, which is no row")
            if source in seen:
                raise ValueError(f"rows begin with each other: {' -> '.join([*seen, source])}")
            seen.append(source)
            source = self.initial_row(source)

    @property
    def trained(self) -> dict[str, dict[str, Any]]:
        """All that is trained: the pretrained runs and the rows."""
        return {**self.pretrained, **self.rows}

    def measurements_of(self, row: str) -> dict[str, Measurement]:
        """By name, the measurements as they are made of a row; none of a pretrained run."""
        changed = self.exceptions.get(row, {})
        return {
            name: replace(made, settings=overlay(made.settings, changed.get(name, {})))
            for name, made in self.measurements.items()
            if row in self.rows
        }

    def initial_row(self, name: str) -> str | None:
        """The row that a row begins with, if any."""
        initial = self.trained[name].get("initial")
        if not isinstance(initial, dict):
            return None
        if initial.keys() != {"row"} or not isinstance(initial["row"], str):
            raise ValueError(
                f"initial of row {name!r} must be a folder or {{row: NAME}}: {initial}"
            )
        return initial["row"]


def load_study(path: Path, overrides: list[str]) -> StudyConfig:
    """Read a study.

    Args:
        path: a YAML file; `extends` may name another, as `read_mapping` finds it, to change parts
            of, or several, of which later ones change parts of earlier ones.
        overrides: "name=value" of parameters, and "dotted.key=value" of anything else.

    Raises:
        ValueError: no such file, not YAML, an unknown key, or a value of the wrong type.
    """
    data = read_mapping(path)
    parameters = data["parameters"] = data.get("parameters") or {}
    _check_parameters(path, parameters)
    for override in overrides:
        name, equals, value = override.partition("=")
        if name in parameters:
            if not equals:
                raise ValueError(f"a parameter reads {name}=value, got {override!r}")
            # Folders that a shell has completed are the same ones.
            parameters[name] = value.rstrip("/") or value
        else:
            apply_override(data, override)
    _check_parameters(path, parameters := data["parameters"])
    study = build(StudyConfig, _fill(data, parameters))
    return replace(study, base=str(_find_base(study.base, path.parent)))


def _check_parameters(path: Path, parameters: Any) -> None:
    if not isinstance(parameters, dict) or any(
        not isinstance(value, str) for value in parameters.values()
    ):
        raise ValueError(f"{path}: parameters must be texts by name, got {parameters}")


def _find_base(name: str, folder: Path) -> Path:
    """A run configuration beside a study or one folder up, or a shipped one."""
    folder = folder.resolve()
    places = [where / each for where in (folder, folder.parent) for each in (name, f"{name}.yaml")]
    found = next((place for place in places if place.is_file()), None)
    try:
        return found or find_shipped(name)
    except ValueError as error:
        raise ValueError(f"base, also sought in {folder} and {folder.parent}: {error}") from error


def run_config(
    study: StudyConfig, base: dict[str, Any], row: str, seed: int, folder: Path
) -> RunConfig:
    """The configuration of one run of a row.

    Args:
        study: the study.
        base: the mapping of its base configuration.
        row: the row's name.
        seed: the run's seed.
        folder: of the study; a run has its own folder in it.
    """
    changes = dict(study.trained[row])
    source = study.initial_row(row)
    if source is not None:
        changes["initial"] = str(run_folder(folder, source, seed))
    data = overlay(_fill(base, study.parameters), changes)
    if changes.get("initial") is not None:
        # The rest of its fields are those of the model it begins with.
        data["model"] = changes.get("model", {})
    data |= {"seed": seed, "output_dir": str(run_folder(folder, row, seed))}
    return build(RunConfig, data)


def run_folder(folder: Path, row: str, seed: int) -> Path:
    """Where a run of a row is kept."""
    return folder / slug(row) / f"seed-{seed}"


def slug(name: str) -> str:
    """A name as part of a file's: lower case, letters and digits of any alphabet, and hyphens."""
    return "".join(each if each.isalnum() else "-" for each in name).strip("-").lower()


def check_slugs(kind: str, names: Iterable[str]) -> None:
    """Refuse names of which no file name can be made, or the same one of two.

    Raises:
        ValueError: there are such names.
    """
    taken: dict[str, str] = {}
    for name in names:
        found = slug(name)
        if not found:
            raise ValueError(f"{kind}: {name!r} has no letter or digit to call a file by")
        if found in taken:
            raise ValueError(
                f"{kind}: {taken[found]!r} and {name!r} would share the file name {found!r}"
            )
        taken[found] = name


def _fill(value: Any, parameters: dict[str, str]) -> Any:
    """Put parameters in place of their {name} in all texts."""
    if isinstance(value, dict):
        return {key: _fill(each, parameters) for key, each in value.items()}
    if isinstance(value, list):
        return [_fill(each, parameters) for each in value]
    if isinstance(value, str):
        for name, text in parameters.items():
            value = value.replace("{" + name + "}", text)
    return value
