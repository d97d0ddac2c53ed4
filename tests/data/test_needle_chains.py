"""Chains, variables and several queries, read as text and solved by a solver of their own."""

import re
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drt.data import (
    MULTI,
    NAMES,
    SINGLE,
    Corpus,
    NeedleQuestion,
    NeedleTask,
    NeedleTemplate,
    batch,
)

ROW = {"seed": 0, "index": 0, "length": 1024, "chunk_size": 32}
FACT = {
    "hops": re.compile(r" DEF (\w+)>(\w+)\. "),
    "variables": re.compile(r" VAR (\w+)=(\w+)\. "),
    "multi": re.compile(r" The key (\w+)=(\w+)\. "),
}
ASKED = {
    "hops": re.compile(r" PATH (\w+)>$"),
    "variables": re.compile(r" ALL VAR=(\d+): $"),
    "multi": re.compile(r" The key ([\w ]+)=$"),
}

CHAINS = st.fixed_dictionaries(
    {
        "num_hops": st.integers(1, 3),
        "num_chains": st.integers(1, 4),
        "num_questions": st.integers(1, 6),
        "question_zone": st.floats(0, 1),
    }
)


@st.composite
def tasks(draw: st.DrawFn) -> NeedleTask:
    """A task of several facts an answer, with chains of up to three hops."""
    kind = draw(st.sampled_from(["hops", "variables", "multi"]))
    if kind == "multi":
        keys = draw(st.integers(2, 6))
        return NeedleTask(
            kind="multi",
            num_keys=keys,
            num_queries=draw(st.integers(2, min(keys, 4))),
            num_questions=draw(st.integers(1, 6)),
            num_digits=draw(st.integers(2, 5)),
            num_names=draw(st.integers(6, 64)),
        )
    symbols = draw(st.sampled_from(["names", "letters", *(["digits"] if kind == "hops" else [])]))
    # The characters of names are what they are; numbers of variables have digits.
    width = {} if (kind, symbols) == ("hops", "names") else {"num_digits": draw(st.integers(2, 5))}
    return NeedleTask(kind=kind, symbols=symbols, **width, **draw(CHAINS))


def solve(kind: str, text: str, asked: str) -> str:
    """The answer that a reader of ``text`` would give, by a search of its own."""
    found = FACT[kind].findall(text)
    facts = dict(found)
    # A distractor that says something else of the same left side would be no distractor.
    assert len(facts) == len(found)
    if kind == "multi":
        return " ".join(facts[name] for name in asked.split(" "))
    if kind == "variables":
        known = [asked]
        for _ in facts:
            known += [name for name, value in facts.items() if value in known and name not in known]
        return " ".join(known[1:])
    path = [facts[asked]]
    while path[-1] in facts:
        path.append(facts[path[-1]])
    return ">".join(path)


def asked_at_end(kind: str, text: str) -> str:
    found = ASKED[kind].search(text)
    assert found is not None
    return found[1]


def num_facts(task: NeedleTask) -> int:
    if task.kind == "multi":
        return task.num_keys
    return task.num_chains * (task.num_hops + (task.kind == "variables"))


@given(tasks(), st.sampled_from([32, 57, 64]), st.integers(0, 2**40), st.integers(0, 300))
@settings(max_examples=60)
def test_training_rows_can_be_solved(
    byte_corpus: Corpus, bpe_corpus: Corpus, task: NeedleTask, chunk: int, seed: int, spare: int
) -> None:
    for corpus in (byte_corpus, bpe_corpus):
        row = task.training_row(
            corpus, seed=seed, index=spare, length=1600 + spare, chunk_size=chunk
        )
        decode = corpus.tokenizer.decode
        first_question = row.questions[0].question_span[0]
        context = decode(row.input_ids[:first_question])
        assert len(FACT[task.kind].findall(context)) == num_facts(task)
        values = np.zeros_like(row.answer_mask)
        for question in row.questions:
            (start, end), (begin, stop) = question.question_span, question.answer_span
            assert end == begin
            assert end % chunk == 0
            assert asked_at_end(task.kind, decode(row.input_ids[start:end])) == question.name
            answer = decode(row.input_ids[begin:stop])
            assert answer == solve(task.kind, context, question.name)
            values[begin:stop] = True
            facts = [decode(row.input_ids[slice(*span)]) for span in question.fact_spans]
            assert question.needle_span == question.fact_spans[0]
            # These facts alone lead to the answer, and each is one.
            assert len(facts) == len(re.findall(r"\w+", answer))
            assert all(FACT[task.kind].fullmatch(fact) for fact in facts)
            assert solve(task.kind, "".join(facts), question.name) == answer
        # Every answer token that is not of a joint counts.
        assert not (row.answer_mask & ~values).any()
        joints = row.input_ids[values & ~row.answer_mask]
        separator = ">" if task.kind == "hops" else " "
        assert set(decode(joints)) <= {separator}
        assert decode(joints).count(separator) == sum(
            len(question.fact_spans) - 1 for question in row.questions
        )
        assert len(row.questions) == task.num_questions


