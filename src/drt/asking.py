"""Questions to a memory on disk, answered with the passages that were retrieved for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from drt.data.tokenization import encode, encode_with_offsets, tokenizer_fingerprint
from drt.ingestion import Notes
from drt.modeling import DRTForCausalLM
from drt.passages import Passage, PassageLog
from drt.retrieval import Retrieval


@dataclass
class RetrievedPassage:
    """A chunk that was retrieved where the last chunk of the question closed."""

    group: int
    """Retrieval group, 0 the lowest."""
    chunk: int
    """Number of the chunk in the memory."""
    weight: float
    """Retrieval weight, 0 to 1."""
    source: str
    """File, or file:row; empty if the chunk is of the question itself."""
    start: int
    """Byte of the source's text at which the chunk begins."""
    end: int
    """Byte at which it ends."""
    text: str
    """The chunk."""


@dataclass
class Reply:
    """An answer and what it rests on."""

    answer: str
    """The text that was generated."""
    passages: list[RetrievedPassage]
    """What was retrieved, by group and falling weight; nothing where no chunk closed in the
    question, which happens with `close_prompt_chunk` False only."""
    is_complete: bool
    """Whether the memory was read to its end; otherwise answer and passages are near the model's
    own, not exact: in the upper layers the question does not see the last tokens before it."""


@torch.no_grad()
def ask(
    model: DRTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    question: str,
    *,
    max_new_tokens: int = 32,
    stop: str | None = None,
) -> Reply:
    """Ask a memory; it is left as it was.

    Of a memory whose reading was stopped, or is under way, the upper layers have not seen the last
    tokens, which only the end of a reading gives them: `Reply.is_complete` is then False.

    Args:
        model: the model that read it, in evaluation mode.
        tokenizer: its tokenizer.
        folder: a folder that `Ingestion` made.
        question: text that follows what was read.
        max_new_tokens: longest answer, in tokens.
        stop: the answer ends before this text.

    Raises:
        ValueError: an empty question, an answer of no token, or a folder that is no memory of this
            model and tokenizer.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    ids = torch.from_numpy(encode(tokenizer, question))[None].to(model.device)
    if not ids.shape[1]:
        raise ValueError("the question is empty")
    marks = {"tokenizer": tokenizer_fingerprint(tokenizer)}
    state, notes = model.load_state(folder, fingerprint=marks)
    # As `generate` does.
    ends = torch.zeros_like(ids, dtype=torch.bool)
    ends[:, -1] = model.config.close_prompt_chunk
    branch = state.fork()
    seen = model(
        ids, past_key_values=branch, chunk_ends=ends, logits_to_keep=1, output_retrievals=True
    )
    options: dict[str, Any] = {"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}
    made = model.generate(
        ids,
        attention_mask=torch.ones(1, state.num_columns + ids.shape[1], dtype=torch.int64),
        past_key_values=state.fork(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **options,
    )
    answer = str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    if stop:
        answer = answer.partition(stop)[0]
    cursor, size = state.cursors[0], model.config.chunk_size
    own = _QuestionChunks(cursor.chunks, size, cursor.opened, question, tokenizer)
    found: list[RetrievedPassage] = []
    with PassageLog(folder) as log:
        # While somebody reads on, the log is ahead of the state: what it has more is not meant.
        log.check_holds(
            num_tokens=cursor.tokens,
            num_chunks=cursor.chunks,
            num_sources=Notes.of(notes).num_sources,
        )
        for group, retrieval in enumerate(seen.retrievals or ()):
            for chunk, weight in _ranked(retrieval):
                passage = log.passage(chunk) if chunk < cursor.chunks else own.passage(chunk)
                text = str(tokenizer.decode(passage.token_ids.tolist()))
                where = passage.source, passage.start, passage.end
                found.append(RetrievedPassage(group, chunk, weight, *where, text))
    return Reply(answer, found, Notes.of(notes).place is None)


def _ranked(retrieval: Retrieval) -> list[tuple[int, float]]:
    """The chunks that the last landmark retrieved, if any, with their weights, falling."""
    if not retrieval.indices.shape[1]:
        return []
    numbers, weights = retrieval.indices[0, -1].tolist(), retrieval.weights[0, -1].tolist()
    pairs = [pair for pair in zip(numbers, weights, strict=True) if pair[0] >= 0]
    return sorted(pairs, key=lambda pair: -pair[1])


class _QuestionChunks(NamedTuple):
    """The chunks that a long question closes itself."""

    first: int
    """Number of the first of them."""
    size: int
    """Tokens of a chunk."""
    opened: int
    """Tokens of the first that were read before the question."""
    question: str
    tokenizer: PreTrainedTokenizerBase

    def passage(self, chunk: int) -> Passage:
        """What of the question such a chunk holds."""
        ids, ends = encode_with_offsets(self.tokenizer, self.question)
        stop = (chunk - self.first + 1) * self.size - self.opened
        start = max(stop - self.size, 0)
        bounds = [0, *ends.tolist()]
        return Passage("", bounds[start], bounds[min(stop, len(ids))], ids[start:stop])
