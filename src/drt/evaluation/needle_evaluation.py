"""Needle evaluations as tasks: lengths, depths and seeds in; a record, table and figure out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from drt.checkpoints import Checkpoint
from drt.data import MULTI_TASK, Corpus, NeedleTask, load_corpus
from drt.data.reading import check_path
from drt.data.tokenization import tokenizer_fingerprint
from drt.evaluation.needles import (
    NeedleScore,
    check_sizes,
    common_chunk_size,
    evaluate_needles,
    first_token,
    pooled,
    temporary_memory,
    tokens_needed,
)
from drt.evaluation.progress import token_bar
from drt.evaluation.reading import check_length, position_limit
from drt.tables import ruled


@dataclass(frozen=True)
class NeedleEvaluationTask:
    """Needles at several lengths: exact match of the generated answer, recall of its chunks."""

    task: NeedleTask = field(default_factory=NeedleTask)
    """What is hidden and asked."""
    lengths: list[int] = field(default_factory=lambda: [1024])
    """Content tokens of context and question."""
    depths: list[float] | None = None
    """Where the needle is, each from 0 (start of the context) to 1 (its end); None = anywhere. Of
    several facts that an answer needs it is where the first one is, and the others are anywhere."""
    questions: int = 64
    """Questions at each length, depth and seed."""
    long_from: int = 262144
    """Lengths above this many tokens get `questions_longest`."""
    questions_longest: int = 8
    """Questions at each longer length, depth and seed."""
    seeds: list[int] = field(default_factory=lambda: [1])
    """Seeds of the examples; their questions are counted together."""
    corpus: str | None = None
    """Haystack: a text file, folder, .jsonl or .jsonl.xz; None = the Python installation's text."""
    memory: Literal["host", "disk"] = "host"
    """Where a DRT keeps chunks while a context is read: in RAM, or in a temporary folder."""
    memory_dtype: Literal["computed", "float32", "bfloat16", "int8"] = "computed"
    """How a DRT stores keys and values; computed = in the precision of the run."""
    segment_size: int = 4096
    """Tokens of one forward while a context is read."""
    chunk_size: int | None = None
    """Questions end at multiples of this many tokens; None = chunk_size of the compared models,
    their least common multiple where it differs, 64 for models without chunks."""
    beyond_limit: Literal["refuse", "leave_out", "go_on"] = "refuse"
    """What to do at lengths beyond a model's max_position_embeddings: an error, no score, or go on
    with positions it was not trained on, which only rotary ones can."""
    begin_with_bos: bool = False
    """Whether to read the model's bos_token_id before each context, as Llama models need it; a DRT
    gets none."""

    def __post_init__(self) -> None:
        for name in ("lengths", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: at least one is needed")
        if len(set(self.seeds)) < len(self.seeds):
            # The same questions twice would make intervals too narrow.
            raise ValueError(f"seeds must be different numbers, got {self.seeds}")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be at least 0, got {min(self.seeds)}")
        if self.depths == []:
            raise ValueError("depths is empty: leave it out for needles anywhere")
        for name, values in (
            ("lengths", self.lengths),
            ("questions", [self.questions]),
            ("questions_longest", [self.questions_longest]),
        ):
            if min(values) < 1:
                raise ValueError(f"{name} must be at least 1, got {min(values)}")
        for depth in self.depths or ():
            if not 0 <= depth <= 1:
                raise ValueError(f"depths must be from 0 to 1, got {depth}")
        if self.depths and self.task.kind == "variables":
            raise ValueError(f"depths is {self.depths}: facts of 'variables' keep their order")
        check_sizes(chunk_size=self.chunk_size, segment_size=self.segment_size)

    def check_data(self) -> None:
        """Raise ValueError if there is no text at `corpus`."""
        if self.corpus is not None:
            check_path(Path(self.corpus))

    def check_model(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """Raise the ValueErrors of `evaluate`."""
        self._readable_lengths(config, load_corpus(self.corpus, tokenizer))

    def evaluate(self, checkpoint: Checkpoint, *, title: str) -> dict[str, Any]:
        """Score a model.

        Args:
            checkpoint: the model and its tokenizer.
            title: what the progress bar is called.

        Returns:
            `scores` (a mapping of `NeedleScore` for each length and depth), `left_out` (lengths the
            model cannot read), and what they were measured with.

        Raises:
            ValueError: a length that fits neither the task nor the model, or no such first token.
        """
        model = checkpoint.model
        corpus = load_corpus(self.corpus, checkpoint.tokenizer)
        with checkpoint.autocast():
            scores = self.score(model, corpus, title=title)
        limit = position_limit(model.config)
        done = {score.length for score in scores}
        return {
            "scores": as_rows(scores),
            "left_out": [length for length in sorted(self.lengths) if length not in done],
            "chunk_size": self._chunk_size(model.config),
            "position_limit": None if limit is None else limit.num_tokens,
            "beyond_limit": limit is not None
            and any(
                self._needed(model.config, corpus, length) > limit.num_tokens for length in done
            ),
            "first_token_id": self._first_token(model.config),
            "haystack_tokens": corpus.num_tokens("held_out"),
            "tokenizer": tokenizer_fingerprint(checkpoint.tokenizer),
            "precision": checkpoint.precision,
            "parameters": model.num_parameters(),
            "settings": asdict(self),
        }

    def score(self, model: Any, corpus: Corpus, *, title: str) -> list[NeedleScore]:
        """Score a model at every length and depth, shortest first, with a progress bar.

        Args:
            model: any causal language model that `start_reading` takes.
            corpus: haystack and tokenizer.
            title: what the progress bar is called.

        Raises:
            ValueError: as `evaluate`.
        """
        lengths = self._readable_lengths(model.config, corpus)
        points = [(length, depth) for length in lengths for depth in self.depths or [None]]
        scores = []
        # Long contexts take the time: the bar counts tokens read.
        total = sum(self._contexts(model, corpus, length) * length for length, _ in points)
        with token_bar(title, total) as bar:
            for length, depth in points:
                bar.set_postfix(length=length, refresh=False)
                score = partial(self._score_at, model, corpus, length, depth, bar)
                scores.append(pooled([score(seed) for seed in self.seeds]))
        return scores

    def _score_at(
        self, model: Any, corpus: Corpus, length: int, depth: float | None, bar: Any, seed: int
    ) -> NeedleScore:
        return evaluate_needles(
            model,
            corpus,
            task=self.task,
            length=length,
            num_questions=self._questions_at(length),
            seed=seed,
            depth=depth,
            chunk_size=self._chunk_size(model.config),
            segment_size=self.segment_size,
            new_memory=partial(temporary_memory, self.memory, self.memory_dtype),
            beyond_limit=self.beyond_limit == "go_on",
            first_token_id=self._first_token(model.config),
            on_context=bar.update,
        )

    def _readable_lengths(self, config: PreTrainedConfig, corpus: Corpus) -> list[int]:
        """The lengths that the model has positions for, found out before anything is read."""
        lengths = []
        for length in sorted(set(self.lengths)):
            needed = self._needed(config, corpus, length)
            try:
                check_length(config, needed, beyond_limit=self.beyond_limit == "go_on")
            except ValueError:
                if self.beyond_limit != "leave_out":
                    raise
            else:
                lengths.append(length)
        return lengths

    def _needed(self, config: PreTrainedConfig, corpus: Corpus, length: int) -> int:
        """Tokens that the model reads for an example, the first and its own answer among them."""
        example = self._first_example(corpus, self._chunk_size(config), length)
        return tokens_needed(example) + (self._first_token(config) is not None)

    def _first_example(self, corpus: Corpus, chunk_size: int, length: int) -> Any:
        return self.task.evaluation_example(
            corpus,
            seed=self.seeds[0],
            index=0,
            length=length,
            chunk_size=chunk_size,
            depth=self.depths[0] if self.depths else None,
        )

    def _contexts(self, model: Any, corpus: Corpus, length: int) -> int:
        """Contexts read at a length and depth; questions of one example share a context."""
        # As many questions at every length: the shortest context is the cheapest to make.
        size = self._chunk_size(model.config)
        example = self._first_example(corpus, size, min(self.lengths))
        contexts = -(-self._questions_at(length) // len(example.questions))
        return contexts * len(self.seeds)

    def _questions_at(self, length: int) -> int:
        return self.questions_longest if length > self.long_from else self.questions

    def _chunk_size(self, config: PreTrainedConfig) -> int:
        return self.chunk_size or common_chunk_size([config])

    def _first_token(self, config: PreTrainedConfig) -> int | None:
        return first_token(config, wanted=self.begin_with_bos)

    @staticmethod
    def table(records: dict[str, dict[str, Any]]) -> str:
        """The records of several models as plain text: figures by length.

        Args:
            records: model name -> what `evaluate` returned.
        """
        by_model = {
            name: {record["settings"]["task"]["kind"]: record["scores"]}
            for name, record in records.items()
        }
        return "\n".join([format_scores(by_model), *_notes(records)])

    @staticmethod
    def draw(records: dict[str, dict[str, Any]], path: Path) -> None:
        """Draw the records of several models: length by depth, or exact match by length.

        Args:
            records: model name -> what `evaluate` returned.
            path: where to; its ending chooses the format.
        """
        from drt.evaluation.needle_figure import draw

        draw({name: record["scores"] for name, record in records.items()}, path)


@dataclass(frozen=True)
class MultiNeedleEvaluationTask(NeedleEvaluationTask):
    """Several named needles in a context, each asked for by its name."""

    task: NeedleTask = MULTI_TASK
    """What is hidden and asked."""


def as_rows(scores: Iterable[NeedleScore]) -> list[dict[str, Any]]:
    """The scores as JSON-ready mappings."""
    return [score._asdict() for score in scores]


def _notes(records: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """What makes the rows of a table less comparable than they look."""
    if len({record["tokenizer"] for record in records.values()}) > 1:
        yield "note: the models have different tokenizers, so their tokens are not the same text"
    for name, record in records.items():
        longest = max((row["length"] for row in record["scores"]), default=0)
        if longest > record["haystack_tokens"]:
            yield (
                f"note: the haystack of {name} has {record['haystack_tokens']:,} tokens, which "
                "longer contexts repeat"
            )
        limit = record["position_limit"]
        if record["beyond_limit"]:
            yield f"note: {name} was made for {limit:,} tokens and went on beyond"
        if record["left_out"]:
            lengths = ", ".join(f"{length:,}" for length in record["left_out"])
            yield f"note: {name} has positions for {limit:,} tokens: {lengths} left out"


def format_scores(models: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> str:
    """A plain-text table of exact match and recall by length.

    Args:
        models: model name -> name of a task -> mappings of `NeedleScore`.
    """
    rows = [row for tasks in models.values() for scores in tasks.values() for row in scores]
    lengths = sorted({row["length"] for row in rows})
    lines = [["model", "task", "figure", *(f"{length:,}" for length in lengths)]]
    for name, tasks in models.items():
        for task, scores in tasks.items():
            for label, cells in _figures(scores):
                lines.append([name, task, label, *(cells.get(each, "-") for each in lengths)])
    return ruled(lines, num_left=3)


def _figures(scores: list[dict[str, Any]]) -> Iterable[tuple[str, dict[int, str]]]:
    """The lines of one model and task: what it is, and its cell at each length."""
    for depth in dict.fromkeys(row.get("depth") for row in scores):
        rows = {row["length"]: row for row in scores if row.get("depth") == depth}
        at = "" if depth is None else f" @{depth:g}"
        yield f"exact{at or ' match'}", {n: f"{row['exact_match']:.3f}" for n, row in rows.items()}
        intervals = {n: row.get("exact_match_interval") for n, row in rows.items()}
        if any(intervals.values()):
            yield "  95 %", {n: f"{i[0]:.3f}-{i[1]:.3f}" for n, i in intervals.items() if i}
        yield "  questions", {n: str(row["n"]) for n, row in rows.items()}
        recalls = {n: row["recall"] for n, row in rows.items() if row["recall"] is not None}
        if recalls:
            yield f"recall@K{at}", {n: f"{value:.3f}" for n, value in recalls.items()}
