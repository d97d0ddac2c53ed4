"""Needle tasks: facts hidden in a haystack, and questions for them that call for retrieval.

A landmark closes every chunk of S tokens, and what is retrieved there serves the tokens that
follow. So a question ends where a chunk ends (the content index of its last token is S - 1 modulo
S) and its answer comes right after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from drt.data.corpora import Corpus, Split
from drt.data.needle_texts import MULTI, NAMES, SINGLE, Needle, NeedleEncoder, NeedleTemplate
from drt.data.placement import Sizes, context_length, move, place, question_ends

Span = tuple[int, int]
"""Start and end (exclusive) in content positions."""

# Rows of both splits, examples and mixtures share no random numbers at equal seed and index.
TRAINING, VALIDATION, EVALUATION, MIXTURE = range(4)


class AskedNeedle(NamedTuple):
    """Where a training row has a needle and a question for it."""

    name: str
    """The name asked for; empty for a single needle."""
    needle_span: Span
    """The needle's text."""
    question_span: Span
    """The question; its end is a multiple of the chunk size."""
    answer_span: Span
    """The answer; it starts where the question ends."""


class NeedleRow(NamedTuple):
    """A training row: haystack, needles, questions and answers."""

    input_ids: np.ndarray
    """Content tokens, int64, shape (length,)."""
    answer_mask: np.ndarray
    """True at the tokens of answers (not one before, where they are predicted), bool, (length,)."""
    questions: tuple[AskedNeedle, ...]
    """What is asked, in the order of the row."""


class NeedleQuestion(NamedTuple):
    """A question about the context of an evaluation example."""

    input_ids: np.ndarray
    """Haystack and then the question, whole chunks, int64, shape (num_tokens,)."""
    answer_ids: np.ndarray
    """The tokens that must follow, int64, shape (num_answer_tokens,)."""
    name: str
    """The name asked for; empty for a single needle."""
    needle_span: Span
    """The needle's text in the context."""
    needle_chunks: tuple[int, ...]
    """The chunks of the context that hold tokens of the value."""
    depth: float
    """Where the needle is: 0 at the start of the context, 1 at its end."""


class NeedleExample(NamedTuple):
    """A context with needles, and questions, each to be asked alone right after the context."""

    context_ids: np.ndarray
    """Content tokens, whole chunks, int64, shape (num_tokens,)."""
    questions: tuple[NeedleQuestion, ...]
    """The questions; all of one length, that of every example of its task and tokenizer."""


@dataclass(frozen=True)
class NeedleTask:
    """What is hidden and what is asked; every random choice follows from a seed and an index."""

    kind: Literal["single", "multi"] = "single"
    """``single``: one pass key without a name. ``multi``: keys with names."""
    num_keys: int = 1
    """Needles hidden in a row; 1 for ``single``."""
    num_questions: int = 1
    """Questions of a row; every key is asked for before any is asked for again."""
    num_digits: int = 5
    """Decimal digits of a value; the first may be 0."""
    num_names: int = len(NAMES)
    """How many of ``NAMES``, from the front, are in use; ``single`` uses none."""
    question_zone: float = 0.5
    """Share of a training row, at its end, over which the questions spread."""
    template: NeedleTemplate | None = None
    """The texts; ``None`` for ``SINGLE`` or ``MULTI``, whichever the kind is."""

    def __post_init__(self) -> None:
        if self.kind not in ("single", "multi"):
            raise ValueError(f"kind is {self.kind!r}; it must be 'single' or 'multi'")
        check_range("num_names", self.num_names, 1, len(NAMES))
        check_range("num_keys", self.num_keys, 1, self.num_names if self.kind == "multi" else 1)
        check_range("num_questions", self.num_questions, 1, float("inf"))
        check_range("num_digits", self.num_digits, 1, 18)
        check_range("question_zone", self.question_zone, 0, 1)
        if self.num_keys > 10**self.num_digits:
            raise ValueError(
                f"{self.num_keys} different values need more than {self.num_digits} digits"
            )
        if self.kind == "multi" and not self.texts.has_name:
            raise ValueError(
                f"needle and question of kind 'multi' must have {{name}}: {self.texts}"
            )

    @property
    def texts(self) -> NeedleTemplate:
        """The texts in use."""
        return self.template or (SINGLE if self.kind == "single" else MULTI)

    def training_row(
        self,
        corpus: Corpus,
        *,
        seed: int,
        index: int,
        length: int,
        chunk_size: int,
        split: Split = "train",
    ) -> NeedleRow:
        """Return training row ``index``: needles, then questions with their answers.

        Args:
            corpus: the haystack and the tokenizer.
            seed: the run's seed, 0 or more.
            index: the row's number, 0 or more.
            length: content tokens of the row (T).
            chunk_size: content tokens of a chunk (S).
            split: which text the haystack is made of.

        Raises:
            ValueError: the largest needles, questions and answers of the task do not fit in
                ``length``, or an argument is out of range.
        """
        rng = generator(seed, index, TRAINING if split == "train" else VALIDATION)
        check_range("chunk_size", chunk_size, 1, length)
        encoder, sizes = _encoder(self, corpus.tokenizer)
        ends = question_ends(
            rng,
            sizes,
            num_questions=self.num_questions,
            length=length,
            chunk_size=chunk_size,
            zone=self.question_zone,
        )
        needles = encoder.draw(rng, self.num_keys)
        asked = _ask(rng, needles, self.num_questions)
        starts = place(
            rng,
            [len(needle.ids) for needle in needles],
            space=int(ends[0]) - len(needles[asked[0]].question),
        )
        ids = corpus.haystack(rng, length, split)
        _write(needles, starts, ids)
        pairs = zip(asked, ends.tolist(), strict=True)
        questions = tuple(_asked(needles[number], starts[number], end) for number, end in pairs)
        mask = np.zeros(length, dtype=np.bool_)
        for number, question in zip(asked, questions, strict=True):
            ids[slice(*question.question_span)] = needles[number].question
            ids[slice(*question.answer_span)] = needles[number].answer
            mask[slice(*question.answer_span)] = True
        return NeedleRow(ids, mask, questions)

    def evaluation_example(
        self,
        corpus: Corpus,
        *,
        seed: int,
        index: int,
        length: int,
        chunk_size: int,
        depth: float | None = None,
    ) -> NeedleExample:
        """Return evaluation example ``index``, its haystack from the held-out split.

        Args:
            corpus: the haystack and the tokenizer.
            seed: the evaluation's seed, 0 or more.
            index: the example's number, 0 or more.
            length: content tokens of the context and one question; a multiple of ``chunk_size``.
            chunk_size: content tokens of a chunk (S).
            depth: ``None``: the needles are anywhere, and ``num_questions`` of them (but each only
                once) are asked for. From 0 (start of the context) to 1 (its end): one needle is
                asked for, which is at that depth, or right beside another needle that is there; the
                others are anywhere.

        Raises:
            ValueError: ``length`` is no multiple of ``chunk_size`` or too short, or an argument is
                out of range.
        """
        rng = generator(seed, index, EVALUATION)
        check_range("chunk_size", chunk_size, 1, length)
        encoder, sizes = _encoder(self, corpus.tokenizer)
        num_context = context_length(sizes, length=length, chunk_size=chunk_size)
        needles = encoder.draw(rng, self.num_keys)
        needle_sizes = [len(needle.ids) for needle in needles]
        starts = place(rng, needle_sizes, space=num_context)
        asked = _ask(rng, needles, min(self.num_questions, len(needles)))
        if depth is not None:
            check_range("depth", depth, 0, 1)
            asked = asked[:1]
            target = round(depth * (num_context - needle_sizes[asked[0]]))
            starts = move(starts, needle_sizes, asked[0], target=target)
        ids = corpus.haystack(rng, length, "held_out")
        _write(needles, starts, ids)
        questions = tuple(
            _question(needles[number], starts[number], ids[num_context:], num_context, chunk_size)
            for number in asked
        )
        return NeedleExample(ids[:num_context], questions)


