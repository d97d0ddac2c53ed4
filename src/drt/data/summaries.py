"""Documents and their summaries, from local rows or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

from drt.data.prepared.hub import load_hub_splits
from drt.data.prepared.sources import SPLIT_NAMES, find_splits
from drt.data.reading import ROWS_SUFFIX, is_rows, json_rows

# What the fields of rows are called, in the sets that are known:
#
#   one summary a document       document, summary     (EdinburghNLP/xsum)
#                                article, highlights   (abisee/cnn_dailymail, subset 3.0.0)
#   several, each as good        document, summaries   (SciTLDR)
#   one of several a question    document, questions: [{question, summaries}]   (SQuALITY)
#   one a query                  document, queries: [{query, answer}]           (QMSum)
DOCUMENT_FIELDS = ("document", "article")
SUMMARY_FIELDS = ("summary", "summaries", "highlights")
QUERY_FIELDS = {"questions": ("question", "summaries"), "queries": ("query", "answer")}
NAME_FIELD = "id"


class SummaryExample(NamedTuple):
    """A document and how it may be summarized."""

    document_name: str
    """What the document is called; the queries of a document share it."""
    document: str
    """The text."""
    query: str | None
    """What the summary is to answer; None = a summary of the whole."""
    summaries: tuple[str, ...]
    """Reference summaries, each as good as the others."""


@dataclass(frozen=True, kw_only=True)
class SummarySource:
    """Where summaries come from and how a prompt is written."""

    path: str | None = None
    """A `.jsonl` or `.jsonl.xz` file, or a folder with one for each split."""
    hub: str | None = None
    """Name of a dataset on the Hugging Face hub, where no path is given."""
    hub_subset: str | None = None
    """Which of the dataset's configurations; None = the only one."""
    hub_revision: str | None = None
    """Commit, tag or branch of the dataset; None = the newest."""
    document_field: str | None = None
    """The field of a row that holds the document; None = document or article."""
    summary_field: str | None = None
    """The field that holds a summary or a list of them; None = as the known sets call it."""
    marker: str = " TL;DR:"
    """The text that ends a prompt; a summary follows."""
    end: str | None = None
    """The text of one token that ends a summary; None = the tokenizer's end of text."""
    max_summary_tokens: int = 256
    """Tokens of a summary at most, without its end; a longer one is cut and has no end."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            raise ValueError(
                f"one of path and hub must be given, got path {self.path!r} and hub {self.hub!r}"
            )
        if self.hub is None and (self.hub_subset or self.hub_revision):
            raise ValueError("hub_subset and hub_revision need hub, a dataset's name")
        if not self.marker:
            raise ValueError("marker is empty; a prompt needs a text that ends it")
        if self.max_summary_tokens < 1:
            raise ValueError(
                f"max_summary_tokens is {self.max_summary_tokens}; it must be 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class SummaryData(SummarySource):
    """Summaries to train on."""

    split: str = "train"
    """Which split is read."""
    length: int = 1024
    """Tokens of a row at most: the start of a document, the marker, a summary and its end."""
    validation_split: str = "validation"
    """The split of the validation loss."""
    validation_rows: int = 32
    """Rows of the validation loss at most, the same at each measurement."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_rows < 1:
            raise ValueError(f"validation_rows is {self.validation_rows}; it must be 1 or more")
        check_room(self.length, self.max_summary_tokens)


def check_room(length: int, max_summary_tokens: int) -> None:
    """Refuse rows in which the longest summary leaves no token to a prompt or the end."""
    if max_summary_tokens > length - 2:
        raise ValueError(
            f"max_summary_tokens is {max_summary_tokens}; with length {length} it must be "
            f"{length - 2} or less"
        )


