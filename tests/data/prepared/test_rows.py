"""Training rows: every token once an epoch, and the same row for the same index."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from drt import DRTForCausalLM
from drt.data import byte_tokenizer
from drt.data.prepared import CorpusConfig, PreparedSplit, TokenRows, find_sources, prepare
from drt.testing import tiny_config

CONFIG = CorpusConfig(tokenizer="bytes", shard_tokens=3000)


@pytest.fixture
def split(corpus: Path, tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast) -> PreparedSplit:
    prepare(CONFIG, bytes_tokenizer, find_sources(CONFIG, [corpus]), tmp_path / "out")
    return PreparedSplit(tmp_path / "out" / "train")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def spans(rows: TokenRows, epoch: int) -> list[tuple[int, int]]:
    first = epoch * rows.num_rows
    return sorted(rows.span(first + place) for place in range(rows.num_rows))


@pytest.mark.parametrize("length", [2, 37, 1000])
def test_packed_rows_tile_the_split_in_each_epoch(split: PreparedSplit, length: int) -> None:
    rows = TokenRows(split, length=length, num_epochs=6)
    assert rows.num_rows == split.num_tokens // length
    assert len(rows) == 6 * rows.num_rows
    starts = set()
    for epoch in range(6):
        found = spans(rows, epoch)
        assert all(one[1] == other[0] for one, other in pairwise(found))
        assert 0 <= found[0][0] < length
        assert found[-1][1] <= split.num_tokens
        starts.add(found[0][0])
    assert len(starts) > 1 or split.num_tokens % length == 0


def test_packed_rows_know_their_documents(split: PreparedSplit) -> None:
    rows = TokenRows(split, length=500, seed=3)
    wanted = split.tokens(0, split.num_tokens).astype(np.int64)
    ids = split.document_ids(0, split.num_tokens)
    borders = 0
    for index in range(len(rows)):
        start, stop = rows.span(index)
        row = rows[index]
        assert {each.dtype for each in row.values()} == {torch.int64}
        assert row["input_ids"].tolist() == wanted[start:stop].tolist()
        assert row["document_ids"].tolist() == ids[start:stop].tolist()
        first = np.flatnonzero(np.diff(ids[start:stop])) + 1
        expected = row["input_ids"].clone()
        expected[first] = -100
        assert torch.equal(row["labels"], expected)
        borders += len(first)
    assert borders > 10


def test_crossing_rows_are_packed_rows_without_borders(split: PreparedSplit) -> None:
    packed = TokenRows(split, length=500)
    crossing = TokenRows(split, length=500, documents="crossing")
    for index in range(len(packed)):
        row = crossing[index]
        assert row.keys() == {"input_ids", "labels"}
        assert torch.equal(row["input_ids"], packed[index]["input_ids"])
        assert torch.equal(row["labels"], row["input_ids"])


@pytest.mark.parametrize("last_piece", ["drop", "pad"])
@pytest.mark.parametrize("length", [2, 300, 401])
def test_rows_apart_hold_one_document_each(
    split: PreparedSplit, length: int, last_piece: Any
) -> None:
    rows = TokenRows(split, length=length, documents="apart", last_piece=last_piece)
    wanted = []
    for document in split.documents():
        pieces = [
            document.tokens[start : start + length].tolist()
            for start in range(0, len(document.tokens), length)
        ]
        least = 2 if last_piece == "pad" else length
        wanted += [piece for piece in pieces if len(piece) >= least]
    found = []
    for index in range(len(rows)):
        row = rows[index]
        mask = row.get("attention_mask", torch.ones(length, dtype=torch.int64))
        assert ("attention_mask" in row) == (last_piece == "pad")
        kept = row["input_ids"][mask.bool()].tolist()
        assert row["labels"].tolist() == kept + [-100] * (length - len(kept))
        found.append(kept)
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("documents", ["packed", "apart"])
def test_a_row_follows_from_seed_and_index_alone(split: PreparedSplit, documents: Any) -> None:
    one = TokenRows(split, length=100, seed=5, num_epochs=3, documents=documents)
    other = TokenRows(split.folder, length=100, seed=5, num_epochs=3, documents=documents)
    order = np.random.default_rng(0).permutation(len(one))
    taken = {int(index): other[int(index)] for index in order}
    assert all(same(one[index], taken[index]) for index in range(len(one)))
    first = [one.span(index) for index in range(one.num_rows)]
    for seed, epoch in ((6, 0), (5, 1)):
        rows = TokenRows(split, length=100, seed=seed, num_epochs=3, documents=documents)
        again = [rows.span(epoch * one.num_rows + index) for index in range(one.num_rows)]
        assert again != first
    # In the order of the split a step would go to the next row; that is chance here.
    steps = [other[0] - one[0] for one, other in pairwise(first)]
    assert np.mean([step == 100 for step in steps]) < 0.2


def test_workers_and_ranks_see_the_same_rows(split: PreparedSplit) -> None:
    rows = TokenRows(split, length=100, seed=1)
    wanted = [rows[index]["input_ids"].tolist() for index in range(len(rows))]
    loader = DataLoader(rows, batch_size=4, num_workers=1, multiprocessing_context="fork")
    found = [row for batch in loader for row in batch["input_ids"].tolist()]
    assert found == wanted
    ranks = [DataLoader(rows, batch_size=2, sampler=range(rank, 40, 2)) for rank in range(2)]
    together = [[row for batch in rank for row in batch["input_ids"].tolist()] for rank in ranks]
    assert [together[index % 2][index // 2] for index in range(40)] == wanted[:40]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"documents": "crossing"},
        {"documents": "apart"},
        {"documents": "apart", "last_piece": "pad"},
    ],
)
def test_the_model_takes_rows(split: PreparedSplit, kwargs: Any) -> None:
    rows = TokenRows(split, length=96, **kwargs)
    model = DRTForCausalLM(tiny_config(vocab_size=258))
    (batch,) = DataLoader(rows, batch_size=3, sampler=range(3))
    assert torch.isfinite(model(**batch).loss)


def test_a_document_is_predicted_as_if_it_were_alone(split: PreparedSplit) -> None:
    """Packing changes no loss: of a row with a border, the part behind it alone has the same."""
    rows = TokenRows(split, length=96)
    row = next(rows[n] for n in range(len(rows)) if (rows[n]["labels"][40:80] == -100).any())
    border = int(torch.nonzero(row["labels"] == -100)[-1])
    model = DRTForCausalLM(tiny_config(vocab_size=258)).eval()
    packed = model(**{key: each[None] for key, each in row.items()}, output_token_losses=True)
    alone = row["input_ids"][None, border:]
    wanted = model(alone, labels=alone, output_token_losses=True)
    # float32 sums of other lengths, of values below 10: 1e-5 is some hundred roundings.
    torch.testing.assert_close(
        packed.token_losses[:, border:], wanted.token_losses, atol=1e-5, rtol=0
    )
    assert packed.token_losses[0, border - 1] == 0


def test_arguments_out_of_range(split: PreparedSplit) -> None:
    for kwargs, match in (
        ({"length": 1}, "length is 1"),
        ({"length": 10**9}, "has no 1000000000 tokens for a row"),
        ({"length": 10**9, "documents": "apart"}, "no document is as long; last_piece 'pad' keeps"),
        ({"length": 10**6, "documents": "apart"}, r"for a row \(apart\)"),
        ({"length": 8, "documents": "mixed"}, "documents is 'mixed'"),
        ({"length": 8, "last_piece": "keep"}, "last_piece is 'keep'"),
        ({"length": 8, "last_piece": "pad"}, "'pad' is for documents 'apart', not 'packed'"),
        ({"length": 8, "num_epochs": 0}, "num_epochs is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            TokenRows(split, **kwargs)  # type: ignore[arg-type]
    rows = TokenRows(split, length=8)
    for index in (-1, len(rows)):
        with pytest.raises(IndexError, match="is not among the"):
            rows[index]


def read_books(path: Path, count: int) -> Iterator[str]:
    import json
    import lzma

    with lzma.open(path, "rt", encoding="utf-8") as file:
        for _, line in zip(range(count), file, strict=False):
            yield json.loads(line)["text"]


def test_real_books(real_data: Path, tmp_path: Path) -> None:
    """Nine books of PG-19: bytes in, the same bytes out, words as Python splits them."""
    books = list(read_books(real_data / "books" / "validation.jsonl.xz", 9))
    for number, book in enumerate(books):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.txt").write_text(book, encoding="utf-8")
    config = CorpusConfig(tokenizer="bytes", shard_tokens=1_000_000)
    prepare(config, byte_tokenizer(), find_sources(config, [tmp_path / "in"]), tmp_path / "out")
    split = PreparedSplit(tmp_path / "out" / "train")
    found = list(split.documents())
    assert [document.name for document in found] == [f"{n}.txt" for n in range(9)]
    for document, book in zip(found, books, strict=True):
        assert document.tokens.astype(np.uint8).tobytes() == book.encode()
        assert document.num_words == len(book.split())
    rows = TokenRows(split, length=4096)
    assert len(rows) == sum(len(book.encode()) for book in books) // 4096
    assert os.path.getsize(split.folder / "tokens.00000.bin") >= 2_000_000
