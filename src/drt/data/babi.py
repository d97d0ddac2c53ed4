"""bAbI stories scattered among the sentences of a haystack, as BABILong does (arXiv 2406.10149).

A story is a list of facts, a question and an answer that some of the facts support (Weston et al.
2015, arXiv 1502.05698). Its facts keep their order; each stands between two sentences of the
haystack. The question ends where a chunk ends and the answer comes right after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from drt.data.corpora import Corpus, Split
from drt.data.needle_rows import (
    NeedleExample,
    NeedleRow,
    asked_needle,
    needle_question,
    write_question,
)
from drt.data.needle_texts import Fact, Query
from drt.data.needles import (
    EVALUATION,
    TRAINING,
    VALIDATION,
    check_chunk_size,
    check_range,
    generator,
)
from drt.data.placement import Sizes, context_length, question_ends
from drt.data.reading import json_rows
from drt.data.sentences import sentence_borders
from drt.data.tokenization import encode_batch

QUESTION = " Question: {question} Answer:"
"""The text that a story's answer follows."""


class Story(NamedTuple):
    """Facts, a question about them, and its answer."""

    task: int
    """Which of the bAbI tasks it belongs to, from 1 on."""
    facts: tuple[str, ...]
    """Sentences, in the order in which things happen."""
    question: str
    """What is asked after all of them."""
    answer: str
    """The right answer."""
    supporting: tuple[int, ...]
    """Which facts, by number, the answer follows from."""


