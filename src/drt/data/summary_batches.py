"""Documents and their summaries as tokens: prompts, and batches to train on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from drt.data.permutation import Permutation
from drt.data.summaries import (
    Summaries,
    SummaryData,
    SummaryExample,
    SummarySource,
    load_summaries,
)
from drt.data.tokenization import encode
from drt.loss import IGNORED

QUERY_BORDER = "\n\n"
"""What stands between a document and what is asked of it."""

# Keys of permutations: of the order of examples, and of which summary of an example is learned.
_ORDER, _SUMMARY = 0, 1


class Prompt(NamedTuple):
    """A document as a model is shown it."""

    token_ids: np.ndarray
    """Int64, shape (T,): start of text, document, query, marker."""
    num_cut: int
    """Tokens of the document that were left out at its end."""


class SummaryFormat:
    """Examples as tokens.

    A prompt is what the tokenizer puts before a text, if anything, the document, the query if there
    is one behind an empty line, and the marker; a summary follows behind a space, then the end.

    Args:
        source: the marker, the end and the longest summary.
        tokenizer: turns texts into tokens.

    Raises:
        ValueError: the tokenizer has no end, or that of the source is not one token of it.
    """

    def __init__(self, source: SummarySource, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.end_id = _end_id(source.end, tokenizer)
        """The token that ends a summary."""
        self._start = _start_ids(tokenizer)

    def prompt(self, example: SummaryExample, *, length: int | None = None) -> Prompt:
        """The prompt of an example, its document cut at the end to `length` tokens in all.

        Raises:
            ValueError: `length` is too short for what stands around the document.
        """
        tail = self.tail(example.query)
        document = encode(self.tokenizer, example.document)
        room = len(document)
        if length is not None:
            room = length - len(self._start) - len(tail)
        if room < 0:
            raise ValueError(
                f"document {example.document_name!r}: query and marker are {len(tail)} tokens, "
                f"which do not fit a prompt of {length}"
            )
        ids = np.concatenate([self._start, document[:room], tail])
        return Prompt(ids, max(len(document) - room, 0))

    def tail(self, query: str | None) -> np.ndarray:
        """What follows a document, int64, shape (num_tokens,): the query and the marker."""
        asked = "" if query is None else f"{QUERY_BORDER}{query}"
        return encode(self.tokenizer, asked + self.source.marker)

    def target(self, summary: str) -> np.ndarray:
        """What a model is to write, int64, shape (num_tokens,): a summary and its end."""
        ids = encode(self.tokenizer, f" {summary.strip()}")
        if len(ids) > self.source.max_summary_tokens:
            return ids[: self.source.max_summary_tokens]
        return np.append(ids, self.end_id)

    def check_length(self, length: int, queries: Iterable[str]) -> None:
        """Refuse a length in which some query, with the marker and a summary, has no room."""
        longest = max(len(self.tail(query)) for query in {*queries, None})
        least = len(self._start) + longest + self.source.max_summary_tokens + 1
        if length < least:
            raise ValueError(
                f"length is {length}; with the marker, the longest query ({longest} tokens in all) "
                f"and a summary of {self.source.max_summary_tokens} tokens it must be {least} or "
                "more"
            )


def _end_id(end: str | None, tokenizer: PreTrainedTokenizerBase) -> int:
    if end is None:
        found: Any = tokenizer.eos_token_id
        if found is None:
            raise ValueError("the tokenizer has no end of text: give `end`, a text of one token")
        return found
    ids = encode(tokenizer, end)
    if len(ids) != 1:
        raise ValueError(f"end {end!r} is {len(ids)} tokens of the tokenizer; it must be one")
    return int(ids[0])


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The special tokens that the tokenizer puts before any text."""
    bare = encode(tokenizer, "a")
    whole = np.array(tokenizer("a")["input_ids"], dtype=np.int64)
    return whole[: int(np.flatnonzero(whole == bare[0])[0])]


class SummaryBatches(Dataset[dict[str, Tensor]]):
    """Step number -> the whole batch of that step, a function of (seed, step) alone.

    Every example comes once an epoch, each epoch in another order. Of several summaries of an
    example one is learned each time.

    Args:
        data: what is read, and how long a row may be.
        tokenizer: turns texts into tokens.
        batch_size: rows of a batch (B).
        num_steps: batches in all.
        seed: what order and choices follow from.
        examples: the examples, where they are loaded already.

    Raises:
        ValueError: nothing to read, a number out of range, or queries that do not fit the length.
    """

    def __init__(
        self,
        data: SummaryData,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        num_steps: int,
        seed: int = 0,
        examples: Summaries | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("num_steps", num_steps)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        self.data, self.seed = data, seed
        self.batch_size, self.num_steps = batch_size, num_steps
        self.examples = load_summaries(data, data.split) if examples is None else examples
        self.format = SummaryFormat(data, tokenizer)
        asks = self.examples[0].query is not None
        self.format.check_length(data.length, self.examples.queries if asks else ())
        # Padding is told by the mask, so that a tokenizer without will do.
        padding: Any = tokenizer.pad_token_id or 0
        self._padding = {
            "input_ids": padding,
            "labels": IGNORED,
            "attention_mask": 0,
            "chunk_ends": False,
        }

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Batch `step`: what `row` returns, padded on the right to the longest, all (B, T).

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not among the {len(self)}")
        first = step * self.batch_size
        rows = [self.row(index) for index in range(first, first + self.batch_size)]
        return {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in self._padding.items()
        }

    def row(self, index: int) -> dict[str, Tensor]:
        """Row `index`, 0 or more, counted through the epochs.

        Returns:
            `input_ids` and `labels`, the latter -100 but on the summary and its end, int64;
            `attention_mask`, int64, 1; `chunk_ends`, bool, True at the last token of the prompt,
            where `generate` closes the chunk too. All (T,).
        """
        epoch, place = divmod(index, len(self.examples))
        number = Permutation(len(self.examples), self.seed, epoch, _ORDER)(place)
        example = self.examples[number]
        choice = Permutation(len(example.summaries), self.seed, epoch, _SUMMARY, number)(0)
        target = self.format.target(example.summaries[choice])
        prompt = self.format.prompt(example, length=self.data.length - len(target)).token_ids
        ids = torch.from_numpy(np.concatenate([prompt, target]))
        labels, ends = ids.clone(), torch.zeros_like(ids, dtype=torch.bool)
        labels[: len(prompt)] = IGNORED
        ends[len(prompt) - 1] = True
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "chunk_ends": ends}
