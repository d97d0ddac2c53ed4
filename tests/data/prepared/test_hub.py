"""Datasets of the hub: rows of what `datasets.load_dataset` returns, without a network."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from drt.data.prepared import CorpusConfig, PreparedSplit, find_sources, prepare
from drt.data.prepared.format import Position
from drt.data.prepared.hub import HubSource


class Rows(list):
    """What is used of `datasets.Dataset`."""

    column_names = ("title", "body")


def fake(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_the_splits_of_a_dataset_are_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> dict[str, Rows]:
        asked.append((args, kwargs))
        rows = [{"title": "A", "body": "one"}, {"title": None, "body": "two"}]
        return {"train": Rows(rows), "dev": Rows(rows[:1])}

    fake(monkeypatch, load)
    config = CorpusConfig(
        tokenizer="bytes",
        hub="some/set",
        hub_subset="small",
        hub_revision="v1",
        text_field="body",
        name_field="title",
    )
    prepare(config, bytes_tokenizer, find_sources(config, []), tmp_path)
    assert asked == [(("some/set", "small"), {"revision": "v1", "data_files": None})]
    found = [
        (d.name, bytes(d.tokens.tolist())) for d in PreparedSplit(tmp_path / "train").documents()
    ]
    assert found == [("A", b"one"), ("2", b"two")]
    assert PreparedSplit(tmp_path / "dev").num_documents == 1
    # As many rows of as many columns, but other ones.
    for other in ({"hub_subset": "large"}, {"hub_revision": "v2"}):
        changed = replace(config, **other)
        with pytest.raises(ValueError, match="holds another corpus: its source is"):
            prepare(changed, bytes_tokenizer, find_sources(changed, []), tmp_path)


def test_reading_begins_at_any_row() -> None:
    source = HubSource(
        Rows([{"title": str(n), "body": f"text {n}"} for n in range(5)]), "x", text_field="body"
    )
    assert [piece.text for piece in source.read(Position(0, 3))] == ["text 3", "text 4"]
    assert source.done == 5


def test_what_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported")

    fake(monkeypatch, load)
    with pytest.raises(ValueError, match="cannot load 'x': RuntimeError: Dataset scripts"):
        find_sources(CorpusConfig(hub="x"), [])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'drt-lm\[data\]'"):
        find_sources(CorpusConfig(hub="x"), [])
    with pytest.raises(ValueError, match="x has no column 'text'; it has"):
        HubSource(Rows(), "x")
    source = HubSource(Rows([{"body": None}]), "x", text_field="body")
    with pytest.raises(ValueError, match="x, row 1: the row has no string 'body'"):
        list(source.read())


def test_the_package_itself_loads_local_files(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bytes_tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
) -> None:
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    config = CorpusConfig(
        tokenizer="bytes", hub="json", hub_files={"train": str(tmp_path / "rows.jsonl")}
    )
    prepare(config, bytes_tokenizer, find_sources(config, []), tmp_path / "out")
    found = PreparedSplit(tmp_path / "out" / "train")
    wanted = {str(n): text.encode() for n, text in enumerate(texts) if text}
    assert {d.name: bytes(d.tokens.tolist()) for d in found.documents()} == wanted
