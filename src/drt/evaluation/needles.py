"""Needle tasks, scored: read a context of any length, generate the answer, compare all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from drt.data import Corpus, NeedleQuestion, NeedleTask, score_answer
from drt.evaluation.memory import peak_rss, reset_peak_rss
from drt.memory import ChunkMemory, DiskMemory, HostMemory
from drt.modeling import DRTForCausalLM
from drt.retrieval import Retrieval
from drt.state import DRTState


class Answer(NamedTuple):
    """What a model said to one question."""

    token_ids: list[int]
    """Greedily generated tokens, as many as the right answer has."""
    exact_match: bool
    """Whether all of them are right."""
    recalled: bool | None
    """Whether some group's retrieval held every chunk of the value; None without retrieval."""
    retrievals: tuple[Retrieval, ...]
    """Per group, what the landmark at the question's end retrieved: (1, 1, K) tensors."""


class NeedleScore(NamedTuple):
    """How a model did at one length."""

    length: int
    """Content tokens of context and question."""
    n: int
    """Questions asked."""
    exact_match: float
    """Share of questions whose whole generated answer was right."""
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


@torch.no_grad()
def read_context(
    model: DRTForCausalLM,
    context_ids: Tensor,
    *,
    segment_size: int = 4096,
    memory: ChunkMemory | None = None,
) -> DRTState:
    """Read (1, T) tokens into a new state, with this memory or one on the model's device."""
    state = model.new_state(context_ids.shape[0], memory=memory)
    model.read(context_ids, state, segment_size=segment_size)
    return state


@torch.no_grad()
def ask(model: DRTForCausalLM, state: DRTState, question: NeedleQuestion) -> Answer:
    """Ask one question of a context that has been read; the state is left as it was.

    Args:
        model: in evaluation mode.
        state: a state of one row that has read the context.
        question: the question and its right answer.
    """
    branch = state.fork()
    ids = torch.as_tensor(question.input_ids, device=model.device)[None]
    ends = torch.zeros_like(ids, dtype=torch.bool)
    ends[:, -1] = True
    out = model(
        ids,
        past_key_values=branch,
        chunk_ends=ends,
        logits_to_keep=1,
        output_retrievals=True,
    )
    retrievals = tuple(Retrieval(*(part[:, -1:] for part in r)) for r in out.retrievals or ())
    said = [int(out.logits[0, -1].argmax())]
    while len(said) < len(question.answer_ids):
        token = ids.new_tensor([said[-1:]])
        out = model(token, past_key_values=branch, logits_to_keep=1)
        said.append(int(out.logits[0, -1].argmax()))
    needed = set(question.needle_chunks)
    found = [needed <= set(r.indices.flatten().tolist()) for r in retrievals]
    right = score_answer(said, question.answer_ids.tolist())
    return Answer(said, right, any(found) if found else None, retrievals)


def evaluate_needles(
    model: DRTForCausalLM,
    corpus: Corpus,
    *,
    task: NeedleTask,
    length: int,
    num_questions: int,
    seed: int = 1,
    segment_size: int = 4096,
    new_memory: Callable[[], AbstractContextManager[ChunkMemory]] = temporary_memory,
    on_context: Callable[[int], object] | None = None,
) -> NeedleScore:
    """Score a model on one needle task at one length.

    Contexts come from the corpus's held-out split; all questions of an example share its context.

    Args:
        model: any `DRTForCausalLM`; put into evaluation mode.
        corpus: haystack and tokenizer.
        task: what is hidden and asked.
        length: content tokens of context and question, a multiple of the model's chunk size.
        num_questions: questions to ask at least; whole examples are used.
        seed: seed of the examples.
        segment_size: tokens of one forward while reading.
        new_memory: makes the memory that a context is read into.
        on_context: called after each example with the tokens read.
    """
    if num_questions < 1:
        raise ValueError(f"num_questions must be at least 1, got {num_questions}")
    model.eval()
    answers: list[Answer] = []
    resettable = reset_peak_rss()
    started, examples = time.perf_counter(), 0
    while len(answers) < num_questions:
        example = task.evaluation_example(
            corpus, seed=seed, index=examples, length=length, chunk_size=model.config.chunk_size
        )
        context = torch.as_tensor(example.context_ids, device=model.device)[None]
        with new_memory() as memory:
            state = read_context(model, context, segment_size=segment_size, memory=memory)
            answers += [ask(model, state, question) for question in example.questions]
        examples += 1
        if on_context is not None:
            on_context(length)
    seconds = (time.perf_counter() - started) / examples
    return _score(length, answers, seconds, peak_rss() if resettable else None)


def _score(length: int, answers: list[Answer], seconds: float, peak: int | None) -> NeedleScore:
    count = len(answers)
    recalls = [answer.recalled for answer in answers if answer.recalled is not None]
    return NeedleScore(
        length=length,
        n=count,
        exact_match=sum(answer.exact_match for answer in answers) / count,
        recall=sum(recalls) / len(recalls) if recalls else None,
        seconds_per_example=seconds,
        peak_rss_bytes=peak,
    )
