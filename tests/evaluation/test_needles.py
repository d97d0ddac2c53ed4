"""Scores are what was asked and answered: counted, deterministic, and of the generated text."""

from typing import Any

import numpy as np
import pytest
import torch

from drt import DRTForCausalLM
from drt.data import Corpus, NeedleTask, byte_tokenizer, load_corpus
from drt.evaluation import ask, evaluate_needles
from drt.evaluation.comparison import format_table
from drt.evaluation.inspection import inspect_question
from drt.evaluation.memory import life_peak_rss, peak_rss, reset_peak_rss
from drt.evaluation.needles import read_context
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
    state = read_context(model, torch.from_numpy(example.context_ids)[None])
    before = (state.num_tokens, len(state.memory))
    for question in example.questions:
        answer = ask(model, state, question)
        prompt = np.concatenate([example.context_ids, question.input_ids])
        whole = model.generate(
            torch.from_numpy(prompt)[None], max_new_tokens=len(question.answer_ids), do_sample=False
        )
        assert answer.token_ids == whole[0, len(prompt) :].tolist()
        assert len(answer.retrievals) == 2
        found = [set(r.indices.flatten().tolist()) for r in answer.retrievals]
        assert answer.recalled == any(set(question.needle_chunks) <= chunks for chunks in found)
    assert (state.num_tokens, len(state.memory)) == before


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
        ["m", "single", "recall@K", "-", "0.500"],
        ["m", "multi", "exact", "match", "0.250", "-"],
    ]


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
