"""What needle tasks make: training rows, evaluation examples, and where things are in them."""

from typing import NamedTuple

import numpy as np

from drt.data.needle_texts import Fact, Query

Span = tuple[int, int]
"""Start and end (exclusive) in content positions."""


class AskedNeedle(NamedTuple):
    """Where a training row has a needle and a question for it."""

    name: str
    """What is asked for; empty for a single needle."""
    needle_span: Span
    """The needle's text; of several facts, that of the first in the order of the answer."""
    question_span: Span
    """The question; its end is a multiple of the chunk size."""
    answer_span: Span
    """The answer; it starts where the question ends."""
    fact_spans: tuple[Span, ...]
    """The text of each fact that the answer needs, in the order of the answer."""


class NeedleRow(NamedTuple):
    """A training row: haystack, needles, questions and answers."""

    input_ids: np.ndarray
    """Content tokens, int64, shape (length,)."""
    answer_mask: np.ndarray
    """True at the tokens of the values of answers (not one before, where they are predicted, and
    not at what only joins two values, so that each value has a first token), bool, (length,)."""
    questions: tuple[AskedNeedle, ...]
    """What is asked, in the order of the row."""


class NeedleQuestion(NamedTuple):
    """A question about the context of an evaluation example."""

    input_ids: np.ndarray
    """Haystack and then the question, whole chunks, int64, shape (num_tokens,)."""
    answer_ids: np.ndarray
    """The tokens that must follow, int64, shape (num_answer_tokens,)."""
    name: str
    """What is asked for; empty for a single needle."""
    needle_span: Span
    """The needle's text in the context; of several facts, that of the first."""
    needle_chunks: tuple[int, ...]
    """The chunks of the context that the answer needs, ascending: all of ``fact_chunks``."""
    depth: float
    """Where the (first) needle is: 0 at the start of the context, 1 at its end."""
    fact_chunks: tuple[tuple[int, ...], ...]
    """For each fact, in the order of the answer, the chunks that hold tokens of its value; of a
    chain's fact, those of its name too."""


class NeedleExample(NamedTuple):
    """A context with needles, and questions, each to be asked alone right after the context."""

    context_ids: np.ndarray
    """Content tokens, whole chunks, int64, shape (num_tokens,)."""
    questions: tuple[NeedleQuestion, ...]
    """The questions; all of one length, that of every example of its task and tokenizer."""


def write_facts(facts: list[Fact], starts: list[int], ids: np.ndarray) -> None:
    """Put each fact at its start."""
    for fact, start in zip(facts, starts, strict=True):
        ids[start : start + len(fact.ids)] = fact.ids


def write_question(query: Query, end: int, ids: np.ndarray, mask: np.ndarray) -> None:
    """Put a question before ``end`` and its answer after it, and mark the answer's values."""
    ids[end - len(query.question) : end] = query.question
    ids[end : end + len(query.answer)] = query.answer
    mask[end : end + len(query.answer)] = query.is_value


def asked_needle(
    query: Query, facts: list[Fact], starts: list[int], question_end: int
) -> AskedNeedle:
    """Say where a training row has ``query`` and its facts."""
    spans = tuple((starts[fact], starts[fact] + len(facts[fact].ids)) for fact in query.facts)
    return AskedNeedle(
        name=query.name,
        needle_span=spans[0],
        question_span=(question_end - len(query.question), question_end),
        answer_span=(question_end, question_end + len(query.answer)),
        fact_spans=spans,
    )


def needle_question(
    query: Query,
    facts: list[Fact],
    starts: list[int],
    *,
    padding: np.ndarray,
    num_context: int,
    chunk_size: int,
) -> NeedleQuestion:
    """Return ``query`` at the end of ``padding``, for a context of ``num_context`` tokens."""
    input_ids = padding.copy()
    input_ids[len(input_ids) - len(query.question) :] = query.question
    chunks = tuple(_chunks(facts[fact], starts[fact], chunk_size) for fact in query.facts)
    first, start = facts[query.facts[0]], starts[query.facts[0]]
    return NeedleQuestion(
        input_ids=input_ids,
        answer_ids=query.answer,
        name=query.name,
        needle_span=(start, start + len(first.ids)),
        needle_chunks=tuple(sorted({number for numbers in chunks for number in numbers})),
        depth=start / max(num_context - len(first.ids), 1),
        fact_chunks=chunks,
    )


def _chunks(fact: Fact, start: int, chunk_size: int) -> tuple[int, ...]:
    first, end = fact.needed
    return tuple(range((start + first) // chunk_size, (start + end - 1) // chunk_size + 1))
