"""Where documents come from: local files, in the splits that their names tell."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from drt.data.prepared.format import Position
from drt.data.prepared.pieces import Piece, cut_pieces
from drt.data.reading import (
    ROWS_SUFFIX,
    XZ_SUFFIX,
    check_distinct,
    is_rows,
    list_text_files,
    parse_row,
    unpacked,
)
from drt.data.streaming import InputStream, TextInput

START = Position(0, 0)

# What the files and folders of a corpus call its splits, and what they are called here.
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
ALL_TEXT = "train"
"""The split of a corpus that has none."""

Files = list[tuple[str, Path]]
"""Files and what their documents are called."""


class Source(Protocol):
    """The documents of a split, in an order that never changes."""

    size: int
    """What there is to read, in `unit`."""
    unit: str
    """What `size` and `done` count."""

    @property
    def done(self) -> int:
        """How much of it was read."""
        ...

    def describe(self) -> dict[str, Any]:
        """What is read, so that another text is told from it; JSON values."""
        ...

    def read(self, start: Position = START) -> Iterator[Piece]:
        """The pieces of all documents from a place on; ValueError that says where it is broken."""
        ...


class FileSource:
    """Text files (a document each) and JSON lines (a document a row), either also with ``.xz``.

    Args:
        files: the files with the names that their documents get.
        text_field: the field of a row that holds the text.
        name_field: the field of a row that names the document; a row without it goes by its number.
    """

    unit = "B"

    def __init__(
        self, files: Files, *, text_field: str = "text", name_field: str | None = "id"
    ) -> None:
        self.files = files
        self.size = sum(path.stat().st_size for _, path in files)
        self.done = 0
        self._text_field, self._name_field = text_field, name_field

    def describe(self) -> dict[str, Any]:
        """How many files, of how many bytes, and a digest of their names and sizes."""
        sizes = hashlib.sha256()
        for name, path in self.files:
            sizes.update(f"{path.stat().st_size} {name}\n".encode("utf-8", "surrogateescape"))
        counts = {"num_files": len(self.files), "num_bytes": self.size}
        names = {"text_field": self._text_field, "name_field": self._name_field}
        return {"kind": "files", **counts, "names_and_sizes": sizes.hexdigest(), **names}

    def read(self, start: Position = START) -> Iterator[Piece]:
        """The pieces of all documents from a place on."""
        before = 0
        for number, (name, path) in enumerate(self.files):
            self.done, before = before, before + path.stat().st_size
            if number < start.file:
                continue
            if is_rows(path):
                skipped = start.row if number == start.file else 0
                yield from self._rows(name, path, number, skipped)
            else:
                yield from cut_pieces(_texts(path), name, Position(number + 1, 0))
        self.done = self.size

    def _rows(self, name: str, path: Path, number: int, skipped: int) -> Iterator[Piece]:
        before = self.done
        with path.open("rb") as raw, unpacked(raw, path) as lines:
            for row, line in enumerate(lines, start=1):
                self.done = before + raw.tell()
                if row > skipped and line.strip():
                    yield from self._row(name, path, Position(number, row), line)

    def _row(self, name: str, path: Path, after: Position, line: bytes) -> Iterator[Piece]:
        row, text = parse_row(line, path, after.row, self._text_field)
        called = row.get(self._name_field)
        document = f"{name}:{after.row if called is None else called}"
        yield from cut_pieces([text], document, after)


def _texts(path: Path) -> Iterator[str]:
    for piece in InputStream(TextInput(str(path), path.stat().st_size)):
        yield piece.text


class Selection:
    """The documents of a source whose names are chosen.

    Args:
        source: all documents.
        is_chosen: whether a document of this name is read.
        description: what is chosen, for the manifest.
    """

    def __init__(self, source: Source, is_chosen: Callable[[str], bool], description: str) -> None:
        self._source, self._is_chosen, self._description = source, is_chosen, description
        self.size, self.unit = source.size, source.unit

    @property
    def done(self) -> int:
        """How much of the source was read."""
        return self._source.done

    def describe(self) -> dict[str, Any]:
        """The source and what is chosen of it."""
        return {**self._source.describe(), "selection": self._description}

    def read(self, start: Position = START) -> Iterator[Piece]:
        """The pieces of the chosen documents from a place on."""
        return (piece for piece in self._source.read(start) if self._is_chosen(piece.name))


def check_one_in(one_in: int) -> None:
    """Raise the ValueError of `hold_out`."""
    if one_in < 2:
        raise ValueError(f"one document in {one_in} cannot be held out; it must be 2 or more")


def hold_out(source: Source, one_in: int) -> dict[str, Source]:
    """Cut a source in two by the sha256 of the documents' names.

    Args:
        source: all documents.
        one_in: one document in so many is for validation, 2 or more.

    Raises:
        ValueError: `one_in` is less than 2.
    """
    check_one_in(one_in)

    def is_held_out(name: str) -> bool:
        data = name.encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.sha256(data).digest(), "big") % one_in == 0

    # The smaller one first: it may turn out to be empty.
    return {
        "validation": Selection(source, is_held_out, f"one in {one_in}"),
        "train": Selection(source, lambda name: not is_held_out(name), f"but one in {one_in}"),
    }


def find_splits(
    paths: list[Path], *, only: str | None = None, rows_only: bool = False
) -> dict[str, Files]:
    """The text files of some paths, by split.

    A path, or what is directly inside a folder among the paths, belongs to the split that its name
    up to the first dot tells: train, validation (or valid, val, dev), test. Where nothing is so
    named, all text is one split, ``ALL_TEXT``.

    Args:
        paths: files and folders.
        only: read all text as one split of this name, whatever anything is called.
        rows_only: leave out files of folders that are not JSON lines.

    Returns:
        For each split, in the order train, validation, test, its files and what they are called:
        where they are in the path that they were found in.

    Raises:
        ValueError: a path that is not there, a folder without text, the same file twice, text
            beside the splits that would be left out, or text of two splits by its names.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"there is no file or folder {path}")
    found = [item for path in paths for item in _files(path, rows_only=rows_only)]
    check_distinct(path for _, path in found)
    if only is not None:
        return {only: found}
    splits: dict[str, Files] = {split: [] for split in dict.fromkeys(SPLIT_NAMES.values())}
    rest: Files = []
    for name, path in found:
        # The path itself may be a split's folder, or else what is directly inside it.
        top = path if path in paths else path.parents[name.count("/")]
        words = [part.partition(".")[0].lower() for part in (top.name, name.partition("/")[0])]
        named = list(dict.fromkeys(SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES))
        if len(named) > 1:
            raise ValueError(
                f"{path} is of the split {named[0]} by its folder and of {named[1]} by its own "
                "name: give the files or folders of each split themselves, or rename one"
            )
        (splits[named[0]] if named else rest).append((name, path))
    splits = {split: files for split, files in splits.items() if files}
    if splits and rest:
        raise ValueError(
            f"{rest[0][1]} is in none of the splits {sorted(splits)} that are beside it; "
            "give the paths of the splits, or one name for all text (--split NAME)"
        )
    return splits or {ALL_TEXT: rest}


def _files(path: Path, *, rows_only: bool) -> Files:
    found = list_text_files(path)
    if not path.is_dir():
        return [(path.name, path)]
    files = [file for file in found if is_rows(file) or not rows_only]
    if not files:
        raise ValueError(f"there is no {ROWS_SUFFIX} or {ROWS_SUFFIX}{XZ_SUFFIX} file in {path}")
    return [(file.relative_to(path).as_posix(), file) for file in files]
