"""Prompts and batches of summaries: what is shown, what is learned, and in which order."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from drt.data import byte_tokenizer
from drt.data.summaries import Summaries, SummaryData, SummaryExample
from drt.data.summary_batches import SummaryBatches, SummaryFormat

EOS = 257
DATA = SummaryData(path="unread", length=64, max_summary_tokens=20, marker=" => ")


def examples(sizes: list[tuple[int, int]]) -> Summaries:
    """Documents and summaries of these numbers of bytes, all different."""
    rows = [
        {"document": f"{n}:" + "d" * document, "summary": f"{n}." + "s" * summary}
        for n, (document, summary) in enumerate(sizes)
    ]
    return Summaries(rows, name="made")


def batches(found: Summaries, data: SummaryData = DATA, **kwargs: int) -> SummaryBatches:
    settings = {"batch_size": 2, "num_steps": 50, **kwargs}
    return SummaryBatches(data, byte_tokenizer(), examples=found, **settings)


def text(ids: torch.Tensor) -> str:
    """The text of some ids without padding and end."""
    return bytes(ids[ids < 256].tolist()).decode()


def test_a_batch_by_hand() -> None:
    made = batches(examples([(5, 3), (100, 40)]))[0]
    rows = {text(row)[0]: number for number, row in enumerate(made["input_ids"])}
    short, long = rows["0"], rows["1"]
    # The short one whole; of the long one 40 bytes of 102, since marker and summary take 4 and 20.
    wanted = {short: "0:ddddd =>  0.sss", long: "1:" + "d" * 38 + " =>  1." + "s" * 17}
    for row, shown in wanted.items():
        assert text(made["input_ids"][row]) == shown
    assert made["labels"][short].tolist() == [-100] * 11 + [*b" 0.sss", EOS] + [-100] * 46
    # Its summary is cut, so it has no end.
    assert made["labels"][long].tolist() == [-100] * 44 + [*(b" 1." + b"s" * 17)]
    assert made["attention_mask"].sum(1)[[short, long]].tolist() == [18, 64]
    assert made["chunk_ends"].nonzero().tolist() == sorted([[short, 10], [long, 43]])
    assert made["input_ids"].shape == (2, 64)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 30)), min_size=1, max_size=7),
    length=st.integers(25, 130),
    most=st.integers(1, 18),
    step=st.integers(0, 20),
    seed=st.integers(0, 3),
)
def test_rows_hold_the_start_of_a_document_and_learn_its_summary_alone(
    sizes: list[tuple[int, int]], length: int, most: int, step: int, seed: int
) -> None:
    data = SummaryData(path="unread", length=length, max_summary_tokens=most, marker=" => ")
    found = examples(sizes)
    made = batches(found, data, seed=seed, batch_size=3)[step]
    assert made["input_ids"].shape[1] == made["attention_mask"].sum(1).max() <= length
    for row in range(3):
        size = int(made["attention_mask"][row].sum())
        ids, labels = made["input_ids"][row], made["labels"][row]
        assert made["attention_mask"][row].tolist() == [1] * size + [0] * (len(ids) - size)
        (end,) = made["chunk_ends"][row].nonzero().flatten().tolist()
        shown = bytes(ids[: end + 1].tolist()).decode()
        example = found[int(shown.split(":")[0])]
        summary = f" {example.summaries[0]}".encode()
        learned = [*summary[:most]] if len(summary) > most else [*summary, EOS]
        assert ids[end + 1 : size].tolist() == labels[end + 1 : size].tolist() == learned
        assert (labels[: end + 1] == -100).all()
        assert (labels[size:] == -100).all()
        kept = shown.removesuffix(" => ")
        assert example.document.startswith(kept)
        # No more is left out than must be.
        assert kept == example.document or size == length


def test_every_example_once_an_epoch_in_another_order() -> None:
    found = examples([(3, 3)] * 10)
    made = batches(found, batch_size=4, num_steps=5, seed=3)
    order = [text(row)[0] for step in range(5) for row in made[step]["input_ids"]]
    assert Counter(order[:10]) == Counter(order[10:]) == Counter("0123456789")
    assert order[:10] != order[10:]
    other = batches(found, batch_size=4, num_steps=5, seed=4)
    assert [text(row)[0] for row in other[0]["input_ids"]] != order[:4]
    again = batches(found, batch_size=4, num_steps=5, seed=3)[4]
    assert all(torch.equal(again[key], value) for key, value in made[4].items())
    with pytest.raises(IndexError, match="step 5 is not among the 5"):
        made[5]


def test_each_of_several_summaries_is_learned_at_times() -> None:
    rows = [{"document": "d", "summaries": ["one", "two", "three"]}]
    made = batches(Summaries(rows, name="x"), batch_size=30)
    learned = Counter(text(row[row >= 0]).strip() for row in made[0]["labels"])
    # Each has a third of 30 rows; fewer than 2 would happen once in ten thousand seeds.
    assert set(learned) == {"one", "two", "three"}
    assert min(learned.values()) > 1


def test_the_query_stands_between_the_document_and_the_marker() -> None:
    rows = [{"document": "d" * 99, "queries": [{"query": "Who?", "answer": "She."}]}]
    made = batches(Summaries(rows, name="x"), batch_size=1)[0]
    assert text(made["input_ids"][0]) == "d" * 48 + "\n\nWho? =>  She."
    rows[0]["queries"][0]["query"] = "?" * 60
    with pytest.raises(ValueError, match=r"length is 64; .* \(66 tokens in all\) .* must be 87"):
        batches(Summaries(rows, name="x"))


def test_what_a_tokenizer_puts_before_a_text_opens_the_prompt() -> None:
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, ":": 4}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="b"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    data = SummaryData(path="unread", length=64, max_summary_tokens=20, marker=":", end="b")
    made = SummaryFormat(data, tokenizer)
    example = SummaryExample("x", "aba", None, ("a",))
    assert made.prompt(example).token_ids.tolist() == [0, 2, 3, 2, 4]
    shorter = made.prompt(example, length=3)
    assert (shorter.token_ids.tolist(), shorter.num_cut) == ([0, 2, 4], 2)
    assert made.end_id == 3
    with pytest.raises(ValueError, match=r"document 'x': query and marker are 1 tokens, .* of 1"):
        made.prompt(example, length=1)
    with pytest.raises(ValueError, match="end 'ab' is 2 tokens"):
        SummaryFormat(SummaryData(path="unread", end="ab"), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no end of text: give `end`"):
        SummaryFormat(SummaryData(path="unread"), tokenizer)


def test_numbers_out_of_range_are_refused() -> None:
    for name in ("batch_size", "num_steps"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be 1 or more"):
            batches(examples([(1, 1)]), **{name: 0})
