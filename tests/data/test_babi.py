"""Stories in haystacks: facts in order between sentences, and an answer that follows from them."""

import json
import lzma
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drt.data import BabiStories, Corpus, batch, load_corpus, load_tokenizer
from drt.data.babi import encode_stories, load_stories, scatter
from drt.data.reading import json_rows

PLACES = ("garden", "kitchen", "office", "hallway")
BOTH = [1, 2]
PEOPLE = ("Mary", "John", "Sandra")
ROW = {"seed": 0, "index": 0, "length": 1024, "chunk_size": 32}
MOVED = re.compile(r" (Mary|John|Sandra) went to the (\w+)\.")
ASKED = re.compile(r" Question: Where is (\w+)\? Answer:")


def moves(rng: np.random.Generator, num_facts: int) -> dict[str, Any]:
    """A story of people who move; of task 1, or of task 2 if it is long."""
    facts = [(str(rng.choice(PEOPLE)), str(rng.choice(PLACES))) for _ in range(num_facts)]
    asked = str(rng.choice([person for person, _ in facts]))
    last = max(number for number, (person, _) in enumerate(facts) if person == asked)
    return {
        "task": 1 if num_facts < 5 else 2,
        "facts": [f"{person} went to the {place}." for person, place in facts],
        "question": f"Where is {asked}?",
        "answer": facts[last][1],
        "supporting": [last],
    }


@pytest.fixture(scope="session")
def stories_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    rows = [moves(rng, 1 + number % 9) for number in range(90)]
    path = tmp_path_factory.mktemp("babi") / "stories.jsonl.xz"
    with lzma.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def where_is(text: str, person: str) -> str:
    """The place that the last fact about a person names."""
    return [place for name, place in MOVED.findall(text) if name == person][-1]


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 300))
@settings(max_examples=40)
def test_training_rows_can_be_solved(
    byte_corpus: Corpus, bpe_corpus: Corpus, stories_file: str, seed: int, index: int, spare: int
) -> None:
    for corpus in (byte_corpus, bpe_corpus):
        row = BabiStories(stories_file, tasks=BOTH).training_row(
            corpus, seed=seed, index=index, length=600 + spare, chunk_size=32
        )
        assert row.input_ids.shape == row.answer_mask.shape == (600 + spare,)
        (question,) = row.questions
        start, end = question.question_span
        assert end % 32 == 0
        decode = corpus.tokenizer.decode
        asked = ASKED.fullmatch(decode(row.input_ids[start:end]))
        assert asked is not None
        answer = decode(row.input_ids[row.answer_mask])
        assert answer == decode(row.input_ids[slice(*question.answer_span)])
        assert answer == " " + where_is(decode(row.input_ids[:start]), asked[1])
        (support,) = [decode(row.input_ids[slice(*span)]) for span in question.fact_spans]
        assert MOVED.fullmatch(support)
        assert where_is(support, asked[1]) == answer.strip()


