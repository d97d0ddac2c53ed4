import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drt.data import SPLITS, Corpus, Document, byte_tokenizer
from drt.data.corpora import MIN_SPLIT_TOKENS, split_documents

BYTES = byte_tokenizer()


def constant_documents(lengths: list[int]) -> list[Document]:
    """Documents whose every token is their number."""
    return [
        Document(name=f"d{number}", tokens=np.full(length, number, dtype=np.uint16))
        for number, length in enumerate(lengths)
    ]


def names(documents: tuple[Document, ...]) -> list[str]:
    return [document.name for document in documents]


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0


def test_one_document_in_twenty_is_held_out_by_its_name() -> None:
    splits = split_documents(constant_documents([MIN_SPLIT_TOKENS] * 400))
    held_out = [f"d{number}" for number in range(400) if is_held_out(f"d{number}")]
    assert names(splits["held_out"]) == sorted(held_out)
    # 400 draws at 1/20: 20 expected with a standard deviation of 4.4; 5 deviations are 22.
    assert 0 < len(held_out) < 42


@given(st.permutations(range(60)), st.integers(0, 60))
def test_split_depends_on_names_alone(order: list[int], num_missing: int) -> None:
    documents = constant_documents([MIN_SPLIT_TOKENS] * 60)
    splits = split_documents(documents)
    assert set(names(splits["train"])).isdisjoint(names(splits["held_out"]))
    assert sorted(names(splits["train"] + splits["held_out"])) == sorted(names(tuple(documents)))
    kept = [documents[number] for number in order[num_missing:]]
    if not any(is_held_out(document.name) for document in kept) or len(kept) < 10:
        return
    again = split_documents(kept)
    for split in SPLITS:
        assert set(names(again[split])) <= set(names(splits[split]))


def test_held_out_split_grows_until_it_is_large_enough() -> None:
    splits = split_documents(constant_documents([100] * 60))
    by_digest = sorted(
        (f"d{number}" for number in range(60)),
        key=lambda name: hashlib.sha256(name.encode()).hexdigest(),
    )
    held_out = names(splits["held_out"])
    assert len(held_out) == -(-MIN_SPLIT_TOKENS // 100)
    extra = [name for name in by_digest if name in held_out and not is_held_out(name)]
    assert extra == [name for name in by_digest if not is_held_out(name)][: len(extra)]


@pytest.mark.parametrize("lengths", [[10_000], [100, 9_000], [5_300, 9]])
def test_few_documents_are_cut_and_their_ends_held_out(lengths: list[int]) -> None:
    documents = [
        Document(name=f"d{number}", tokens=np.arange(length))
        for number, length in enumerate(lengths)
    ]
    splits = split_documents(documents)
    for number, length in enumerate(lengths):
        name = f"d{number}"
        parts = [
            document.tokens
            for split in SPLITS
            for document in splits[split]
            if document.name == name
        ]
        assert np.concatenate(parts).tolist() == list(range(length))
        assert len(parts[0]) == round(0.9 * length)


def test_too_little_text_is_refused() -> None:
    match = r"1 documents with 2000 tokens leave 200 tokens for the held_out split, which needs 512"
    with pytest.raises(ValueError, match=match):
        split_documents(constant_documents([2000]))
    with pytest.raises(ValueError, match="0 documents with 0 tokens"):
        split_documents(constant_documents([0]))


def test_two_documents_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="2 documents have only 1 different names"):
        split_documents(constant_documents([600])[:1] * 2)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 3000), st.integers(0))
def test_haystack_is_made_of_runs_of_its_split(
    lengths: list[int], num_tokens: int, seed: int
) -> None:
    # A document's tokens count on from 1000 times its number.
    documents = [
        Document(name=f"d{number}", tokens=np.arange(length + 20) + 1000 * number)
        for number, length in enumerate(lengths)
    ]
    corpus = Corpus(documents, BYTES, min_split_tokens=1)
    for split in SPLITS:
        haystack = corpus.haystack(np.random.default_rng(seed), num_tokens, split)
        assert haystack.dtype == np.int64
        assert haystack.shape == (num_tokens,)
        own = {
            int(token): document
            for document in corpus.documents(split)
            for token in document.tokens
        }
        assert set(haystack.tolist()) <= set(own)
        for before, after in pairwise(haystack):
            ended = int(before) == own[int(before)].tokens[-1]
            assert ended or after == before + 1


def test_haystack_uses_every_document_before_any_again(rng: np.random.Generator) -> None:
    corpus = Corpus(constant_documents([1] * 100), BYTES, min_split_tokens=1)
    count = corpus.num_tokens("train")
    haystack = corpus.haystack(rng, 3 * count, "train").reshape(3, count)
    for once in haystack:
        assert sorted(once) == sorted(document.tokens[0] for document in corpus.documents("train"))
    assert not (haystack[0] == haystack[1]).all()


def test_short_haystacks_draw_documents_by_length(rng: np.random.Generator) -> None:
    corpus = Corpus(constant_documents([300, 2700, 600]), BYTES, min_split_tokens=1)
    lengths = {int(each.tokens[0]): len(each.tokens) for each in corpus.documents("train")}
    drawn = np.array([corpus.haystack(rng, 1, "train")[0] for _ in range(2000)])
    for number, length in lengths.items():
        share = length / corpus.num_tokens("train")
        # Five standard deviations of a share of 2,000 draws.
        assert abs((drawn == number).mean() - share) < 5 * (share * (1 - share) / 2000) ** 0.5


def test_short_haystacks_start_anywhere_in_a_document(rng: np.random.Generator) -> None:
    document = Document(name="one", tokens=np.arange(1000))
    corpus = Corpus([document], BYTES, min_split_tokens=1)
    starts = [corpus.haystack(rng, 1, "train")[0] for _ in range(900)]
    # Tenths of 900 even draws: 90 expected with a standard deviation of 9; 5 deviations are 45.
    assert (abs(np.histogram(starts, bins=10, range=(0, 900))[0] - 90) < 45).all()


def test_haystack_may_exceed_its_split(byte_corpus: Corpus, rng: np.random.Generator) -> None:
    num_tokens = 2**20
    assert byte_corpus.num_tokens("held_out") < num_tokens / 50
    haystack = byte_corpus.haystack(rng, num_tokens, "held_out")
    assert len(haystack) == num_tokens
    # The same documents come again from other starts: no period.
    size = byte_corpus.num_tokens("held_out")
    assert not (haystack[:size] == haystack[size : 2 * size]).all()


def test_haystack_follows_from_its_generator(byte_corpus: Corpus) -> None:
    one, same, other = (
        byte_corpus.haystack(np.random.default_rng(seed), 5000, "train") for seed in (1, 1, 2)
    )
    assert (one == same).all()
    assert not (one == other).all()


def test_wrong_arguments_of_haystack_are_refused(
    byte_corpus: Corpus, rng: np.random.Generator
) -> None:
    with pytest.raises(ValueError, match="num_tokens is -1"):
        byte_corpus.haystack(rng, -1, "train")
    with pytest.raises(ValueError, match="split is 'test'"):
        byte_corpus.haystack(rng, 1, "test")
