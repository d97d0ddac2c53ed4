"""Scores are what was asked and answered: counted, deterministic, and of the generated text."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drt import DRTConfig, DRTForCausalLM
from drt.data import Corpus, NeedleTask, byte_tokenizer, load_corpus
from drt.evaluation import ask, evaluate_needles, needles, start_reading
from drt.evaluation.comparison import format_table
from drt.evaluation.inspection import inspect_question
from drt.evaluation.intervals import effective_number, wilson_interval
from drt.evaluation.memory import life_peak_rss, peak_rss, reset_peak_rss
from drt.evaluation.needles import (
    NeedleScore,
    ScoredAnswer,
    common_chunk_size,
    pooled,
    temporary_memory,
    tokens_needed,
)
from drt.evaluation.reading import Answer, CachedReading, DRTReading
from drt.retrieval import Retrieval
from drt.testing import tiny_config


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(None, byte_tokenizer(), max_bytes=1 << 20)


@pytest.fixture(scope="module")
def model() -> DRTForCausalLM:
    return DRTForCausalLM(tiny_config(vocab_size=258)).eval()


MULTI = NeedleTask(kind="multi", num_keys=3, num_questions=3, num_digits=2)


def test_questions_of_an_example_share_its_context(model: DRTForCausalLM, corpus: Corpus) -> None:
    read: list[int] = []
    score = evaluate_needles(
        model, corpus, task=MULTI, length=256, num_questions=4, on_context=read.append
    )
    # Two contexts of three questions: whole examples are used.
    assert (score.length, score.n, read) == (256, 6, [256, 256])
    again = evaluate_needles(model, corpus, task=MULTI, length=256, num_questions=4)
    assert (again.exact_match, again.recall) == (score.exact_match, score.recall)


def test_an_answer_is_the_greedy_continuation(model: DRTForCausalLM, corpus: Corpus) -> None:
    example = MULTI.evaluation_example(corpus, seed=5, index=0, length=256, chunk_size=16)
    reading = start_reading(model)
    assert isinstance(reading, DRTReading)
    reading.read(torch.from_numpy(example.context_ids))
    before = (reading.num_tokens, reading.state.num_tokens, len(reading.state.memory))
    for question in example.questions:
        answer = ask(reading, question)
        prompt = np.concatenate([example.context_ids, question.input_ids])
        whole = model.generate(
            torch.from_numpy(prompt)[None], max_new_tokens=len(question.answer_ids), do_sample=False
        )
        assert answer.token_ids == whole[0, len(prompt) :].tolist()
        assert len(answer.retrievals) == 2
        found = [set(r.indices.flatten().tolist()) for r in answer.retrievals]
        assert answer.recalled == any(set(question.needle_chunks) <= chunks for chunks in found)
    assert (reading.num_tokens, reading.state.num_tokens, len(reading.state.memory)) == before


@pytest.mark.parametrize(
    ("groups", "recalled"),
    [([[3, 4], [9, 1]], True), ([[3, 9], [4, 1]], False), ([[3, 4], [0, 1]], False)],
)
def test_the_facts_of_a_chain_may_be_found_by_different_groups(
    groups: list[list[int]], recalled: bool
) -> None:
    task = NeedleTask(kind="hops", num_digits=3, symbols="digits")
    example = task.evaluation_example(
        load_corpus(None, byte_tokenizer()), seed=1, index=0, length=256, chunk_size=16
    )
    question = example.questions[0]._replace(fact_chunks=((3, 4), (9,)), needle_chunks=(3, 4, 9))

    class Found:
        """Answers nothing right, and retrieved these chunks."""

        def answer(self, question_ids: torch.Tensor, num_tokens: int) -> Answer:
            empty = torch.zeros(1, 1, 2)
            retrievals = tuple(Retrieval(torch.tensor([[g]]), empty, empty) for g in groups)
            return Answer([0] * num_tokens, retrievals)

    assert ask(Found(), question).recalled is recalled  # type: ignore[arg-type]


def test_a_right_answer_scores(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is made to say the right digits gets 1, and one wrong digit makes it 0."""
    model = DRTForCausalLM(tiny_config(vocab_size=258, retrieval_groups=[])).eval()
    task = NeedleTask(num_digits=3)
    said: list[int] = []
    plain = model.forward

    def told(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        if kwargs.get("logits_to_keep") == 1 and said:
            out.logits = torch.nn.functional.one_hot(torch.tensor([[said.pop(0)]]), 258).float()
        return out

    monkeypatch.setattr(model, "forward", told)
    for spoil, expected in ((0, 1.0), (1, 0.0)):
        example = task.evaluation_example(corpus, seed=1, index=0, length=128, chunk_size=16)
        said[:] = [int(token) for token in example.questions[0].answer_ids]
        said[-1] += spoil
        score = evaluate_needles(model, corpus, task=task, length=128, num_questions=1)
        assert score.exact_match == expected
        assert score.recall is None
        said.clear()


def test_inspection_shows_the_retrieved_text(model: DRTForCausalLM, corpus: Corpus) -> None:
    seen = inspect_question(model, corpus, MULTI, length=256, seed=1)
    assert [p.group for p in seen.passages] == [0] * 4 + [1] * 4
    for group in (0, 1):
        weights = [p.weight for p in seen.passages if p.group == group]
        assert sum(weights) == pytest.approx(1.0, abs=1e-5)
        assert weights == sorted(weights, reverse=True)
    assert all(len(p.text) == 16 or "\ufffd" in p.text for p in seen.passages)
    assert seen.expected.isdigit()


def test_the_table_has_a_line_for_each_figure() -> None:
    row = {"length": 128, "n": 4, "exact_match": 0.25, "recall": None}
    long = {"length": 2048, "n": 4, "exact_match": 1.0, "recall": 0.5}
    table = format_table({"m": {"single": [row, long], "multi": [row]}})
    lines = [line.split() for line in table.splitlines()[2:]]
    assert lines == [
        ["m", "single", "exact", "match", "0.250", "1.000"],
        ["m", "single", "questions", "4", "4"],
        ["m", "single", "recall@K", "-", "0.500"],
        ["m", "multi", "exact", "match", "0.250", "-"],
        ["m", "multi", "questions", "4", "-"],
    ]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def test_any_causal_model_is_asked(llama: LlamaForCausalLM, corpus: Corpus) -> None:
    score = evaluate_needles(llama, corpus, task=MULTI, length=256, num_questions=3)
    assert (score.length, score.depth, score.n, score.recall) == (256, None, 3, None)
    assert score.num_right == 0
    # Wilson's upper end for none of n is z^2 / (n + z^2), z = 1.959964.
    assert score.exact_match_interval == pytest.approx((0, 3.841459 / 4.841459), abs=1e-6)


def test_all_models_are_asked_the_same(
    llama: LlamaForCausalLM, model: DRTForCausalLM, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one chunk size, whatever their own; and a first token is read before, if asked for."""
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    contexts: list[torch.Tensor] = []
    for kind in (CachedReading, DRTReading):

        def note(self: Any, ids: Any, count: int, answer: Any = kind.answer) -> Any:
            asked.append((torch.cat(contexts), ids))
            return answer(self, ids, count)

        def read(self: Any, ids: Any, plain: Any = kind.read) -> None:
            contexts.append(ids)
            plain(self, ids)

        monkeypatch.setattr(kind, "answer", note)
        monkeypatch.setattr(kind, "read", read)
    task = NeedleTask(num_digits=3)
    seen = []
    for reader, first in ((model, None), (llama, None), (llama, 256)):
        contexts.clear()
        asked.clear()
        score = evaluate_needles(
            reader, corpus, task=task, length=256, num_questions=1, chunk_size=64,
            depth=0.25, first_token_id=first,
        )  # fmt: skip
        assert score.depth == 0.25
        # 64 is no chunk of the tiny model, so what it retrieves is not counted.
        assert score.recall is None
        seen.append(asked[0])
    for context, question in seen[1:]:
        assert torch.equal(question, seen[0][1])
        assert torch.equal(context[-len(seen[0][0]) :], seen[0][0])
    assert len(question) % 64 == 0
    assert seen[1][0].shape == seen[0][0].shape
    assert seen[2][0][0] == 256
    assert len(seen[2][0]) == len(seen[0][0]) + 1


def test_questions_end_where_all_chunks_end() -> None:
    sizes = [DRTConfig(chunk_size=16), DRTConfig(chunk_size=24), LlamaConfig()]
    assert common_chunk_size(sizes) == 48
    assert common_chunk_size([LlamaConfig()]) == 64


def test_a_length_beyond_the_positions_is_refused_before_it_is_read(
    llama: LlamaForCausalLM, corpus: Corpus
) -> None:
    task = NeedleTask(num_digits=3)
    example = task.evaluation_example(corpus, seed=1, index=0, length=512, chunk_size=64)
    # The last token of an answer is said, not read.
    assert tokens_needed(example) == 512 + 2
    read: list[int] = []
    kwargs: dict[str, Any] = {"task": task, "length": 512, "num_questions": 1}
    with pytest.raises(ValueError, match=r"512 positions .* 514 tokens"):
        evaluate_needles(llama, corpus, on_context=read.append, **kwargs)
    assert not read
    assert evaluate_needles(llama, corpus, beyond_limit=True, **kwargs).n == 1


def test_scores_of_several_seeds_are_counted_together() -> None:
    def score(right: int, n: int, recall: float | None, peak: int | None) -> NeedleScore:
        interval = wilson_interval(right, n)
        return NeedleScore(128, 0.5, n, n, right, right / n, interval, recall, float(n), peak)

    both = pooled([score(1, 4, 0.25, 7), score(6, 6, 1.0, 9)])
    assert (both.length, both.depth, both.n, both.num_right) == (128, 0.5, 10, 7)
    assert both.exact_match == 0.7
    assert both.exact_match_interval == wilson_interval(7, 10)
    assert both.recall == pytest.approx((4 * 0.25 + 6) / 10)
    assert both.seconds_per_example == pytest.approx((4 * 4 + 6 * 6) / 10)
    assert both.peak_rss_bytes == 9
    assert pooled([score(1, 4, None, None)] * 2).recall is None


def test_questions_of_one_context_tell_less_than_as_many_contexts(
    model: DRTForCausalLM, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def say(reading: Any, question: Any, **_: Any) -> ScoredAnswer:
        asked.append(1)
        # All of the first context are right, all of the second wrong, of the third one is.
        return ScoredAnswer([], len(asked) in (1, 2, 3, 7), None, ())

    monkeypatch.setattr(needles, "ask", say)
    kwargs: dict[str, Any] = {"task": MULTI, "length": 256}
    score = evaluate_needles(model, corpus, num_questions=9, **kwargs)
    assert (score.n, score.num_right) == (9, 4)
    assert score.num_independent == effective_number(np.array([3, 0, 1]), np.array([3, 3, 3])) < 9
    assert score.exact_match_interval == wilson_interval(
        4 / 9 * score.num_independent, score.num_independent
    )
    both = pooled([score, score])
    assert both.num_independent == 2 * score.num_independent


@pytest.mark.parametrize("place", ["host", "disk"])
def test_where_chunks_are_kept_changes_nothing(
    model: DRTForCausalLM, corpus: Corpus, place: Any
) -> None:
    example = MULTI.evaluation_example(corpus, seed=5, index=0, length=256, chunk_size=16)
    answers = []
    for new_memory in (None, lambda: temporary_memory(place)):
        with start_reading(model, new_memory=new_memory) as reading:
            reading.read(torch.from_numpy(example.context_ids))
            answers.append(ask(reading, example.questions[0]).token_ids)
    assert answers[0] == answers[1]


def test_no_questions_is_refused(model: DRTForCausalLM, corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="num_questions must be at least 1, got 0"):
        evaluate_needles(model, corpus, task=MULTI, length=256, num_questions=0)


def test_peak_memory_sees_an_allocation() -> None:
    if not reset_peak_rss():
        pytest.skip("this system cannot reset the peak of a process")
    before = peak_rss()
    block = torch.ones(32 << 20)
    highest = peak_rss()
    assert highest - before > 100 << 20
    assert block.numel() == 32 << 20
    del block
    reset_peak_rss()
    assert peak_rss() < highest - (100 << 20)
    # The kernel counts pages in batches, so two readings may differ by some of them.
    assert life_peak_rss() >= highest - (4 << 20)
