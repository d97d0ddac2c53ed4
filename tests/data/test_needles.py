import re
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from drt.data import (
    MULTI,
    NAMES,
    SINGLE,
    Corpus,
    Document,
    NeedleRow,
    NeedleTask,
    NeedleTemplate,
    load_corpus,
    load_tokenizer,
    score_answer,
)

NEEDLE = re.compile(r" The key (?:pass|(?P<name>\w+))=(?P<value>\d+)\. ")
ROW = {"seed": 0, "index": 0, "length": 1024, "chunk_size": 32}

TASKS = st.one_of(
    st.builds(NeedleTask, num_questions=st.integers(1, 3), num_digits=st.integers(1, 7)),
    st.builds(
        NeedleTask,
        kind=st.just("multi"),
        num_keys=st.integers(1, 9),
        num_questions=st.integers(1, 12),
        num_digits=st.integers(2, 7),
        num_names=st.integers(9, 64),
        question_zone=st.floats(0, 1),
    ),
)
PLACE = {
    "seed": st.integers(0, 2**40),
    "index": st.integers(0, 2**40),
    "chunk_size": st.sampled_from([24, 32, 57, 64]),
}


def assert_row_is_sound(task: NeedleTask, row: NeedleRow, corpus: Corpus, chunk_size: int) -> None:
    """Needles, questions and answers of ``row`` say what they should, where they should."""
    decode = corpus.tokenizer.decode
    masked = np.zeros_like(row.answer_mask)
    spans = {question.needle_span for question in row.questions}
    values = {}
    for span in spans:
        found = NEEDLE.fullmatch(decode(row.input_ids[slice(*span)]))
        assert found is not None
        values[span] = found["value"]
        assert len(found["value"]) == task.num_digits
    assert len(set(values.values())) == len(values)
    for question in row.questions:
        start, end = question.question_span
        template = task.texts.question.replace("{name}", question.name)
        assert end % chunk_size == 0
        assert decode(row.input_ids[start:end]) == template
        assert question.answer_span[0] == end
        assert decode(row.input_ids[slice(*question.answer_span)]) == values[question.needle_span]
        assert question.needle_span[1] <= start
        masked[slice(*question.answer_span)] = True
        spans |= {(start, question.answer_span[1])}
    assert (masked == row.answer_mask).all()
    ordered = sorted(spans)
    assert all(one[1] <= two[0] for one, two in pairwise(ordered))
    assert len(row.questions) == task.num_questions


@given(TASKS, st.fixed_dictionaries(PLACE), st.integers(0, 700))
def test_training_rows_are_sound(
    byte_corpus: Corpus, task: NeedleTask, where: dict[str, int], spare: int
) -> None:
    length = 1100 + spare
    row = task.training_row(byte_corpus, length=length, **where)
    assert row.input_ids.shape == row.answer_mask.shape == (length,)
    assert (row.input_ids.dtype, row.answer_mask.dtype) == (np.int64, np.bool_)
    assert_row_is_sound(task, row, byte_corpus, where["chunk_size"])


@given(TASKS, st.fixed_dictionaries(PLACE))
@settings(max_examples=40)
def test_training_rows_of_bpe_tokens_are_sound(
    bpe_corpus: Corpus, task: NeedleTask, where: dict[str, int]
) -> None:
    row = task.training_row(bpe_corpus, length=2000, **where)
    assert_row_is_sound(task, row, bpe_corpus, where["chunk_size"])


@pytest.mark.parametrize(
    "task",
    [
        NeedleTask(num_questions=3),
        NeedleTask(kind="multi", num_keys=4, num_questions=3),
        NeedleTask(kind="multi", num_keys=2, num_questions=5),
        NeedleTask(kind="multi", num_keys=1, num_questions=6, num_names=4),
    ],
)
def test_short_rows(byte_corpus: Corpus, task: NeedleTask) -> None:
    for index in range(50):
        row = task.training_row(byte_corpus, seed=3, index=index, length=256, chunk_size=32)
        assert_row_is_sound(task, row, byte_corpus, 32)


def test_every_needle_is_in_the_row_and_none_in_the_haystack(byte_corpus: Corpus) -> None:
    task = NeedleTask(kind="multi", num_keys=6, num_questions=2)
    row = task.training_row(byte_corpus, **ROW)
    text = byte_corpus.tokenizer.decode(row.input_ids)
    # A question and its answer are followed by haystack, not by the end of a needle's text.
    found = {match["name"]: match["value"] for match in NEEDLE.finditer(text)}
    assert len(found) == 6
    assert set(found) <= set(NAMES)


