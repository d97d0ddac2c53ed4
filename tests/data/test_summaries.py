"""Documents and summaries: every form of rows, where they come from, and what is refused."""

import json
import lzma
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drt.data.summaries import Summaries, SummaryData, SummaryExample, load_summaries

PLAIN = {"id": "a", "document": "Long text.", "summary": "Short."}
SEVERAL = {"id": 7, "document": "Long text.", "summaries": ["Short.", "Brief."]}
QUESTIONS = {
    "document": "A story.",
    "questions": [
        {"question": "Who?", "summaries": ["She.", "A woman."]},
        {"question": "Where?", "summaries": ["There."]},
    ],
}
QUERIES = {"id": "m", "document": "B: hm", "queries": [{"query": "What?", "answer": "Nothing."}]}
NEWS = {"id": "n", "article": "News.", "highlights": "One .\nTwo ."}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (PLAIN, [SummaryExample("a", "Long text.", None, ("Short.",))]),
        (SEVERAL, [SummaryExample("7", "Long text.", None, ("Short.", "Brief."))]),
        (
            QUESTIONS,
            [
                SummaryExample("1", "A story.", "Who?", ("She.", "A woman.")),
                SummaryExample("1", "A story.", "Where?", ("There.",)),
            ],
        ),
        (QUERIES, [SummaryExample("m", "B: hm", "What?", ("Nothing.",))]),
        (NEWS, [SummaryExample("n", "News.", None, ("One .\nTwo .",))]),
    ],
)
def test_each_known_form_of_rows(row: dict[str, Any], wanted: list[SummaryExample]) -> None:
    assert list(Summaries([row], name="x")) == wanted


def test_examples_of_many_rows_are_counted_and_indexed() -> None:
    found = Summaries([QUESTIONS, {**QUESTIONS, "questions": []}, QUESTIONS], name="x")
    assert [example.document_name for example in found] == ["1", "1", "3", "3"]
    assert found[-1] == found[3]
    assert found[1:3] == [found[1], found[2]]
    assert list(found.queries) == ["Who?", "Where?"] * 2
    with pytest.raises(IndexError, match="example 4 is not among the 4"):
        found[4]


def test_fields_may_be_named() -> None:
    row = {"body": "Long.", "gist": ["a", "b"], "queries": "none of this"}
    (found,) = Summaries([row], name="x", document_field="body", summary_field="gist")
    assert found == SummaryExample("1", "Long.", None, ("a", "b"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "x has no rows"),
        (["text"], "x, row 1: the row is a str, not an object"),
        ([{"text": "t"}], r"x has the fields \['text'\] and none of \['document', 'article'\]"),
        ([{"document": "t"}], "none of .*'summary', 'summaries', 'highlights'"),
        ([PLAIN, {"document": "t", "summary": []}], "x, row 2: it has no text or list 'summary'"),
        ([PLAIN, {"document": "t", "summary": [1]}], "x, row 2: 'summary' holds something but"),
        ([PLAIN, {"document": None, "summary": "s"}], "x, row 2: it has no text 'document'"),
        ([QUESTIONS, PLAIN], "x, row 2: it has no list 'questions'"),
        ([{**QUESTIONS, "questions": [{}]}], "x, row 1: it has no text 'question'"),
        ([{**QUESTIONS, "questions": []}] * 2, "x has rows but nothing in their questions"),
    ],
)
def test_rows_that_are_no_examples_are_named(rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(Summaries(rows, name="x"))


def write(path: Path, rows: list[Any]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


def test_the_splits_of_a_folder_and_a_single_file(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl.xz", [PLAIN, PLAIN])
    write(folder / "val.jsonl", [NEWS])
    data = SummaryData(path=str(folder))
    assert len(load_summaries(data, "train")) == 2
    assert load_summaries(data, "validation")[0].document == "News."
    assert load_summaries(data, "val")[0].document == "News."
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'validation'\]"):
        load_summaries(data, "test")
    # What describes the rows is none of them.
    (folder / "README.md").write_text("A set.")
    assert len(load_summaries(data, "train")) == 2
    write(folder / "test.jsonl", [NEWS, {**NEWS, "highlights": None}])
    with pytest.raises(ValueError, match="row 2: it has no text or list 'highlights'"):
        load_summaries(data, "test")
    alone = SummaryData(path=str(write(tmp_path / "mine.jsonl", [SEVERAL])))
    assert load_summaries(alone, "train")[0].summaries == ("Short.", "Brief.")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    cases = {"a.txt": b"text", "b.jsonl": b"{", "c.jsonl.xz": lzma.compress(b"{}\n" * 99)[:-9]}
    wanted = ["is not a .jsonl file", "does not hold a JSON object a line", "not a whole xz file"]
    for (name, data), message in zip(cases.items(), wanted, strict=True):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} .*{message}|{name} {message}"):
            load_summaries(SummaryData(path=str(tmp_path / name)), "train")


class Rows(list):
    """What is used of `datasets.Dataset`; notes which rows are looked at."""

    def __init__(self, rows: list[Any]) -> None:
        super().__init__(rows)
        self.seen: list[Any] = []

    def __getitem__(self, index: Any) -> Any:
        self.seen.append(index)
        return super().__getitem__(index)


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    rows = Rows([{**NEWS, "id": str(number)} for number in range(1000)])

    def load(*args: Any, **kwargs: Any) -> dict[str, Any]:
        asked.append((args, kwargs))
        return {"train": rows, "test": Rows([NEWS])}

    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = SummaryData(hub="some/news", hub_subset="3.0.0", hub_revision="main")
    found = load_summaries(data, "train")
    assert asked == [(("some/news", "3.0.0"), {"revision": "main", "data_files": None})]
    assert (len(found), found[500].document_name) == (1000, "500")
    # A dataset of a gigabyte is not gone through to learn one example.
    assert set(rows.seen) == {0, 500}
    with pytest.raises(ValueError, match=r"no split 'val'; it has \['test', 'train'\]"):
        load_summaries(data, "val")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one of path and hub must be given, got path None and hub None"),
        ({"path": "a", "hub": "b"}, "one of path and hub must be given"),
        ({"path": "a", "hub_subset": "x"}, "hub_subset and hub_revision need hub"),
        ({"path": "a", "marker": ""}, "marker is empty"),
        ({"path": "a", "max_summary_tokens": 0}, "max_summary_tokens is 0; it must be 1 or more"),
        ({"path": "a", "length": 66, "max_summary_tokens": 65}, "length 66 it must be 64 or less"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SummaryData(**fields)


def test_the_real_sets(real_data: Path) -> None:
    sizes = {"proposals": 159, "scitldr": 618, "squality": 52 * 5, "qmsum": 281}
    for name, size in sizes.items():
        found = load_summaries(SummaryData(path=str(real_data / "summarization" / name)), "test")
        assert len(found) == size
        assert all(example.document and all(example.summaries) for example in found)