# Rows of a run share one encoder: it encodes tens of texts, a row only its values.
@lru_cache(maxsize=16)
def _encoder(task: NeedleTask, tokenizer: PreTrainedTokenizerBase) -> tuple[NeedleEncoder, Sizes]:
    encoder = NeedleEncoder(
        task.texts,
        tokenizer,
        names=NAMES[: task.num_names] if task.kind == "multi" else ("",),
        num_digits=task.num_digits,
    )
    return encoder, encoder.largest(task.num_keys)


def score_answer(
    generated_ids: Sequence[int] | np.ndarray | torch.Tensor,
    answer_ids: Sequence[int] | np.ndarray | torch.Tensor,
) -> bool:
    """Whether the generated tokens, shape (num_tokens,), are the answer's: as many, each equal."""
    generated = [int(token) for token in generated_ids]
    return generated == [int(token) for token in answer_ids]


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """Return the random numbers of item ``index`` of a stream; raise ValueError below 0."""
    check_range("seed", seed, 0, float("inf"))
    check_range("index", index, 0, float("inf"))
    return np.random.default_rng([seed, index, stream])


def _ask(rng: np.random.Generator, needles: list[Needle], num_questions: int) -> list[int]:
    """Return which needle each question asks for: every one before any is asked for again."""
    asked: list[int] = []
    while len(asked) < num_questions:
        order = rng.permutation(len(needles)).tolist()
        # An answer given just before is in reach of the sliding window.
        asked += order if asked[-1:] != order[:1] else order[::-1]
    return asked[:num_questions]


def _write(needles: list[Needle], starts: list[int], ids: np.ndarray) -> None:
    for needle, start in zip(needles, starts, strict=True):
        ids[start : start + len(needle.ids)] = needle.ids


def _asked(needle: Needle, start: int, question_end: int) -> AskedNeedle:
    return AskedNeedle(
        name=needle.name,
        needle_span=(start, start + len(needle.ids)),
        question_span=(question_end - len(needle.question), question_end),
        answer_span=(question_end, question_end + len(needle.answer)),
    )


def _question(
    needle: Needle, start: int, padding: np.ndarray, num_context: int, chunk_size: int
) -> NeedleQuestion:
    input_ids = padding.copy()
    input_ids[len(input_ids) - len(needle.question) :] = needle.question
    value_start = start + needle.value_start
    last_chunk = (value_start + len(needle.answer) - 1) // chunk_size
    return NeedleQuestion(
        input_ids=input_ids,
        answer_ids=needle.answer,
        name=needle.name,
        needle_span=(start, start + len(needle.ids)),
        needle_chunks=tuple(range(value_start // chunk_size, last_chunk + 1)),
        depth=start / max(num_context - len(needle.ids), 1),
    )


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError for a value outside ``low`` to ``high``."""
    # Written so that NaN fails too.
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be from {low} to {high}")
