"""Needle tasks, scored: read a context of any length, generate the answer, compare all of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedConfig

from drt.configuration import DRTConfig
from drt.data import Corpus, NeedleExample, NeedleQuestion, NeedleTask, score_answer
from drt.evaluation.intervals import Interval, effective_number, wilson_interval
from drt.evaluation.memory import peak_rss, reset_peak_rss
from drt.evaluation.reading import NewMemory, Reading, check_length, start_reading
from drt.memory import ChunkMemory, DiskMemory, HostMemory
from drt.retrieval import Retrieval

DEFAULT_CHUNK_SIZE = 64
"""Where questions end, modulo, for models that have no chunks."""


class ScoredAnswer(NamedTuple):
    """What a model said to one question, and whether it was right."""

    token_ids: list[int]
    """Greedily generated tokens, as many as the right answer has."""
    exact_match: bool
    """Whether all of them are right."""
    recalled: bool | None
    """Whether some group's retrieval held every chunk of the value, of each fact where there are
    several; None without retrieval, and where the model's chunks are not those of the question."""
    retrievals: tuple[Retrieval, ...]
    """Per group, what the landmark at the question's end retrieved: (1, 1, K) tensors."""


class NeedleScore(NamedTuple):
    """How a model did at one length, or at one length and depth."""

    length: int
    """Content tokens of context and question."""
    depth: float | None
    """Where the needle was: 0 the start of the context, 1 its end; None = anywhere."""
    n: int
    """Questions asked."""
    num_independent: float
    """As many questions of contexts of their own would tell as much: questions of one context are
    answered alike more often than by chance (`intervals.effective_number`)."""
    num_right: int
    """Questions whose whole generated answer was right."""
    exact_match: float
    """Their share."""
    exact_match_interval: Interval
    """Wilson's 95 % interval of that share, of `num_independent` questions."""
    recall: float | None
    """Share whose needle chunks were all retrieved; None for a model that retrieves nothing."""
    seconds_per_example: float
    """Wall time per context, reading and answering together."""
    peak_rss_bytes: int | None
    """Peak memory of the process during this measurement; None where it cannot be reset."""


@contextmanager
def temporary_memory(
    place: Literal["host", "disk"] = "host",
    dtype: Literal["computed", "float32", "bfloat16", "int8"] = "computed",
) -> Iterator[ChunkMemory]:
    """An empty memory in RAM or in a temporary folder, gone at the end.

    Args:
        place: where the chunks are kept.
        dtype: how keys and values are stored; computed = as they come.
    """
    stored = None if dtype == "computed" else getattr(torch, dtype)
    if place == "host":
        with HostMemory(dtype=stored) as memory:
            yield memory
        return
    with (
        TemporaryDirectory(prefix="drt-") as folder,
        DiskMemory.create(folder, fingerprint={}, dtype=stored, fsync="never") as memory,
    ):
        yield memory