def test_names_are_asked_once_each_before_any_again(byte_corpus: Corpus) -> None:
    task = NeedleTask(kind="multi", num_keys=3, num_questions=7)
    for index in range(20):
        row = task.training_row(byte_corpus, seed=0, index=index, length=1024, chunk_size=32)
        asked = [question.name for question in row.questions]
        assert len(set(asked[:3])) == len(set(asked[3:6])) == 3
        assert all(one != two for one, two in pairwise(asked))


def test_all_names_of_the_pool_and_no_others_are_used(byte_corpus: Corpus) -> None:
    task = NeedleTask(kind="multi", num_keys=2, num_questions=2, num_names=5)
    rows = [
        task.training_row(byte_corpus, seed=0, index=index, length=512, chunk_size=32)
        for index in range(60)
    ]
    # The chance that 60 rows of 2 in 5 leave one out is 5 * 0.6**60, about 1e-12.
    assert {question.name for row in rows for question in row.questions} == set(NAMES[:5])


def test_built_in_names_are_usable() -> None:
    assert len(NAMES) == len(set(NAMES)) == 64
    assert all(re.fullmatch("[a-z]{2,6}", name) for name in NAMES)


def test_needles_are_anywhere_and_cross_chunk_borders(byte_corpus: Corpus) -> None:
    task = NeedleTask()
    rows = [
        task.training_row(byte_corpus, seed=0, index=index, length=1024, chunk_size=32)
        for index in range(200)
    ]
    starts, ends = np.array([row.questions[0].needle_span for row in rows]).T
    crossing = (starts // 32 != (ends - 1) // 32).mean()
    # A needle of 21 tokens crosses a border of 32 at 20 of 32 offsets. Five standard deviations.
    assert abs(crossing - 20 / 32) < 5 * (20 / 32 * 12 / 32 / 200) ** 0.5
    # 200 draws of 32 offsets leave one out with chance 32 * (31/32)**200, about 0.06; four, never.
    assert len(set(starts % 32)) > 28


def test_most_questions_are_far_from_their_needles(byte_corpus: Corpus) -> None:
    task = NeedleTask(kind="multi", num_keys=4, num_questions=4)
    rows = [
        task.training_row(byte_corpus, seed=0, index=index, length=2048, chunk_size=32)
        for index in range(200)
    ]
    gaps = [
        question.question_span[0] - question.needle_span[1]
        for row in rows
        for question in row.questions
    ]
    # Needles are even over the first half or more, questions over the second: of a square with
    # sides of 1,000 tokens, a corner with sides of 128 lies within the smallest window twice over.
    assert np.mean(np.array(gaps) < 128) < 0.05


def test_first_digit_may_be_zero_and_all_digits_occur(byte_corpus: Corpus) -> None:
    task = NeedleTask(num_digits=2)
    answers = np.array(
        [
            row.input_ids[row.answer_mask]
            for row in (
                task.training_row(byte_corpus, seed=0, index=index, length=256, chunk_size=32)
                for index in range(300)
            )
        ]
    )
    # 300 draws of 10 digits leave one out with chance 10 * 0.9**300, about 2e-13.
    for digits in answers.T:
        assert set(digits) == set(b"0123456789")


@given(TASKS, st.fixed_dictionaries(PLACE))
@settings(max_examples=20)
def test_rows_follow_from_seed_and_index(
    byte_corpus: Corpus, task: NeedleTask, where: dict[str, int]
) -> None:
    row = task.training_row(byte_corpus, length=1100, **where)
    task.training_row(byte_corpus, length=1100, **{**where, "index": where["index"] + 1})
    again = task.training_row(byte_corpus, length=1100, **where)
    assert (row.input_ids == again.input_ids).all()
    assert row.questions == again.questions
    for change in ({"index": where["index"] + 1}, {"seed": where["seed"] + 1}):
        other = task.training_row(byte_corpus, length=1100, **{**where, **change})
        assert not (row.input_ids == other.input_ids).all()


def test_other_processes_make_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"Line {number} of many. " for number in range(999)))
    script = (
        "import sys, zlib; from drt.data import *\n"
        "corpus = load_corpus(sys.argv[1], load_tokenizer('bytes'))\n"
        "task = NeedleTask(kind='multi', num_keys=4, num_questions=2)\n"
        "row = task.training_row(corpus, seed=0, index=0, length=1024, chunk_size=32)\n"
        "example = task.evaluation_example(corpus, seed=0, index=0, length=512, chunk_size=32)\n"
        "print(zlib.crc32(row.input_ids.tobytes() + example.context_ids.tobytes()))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    paths = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "1"}
    there = subprocess.run(command, env=paths, capture_output=True, text=True, check=True).stdout
    corpus = load_corpus(tmp_path, load_tokenizer("bytes"))
    task = NeedleTask(kind="multi", num_keys=4, num_questions=2)
    row = task.training_row(corpus, **ROW)
    example = task.evaluation_example(corpus, **{**ROW, "length": 512})
    here = zlib.crc32(row.input_ids.tobytes() + example.context_ids.tobytes())
    assert int(there) == here


def test_rows_are_of_their_split(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = corpus_of_two_letters(bytes_tokenizer)
    task = NeedleTask()
    train = task.training_row(corpus, **ROW).input_ids
    held_out = task.training_row(corpus, **ROW, split="held_out").input_ids
    example = task.evaluation_example(corpus, **ROW)
    assert (ord("A") in train, ord("B") in train) == (True, False)
    for ids in (held_out, example.context_ids, example.questions[0].input_ids):
        assert (ord("A") in ids, ord("B") in ids) == (False, True)


def corpus_of_two_letters(tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """A corpus with As to train on and Bs held out: the last tenth of its one document."""
    return Corpus([Document("one", np.array([65] * 9000 + [66] * 1000))], tokenizer)


@given(
    TASKS,
    st.fixed_dictionaries(PLACE),
    st.integers(0, 20),
    st.one_of(st.none(), st.floats(0, 1)),
)
def test_evaluation_examples_are_sound(
    byte_corpus: Corpus, task: NeedleTask, where: dict[str, int], spare: int, depth: float | None
) -> None:
    size = where["chunk_size"]
    length = (-(-300 // size) + 2 + spare) * size
    example = task.evaluation_example(byte_corpus, length=length, depth=depth, **where)
    assert len(example.context_ids) % size == 0
    expected = 1 if depth is not None else min(task.num_questions, task.num_keys)
    assert len(example.questions) == expected
    assert len({question.name for question in example.questions}) == expected
    decode = byte_corpus.tokenizer.decode
    for question in example.questions:
        assert len(example.context_ids) + len(question.input_ids) == length
        text = task.texts.question.replace("{name}", question.name)
        assert decode(question.input_ids).endswith(text)
        start, end = question.needle_span
        found = NEEDLE.fullmatch(decode(example.context_ids[start:end]))
        assert found is not None
        assert (found["name"] or "") == question.name
        assert found["value"] == decode(question.answer_ids)
        assert question.answer_ids.dtype == question.input_ids.dtype == np.int64
        value = range(start + found.start("value"), start + found.end("value"))
        assert question.needle_chunks == tuple(sorted({place // size for place in value}))
        assert question.depth == pytest.approx(start / (len(example.context_ids) - (end - start)))


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
def test_depth_places_the_needle(byte_corpus: Corpus, depth: float | None) -> None:
    one = NeedleTask().evaluation_example(byte_corpus, **ROW, depth=depth)
    # Rounding to a token of a context of 960, less the needle.
    assert abs(one.questions[0].depth - depth) <= 0.5 / (960 - 24)
    many = NeedleTask(kind="multi", num_keys=9, num_questions=3)
    for index in range(30):
        example = many.evaluation_example(byte_corpus, **{**ROW, "index": index}, depth=depth)
        # Half of a needle of at most 29 tokens that is in the way, and rounding.
        assert abs(example.questions[0].depth - depth) <= 15.5 / (960 - 29)


def test_depths_are_even_if_not_given(byte_corpus: Corpus) -> None:
    task = NeedleTask()
    depths = [
        task.evaluation_example(byte_corpus, **{**ROW, "index": index}).questions[0].depth
        for index in range(400)
    ]
    # Quarters of 400 even draws: 100 expected with a standard deviation of 8.7.
    assert (abs(np.histogram(depths, bins=4, range=(0, 1))[0] - 100) < 44).all()


def test_examples_follow_from_seed_and_index_and_differ_from_rows(byte_corpus: Corpus) -> None:
    task = NeedleTask()
    example, again = (task.evaluation_example(byte_corpus, **ROW) for _ in range(2))
    assert (example.context_ids == again.context_ids).all()
    row = task.training_row(byte_corpus, **ROW)
    answer = row.input_ids[row.answer_mask]
    assert not score_answer(example.questions[0].answer_ids, answer)


def test_bpe_examples_are_sound(bpe_corpus: Corpus) -> None:
    task = NeedleTask(kind="multi", num_keys=5, num_questions=5)
    decode = bpe_corpus.tokenizer.decode
    for index in range(30):
        example = task.evaluation_example(bpe_corpus, **{**ROW, "index": index})
        for question in example.questions:
            needle = example.context_ids[slice(*question.needle_span)]
            found = NEEDLE.fullmatch(decode(needle))
            assert found is not None
            assert found["value"] == decode(question.answer_ids)
            # The same tokens, not only the same text.
            size = len(question.answer_ids)
            windows = np.lib.stride_tricks.sliding_window_view(needle, size)
            assert (windows == question.answer_ids).all(axis=1).sum() == 1


def test_long_contexts(byte_corpus: Corpus) -> None:
    example = NeedleTask(kind="multi", num_keys=8, num_questions=8).evaluation_example(
        byte_corpus, seed=0, index=0, length=2**20, chunk_size=64
    )
    assert len(example.context_ids) == 2**20 - 64
    assert len(example.questions) == 8


def test_other_texts(byte_corpus: Corpus) -> None:
    template = NeedleTemplate(needle="[{name}={value};]", question="[{name}=", before_value="#")
    task = NeedleTask(kind="multi", num_keys=3, num_questions=2, template=template)
    row = task.training_row(byte_corpus, seed=0, index=0, length=256, chunk_size=16)
    text = byte_corpus.tokenizer.decode(row.input_ids)
    hidden = dict(re.findall(r"\[(\w+)=(#\d{5});\]", text))
    assert len(hidden) == 3
    for question in row.questions:
        answer = byte_corpus.tokenizer.decode(row.input_ids[slice(*question.answer_span)])
        assert answer == hidden[question.name]
    assert row.answer_mask.sum() == 2 * 6


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": "double"}, "kind is 'double'"),
        ({"num_keys": 2}, "num_keys is 2; it must be from 1 to 1"),
        ({"kind": "multi", "num_keys": 0}, "num_keys is 0"),
        ({"kind": "multi", "num_keys": 5, "num_names": 4}, "num_keys is 5; .* from 1 to 4"),
        ({"num_names": 8}, "num_names is 8; kind 'single' has no num_names"),
        ({"num_names": 65}, "num_names is 65; it must be from 1 to 64"),
        ({"num_questions": 0}, "num_questions is 0"),
        ({"num_digits": 0}, "num_digits is 0"),
        ({"num_digits": 19}, "num_digits is 19"),
        ({"question_zone": 1.5}, "question_zone is 1.5"),
        ({"question_zone": float("nan")}, "question_zone is nan"),
        ({"kind": "multi", "num_keys": 11, "num_digits": 1}, "11 different values"),
        ({"kind": "multi", "template": SINGLE}, "must have {name}"),
    ],
)
def test_wrong_tasks_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NeedleTask(**fields)


@pytest.mark.parametrize(
    ("needle", "question"),
    [("a", "b"), ("{value}{value}", "b"), ("{value}", "{value}"), ("{value}", "")],
)
def test_wrong_texts_are_refused(needle: str, question: str) -> None:
    with pytest.raises(ValueError, match="must"):
        NeedleTemplate(needle=needle, question=question)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"length": 68}, r"of 21 tokens in all .* 14 tokens .* of 5 need 69 .* length is 68"),
        ({"chunk_size": 4}, "an answer of 5 tokens exceeds chunk_size 4"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"length": 10, "chunk_size": 32}, "length is 10; .* a chunk, 32 tokens"),
        ({"seed": -1}, "seed is -1"),
        ({"index": -2}, "index is -2"),
    ],
)
def test_wrong_arguments_are_refused(
    byte_corpus: Corpus, change: dict[str, int], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        NeedleTask().training_row(byte_corpus, **{**ROW, **change})
    if "length" not in change:
        with pytest.raises(ValueError, match=match):
            NeedleTask().evaluation_example(byte_corpus, **{**ROW, **change})


def test_wrong_arguments_of_examples_are_refused(byte_corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="length is 1000; it must be a multiple of chunk_size 32"):
        NeedleTask().evaluation_example(byte_corpus, **{**ROW, "length": 1000})
    with pytest.raises(ValueError, match="need 64 tokens at chunk_size 32; length is 32"):
        NeedleTask().evaluation_example(byte_corpus, **{**ROW, "length": 32})
    for depth in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="depth is"):
            NeedleTask().evaluation_example(byte_corpus, **ROW, depth=depth)


def test_default_texts_repeat_the_words_before_the_value() -> None:
    for template in (SINGLE, MULTI):
        before = template.needle.split("{value}")[0]
        assert template.question.endswith(before)


def test_score_is_an_exact_match() -> None:
    assert score_answer([1, 2, 3], np.array([1, 2, 3]))
    assert score_answer(torch.tensor([1, 2, 3]), [1, 2, 3])
    for wrong in ([1, 2], [1, 2, 4], [1, 2, 3, 3], []):
        assert not score_answer(wrong, [1, 2, 3])
