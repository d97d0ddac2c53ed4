"""Perplexity by context length, with the same targets, and by position: counted by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drt import DRTForCausalLM
from drt.checkpoints import Checkpoint
from drt.data.prepared import PreparedSplit
from drt.data.tokenization import byte_tokenizer
from drt.evaluation.document_losses import paired_difference
from drt.evaluation.perplexity import PerplexityTask
from drt.run_config import build
from drt.testing import tiny_config

from .conftest import TEXT, Bigram, Prepare

# Sums of float32 losses in another order, and through other operators of the same model.
CLOSE = {"rel": 2e-5}


def checkpoint(model: Any, tokenizer: Any = None) -> Checkpoint:
    return Checkpoint(Path("model"), model, tokenizer or byte_tokenizer(), "float32")


def evaluate(split: PreparedSplit, model: Any, **settings: Any) -> dict[str, Any]:
    task = build(PerplexityTask, {"data": str(split.folder), **settings})
    record = task.evaluate(checkpoint(model), title="test")
    assert json.loads(json.dumps(record)) == record
    return record


@pytest.fixture(scope="module")
def drt() -> DRTForCausalLM:
    torch.manual_seed(1)
    return DRTForCausalLM(tiny_config(vocab_size=258)).eval()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def whole_losses(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Losses of all tokens but the first in one forward: float64 from the model's own logits."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        scores = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
    return -scores.gather(1, ids[1:, None])[:, 0].numpy()


def test_segments_by_hand(make_split: Prepare) -> None:
    # After a comes b with probability 1/2, after b comes a space with 1/4, and so on.
    logits = torch.full((258, 258), -1e4)
    for before, after, share in ("ab2", "b 4", " a8", "aa2", "bb4", "  8"):
        logits[ord(before), ord(after)] = -math.log(int(share))
    # The rest of each row's probability.
    logits[:, 257] = torch.log1p(-logits[:, :257].exp().sum(-1))
    split = make_split(["ab ab", "ab"])
    record = evaluate(split, Bigram(logits), lengths=[4])
    (row,) = record["rows"]
    # Windows ab_a, b and ab: scored are b, space and a, nothing, and b.
    assert row["num_tokens"] == 4
    assert row["nats"] == pytest.approx(math.log(2 * 4 * 8 * 2), rel=1e-6)
    assert row["perplexity"] == pytest.approx(128 ** (1 / 4), rel=1e-6)
    # The only word that begins in a scored token is the second of the first text.
    assert (row["num_words"], row["num_bytes"]) == (1, 4)
    assert row["perplexity_per_word"] == pytest.approx(128, rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(7 / 4, rel=1e-6)
    assert (row["num_windows"], row["num_full_windows"]) == (2, 1)
    assert row["by_document"]["tokens"] == [3, 1]
    assert row["not_scored"] == {"documents": 0, "tokens": 3}


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_segments(make_split: Prepare, bigram: Bigram, batch_tokens: int) -> None:
    texts = [TEXT * 3, TEXT[5:60], "z", TEXT[::-1] * 2]
    split = make_split(texts)
    settings = {"lengths": [7, 64], "batch_tokens": batch_tokens, "segment_size": 5}
    record = evaluate(split, bigram, **settings)
    for row, length in zip(record["rows"], (7, 64), strict=True):
        nats, scored, words = [], [], 0
        for text in texts:
            data = np.frombuffer(text.encode(), np.uint8)
            parts = [data[start : start + length] for start in range(0, len(data), length)]
            losses = [bigram.nats(part) for part in parts]
            if len(data) > 1:
                nats.append(sum(each.sum() for each in losses))
                scored.append(sum(len(each) for each in losses))
            starts = [len(text[:n].encode()) for n, _ in word_starts(text)]
            words += sum(start % length != 0 for start in starts)
        assert row["by_document"]["nats"] == pytest.approx(nats, **CLOSE)
        assert row["by_document"]["tokens"] == scored
        assert row["num_bytes"] == row["num_tokens"] == sum(scored)
        assert row["num_words"] == words
        assert row["perplexity"] == pytest.approx(math.exp(sum(nats) / sum(scored)), **CLOSE)
        assert row["not_scored"]["documents"] == 1
        low, high = row["perplexity_interval"]
        assert low < row["perplexity"] < high


def word_starts(text: str) -> list[tuple[int, str]]:
    pairs = enumerate(zip(" " + text, text, strict=False))
    return [(n, c) for n, (before, c) in pairs if before.isspace() and not c.isspace()]


@pytest.mark.parametrize("kind", ["drt", "llama"])
def test_sliding_windows_against_brute_force(
    make_split: Prepare, request: pytest.FixtureRequest, kind: str
) -> None:
    model = request.getfixturevalue(kind)
    split = make_split([TEXT * 2, TEXT[:50], TEXT[::-1] * 2])
    settings = {"mode": "sliding", "lengths": [32, 128], "stride": 16, "max_targets": 5}
    record = evaluate(split, model, **settings)
    one_by_one = evaluate(split, model, **settings, batch_tokens=1, segment_size=24)
    short, long = record["rows"]
    # Two documents have 128 tokens or more, and the last of five stretches is the second's.
    assert short["by_document"]["documents"] == [0, 2]
    assert short["num_tokens"] == long["num_tokens"] == 80
    assert short["by_document"]["tokens"] == long["by_document"]["tokens"]
    assert short["scored_sha256"] == long["scored_sha256"]
    for row, other, length in zip(record["rows"], one_by_one["rows"], (32, 128), strict=True):
        for place, number in enumerate((0, 2)):
            tokens = split.document(number).tokens
            room = (len(tokens) - 112) // 16
            count = row["by_document"]["tokens"][place] // 16
            chosen = [(2 * n + 1) * room // (2 * count) for n in range(count)]
            stops = [128 + 16 * n for n in chosen]
            wanted = sum(
                whole_losses(model, tokens[stop - length : stop])[-16:].sum() for stop in stops
            )
            assert row["by_document"]["nats"][place] == pytest.approx(wanted, **CLOSE)
        assert other["by_document"]["nats"] == pytest.approx(row["by_document"]["nats"], **CLOSE)
    assert short["nats"] != pytest.approx(long["nats"], rel=1e-3)
    ratio = long["perplexity"] / short["perplexity"]
    assert (short["ratio_to_shortest"], long["ratio_to_shortest"]) == pytest.approx((1, ratio))


@pytest.mark.parametrize("kind", ["drt", "llama", "bigram"])
def test_books_by_position(make_split: Prepare, request: pytest.FixtureRequest, kind: str) -> None:
    model = request.getfixturevalue(kind)
    split = make_split([TEXT * 2, TEXT[:50], TEXT[:30]])
    settings = {"mode": "book", "first_bucket": 32, "segment_size": 20}
    record = evaluate(split, model, **settings, max_document_tokens=200)
    rows = record["rows"]
    assert [row["label"] for row in rows] == ["0-32", "32-64", "64-128", "128-256"]
    assert [row["num_documents"] for row in rows] == [3, 2, 1, 1]
    for row in rows:
        first, end = row["from"], row["to"]
        nats, count = 0.0, 0
        for document in split.documents():
            # Position p is predicted from the p tokens before it.
            losses = whole_losses(model, document.tokens[:200])[max(first - 1, 0) : end - 1]
            nats, count = nats + losses.sum(), count + len(losses)
        assert row["num_tokens"] == row["num_bytes"] == count
        assert row["nats"] == pytest.approx(nats, **CLOSE)
    overall = record["overall"]
    assert overall["nats"] == pytest.approx(sum(row["nats"] for row in rows))
    assert overall["num_tokens"] == sum(row["num_tokens"] for row in rows)
    assert overall["num_words"] == sum(row["num_words"] for row in rows)
    assert overall["not_scored"]["documents"] == 0


def test_whole_documents_have_the_counts_of_the_manifest(
    make_split: Prepare, byte_bpe: PreTrainedTokenizerFast
) -> None:
    texts = ["\n" + TEXT, " " + TEXT[::-1]]
    split = make_split(texts, byte_bpe, end_of_text=True)
    model = Bigram(torch.zeros(300, 300))
    longest = int(split.document_lengths().max())
    task = PerplexityTask(data=str(split.folder), lengths=[longest])
    (row,) = task.evaluate(checkpoint(model, byte_bpe), title="")["rows"]
    # The first token of each, white space, is not scored; the end of the text is.
    assert row["num_words"] == sum(document.num_words for document in split.documents())
    assert row["num_tokens"] == split.num_tokens - 2
    assert row["perplexity"] == pytest.approx(300, rel=1e-6)
    firsts = [byte_bpe.decode(document.tokens[:1]) for document in split.documents()]
    num_bytes = sum(document.num_bytes for document in split.documents())
    assert row["num_bytes"] == num_bytes - sum(len(first) for first in firsts)


def test_two_models_on_the_same_tokens(make_split: Prepare, bigram: Bigram) -> None:
    split = make_split([TEXT[n:] * 2 for n in range(8)])
    better = Bigram(bigram.table.detach().clone())
    with torch.no_grad():
        # Of every pair of letters in the text a little more.
        for before, after in zip(TEXT.encode(), TEXT.encode()[1:], strict=False):
            better.table[before, after] += 0.3
    settings = {"mode": "sliding", "lengths": [16, 32]}
    a, b = (evaluate(split, model, **settings) for model in (better, bigram))
    pairs = paired_difference(a, b)
    for pair, row_a, row_b in zip(pairs, a["rows"], b["rows"], strict=True):
        assert pair["ratio"] == pytest.approx(row_a["perplexity"] / row_b["perplexity"])
        assert pair["interval"][0] <= pair["ratio"] <= pair["interval"][1] < 1
    # A bigram has no use for more context.
    assert a["rows"][1]["ratio_to_shortest"] == pytest.approx(1)
    assert a["rows"][1]["ratio_to_shortest_interval"] == pytest.approx([1, 1])
    assert "1.000 (1.000-1.000)" in PerplexityTask.table({"a": a})
    longer = evaluate(split, bigram, mode="sliding", lengths=[16, 64])
    with pytest.raises(ValueError, match="16 and 16 score other tokens"):
        paired_difference(a, longer)
    # Told of the longer one, a model that is read at fewer lengths scores the same tokens.
    fewer = evaluate(split, better, mode="sliding", lengths=[16], longest_length=64, stride=8)
    (pair,) = paired_difference(fewer, longer)
    assert pair["label"] == "16"
    assert 0 < pair["ratio"] < 1


def test_nothing_is_read_before_all_lengths_are_seen_to_fit(
    make_split: Prepare, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = make_split(["x" * 600, "y" * 30])

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(llama, "forward", read)
    for settings in (
        {"lengths": [16, 600]},
        {"mode": "sliding", "lengths": [16, 600]},
        {"mode": "book"},
    ):
        with pytest.raises(ValueError, match=r"has 512 positions .* 600 tokens need more"):
            evaluate(split, llama, **settings)


def test_a_table_of_models(make_split: Prepare, bigram: Bigram) -> None:
    split = make_split([TEXT, TEXT * 2])
    one = evaluate(split, bigram, lengths=[64])
    two = evaluate(split, bigram, lengths=[32, 64])
    book = evaluate(split, bigram, mode="book", first_bucket=128)
    lines = PerplexityTask.table({"one": one, "two": two, "book": book}).splitlines()
    assert lines[0] == "segmented, perplexity a token, 95 % interval"
    assert lines[1].split() == ["model", "64", "32"]
    assert lines[3].split()[0] == "one"
    assert lines[3].split()[1] == f"{one['rows'][0]['perplexity']:.3f}"
    assert lines[3].split()[-1] == "-"
    assert lines[4].split()[1] == lines[3].split()[1]
    assert "book, bits a byte" in lines
    one["rows"][0]["perplexity_per_word"] = 1.5e9
    assert PerplexityTask.table({"one": one}).splitlines()[8].split() == ["one", "1.500e+09"]
    assert any(line.split()[-1:] == ["overall"] for line in lines)


@pytest.mark.parametrize("settings", [{"lengths": [32, 64]}, {"mode": "book", "first_bucket": 32}])
def test_a_figure_of_models(
    make_split: Prepare, bigram: Bigram, tmp_path: Path, settings: dict[str, Any]
) -> None:
    split = make_split([TEXT, TEXT * 2])
    records = {"a": evaluate(split, bigram, **settings), "b": evaluate(split, bigram, **settings)}
    PerplexityTask.draw(records, tmp_path / "perplexity.png")
    assert (tmp_path / "perplexity.png").stat().st_size > 5_000


def test_errors(
    make_split: Prepare, bigram: Bigram, llama: Any, byte_bpe: PreTrainedTokenizerFast
) -> None:
    split = make_split(["x" * 600, "y" * 30])
    for settings in ({"mode": "sliding"}, {}):
        with pytest.raises(ValueError, match=r"1,024 tokens of one document .* has 600"):
            evaluate(split, bigram, **settings)
    with pytest.raises(ValueError, match="was prepared with another tokenizer"):
        PerplexityTask(data=str(split.folder)).evaluate(checkpoint(bigram, byte_bpe), title="")
    for batch_tokens in (1, 1024):
        with pytest.raises(ValueError, match=r"has 512 positions .* 600 tokens need more"):
            evaluate(split, llama, lengths=[600], batch_tokens=batch_tokens)
    assert evaluate(split, llama, lengths=[600], beyond_limit=True)["rows"][0]["num_tokens"] == 628
    for settings, match in (
        ({"lengths": []}, "lengths must be of at least 2 tokens"),
        ({"lengths": [64, 1]}, "lengths must be of at least 2 tokens"),
        ({"lengths": [0]}, "lengths must be at least 1"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"stride": 8}, "stride is 8, which mode segmented does not read: it is of mode sliding"),
        ({"mode": "sliding", "stride": 64, "lengths": [64]}, "stride is 64: it must be below"),
        ({"mode": "sliding", "max_tokens": 64}, "max_tokens is 64, .* mode segmented and book"),
        ({"longest_length": 2048}, "longest_length is 2048, which mode segmented does not read"),
        ({"mode": "book", "lengths": [64]}, r"lengths is \[64\], which mode book does not read"),
        ({"max_targets": 9}, "max_targets is 9, .*: it is of mode sliding"),
        ({"first_bucket": 9}, "first_bucket is 9, .*: it is of mode book"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"mode": "sliding", "longest_length": 512}, "at least the longest of lengths, 1024"),
        ({"mode": "book", "first_bucket": 1}, "first_bucket must be at least 2"),
        ({"mode": "chapter"}, "mode must be one of"),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate(split, bigram, **settings)