def check_sizes(*, chunk_size: int | None, segment_size: int) -> None:
    """Raise ValueError for sizes below 1; no chunk size at all is one."""
    for name, size in (("chunk_size", chunk_size), ("segment_size", segment_size)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def first_token(config: PreTrainedConfig, *, wanted: bool) -> int | None:
    """The token that is read before each context; None = none is wanted, or the model is a DRT.

    Raises:
        ValueError: one is wanted of a model that names none.
    """
    if not wanted or isinstance(config, DRTConfig):
        return None
    found = getattr(config.get_text_config(), "bos_token_id", None)
    if found is None:
        raise ValueError(
            f"begin_with_bos: the configuration of a {config.model_type} has no bos_token_id"
        )
    return found


def common_chunk_size(configs: Sequence[Any]) -> int:
    """The chunk size of questions that several models can be asked.

    A question that ends where a chunk ends for the least common multiple ends so for all of them.

    Args:
        configs: the models' configurations; those without chunks have no say.
    """
    sizes = [getattr(config, "chunk_size", None) for config in configs]
    return math.lcm(*(size for size in sizes if size)) if any(sizes) else DEFAULT_CHUNK_SIZE


def tokens_needed(example: NeedleExample) -> int:
    """Tokens that a model reads at most for an example, its own answer among them."""
    ends = (len(q.input_ids) + len(q.answer_ids) - 1 for q in example.questions)
    return len(example.context_ids) + max(ends)


def ask(reading: Reading, question: NeedleQuestion, *, chunks_agree: bool = True) -> ScoredAnswer:
    """Ask one question of a context that has been read; the reading is left as it was.

    Args:
        reading: has read the context.
        question: the question and its right answer.
        chunks_agree: whether the model's chunks are those that the question counts in.
    """
    answer = reading.answer(torch.as_tensor(question.input_ids), len(question.answer_ids))
    found = [set(r.indices.flatten().tolist()) for r in answer.retrievals]
    right = score_answer(answer.token_ids, question.answer_ids.tolist())
    recalled = None
    if found and chunks_agree:
        # The facts of a chain may be found one after the other, each by another group.
        facts = question.fact_chunks
        recalled = all(any(chunks >= set(fact) for chunks in found) for fact in facts)
    return ScoredAnswer(answer.token_ids, right, recalled, answer.retrievals)


def evaluate_needles(
    model: Any,
    corpus: Corpus,
    *,
    task: NeedleTask,
    length: int,
    num_questions: int,
    seed: int = 1,
    depth: float | None = None,
    chunk_size: int | None = None,
    segment_size: int = 4096,
    new_memory: NewMemory = temporary_memory,
    beyond_limit: bool = False,
    first_token_id: int | None = None,
    on_context: Callable[[int], object] | None = None,
) -> NeedleScore:
    """Score a model on one needle task at one length.

    Contexts come from the corpus's held-out split; all questions of an example share its context.

    Args:
        model: any causal language model that `start_reading` takes; put into evaluation mode.
        corpus: haystack and tokenizer.
        task: what is hidden and asked.
        length: content tokens of context and question, a multiple of `chunk_size`.
        num_questions: questions to ask at least; whole examples are used.
        seed: seed of the examples.
        depth: where the asked-for needle is, 0 to 1; None = anywhere.
        chunk_size: questions end at multiples of it; None = the model's, or 64 if it has none.
            Only models whose chunks are of this size can have their recall counted.
        segment_size: tokens of one forward while reading.
        new_memory: makes the memory that a DRT reads a context into.
        beyond_limit: whether rotary positions may go beyond the model's limit.
        first_token_id: a token to read before each context; None = none.
        on_context: called after each example with the tokens read.

    Raises:
        ValueError: no questions, a length that does not fit the task or the model.
    """
    if num_questions < 1:
        raise ValueError(f"num_questions must be at least 1, got {num_questions}")
    model.eval()
    first = [] if first_token_id is None else [first_token_id]
    size = common_chunk_size([model.config]) if chunk_size is None else chunk_size
    agree = not first and size == getattr(model.config, "chunk_size", None)
    contexts: list[list[ScoredAnswer]] = []
    resettable = reset_peak_rss()
    started = time.perf_counter()
    while sum(map(len, contexts)) < num_questions:
        example = task.evaluation_example(
            corpus, seed=seed, index=len(contexts), length=length, chunk_size=size, depth=depth
        )
        # Before hours of reading, not after.
        check_length(model.config, len(first) + tokens_needed(example), beyond_limit=beyond_limit)
        with start_reading(
            model, segment_size=segment_size, new_memory=new_memory, beyond_limit=beyond_limit
        ) as reading:
            reading.read(torch.tensor(first, dtype=torch.int64))
            reading.read(torch.as_tensor(example.context_ids))
            contexts.append(
                [ask(reading, question, chunks_agree=agree) for question in example.questions]
            )
        if on_context is not None:
            on_context(length)
    seconds = (time.perf_counter() - started) / len(contexts)
    return _score(length, depth, contexts, seconds, peak_rss() if resettable else None)


def _score(
    length: int,
    depth: float | None,
    contexts: list[list[ScoredAnswer]],
    seconds: float,
    peak: int | None,
) -> NeedleScore:
    answers = [answer for context in contexts for answer in context]
    hits = np.array([sum(answer.exact_match for answer in context) for context in contexts])
    independent = effective_number(hits, np.array([len(context) for context in contexts]))
    recalls = [answer.recalled for answer in answers if answer.recalled is not None]
    right, count = sum(answer.exact_match for answer in answers), len(answers)
    return NeedleScore(
        length=length,
        depth=depth,
        n=count,
        num_right=right,
        exact_match=right / count,
        num_independent=independent,
        exact_match_interval=_interval(right, count, independent),
        recall=sum(recalls) / len(recalls) if recalls else None,
        seconds_per_example=seconds,
        peak_rss_bytes=peak,
    )


def pooled(scores: Sequence[NeedleScore]) -> NeedleScore:
    """One score of the questions of several at one length, say of other seeds or depths."""
    count, right = sum(s.n for s in scores), sum(s.num_right for s in scores)
    recalls = [(s.recall, s.n) for s in scores if s.recall is not None]
    independent = sum(s.num_independent for s in scores)
    peaks = [s.peak_rss_bytes for s in scores if s.peak_rss_bytes is not None]
    depths = {s.depth for s in scores}
    return NeedleScore(
        length=scores[0].length,
        depth=depths.pop() if len(depths) == 1 else None,
        n=count,
        num_right=right,
        exact_match=right / count,
        num_independent=independent,
        exact_match_interval=_interval(right, count, independent),
        recall=sum(share * n for share, n in recalls) / count if recalls else None,
        seconds_per_example=sum(s.seconds_per_example * s.n for s in scores) / count,
        peak_rss_bytes=max(peaks) if peaks else None,
    )


def _interval(right: int, count: int, independent: float) -> Interval:
    return wilson_interval(right / count * independent, independent)
