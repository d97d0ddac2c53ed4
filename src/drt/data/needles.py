"""Needle tasks: facts hidden in a haystack, and questions for them that call for retrieval.

A landmark closes every chunk of S tokens, and what is retrieved there serves the tokens that
follow. So a question ends where a chunk ends (the content index of its last token is S - 1 modulo
S) and its answer comes right after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from drt.data.chains import (
    HOPS,
    MAX_LETTERS,
    VARIABLES,
    ChainEncoder,
    SymbolKind,
    Symbols,
    check_chain_template,
    draw_assignments,
    draw_paths,
)
from drt.data.corpora import Corpus, Split
from drt.data.needle_rows import (
    NeedleExample,
    NeedleRow,
    asked_needle,
    needle_question,
    write_facts,
    write_question,
)
from drt.data.needle_texts import MULTI, NAMES, SINGLE, NeedleEncoder, NeedleTemplate
from drt.data.placement import Sizes, context_length, move, place, question_ends

NeedleKind = Literal["single", "multi", "hops", "variables"]
TEMPLATES: dict[str, NeedleTemplate] = {
    "single": SINGLE,
    "multi": MULTI,
    "hops": HOPS,
    "variables": VARIABLES,
}
MAX_HOPS = 16

# Rows of both splits, examples and mixtures share no random numbers at equal seed and index.
TRAINING, VALIDATION, EVALUATION, MIXTURE = range(4)


@dataclass(frozen=True)
class NeedleTask:
    """What is hidden and what is asked; every random choice follows from a seed and an index."""

    kind: NeedleKind = "single"
    """``single``: one pass key without a name. ``multi``: keys with names. ``hops``: chains of
    facts of which one name leads to the next, the path is asked. ``variables``: chains of variables
    that have one number, all of them are asked for."""
    num_keys: int = 1
    """Needles hidden in a row of kind ``multi``; 1 for the others."""
    num_questions: int = 1
    """Questions of a row; everything is asked for before anything is asked for again, and then an
    answer may still be in reach of a sliding window: the only one of ``single`` in short rows."""
    num_digits: int = 5
    """Decimal digits of a value (the first may be 0), or characters of a symbol of a chain."""
    num_names: int = len(NAMES)
    """How many of ``NAMES``, from the front, are in use; ``single`` uses none."""
    question_zone: float = 0.5
    """Share of a training row, at its end, over which the questions spread."""
    template: NeedleTemplate | None = None
    """The texts; ``None`` for those of the kind: ``SINGLE``, ``MULTI``, ``HOPS``, ``VARIABLES``."""
    num_queries: int = 1
    """Keys of kind ``multi`` that one question asks for, each time other ones; the answer has their
    values in the order of the question."""
    num_hops: int = 2
    """Facts of a chain of ``hops``, and symbols of the answer; of ``variables``, copies of the
    first variable, so that a chain has one fact and one variable more."""
    num_chains: int = 4
    """Chains hidden in a row of kind ``hops`` or ``variables``, the asked one among them."""
    symbols: SymbolKind = "names"
    """What the links of chains are: names, or random digits or letters."""

    def __post_init__(self) -> None:
        if self.kind not in TEMPLATES:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {list(TEMPLATES)}")
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
        self._check_queries()
        if self.is_chained:
            self._check_chains()
        else:
            self._check_unused("num_hops", "num_chains", "symbols")
        if self.kind == "single" or (self.is_chained and self.symbols != "names"):
            self._check_unused("num_names")
        if self.kind == "hops" and self.symbols == "names":
            self._check_unused("num_digits")

    def _check_queries(self) -> None:
        check_range("num_queries", self.num_queries, 1, self.num_keys)
        if self.num_queries > 1 and self.texts.question.count("{name}") != 1:
            raise ValueError(f"a question for several names has {{name}} once: {self.texts}")

    def _check_chains(self) -> None:
        check_chain_template(self.texts)
        check_range("num_hops", self.num_hops, 1, MAX_HOPS)
        check_range("num_chains", self.num_chains, 1, float("inf"))
        if self.symbols not in get_args(SymbolKind):
            raise ValueError(
                f"symbols is {self.symbols!r}; it must be one of {list(get_args(SymbolKind))}"
            )
        if self.symbols == "letters":
            check_range("num_digits, the letters of a symbol,", self.num_digits, 1, MAX_LETTERS)
        needed, there = self.num_chains * (self.num_hops + 1), self.link_symbols.count
        if needed > there:
            raise ValueError(
                f"{self.num_chains} chains of {self.num_hops} hops need {needed} different symbols;"
                f" there are {there}"
            )
        if self.kind == "variables":
            self._check_variables()

    def _check_variables(self) -> None:
        if self.symbols == "digits":
            raise ValueError("symbols is 'digits'; variables would look like their numbers")
        if self.num_chains > 10**self.num_digits:
            raise ValueError(
                f"{self.num_chains} different numbers need more than {self.num_digits} digits"
            )

    def _check_unused(self, *names: str) -> None:
        """Refuse a value for what this kind does not have: nothing would read it."""
        for name in names:
            if getattr(self, name) != getattr(NeedleTask, name):
                kind = f"{self.kind!r}" + (f" of {self.symbols}" if self.is_chained else "")
                raise ValueError(f"{name} is {getattr(self, name)!r}; kind {kind} has no {name}")

    @property
    def texts(self) -> NeedleTemplate:
        """The texts in use."""
        return self.template or TEMPLATES[self.kind]

    @property
    def is_chained(self) -> bool:
        """Whether an answer takes several facts of which one leads to the next."""
        return self.kind in ("hops", "variables")

    @property
    def link_symbols(self) -> Symbols:
        """What the links of chains are called."""
        return Symbols(self.symbols, num_names=self.num_names, width=self.num_digits)

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
        check_chunk_size(chunk_size, length)
        encoder, sizes = _encoder(self, corpus.tokenizer)
        ends = question_ends(
            rng,
            sizes,
            num_questions=self.num_questions,
            length=length,
            chunk_size=chunk_size,
            zone=self.question_zone,
        ).tolist()
        facts, queries, in_order = encoder.draw(rng)
        asked = [queries[number] for number in _ask(rng, len(queries), self.num_questions)]
        starts = place(
            rng,
            [len(fact.ids) for fact in facts],
            space=ends[0] - len(asked[0].question),
            in_order=in_order,
        )
        ids = corpus.haystack(rng, length, split)
        write_facts(facts, starts, ids)
        mask = np.zeros(length, dtype=np.bool_)
        for query, end in zip(asked, ends, strict=True):
            write_question(query, end, ids, mask)
        questions = (
            asked_needle(query, facts, starts, end) for query, end in zip(asked, ends, strict=True)
        )
        return NeedleRow(ids, mask, tuple(questions))

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
        check_chunk_size(chunk_size, length)
        encoder, sizes = _encoder(self, corpus.tokenizer)
        num_context = context_length(sizes, length=length, chunk_size=chunk_size)
        facts, queries, in_order = encoder.draw(rng)
        fact_sizes = [len(fact.ids) for fact in facts]
        starts = place(rng, fact_sizes, space=num_context, in_order=in_order)
        asked = _ask(rng, len(queries), min(self.num_questions, len(queries)))
        if depth is not None:
            check_range("depth", depth, 0, 1)
            if in_order:
                raise ValueError(f"depth is {depth}; facts of {self.kind!r} keep their order")
            asked = asked[:1]
            moved = queries[asked[0]].facts[0]
            target = round(depth * (num_context - fact_sizes[moved]))
            starts = move(starts, fact_sizes, moved, target=target)
        ids = corpus.haystack(rng, length, "held_out")
        write_facts(facts, starts, ids)
        questions = tuple(
            needle_question(
                queries[number],
                facts,
                starts,
                padding=ids[num_context:],
                num_context=num_context,
                chunk_size=chunk_size,
            )
            for number in asked
        )
        return NeedleExample(ids[:num_context], questions)


# Rows of a run share one encoder: it encodes tens of texts, a row only its values.
@lru_cache(maxsize=16)
def _encoder(
    task: NeedleTask, tokenizer: PreTrainedTokenizerBase
) -> tuple[NeedleEncoder | ChainEncoder, Sizes]:
    make = _chain_encoder if task.is_chained else _needle_encoder
    encoder = make(task, tokenizer)
    return encoder, encoder.largest()


def _needle_encoder(task: NeedleTask, tokenizer: PreTrainedTokenizerBase) -> NeedleEncoder:
    return NeedleEncoder(
        task.texts,
        tokenizer,
        names=NAMES[: task.num_names] if task.kind == "multi" else ("",),
        num_digits=task.num_digits,
        num_keys=task.num_keys,
        num_queries=task.num_queries,
        num_questions=task.num_questions,
    )


def _chain_encoder(task: NeedleTask, tokenizer: PreTrainedTokenizerBase) -> ChainEncoder:
    symbols = task.link_symbols
    counts = {"num_chains": task.num_chains, "num_hops": task.num_hops}
    kinds = [symbols]
    if task.kind == "hops":
        draw = partial(draw_paths, symbols=symbols, **counts)
    else:
        numbers = Symbols("digits", num_names=task.num_names, width=task.num_digits)
        draw = partial(draw_assignments, symbols=symbols, numbers=numbers, **counts)
        kinds.append(numbers)
    return ChainEncoder(
        task.texts,
        tokenizer,
        draw_chains=draw,
        symbols=kinds,
        ordered=task.kind == "variables",
    )


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


def _ask(rng: np.random.Generator, num_queries: int, num_questions: int) -> list[int]:
    """Return which query each question is: every one before any is asked again."""
    asked: list[int] = []
    while len(asked) < num_questions:
        order = rng.permutation(num_queries).tolist()
        # An answer given just before is in reach of the sliding window.
        asked += order if asked[-1:] != order[:1] else order[::-1]
    return asked[:num_questions]


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError for a value outside ``low`` to ``high``."""
    # Written so that NaN fails too.
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be from {low} to {high}")


def check_chunk_size(chunk_size: int, length: int) -> None:
    """Raise ValueError unless a row of ``length`` tokens has room for a chunk."""
    check_range("chunk_size", chunk_size, 1, float("inf"))
    if length < chunk_size:
        raise ValueError(
            f"length is {length}; it must be at least that of a chunk, {chunk_size} tokens"
        )


MULTI_TASK = NeedleTask(kind="multi", num_keys=6, num_questions=6)
"""The task with several named needles that evaluations ask; its questions share a context."""