class EncodedStory(NamedTuple):
    """A story as tokens."""

    facts: list[np.ndarray]
    """Each fact with the blank before it, int64, (num_tokens,)."""
    query: Query
    """Question, answer and supporting facts."""

    @property
    def sizes(self) -> Sizes:
        """What must fit in a row."""
        hidden = sum(len(fact) for fact in self.facts)
        return Sizes(hidden, question=len(self.query.question), answer=len(self.query.answer))

    def num_needed(self, chunk_size: int) -> int:
        """The shortest row, in tokens, that has room for the story whatever its place."""
        return sum(-(-size // chunk_size) for size in self.sizes) * chunk_size


@dataclass(frozen=True)
class BabiStories:
    """Stories of bAbI tasks in haystacks; every random choice follows from a seed and an index."""

    facts: str
    """A .jsonl file, or .jsonl.xz, whose rows have task, facts, question, answer, supporting."""
    tasks: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """The tasks, by number, whose stories are told."""
    question_zone: float = 0.5
    """Share of a training row, at its end, in which the question is."""

    def __post_init__(self) -> None:
        check_range("question_zone", self.question_zone, 0, 1)
        if not self.tasks:
            raise ValueError("tasks is empty: at least one is needed")

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
        """Return training row ``index``: a story in a haystack, its question and answer.

        Args:
            corpus: the haystack and the tokenizer.
            seed: the run's seed, 0 or more.
            index: the row's number, 0 or more.
            length: content tokens of the row (T); of the stories that fit, one is drawn.
            chunk_size: content tokens of a chunk (S).
            split: which text the haystack is made of.

        Raises:
            ValueError: no story fits in ``length`` with an answer that fits in a chunk, or an
                argument is out of range.
        """
        rng = generator(seed, index, TRAINING if split == "train" else VALIDATION)
        stories = self.fitting(corpus.tokenizer, length=length, chunk_size=chunk_size)
        story = stories[int(rng.integers(len(stories)))]
        (end,) = question_ends(
            rng,
            story.sizes,
            num_questions=1,
            length=length,
            chunk_size=chunk_size,
            zone=self.question_zone,
        ).tolist()
        space = end - story.sizes.question
        haystack = corpus.haystack(rng, length - story.sizes.hidden, split)
        before, after = np.split(haystack, [space - story.sizes.hidden])
        context, starts = scatter(rng, story.facts, before, corpus.tokenizer)
        ids, mask = np.concatenate((context, after)), np.zeros(length, dtype=np.bool_)
        write_question(story.query, end, ids, mask)
        return NeedleRow(ids, mask, (asked_needle(story.query, _facts(story), starts, end),))

    def evaluation_example(
        self, corpus: Corpus, *, seed: int, index: int, length: int, chunk_size: int
    ) -> NeedleExample:
        """Return evaluation example ``index``, its haystack from the held-out split.

        Args:
            corpus: the haystack and the tokenizer.
            seed: the evaluation's seed, 0 or more.
            index: the example's number, 0 or more; examples 0 to ``num_fitting`` - 1 have
                different stories.
            length: content tokens of the context and the question; a multiple of ``chunk_size``.
            chunk_size: content tokens of a chunk (S).

        Raises:
            ValueError: no story fits in ``length``, ``length`` is no multiple of ``chunk_size``, or
                an argument is out of range.
        """
        rng = generator(seed, index, EVALUATION)
        stories = self.fitting(corpus.tokenizer, length=length, chunk_size=chunk_size)
        order = np.random.default_rng([seed, EVALUATION]).permutation(len(stories))
        story = stories[order[index % len(stories)]]
        num_context = context_length(story.sizes, length=length, chunk_size=chunk_size)
        haystack = corpus.haystack(rng, length - story.sizes.hidden, "held_out")
        before, padding = np.split(haystack, [num_context - story.sizes.hidden])
        context, starts = scatter(rng, story.facts, before, corpus.tokenizer)
        question = needle_question(
            story.query,
            _facts(story),
            starts,
            padding=padding,
            num_context=num_context,
            chunk_size=chunk_size,
        )
        return NeedleExample(context, (question,))

    def num_fitting(
        self, tokenizer: PreTrainedTokenizerBase, *, length: int, chunk_size: int
    ) -> int:
        """How many stories have room in ``length`` tokens; raise ValueError if none has."""
        return len(self.fitting(tokenizer, length=length, chunk_size=chunk_size))

    def fitting(
        self, tokenizer: PreTrainedTokenizerBase, *, length: int, chunk_size: int
    ) -> list[EncodedStory]:
        """The stories that have room in ``length`` tokens, in the order of the file.

        Those whose answer has more tokens than a chunk are none of them.

        Raises:
            ValueError: there is none, or ``chunk_size`` is out of range.
        """
        check_chunk_size(chunk_size, length)
        return _fitting(self.facts, tuple(self.tasks), tokenizer, length, chunk_size)


def load_stories(path: str | Path) -> list[Story]:
    """Read the stories of a ``.jsonl`` file, or of a ``.jsonl.xz``.

    Raises:
        ValueError: there is no such file, it is damaged, or a row is not a story.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no stories at {path}: there is no such file")
    stories = []
    for number, row in json_rows(path):
        try:
            stories.append(_story(row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, is not a story: {error!r}") from error
    return stories


def scatter(
    rng: np.random.Generator,
    facts: Sequence[np.ndarray],
    haystack: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[np.ndarray, list[int]]:
    """Put facts, in their order, between random sentences of a haystack.

    A border may take several facts, one after the other. A haystack in which no sentence begins
    takes all of them at its start.

    Args:
        rng: the source of the places.
        facts: token ids, each of shape (num_tokens,).
        haystack: token ids, shape (num_tokens,).
        tokenizer: what the tokens are of.

    Returns:
        The text of both, int64, and where each fact starts in it.
    """
    borders = sentence_borders(haystack, tokenizer)
    places = np.sort(rng.choice(borders, size=len(facts)))
    sizes = [len(fact) for fact in facts]
    starts = places + np.concatenate([[0], np.cumsum(sizes)])[: len(facts)]
    pieces = np.split(haystack, places)
    text = [part for pair in zip(pieces, facts, strict=False) for part in pair]
    return np.concatenate([*text, pieces[-1]]), starts.tolist()


def _story(row: dict[str, object]) -> Story:
    facts, supporting = row["facts"], row["supporting"]
    if not isinstance(facts, list) or not isinstance(supporting, list):
        raise TypeError("facts and supporting must be lists")
    wrong = [number for number in supporting if number not in range(len(facts))]
    if wrong or not supporting:
        raise ValueError(f"supporting is {supporting}; there are {len(facts)} facts")
    question, answer = str(row["question"]), str(row["answer"])
    return Story(int(str(row["task"])), tuple(facts), question, answer, tuple(supporting))


# Rows of a run share them. A file that changes under a run's hands is not read again.
@lru_cache(maxsize=8)
def _encoded(
    path: str, tasks: tuple[int, ...], tokenizer: PreTrainedTokenizerBase
) -> list[EncodedStory]:
    return encode_stories(stories_of(path, tasks), tokenizer)


def stories_of(path: str, tasks: Sequence[int]) -> list[Story]:
    """The stories of some tasks in a file; ValueError if one of them has none there."""
    stories = load_stories(path)
    missing = sorted(set(tasks) - {story.task for story in stories})
    if missing:
        raise ValueError(f"{path} has no stories of tasks {missing}")
    return [story for story in stories if story.task in tasks]


# Gone through once for all rows of a stage, or all questions of a length.
@lru_cache(maxsize=64)
def _fitting(
    path: str,
    tasks: tuple[int, ...],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    chunk_size: int,
) -> list[EncodedStory]:
    stories = _encoded(path, tasks, tokenizer)
    answerable = [story for story in stories if story.sizes.answer <= chunk_size]
    fitting = [story for story in answerable if story.num_needed(chunk_size) <= length]
    if fitting:
        return fitting
    if not answerable:
        shortest = min(story.sizes.answer for story in stories)
        raise ValueError(
            f"no story of tasks {list(tasks)} fits: the shortest answer has {shortest} tokens; "
            f"chunk_size is {chunk_size}"
        )
    least = min(story.num_needed(chunk_size) for story in answerable)
    raise ValueError(
        f"no story of tasks {list(tasks)} fits: the shortest needs {least} tokens at "
        f"chunk_size {chunk_size}; length is {length}"
    )


def encode_stories(
    stories: Sequence[Story], tokenizer: PreTrainedTokenizerBase
) -> list[EncodedStory]:
    """Return stories as tokens: each fact, question and answer on its own."""
    wanted: dict[str, None] = {}
    for story in stories:
        wanted |= dict.fromkeys(_texts(story))
    # Facts come again and again, in this story and others.
    encoded = encode_batch(tokenizer, list(wanted))
    ids = {
        text: np.array(found, dtype=np.int64) for text, found in zip(wanted, encoded, strict=True)
    }
    return [_encode_story(story, [ids[text] for text in _texts(story)]) for story in stories]


def _texts(story: Story) -> list[str]:
    facts = [f" {fact}" for fact in story.facts]
    return [*facts, QUESTION.replace("{question}", story.question), f" {story.answer}"]


def _encode_story(story: Story, texts: list[np.ndarray]) -> EncodedStory:
    *facts, question, answer = texts
    query = Query(
        name=story.question,
        facts=story.supporting,
        question=question,
        answer=answer,
        is_value=np.ones(len(answer), dtype=np.bool_),
    )
    return EncodedStory(facts, query)


def _facts(story: EncodedStory) -> list[Fact]:
    return [Fact(ids, (0, len(ids))) for ids in story.facts]
