"""bAbI stories in books of any length: exact match of the generated answer, task by task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from drt.checkpoints import Checkpoint
from drt.data import BabiStories, Corpus, NeedleExample, load_corpus, score_answer
from drt.data.babi import stories_of
from drt.data.reading import check_path
from drt.evaluation.intervals import Interval, wilson_interval
from drt.evaluation.needles import (
    check_sizes,
    common_chunk_size,
    first_token,
    temporary_memory,
    tokens_needed,
)
from drt.evaluation.progress import token_bar
from drt.evaluation.reading import check_length, start_reading
from drt.tables import ruled


class StoryAnswer(NamedTuple):
    """How a model did on one story."""

    exact_match: bool
    """Whether every token of the answer was right."""
    recall: float | None
    """Share of the supporting facts' chunks that some group retrieved at the question's end; None
    without retrieval, and where the model's chunks are not those of the question."""


class BabiScore(NamedTuple):
    """How a model did on one task at one length."""

    task: int
    """The bAbI task, 1 on."""
    length: int
    """Content tokens of context and question."""
    n: int
    """Stories asked about; fewer than wanted where not so many fit."""
    num_right: int
    """Those whose whole generated answer was right."""
    exact_match: float
    """Their share."""
    exact_match_interval: Interval
    """Wilson's 95 % interval of that share."""
    recall: float | None
    """Mean share of the supporting facts' chunks that were retrieved; None without retrieval."""