@given(st.integers(0, 2**40), st.integers(0, 200), st.sampled_from([32, 57]), st.integers(0, 9))
@settings(max_examples=40)
def test_examples_can_be_solved(
    byte_corpus: Corpus,
    bpe_corpus: Corpus,
    stories_file: str,
    seed: int,
    index: int,
    chunk: int,
    more: int,
) -> None:
    for corpus in (byte_corpus, bpe_corpus):
        length = (-(-600 // chunk) + more) * chunk
        example = BabiStories(stories_file, tasks=[2]).evaluation_example(
            corpus, seed=seed, index=index, length=length, chunk_size=chunk
        )
        (question,) = example.questions
        assert len(example.context_ids) + len(question.input_ids) == length
        assert len(example.context_ids) % chunk == 0
        decode = corpus.tokenizer.decode
        context = decode(example.context_ids)
        assert len(MOVED.findall(context)) >= 5
        asked = ASKED.search(decode(question.input_ids))
        assert asked is not None
        assert asked.end() == len(decode(question.input_ids))
        assert decode(question.answer_ids) == " " + where_is(context, asked[1])
        chunks = question.needle_chunks
        held = example.context_ids[chunks[0] * chunk : (chunks[-1] + 1) * chunk]
        assert (asked[1], decode(question.answer_ids).strip()) in MOVED.findall(decode(held))


def test_facts_keep_their_order_and_stand_between_sentences(
    byte_corpus: Corpus, stories_file: str
) -> None:
    stories = encode_stories(load_stories(stories_file), byte_corpus.tokenizer)
    told = {tuple(bytes(fact.tolist()).decode() for fact in story.facts) for story in stories}
    spread = []
    for index in range(30):
        example = BabiStories(stories_file, tasks=BOTH).evaluation_example(
            byte_corpus, **{**ROW, "index": index}
        )
        text = byte_corpus.tokenizer.decode(example.context_ids)
        found = list(MOVED.finditer(text))
        assert tuple(match[0] for match in found) in told
        for match in found:
            assert text[match.start() - 1] == "."
            assert match.end() == len(text) or text[match.end()] == " "
        spread += [two.start() - one.end() for one, two in pairwise(found)]
    assert np.mean(np.array(spread) > 0) > 0.5


def test_scattering_takes_nothing_from_the_haystack(
    byte_corpus: Corpus, rng: np.random.Generator
) -> None:
    facts = [np.arange(size) + 1000 * size for size in (3, 1, 2, 5)]
    for num_tokens in (0, 1, 40, 500):
        haystack = byte_corpus.haystack(rng, num_tokens, "train")
        text, starts = scatter(rng, facts, haystack, byte_corpus.tokenizer)
        for fact, start in zip(facts, starts, strict=True):
            assert (text[start : start + len(fact)] == fact).all()
        assert starts == sorted(starts)
        assert (text[text < 256] == haystack).all()
        assert len(text) == num_tokens + 11


def test_examples_have_different_stories(byte_corpus: Corpus, stories_file: str) -> None:
    task = BabiStories(stories_file, tasks=[1])
    count = task.num_fitting(byte_corpus.tokenizer, length=1024, chunk_size=32)
    assert count == 40
    texts = set()
    for index in range(count):
        example = task.evaluation_example(byte_corpus, **{**ROW, "index": index})
        found = MOVED.findall(byte_corpus.tokenizer.decode(example.context_ids))
        texts.add((example.questions[0].name, *found))
    expected = load_stories(stories_file)
    assert len(texts) == len({(s.question, s.facts) for s in expected if s.task == 1})


def test_only_stories_that_fit_are_told(byte_corpus: Corpus, stories_file: str) -> None:
    task = BabiStories(stories_file, tasks=BOTH)
    counts = [
        task.num_fitting(byte_corpus.tokenizer, length=length, chunk_size=32)
        for length in (160, 256, 1024)
    ]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[1] <= counts[2] == 90
    for index in range(20):
        task.training_row(byte_corpus, **{**ROW, "length": 160, "index": index})


def test_stories_whose_answer_exceeds_a_chunk_are_not_told(
    byte_corpus: Corpus, stories_file: str
) -> None:
    task = BabiStories(stories_file, tasks=BOTH)
    sizes = {
        size: [
            story.sizes.answer
            for story in task.fitting(byte_corpus.tokenizer, length=4096, chunk_size=size)
        ]
        for size in (7, 32)
    }
    assert max(sizes[7]) <= 7 < max(sizes[32])
    assert len(sizes[7]) == sum(size <= 7 for size in sizes[32])


def test_rows_follow_from_seed_and_index(byte_corpus: Corpus, stories_file: str) -> None:
    task = BabiStories(stories_file, tasks=BOTH)
    row, again = (task.training_row(byte_corpus, **ROW) for _ in range(2))
    assert (row.input_ids == again.input_ids).all()
    assert row.questions == again.questions
    for change in ({"index": 1}, {"seed": 1}):
        assert (
            task.training_row(byte_corpus, **{**ROW, **change}).input_ids != row.input_ids
        ).any()


def test_batches_mix_stories_with_other_tasks(byte_corpus: Corpus, stories_file: str) -> None:
    made = batch(
        BabiStories(stories_file, tasks=BOTH),
        byte_corpus,
        seed=0,
        index=0,
        batch_size=4,
        length=512,
        chunk_size=32,
    )
    assert made["chunk_ends"].sum() == 4
    assert (made["answer_mask"].sum(dim=1) >= len(" garden")).all()


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({}, "line 1, is not a story: KeyError"),
        ({"facts": "none", "supporting": [0]}, "must be lists"),
        ({"facts": ["A."], "supporting": [1]}, r"supporting is \[1\]; there are 1 facts"),
        ({"facts": ["A."], "supporting": []}, r"supporting is \[\]"),
    ],
)
def test_rows_that_are_no_stories_are_refused(
    tmp_path: Path, row: dict[str, Any], match: str
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(json.dumps({"task": 1, "question": "?", "answer": "a", **row}) + "\n")
    with pytest.raises(ValueError, match=match):
        load_stories(path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    whole = lzma.compress(b"{}\n" * 99)
    for name, data, match in (
        ("cut.jsonl.xz", whole[:-9], "cut.jsonl.xz is not a whole xz file"),
        ("broken.jsonl", b"{", "broken.jsonl does not hold a JSON object a line: line 1"),
        ("latin.jsonl", b'"\xe9"', "latin.jsonl does not hold a JSON object a line: line 1"),
    ):
        (tmp_path / name).write_bytes(data)
        rows = json_rows(tmp_path / name)
        with pytest.raises(ValueError, match=re.escape(match)):
            list(rows)
    with pytest.raises(ValueError, match="does not hold a JSON object a line"):
        load_stories(tmp_path / "broken.jsonl")


def test_wrong_arguments_are_refused(byte_corpus: Corpus, stories_file: str) -> None:
    with pytest.raises(ValueError, match="no stories at nowhere"):
        load_stories("nowhere")
    with pytest.raises(ValueError, match="tasks is empty"):
        BabiStories(stories_file, tasks=[])
    with pytest.raises(ValueError, match="question_zone is 2"):
        BabiStories(stories_file, question_zone=2)
    with pytest.raises(ValueError, match=r"has no stories of tasks \[7\]"):
        BabiStories(stories_file, tasks=[1, 7]).training_row(byte_corpus, **ROW)
    with pytest.raises(ValueError, match=r"the shortest needs 128 tokens .* length is 96"):
        BabiStories(stories_file, tasks=BOTH).training_row(byte_corpus, **{**ROW, "length": 96})
    small = {**ROW, "chunk_size": 4}
    with pytest.raises(ValueError, match=r"shortest answer has \d+ tokens; chunk_size is 4"):
        BabiStories(stories_file, tasks=BOTH).training_row(byte_corpus, **small)
    with pytest.raises(ValueError, match="length is 1000; it must be a multiple of chunk_size 32"):
        BabiStories(stories_file, tasks=BOTH).evaluation_example(
            byte_corpus, **{**ROW, "length": 1000}
        )


def test_real_stories_in_real_books(real_data: Path) -> None:
    tokenizer = load_tokenizer(str(real_data / "tokenizers/gpt2"))
    corpus = load_corpus(real_data / "haystack/essays.jsonl.xz", tokenizer, max_bytes=2**20)
    task = BabiStories(str(real_data / "haystack/babi-qa1-5-test.jsonl.xz"))
    assert task.num_fitting(tokenizer, length=4096, chunk_size=64) > 4900
    for index in range(20):
        example = task.evaluation_example(corpus, seed=0, index=index, length=4096, chunk_size=64)
        (question,) = example.questions
        support = [example.context_ids[c * 64 : c * 64 + 64] for c in question.needle_chunks]
        answer = tokenizer.decode(question.answer_ids).strip()
        # The answer is a word of the supporting facts, or (task 4) of the question.
        assert answer in tokenizer.decode(np.concatenate(support))
