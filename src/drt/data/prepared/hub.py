"""Documents from the Hugging Face hub, or from any files that `datasets` can load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from drt.data.prepared.format import Position
from drt.data.prepared.pieces import Piece, cut_pieces
from drt.data.prepared.sources import START
from drt.data.reading import text_of


class HubSource:
    """The rows of one split of a dataset, a document each.

    Args:
        rows: the split, as `datasets.load_dataset` returns it.
        name: the dataset's name.
        chosen: what else chose the rows: subset, revision, files.
        text_field: the column that holds the text.
        name_field: the column that names the document; without it, or where it is null, the row's
            number does.

    Raises:
        ValueError: the split has no column of text.
    """

    unit = "rows"

    def __init__(
        self,
        rows: Any,
        name: str,
        *,
        chosen: Mapping[str, Any] | None = None,
        text_field: str = "text",
        name_field: str | None = None,
    ) -> None:
        if text_field not in rows.column_names:
            raise ValueError(f"{name} has no column {text_field!r}; it has {rows.column_names}")
        self.size, self.done = len(rows), 0
        self._rows, self._name, self._chosen = rows, name, dict(chosen or {})
        self._text_field, self._name_field = text_field, name_field

    def describe(self) -> dict[str, Any]:
        """Which dataset, how many rows it has, and which columns are read."""
        names = {"text_field": self._text_field, "name_field": self._name_field}
        return {"kind": "hub", "name": self._name, **self._chosen, "num_rows": self.size, **names}

    def read(self, start: Position = START) -> Iterator[Piece]:
        """The pieces of all documents from a place on."""
        for number in range(start.row, self.size):
            row = self._rows[number]
            self.done = number + 1
            try:
                text = text_of(row, self._text_field)
            except ValueError as error:
                raise ValueError(f"{self._name}, row {number + 1}: {error}") from error
            called = row.get(self._name_field)
            label = number + 1 if called is None else called
            yield from cut_pieces([text], str(label), Position(0, number + 1))


def load_hub_splits(
    name: str,
    *,
    subset: str | None = None,
    revision: str | None = None,
    data_files: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Load the splits of a dataset; what was downloaded before is not downloaded again.

    Args:
        name: its name on the hub, or a format of local files ("json", "parquet", "csv", "text").
        subset: which of its configurations; None = the only one.
        revision: a commit, tag or branch; None = the newest.
        data_files: for each split the files that are read, paths or `hf://` addresses.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: nothing of that name can be loaded.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "datasets of the Hugging Face hub need the package 'datasets': "
            "pip install 'drt-lm[data]'"
        ) from error
    try:
        return dict(datasets.load_dataset(name, subset, revision=revision, data_files=data_files))
    # The errors of the package have several bases: RuntimeError for datasets that are scripts,
    # OSError and its own without a network.
    except Exception as error:
        raise ValueError(
            f"datasets cannot load {name!r}: {type(error).__name__}: {error}"
        ) from error