@given(tasks(), st.sampled_from([32, 57, 64]), st.integers(0, 2**40), st.integers(0, 9))
@settings(max_examples=60)
def test_examples_can_be_solved_from_their_chunks(
    byte_corpus: Corpus, bpe_corpus: Corpus, task: NeedleTask, chunk: int, seed: int, more: int
) -> None:
    for corpus in (byte_corpus, bpe_corpus):
        length = (-(-900 // chunk) + more) * chunk
        example = task.evaluation_example(
            corpus, seed=seed, index=more, length=length, chunk_size=chunk
        )
        assert len(example.questions) <= task.num_questions
        assert len({question.name for question in example.questions}) == len(example.questions)
        decode = corpus.tokenizer.decode
        context = decode(example.context_ids)
        for question in example.questions:
            assert len(example.context_ids) + len(question.input_ids) == length
            assert asked_at_end(task.kind, decode(question.input_ids)) == question.name
            answer = decode(question.answer_ids)
            assert answer == solve(task.kind, context, question.name)
            assert_chunks_hold(question, example.context_ids, decode, chunk)


def assert_chunks_hold(
    question: NeedleQuestion, context: np.ndarray, decode: Callable[..., str], chunk: int
) -> None:
    """The chunks named for each fact hold its part of the answer."""
    assert set(question.needle_chunks) == {c for chunks in question.fact_chunks for c in chunks}
    assert list(question.needle_chunks) == sorted(question.needle_chunks)
    symbols = re.findall(r"\w+", decode(question.answer_ids))
    assert len(symbols) == len(question.fact_chunks)
    for symbol, chunks in zip(symbols, question.fact_chunks, strict=True):
        assert chunks == tuple(range(chunks[0], chunks[-1] + 1))
        assert symbol in decode(context[chunks[0] * chunk : (chunks[-1] + 1) * chunk])


@pytest.mark.parametrize("kind", ["hops", "variables"])
def test_chunks_of_chains_are_those_of_both_symbols(byte_corpus: Corpus, kind: Any) -> None:
    task = NeedleTask(kind=kind, num_hops=2, num_chains=2)
    for index in range(20):
        example = task.evaluation_example(byte_corpus, **{**ROW, "index": index})
        text = example.context_ids.astype(np.uint8).tobytes()
        for question in example.questions:
            expected = set()
            for match in re.finditer(FACT[kind].pattern.encode(), text):
                chain = (
                    question.name + " " + bytes(question.answer_ids.tolist()).decode()
                ).encode()
                if match[1] in chain and match[2] in chain:
                    expected |= set(range(match.start(1) // 32, (match.end(2) - 1) // 32 + 1))
            assert question.needle_chunks == tuple(sorted(expected))


def test_facts_of_paths_are_in_any_order_and_of_variables_in_that_of_the_chain(
    byte_corpus: Corpus,
) -> None:
    orders: dict[str, list[bool]] = {}
    for kind in ("hops", "variables"):
        task = NeedleTask(kind=kind, num_hops=2, num_chains=3)  # pyright: ignore[reportArgumentType]
        for index in range(60):
            row = task.training_row(byte_corpus, **{**ROW, "index": index})
            starts = [start for start, _ in row.questions[0].fact_spans]
            orders.setdefault(kind, []).append(starts == sorted(starts))
    assert all(orders["variables"])
    # Two facts in either order: 60 fair draws are more than 12 from even once in 10^3 runs.
    assert 18 < sum(orders["hops"]) < 42


def test_facts_are_anywhere_out_of_reach_of_the_window(byte_corpus: Corpus) -> None:
    task = NeedleTask(kind="hops", num_chains=3, num_questions=3)
    far = []
    for index in range(100):
        row = task.training_row(byte_corpus, **{**ROW, "index": index})
        for question in row.questions:
            start = question.question_span[0]
            far.append([start - end > 128 for _, end in question.fact_spans])
    both = np.array(far)
    # Facts are even over the first half of the row or more, questions over the second.
    assert both.any(axis=1).mean() > 0.9
    assert both.all(axis=1).mean() > 0.8


def test_every_chain_is_asked_before_any_again(byte_corpus: Corpus) -> None:
    task = NeedleTask(kind="hops", num_chains=3, num_questions=7)
    for index in range(10):
        row = task.training_row(byte_corpus, **{**ROW, "index": index})
        asked = [question.name for question in row.questions]
        assert len(set(asked[:3])) == len(set(asked[3:6])) == 3
        assert all(one != two for one, two in pairwise(asked))


def test_questions_for_several_keys_ask_for_different_ones(byte_corpus: Corpus) -> None:
    task = NeedleTask(kind="multi", num_keys=4, num_queries=2, num_questions=6)
    rows = [task.training_row(byte_corpus, **{**ROW, "index": index}) for index in range(20)]
    asked = [tuple(question.name.split(" ")) for row in rows for question in row.questions]
    assert all(len(set(names)) == 2 for names in asked)
    # Six of twelve ordered pairs a row, drawn with repetition and told once.
    assert np.mean([len({q.name for q in row.questions}) for row in rows]) > 4


@pytest.mark.parametrize("symbols", ["names", "digits", "letters"])
def test_symbols(byte_corpus: Corpus, symbols: Any) -> None:
    width = {"num_names": 20} if symbols == "names" else {"num_digits": 3}
    task = NeedleTask(kind="hops", symbols=symbols, num_questions=4, **width)
    pattern = {"names": "|".join(NAMES[:20]), "digits": r"\d{3}", "letters": "[a-z]{3}"}[symbols]
    seen = set()
    for index in range(30):
        row = task.training_row(byte_corpus, **{**ROW, "index": index})
        seen |= {question.name for question in row.questions}
        for question in row.questions:
            text = byte_corpus.tokenizer.decode(row.input_ids[slice(*question.answer_span)])
            assert re.fullmatch(f"({pattern})>({pattern})", text)
    # 120 starts, four a row different: of 20 names all but a few, of 1,000 and more nearly each.
    assert len(seen) > (15 if symbols == "names" else 90)


def test_few_names_can_all_be_in_use(byte_corpus: Corpus) -> None:
    task = NeedleTask(kind="hops", num_hops=2, num_chains=2, num_names=6, num_questions=2)
    row = task.training_row(byte_corpus, **ROW)
    text = byte_corpus.tokenizer.decode(row.input_ids)
    assert {name for fact in FACT["hops"].findall(text) for name in fact} == set(NAMES[:6])


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_places_the_first_fact(byte_corpus: Corpus, depth: float) -> None:
    task = NeedleTask(kind="hops", num_chains=3, num_questions=3)
    for index in range(20):
        example = task.evaluation_example(byte_corpus, **{**ROW, "index": index}, depth=depth)
        (question,) = example.questions
        # Half of a fact of 16 tokens that is in the way, and rounding.
        assert abs(question.depth - depth) <= 8.5 / (992 - 16)
        text = byte_corpus.tokenizer.decode(example.context_ids[slice(*question.needle_span)])
        assert text.startswith(f" DEF {question.name}>")


def test_other_texts_of_chains(byte_corpus: Corpus) -> None:
    template = NeedleTemplate(needle="[{name}-{value}]", question="?{name}-", joint="-")
    task = NeedleTask(kind="hops", num_hops=3, num_chains=2, template=template)
    row = task.training_row(byte_corpus, **ROW)
    text = byte_corpus.tokenizer.decode(row.input_ids)
    facts = dict(re.findall(r"\[(\w+)-(\w+)\]", text))
    start = row.questions[0].name
    path = [facts[start], facts[facts[start]], facts[facts[facts[start]]]]
    assert f"?{start}-" + "-".join(path) in text


def test_rows_follow_from_seed_and_index(byte_corpus: Corpus) -> None:
    for kind in ("hops", "variables"):
        task = NeedleTask(kind=kind, num_questions=2)  # pyright: ignore[reportArgumentType]
        row, again = (task.training_row(byte_corpus, **ROW) for _ in range(2))
        assert (row.input_ids == again.input_ids).all()
        assert row.questions == again.questions
        for change in ({"index": 1}, {"seed": 1}):
            other = task.training_row(byte_corpus, **{**ROW, **change})
            assert not (row.input_ids == other.input_ids).all()


def test_rows_of_one_fact_an_answer_are_what_they_always_were(byte_corpus: Corpus) -> None:
    # Sums of what the version before chains made: runs of then and now see the same rows.
    recorded = {"single": (3527189043, 1115090288), "multi": (1011959600, 1597331483)}
    for task in (
        NeedleTask(num_questions=3),
        NeedleTask(kind="multi", num_keys=6, num_questions=8, num_names=16),
    ):
        rows = examples = 0
        for index in range(20):
            row = task.training_row(byte_corpus, **{**ROW, "seed": 5, "index": index})
            spans = [(q.name, q.needle_span, q.question_span, q.answer_span) for q in row.questions]
            data = row.input_ids.tobytes() + row.answer_mask.tobytes() + repr(spans).encode()
            rows = zlib.crc32(data, rows)
            example = task.evaluation_example(
                byte_corpus, **{**ROW, "seed": 5, "index": index}, depth=[None, 0.3][index % 2]
            )
            examples = zlib.crc32(example.context_ids.tobytes(), examples)
            for q in example.questions:
                place = repr((q.name, q.needle_span, q.needle_chunks, q.depth)).encode()
                data = q.input_ids.tobytes() + q.answer_ids.tobytes() + place
                examples = zlib.crc32(data, examples)
        assert (rows, examples) == recorded[task.kind]


def test_batches_of_chains(byte_corpus: Corpus) -> None:
    mixture = [(NeedleTask(kind="hops", num_chains=2), 1.0), (NeedleTask(kind="variables"), 1.0)]
    made = batch(mixture, byte_corpus, seed=0, index=0, batch_size=8, length=512, chunk_size=32)
    assert made["input_ids"].shape == (8, 512)
    assert made["chunk_ends"].sum() == 8
    first = made["answer_mask"][:, 1:] & ~made["answer_mask"][:, :-1]
    # Two symbols of a path, three of an assignment: each has a first token of its own.
    assert set(first.sum(dim=1).tolist()) == {2, 3}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": "chains"}, "kind is 'chains'; it must be one of"),
        ({"kind": "hops", "num_hops": 0}, "num_hops is 0; it must be from 1 to 16"),
        ({"kind": "hops", "num_chains": 0}, "num_chains is 0"),
        ({"kind": "hops", "num_keys": 2}, "num_keys is 2; it must be from 1 to 1"),
        ({"kind": "hops", "num_digits": 9}, "num_digits is 9; kind 'hops' of names has no num_dig"),
        (
            {"kind": "hops", "symbols": "letters", "num_names": 13},
            "num_names is 13; kind 'hops' of letters has no num_names",
        ),
        ({"kind": "hops", "num_names": 11}, "4 chains of 2 hops need 12 different .* are 11"),
        (
            {"kind": "hops", "symbols": "digits", "num_digits": 1},
            "need 12 different symbols; there are 10",
        ),
        ({"kind": "hops", "symbols": "letters", "num_digits": 14}, "is 14; .* from 1 to 13"),
        ({"kind": "hops", "symbols": "runes"}, "symbols is 'runes'"),
        ({"kind": "variables", "symbols": "digits"}, "symbols is 'digits'"),
        ({"kind": "variables", "num_chains": 11, "num_digits": 1}, "11 different numbers"),
        ({"kind": "multi", "num_keys": 3, "num_queries": 4}, "num_queries is 4; .* from 1 to 3"),
        ({"num_queries": 2}, "num_queries is 2; it must be from 1 to 1"),
        ({"num_hops": 3}, "num_hops is 3; kind 'single' has no num_hops"),
        ({"kind": "multi", "num_chains": 2}, "num_chains is 2; kind 'multi'"),
        ({"kind": "multi", "symbols": "digits"}, "symbols is 'digits'; kind 'multi'"),
        ({"kind": "hops", "template": SINGLE}, "must have {name} once"),
        (
            {"kind": "hops", "template": NeedleTemplate("{value}<{name}", "{name}")},
            "in the needle before {value}",
        ),
        (
            {
                "kind": "multi",
                "num_keys": 2,
                "num_queries": 2,
                "template": NeedleTemplate(MULTI.needle, "{name} {name}="),
            },
            "has {name} once",
        ),
    ],
)
def test_wrong_tasks_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NeedleTask(**fields)


def test_rows_without_room_are_refused(byte_corpus: Corpus) -> None:
    task = NeedleTask(kind="hops", num_chains=4)
    with pytest.raises(ValueError, match=r"of 128 tokens in all .* length is 128"):
        task.training_row(byte_corpus, **{**ROW, "length": 128})
    with pytest.raises(ValueError, match="need 160 tokens at chunk_size 32; length is 128"):
        task.evaluation_example(byte_corpus, **{**ROW, "length": 128})
    with pytest.raises(ValueError, match="an answer of 9 tokens exceeds chunk_size 8"):
        task.training_row(byte_corpus, **{**ROW, "chunk_size": 8})
    with pytest.raises(ValueError, match=r"depth is 0\.5; facts of 'variables' keep their order"):
        NeedleTask(kind="variables").evaluation_example(byte_corpus, **ROW, depth=0.5)
