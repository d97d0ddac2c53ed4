"""What was retrieved for a question, with which weight, and the text of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from drt.data import Corpus, NeedleTask
from drt.evaluation.needles import ask
from drt.evaluation.reading import start_reading
from drt.modeling import DRTForCausalLM


@dataclass
class Passage:
    """One retrieved chunk."""

    group: int
    """Retrieval group, 0 the lowest."""
    chunk: int
    """Number of the chunk in the row."""
    weight: float
    """Retrieval weight, 0 to 1."""
    score: float
    """Landmark score without noise."""
    text: str
    """The chunk's content."""
    holds_answer: bool
    """Whether tokens of the asked-for value lie in it."""


@dataclass
class Inspection:
    """One question, its answer, and what was retrieved for it."""

    length: int
    """Content tokens of context and question."""
    question: str
    """The question's text, without the haystack in front of it."""
    expected: str
    """The right answer."""
    generated: str
    """What the model said."""
    needle_position: int
    """Content position of the needle's first token."""
    passages: list[Passage]
    """What the landmark at the question's end retrieved, by group and weight."""


def inspect_question(
    model: DRTForCausalLM, corpus: Corpus, task: NeedleTask, *, length: int, seed: int
) -> Inspection:
    """Ask one question of a held-out context and keep what was retrieved for it."""
    model.eval()
    size = model.config.chunk_size
    example = task.evaluation_example(corpus, seed=seed, index=0, length=length, chunk_size=size)
    question = example.questions[0]
    reading = start_reading(model)
    reading.read(torch.as_tensor(example.context_ids))
    answer = ask(reading, question)
    decode: Any = corpus.tokenizer.decode
    ids = [*example.context_ids.tolist(), *question.input_ids.tolist()]
    passages = [
        Passage(group, chunk, weight, score, decode(ids[chunk * size : (chunk + 1) * size]),
                chunk in question.needle_chunks)
        for group, retrieval in enumerate(answer.retrievals)
        for chunk, weight, score in zip(
            *(part.flatten().tolist() for part in retrieval), strict=True
        )
        if chunk >= 0
    ]  # fmt: skip
    passages.sort(key=lambda passage: (passage.group, -passage.weight))
    return Inspection(
        length=length,
        question=decode(question.input_ids.tolist()).rpartition("\n")[2][-60:],
        expected=decode(question.answer_ids.tolist()),
        generated=decode(answer.token_ids),
        needle_position=question.needle_span[0],
        passages=passages,
    )
