"""Reading without logits: layers whose work no later token can see are left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drt.arguments import (
    check_columns,
    check_ids,
    check_mask,
    check_state,
    make_marks,
    move_right,
)
from drt.chunking import Marks
from drt.state import DRTState


class DRTReading:
    """`read`, for `DRTForCausalLM`."""

    # What the class is mixed into has.
    config: Any
    model: Any
    _predictions: Any

    @torch.no_grad()
    def read(
        self,
        input_ids: Tensor,
        state: DRTState,
        *,
        attention_mask: Tensor | None = None,
        chunk_ends: Tensor | None = None,
        segment_size: int = 4096,
        complete: bool = True,
    ) -> Tensor | None:
        """Read a text of any length into a state, in segments, without logits.

        Layers whose work no later token can see are left out. Only the lower layers and the chunk
        encoder write to the memory, so the upper layers run over just the tail of the text; a
        model without retrieval groups reads nothing but its tail. The state is exact to rounding.

        Args:
            input_ids: (B, T) int64 content tokens.
            state: the state to extend. After an error on the way it is refused, as it holds an
                unknown part of them.
            attention_mask: (B, T), or (B, past + T) of which the last T count; 0 = padding,
                anywhere; None = no padding.
            chunk_ends: (B, T) bool, where chunks close although they are not full.
            segment_size: tokens of one forward; bounds the working memory.
            complete: False leaves out the upper layers altogether: right when more text follows,
                at least `reach` tokens in the read that completes the state.

        Returns:
            (B, 1, E) from which `lm_head` predicts the token that follows; None of an empty text,
            and where `complete` is False. Of a row of padding alone it means nothing.

        Raises:
            ValueError: ids, a mask or a state of a wrong shape, an unfinished state, or ids beyond
                the vocabulary.
        """
        if segment_size < 1:
            raise ValueError(f"segment_size must be at least 1, got {segment_size}")
        check_columns(input_ids, None, hidden_size=self.config.hidden_size)
        check_ids(input_ids, vocab_size=self.config.vocab_size)
        check_state(state, input_ids)
        check_mask(attention_mask, input_ids, state)
        marks = make_marks(input_ids, attention_mask, chunk_ends, None)
        # From here to `end_reading` an error leaves the state unfinished.
        state.note_ids(input_ids)
        if marks.content is not None:
            input_ids, marks = move_right(input_ids, marks)
        content, length = marks.content, input_ids.shape[1]
        tail = max(length - self.reach, 0) if complete else length
        if complete and tail and self._some_row_goes_on(content, state):
            tail = 0
        out, first = None, 0
        if tail and self.config.retrieval_groups:
            state.forget_layers(self.config.num_lower_layers)
        elif tail:
            state.skip(content[:, :tail].sum(-1).tolist() if content is not None else tail)
            first = tail
        for begin, end in _segments(first, length, tail, segment_size):
            part = Marks(*(mark if mark is None else mark[:, begin:end] for mark in marks))
            ids = input_ids[:, begin:end]
            embeddings = self.model.embed_tokens(ids)
            out = self.model(embeddings, state, input_ids=ids, marks=part, memory_only=end <= tail)
        hidden = None if out is None or not complete else self._predictions(out, 1)
        state.end_reading()
        return hidden

    def _some_row_goes_on(self, content: np.ndarray | None, state: DRTState) -> bool:
        """Whether a row gets too few tokens to see none of those that it read before."""
        if content is None:
            return False
        counts = content.sum(-1).tolist()
        return any(
            before and count < self.reach
            for before, count in zip(state.num_tokens, counts, strict=True)
        )

    @property
    def reach(self) -> int:
        """Tokens, its own included, that the layers above the memory can see from a position."""
        config = self.config
        groups = len(config.retrieval_groups)
        layers = config.num_upper_layers if groups else config.num_hidden_layers
        # A layer looks back W - 1 positions; a retrieval is a chunk old at most when it is used.
        retrievals = (groups + 1) * (config.chunk_size + 1) if groups else 0
        return layers * (config.sliding_window - 1) + retrievals + 1


def _segments(begin: int, length: int, tail: int, size: int) -> Iterator[tuple[int, int]]:
    """Segments of at most `size` tokens from `begin` to `length`, cut once more at `tail`."""
    while begin < length:
        limit = tail if begin < tail else length
        end = min(begin + size, limit)
        yield begin, end
        begin = end