@dataclass(frozen=True)
class BabiTask:
    """bAbI stories scattered in a haystack, a question at its end, tasks scored one by one."""

    facts: str
    """Stories: a .jsonl or .jsonl.xz file, rows with task, facts, question, answer, supporting."""
    tasks: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """The bAbI tasks, by number."""
    lengths: list[int] = field(default_factory=lambda: [4096])
    """Content tokens of context and question."""
    corpus: str | None = None
    """Haystack: a text file, folder, .jsonl or .jsonl.xz; None = the Python installation's text."""
    n: int = 50
    """Stories of each task at each length, all of them different ones; fewer if fewer fit."""
    seed: int = 1
    """Seed of the examples."""
    memory: Literal["host", "disk"] = "host"
    """Where a DRT keeps chunks while a context is read: in RAM, or in a temporary folder."""
    memory_dtype: Literal["computed", "float32", "bfloat16", "int8"] = "computed"
    """How a DRT stores keys and values; computed = in the precision of the run."""
    segment_size: int = 4096
    """Tokens of one forward while a context is read."""
    chunk_size: int | None = None
    """Questions end at multiples of this many tokens; None = the model's, 64 if it has none."""
    beyond_limit: bool = False
    """Whether rotary positions may go on beyond a model's max_position_embeddings."""
    begin_with_bos: bool = False
    """Whether to read the model's bos_token_id before each context, as Llama models need it; a DRT
    gets none."""

    def __post_init__(self) -> None:
        if not self.lengths or not self.tasks:
            raise ValueError(f"tasks is {self.tasks} and lengths {self.lengths}: neither may be []")
        if self.n < 1:
            raise ValueError(f"n is {self.n}; it must be 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")
        check_sizes(chunk_size=self.chunk_size, segment_size=self.segment_size)

    def check_data(self) -> None:
        """Raise ValueError if there are no such stories of a task, or no text at `corpus`."""
        stories_of(self.facts, self.tasks)
        if self.corpus is not None:
            check_path(Path(self.corpus))

    def check_model(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """Raise the ValueErrors of `evaluate`."""
        self._check_lengths(config, load_corpus(self.corpus, tokenizer), self._chunk_size(config))

    def evaluate(self, checkpoint: Checkpoint, *, title: str) -> dict[str, Any]:
        """Score a model.

        Args:
            checkpoint: the model and its tokenizer.
            title: what the progress bar is called.

        Returns:
            `scores` (a mapping of `BabiScore` for each length and task), `precision` and
            `settings`.

        Raises:
            ValueError: no story of a task fits a length, the model has too few positions, or no
                such first token.
        """
        corpus = load_corpus(self.corpus, checkpoint.tokenizer)
        size = self._chunk_size(checkpoint.model.config)
        cells = [(length, task) for length in sorted(set(self.lengths)) for task in self.tasks]
        self._check_lengths(checkpoint.model.config, corpus, size)
        scores = []
        # Long contexts take the time: the bar counts tokens read.
        total = sum(self._count(corpus, *cell, size) * cell[0] for cell in cells)
        with token_bar(title, total) as bar:
            for length, task in cells:
                answers = []
                for index in range(self._count(corpus, length, task, size)):
                    example = self._stories(task).evaluation_example(
                        corpus, seed=self.seed, index=index, length=length, chunk_size=size
                    )
                    with checkpoint.autocast():
                        answers.append(self._ask(checkpoint.model, example, size))
                    bar.update(length)
                scores.append(_score(task, length, answers)._asdict())
        return {"scores": scores, "precision": checkpoint.precision, "settings": asdict(self)}

    def _chunk_size(self, config: PreTrainedConfig) -> int:
        return self.chunk_size or common_chunk_size([config])

    def _check_lengths(self, config: PreTrainedConfig, corpus: Corpus, chunk_size: int) -> None:
        """Refuse a length that fits a task or the model not, before any other is asked."""
        for length in self.lengths:
            for task in self.tasks:
                example = self._stories(task).evaluation_example(
                    corpus, seed=self.seed, index=0, length=length, chunk_size=chunk_size
                )
                needed = tokens_needed(example) + len(self._first(config))
                check_length(config, needed, beyond_limit=self.beyond_limit)

    def _first(self, config: PreTrainedConfig) -> list[int]:
        token = first_token(config, wanted=self.begin_with_bos)
        return [] if token is None else [token]

    def _stories(self, task: int) -> BabiStories:
        return BabiStories(facts=self.facts, tasks=[task])

    def _count(self, corpus: Corpus, length: int, task: int, chunk_size: int) -> int:
        stories = self._stories(task)
        there = stories.num_fitting(corpus.tokenizer, length=length, chunk_size=chunk_size)
        return min(self.n, there)

    def _ask(self, model: Any, example: NeedleExample, chunk_size: int) -> StoryAnswer:
        (question,), first = example.questions, self._first(model.config)
        with start_reading(
            model,
            segment_size=self.segment_size,
            new_memory=partial(temporary_memory, self.memory, self.memory_dtype),
            beyond_limit=self.beyond_limit,
        ) as reading:
            reading.read(torch.tensor(first, dtype=torch.int64))
            reading.read(torch.as_tensor(example.context_ids))
            ids = torch.as_tensor(question.input_ids)
            answer = reading.answer(ids, len(question.answer_ids))
        right = score_answer(answer.token_ids, question.answer_ids)
        agree = not first and chunk_size == getattr(model.config, "chunk_size", None)
        if not answer.retrievals or not agree:
            return StoryAnswer(right, None)
        # What one group finds may be what tells the next where to look: together they count.
        found = {int(chunk) for r in answer.retrievals for chunk in r.indices.flatten()}
        needed = question.needle_chunks
        return StoryAnswer(right, sum(chunk in found for chunk in needed) / len(needed))

    @staticmethod
    def table(records: dict[str, dict[str, Any]]) -> str:
        """The records of several models as plain text: tasks down, lengths across.

        Args:
            records: model name -> what `evaluate` returned.
        """
        rows = [row for record in records.values() for row in record["scores"]]
        lengths = sorted({row["length"] for row in rows})
        lines = [["model", "task", "figure", *(f"{length:,}" for length in lengths)]]
        for name, record in records.items():
            for task in dict.fromkeys(row["task"] for row in record["scores"]):
                cells = {row["length"]: row for row in record["scores"] if row["task"] == task}
                for figure, texts in _figures(cells):
                    shown = [texts.get(length, "-") for length in lengths]
                    lines.append([name, f"qa{task}", figure, *shown])
        return ruled(lines, num_left=3)


def _score(task: int, length: int, answers: list[StoryAnswer]) -> BabiScore:
    right, count = sum(answer.exact_match for answer in answers), len(answers)
    recalls = [answer.recall for answer in answers if answer.recall is not None]
    return BabiScore(
        task=task,
        length=length,
        n=count,
        num_right=right,
        exact_match=right / count,
        exact_match_interval=wilson_interval(right, count),
        recall=sum(recalls) / len(recalls) if recalls else None,
    )


def _figures(cells: dict[int, dict[str, Any]]) -> Iterable[tuple[str, dict[int, str]]]:
    yield "exact match", {n: f"{row['exact_match']:.3f} of {row['n']}" for n, row in cells.items()}
    intervals = {n: row["exact_match_interval"] for n, row in cells.items()}
    yield "  95 %", {n: f"{low:.3f}-{high:.3f}" for n, (low, high) in intervals.items()}
    recalls = {n: row["recall"] for n, row in cells.items() if row["recall"] is not None}
    if recalls:
        yield "  recall@K", {n: f"{recall:.3f}" for n, recall in recalls.items()}