class Summaries(Sequence[SummaryExample]):
    """The examples of rows: one a row, or one for each query of a row.

    Rows are looked at when an example is asked for, but for those with queries, which are counted.

    Args:
        rows: mappings, such as a split of `datasets.load_dataset`.
        name: what they are called in errors.
        document_field: as in `SummarySource`.
        summary_field: as in `SummarySource`; queries of rows are left alone where it is given.

    Raises:
        ValueError: there is no row, or none of the fields of the known sets.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        *,
        name: str,
        document_field: str | None = None,
        summary_field: str | None = None,
    ) -> None:
        if not len(rows):
            raise ValueError(f"{name} has no rows")
        self._rows, self._name = rows, name
        first = rows[0]
        if not isinstance(first, dict):
            raise ValueError(f"{name}, row 1: the row is a {type(first).__name__}, not an object")
        self._document_field = document_field or self._field(first, DOCUMENT_FIELDS)
        fields = SUMMARY_FIELDS if summary_field else (*QUERY_FIELDS, *SUMMARY_FIELDS)
        self._summary_field = summary_field or self._field(first, fields)
        self._places: list[tuple[int, int]] | None = None
        if summary_field is None and self._summary_field in QUERY_FIELDS:
            self._places = [
                (row, query)
                for row in range(len(rows))
                for query in range(len(self._list(row, self._summary_field)))
            ]
            if not self._places:
                raise ValueError(f"{name} has rows but nothing in their {self._summary_field}")

    def __len__(self) -> int:
        return len(self._rows) if self._places is None else len(self._places)

    @overload
    def __getitem__(self, index: int) -> SummaryExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[SummaryExample]: ...
    def __getitem__(self, index: int | slice) -> SummaryExample | list[SummaryExample]:
        """The example at an index; ValueError that names the row where a field is missing."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} is not among the {len(self)}")
        index %= len(self)
        if self._places is None:
            return self._example(index, None, self._rows[index], self._summary_field)
        number, query = self._places[index]
        asked = self._list(number, self._summary_field)[query]
        query_field, summary_field = QUERY_FIELDS[self._summary_field]
        return self._example(number, self._text(number, asked, query_field), asked, summary_field)

    @property
    def queries(self) -> Iterator[str]:
        """What is asked, example by example; nothing where whole documents are summarized."""
        return (query for example in self if (query := example.query) is not None)

    def _example(
        self, number: int, query: str | None, summarized: Any, summary_field: str
    ) -> SummaryExample:
        row = self._rows[number]
        document = self._text(number, row, self._document_field)
        found = summarized.get(summary_field) if isinstance(summarized, dict) else None
        summaries = [found] if isinstance(found, str) else found
        if not isinstance(summaries, list) or not summaries:
            raise ValueError(f"{self._at(number)}: it has no text or list {summary_field!r}")
        if not all(isinstance(summary, str) for summary in summaries):
            raise ValueError(f"{self._at(number)}: {summary_field!r} holds something but text")
        name = row.get(NAME_FIELD)
        return SummaryExample(
            str(number + 1 if name is None else name), document, query, tuple(summaries)
        )

    def _text(self, number: int, row: Any, field: str) -> str:
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{self._at(number)}: it has no text {field!r}")
        return text

    def _list(self, number: int, field: str) -> list[Any]:
        row = self._rows[number]
        found = row.get(field) if isinstance(row, dict) else None
        if not isinstance(found, list):
            raise ValueError(f"{self._at(number)}: it has no list {field!r}")
        return found

    def _field(self, row: dict[str, Any], known: tuple[str, ...]) -> str:
        found = next((field for field in known if field in row), None)
        if found is None:
            raise ValueError(
                f"{self._name} has the fields {sorted(row)} and none of {list(known)}: "
                "name document_field and summary_field"
            )
        return found

    def _at(self, number: int) -> str:
        return f"{self._name}, row {number + 1}"


def load_summaries(source: SummarySource, split: str) -> Summaries:
    """The examples of one split.

    Args:
        source: where they are.
        split: its name: one of the hub's dataset, or train, validation or test as the names of
            local files say; a file whose name says nothing is "train".

    Raises:
        ImportError: a dataset of the hub is wanted and `datasets` is not installed.
        ValueError: nothing there, no such split, a file that is not JSON lines, unknown fields, or
            a local row without its texts.
    """
    fields: Any = {"document_field": source.document_field, "summary_field": source.summary_field}
    if source.hub is not None:
        splits = load_hub_splits(source.hub, subset=source.hub_subset, revision=source.hub_revision)
        rows = splits[_known(split, splits, source.hub)]
        return Summaries(rows, name=source.hub, **fields)
    assert source.path is not None
    files = find_splits([Path(source.path)], rows_only=True)
    chosen = files[_known(SPLIT_NAMES.get(split, split), files, source.path)]
    rows = [row for _, path in chosen for row in _read_rows(path)]
    examples = Summaries(rows, name=source.path, **fields)
    for _ in examples:
        # A row that lacks something is found now, not in the middle of a run.
        pass
    return examples


def _known(split: str, splits: dict[str, Any], where: str) -> str:
    if split not in splits:
        raise ValueError(f"{where} has no split {split!r}; it has {sorted(splits)}")
    return split


def _read_rows(path: Path) -> list[Any]:
    if not is_rows(path):
        raise ValueError(f"{path} is not a {ROWS_SUFFIX} file: summaries are read from rows")
    return [row for _, row in json_rows(path)]
