"""The decoding state: all that a model must remember of what it has read.

Per row: where it stands, the last W positions of every self-attention layer, the open chunk, the
current retrieval of each group, and the memory of closed chunks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from drt.cache import ForkedCache, row_numbers
from drt.chunking import Cursor, Marks, SegmentLayout
from drt.configuration import DRTConfig
from drt.memory import ChunkMemory, DeviceMemory
from drt.retrieval import RetrievedChunks

# Ids by which a text that was read is recognized.
_NUM_RECENT = 64


class WindowKeys(NamedTuple):
    """What a self-attention layer reads: cached positions, then those of the segment."""

    keys: Tensor
    """(B, N, G, D)."""
    values: Tensor
    """(B, N, G, D)."""
    first_keys: Tensor | None
    """(B, P) int64, the first key that each position may see; None = all in its window."""


class WindowCache:
    """Keys and values of the last W - 1 positions of one self-attention layer.

    They are stored head-major, (B, G, n, D), which a step of decoding reads without a copy; rows
    that have fewer stand at the right.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.lengths: list[int] = []
        """Positions of each row."""

    def extend(
        self, key: Tensor, value: Tensor, *, window: int, layout: SegmentLayout
    ) -> WindowKeys:
        """Append (B, P, G, D) keys and values; return those with the cached ones before them."""
        before = self.lengths or [0] * key.shape[0]
        cached = max(before)
        self.lengths = [
            min(length + count, window - 1)
            for length, count in zip(before, layout.counts, strict=True)
        ]
        keys, kept_keys = self._extend(self.keys, key.transpose(1, 2), layout)
        values, kept_values = self._extend(self.values, value.transpose(1, 2), layout)
        # As all that a state remembers: a second backward has no graph to go through.
        self.keys, self.values = kept_keys.detach(), kept_values.detach()
        first = _first_keys(before, cached, layout, key.device)
        return WindowKeys(keys.transpose(1, 2), values.transpose(1, 2), first)

    def _extend(
        self, cached: Tensor | None, new: Tensor, layout: SegmentLayout
    ) -> tuple[Tensor, Tensor]:
        """Cached and new positions, and what to keep of them."""
        joined = new if cached is None else torch.cat([cached.to(new.dtype), new], dim=2)
        kept = max(self.lengths)
        if layout.is_even:
            last = joined[:, :, joined.shape[2] - kept :]
            # A slice of little more than itself costs less than a copy, one of a segment more.
            return joined, last if joined.shape[2] <= 2 * kept else last.clone()
        ends = _sent(layout.counts, new.device) + joined.shape[2] - new.shape[2]
        place = (ends[:, None] + torch.arange(-kept, 0, device=new.device)).clamp_min(0)
        index = place[:, None, :, None].expand(-1, joined.shape[1], -1, joined.shape[3])
        return joined, joined.gather(2, index)

    def select_rows(self, rows: Tensor, numbers: list[int]) -> None:
        """Replace the rows by those with these numbers, given on the device and on the host."""
        if self.keys is None or self.values is None:
            return
        self.lengths = [self.lengths[number] for number in numbers]
        # The longest row may have gone, and what only it needed with it.
        unused = self.keys.shape[2] - max(self.lengths)
        self.keys, self.values = self.keys[rows, :, unused:], self.values[rows, :, unused:]

    def clear(self) -> None:
        """Forget all positions."""
        self.keys = self.values = None
        self.lengths = []


def _first_keys(
    before: list[int], cached: int, layout: SegmentLayout, device: torch.device
) -> Tensor | None:
    """`WindowKeys.first_keys`: past the unused places of short rows, and past other documents."""
    if min(before) == cached and layout.document_starts is None:
        return None
    unused = _sent([[cached - length] for length in before], device)
    if layout.document_starts is None:
        return unused.expand(-1, layout.num_positions)
    origin = _sent([[cached - first] for first in layout.first_positions], device)
    return torch.maximum(layout.document_starts + origin, unused)


def _sent(numbers: list[Any], device: torch.device) -> Tensor:
    """A tensor on the device, for which the host does not wait."""
    return torch.tensor(numbers).to(device, non_blocking=True)


class CurrentRetrieval(NamedTuple):
    """What the open blocks of one group attend to."""

    numbers: Tensor
    """(B, 1, K) int64 chunk numbers, -1 = none."""
    chunks: RetrievedChunks
    """The same chunks, gathered."""

    def select_rows(self, rows: Tensor) -> CurrentRetrieval:
        """The rows with these numbers; the chunks themselves stay where they are."""
        chunks = self.chunks._replace(
            indices=self.chunks.indices[rows], weights=self.chunks.weights[rows], in_order=False
        )
        return CurrentRetrieval(self.numbers[rows], chunks)


class PlainSteps(Protocol):
    """What may take some steps in place of the ordinary forward: a `DecodingGraph`."""

    def covers(self, input_ids: Tensor, marks: Marks) -> bool:
        """Whether it takes this step."""
        ...

    def step(self, input_ids: Tensor, marks: Marks) -> Tensor:
        """Take it and return the logits."""
        ...

    def settle(self) -> None:
        """Write what the steps changed back to the state."""
        ...


class DRTState(ForkedCache):
    """What `DRTForCausalLM` carries from one forward to the next; made by `model.new_state()`.

    Tensors in it are replaced, never written to, so a fork is a shallow copy.

    Args:
        config: the model's configuration.
        batch_size: rows.
        memory: an empty chunk memory; None = a `DeviceMemory`.

    Raises:
        ValueError: no rows, or a memory that holds chunks.
    """

    def __init__(
        self, config: DRTConfig, batch_size: int, *, memory: ChunkMemory | None = None
    ) -> None:
        super().__init__(layers=[])
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if memory is not None and len(memory):
            raise ValueError(
                f"a new state needs an empty memory, this one holds {len(memory)} chunks: "
                "load_state goes on from what was read and saved"
            )
        self.cursors = [Cursor()] * batch_size
        """Where each row stands."""
        self._windows = [WindowCache() for _ in range(config.num_hidden_layers)]
        self._opened: Tensor | None = None
        self.opened_ids: Tensor | None = None
        """(B, n) int64 ids of the open chunks, as `opened`, where a retriever reads text."""
        self.current: list[CurrentRetrieval | None] = [None] * len(config.retrieval_groups)
        """Per group, the chunks that the open block attends to."""
        self.memory: ChunkMemory = DeviceMemory() if memory is None else memory
        self.num_columns = 0
        """Columns read, padding among them."""
        self.is_unfinished = False
        """Whether a reading has begun and not ended: it is under way, or an error has ended it."""
        self._recent_ids: list[Tensor] = []
        self.decoding_graph: PlainSteps | None = None
        """What takes the plain steps of decoding for this state; None = the ordinary forward."""

    # A decoding graph has windows and open chunks in buffers of its own: whoever asks gets them.

    @property
    def windows(self) -> list[WindowCache]:
        """Per layer, keys and values of the last positions."""
        if self.decoding_graph is not None:
            self.decoding_graph.settle()
        return self._windows

    @property
    def opened(self) -> Tensor | None:
        """(B, n, E) lower-layer outputs of the open chunks; rows with fewer stand at the right."""
        if self.decoding_graph is not None:
            self.decoding_graph.settle()
        return self._opened

    @opened.setter
    def opened(self, opened: Tensor | None) -> None:
        self._opened = opened

    def extend_opened(self, hidden: Tensor, layout: SegmentLayout) -> Tensor:
        """Append (B, P, E) lower-layer outputs; return the closed chunks, (B, C, S + 1, E)."""
        before = hidden[:, :0] if self.opened is None else self.opened
        closed, opened = layout.split_chunks(hidden, before)
        # A copy where it is a part of something larger.
        self.opened = opened.detach().clone() if layout.num_closed else opened.detach()
        return closed

    def extend_opened_ids(self, ids: Tensor, layout: SegmentLayout) -> Tensor:
        """Append the (B, P) ids of all positions; return the closed chunks', (B, C, S + 1)."""
        before = ids[:, :0] if self.opened_ids is None else self.opened_ids
        closed, opened = layout.split_chunks(ids[..., None], before[..., None])
        self.opened_ids = opened[..., 0].clone()
        return closed[..., 0]

    def next_positions(self, layout: SegmentLayout) -> list[int] | Tensor:
        """Position of each row's first one in the segment: B numbers, or (B,) on the device."""
        return layout.first_positions

    @property
    def num_tokens(self) -> list[int]:
        """Content tokens read, per row."""
        return [cursor.tokens for cursor in self.cursors]

    def close_chunk(self, rows: Sequence[int] | None = None) -> None:
        """End the open chunks here: their landmarks come before the next token that is read.

        To have the landmark's own prediction of that token, mark the end of the chunk in the
        forward that reads its last token: `model(ids, past_key_values=state, chunk_ends=...)`.

        Args:
            rows: the rows to do this for; None = all.
        """
        for row in range(len(self.cursors)) if rows is None else rows:
            self.cursors[row] = self.cursors[row]._replace(closing=self.cursors[row].opened > 0)

    def fork(self) -> DRTState:
        """A state that goes on from here on its own; what the memory holds is shared."""
        windows = [copy.copy(window) for window in self.windows]
        other = copy.copy(self)
        other.decoding_graph = None
        other.cursors = list(self.cursors)
        other._windows = windows
        other.current = list(self.current)
        other._recent_ids = list(self._recent_ids)
        other.memory = self.memory.fork()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> DRTState:
        return self.fork()

    def skip(self, num_tokens: int | list[int]) -> None:
        """Forget every layer and count tokens as read: for a model that remembers windows only."""
        self.forget_layers(0)
        counts = num_tokens if isinstance(num_tokens, list) else [num_tokens] * self.batch_size
        self.cursors = [
            cursor._replace(tokens=cursor.tokens + count)
            for cursor, count in zip(self.cursors, counts, strict=True)
        ]

    def begin_reading(self, num_columns: int) -> None:
        """Count columns that are to be read; the state is unfinished until `end_reading`."""
        self.is_unfinished = True
        self.num_columns += num_columns

    def end_reading(self) -> None:
        """What was begun has been read."""
        self.is_unfinished = False

    def check_finished(self) -> None:
        """Refuse a state that holds part of what it was to read.

        Raises:
            ValueError: the last reading has not ended.
        """
        if self.is_unfinished:
            raise ValueError(
                "the state is unfinished: an error has interrupted what last read into it, and it "
                "holds an unknown part of that. Go on from a fork made before, or from what "
                "load_state gives"
            )

    @property
    def recent_ids(self) -> Tensor | None:
        """(B, n) int64, the last ids that were read, padding among them."""
        if not self._recent_ids:
            return None
        return torch.cat(self._recent_ids, dim=1)[:, -_NUM_RECENT:]

    @recent_ids.setter
    def recent_ids(self, ids: Tensor | None) -> None:
        self._recent_ids = [] if ids is None else [ids]

    def note_ids(self, input_ids: Tensor) -> None:
        """Begin to read (B, T) ids, and remember the last of them, to recognize them."""
        self.begin_reading(input_ids.shape[1])
        last = input_ids[:, -_NUM_RECENT:]
        # A view would keep all of the ids, and change with the buffer that it is of.
        self._recent_ids.append(last.clone())
        del self._recent_ids[:-_NUM_RECENT]

    def check_new(self, input_ids: Tensor) -> None:
        """Refuse (B, T) ids that begin with what this state has read.

        Raises:
            ValueError: they do; they would be read twice.
        """
        read, length = self.num_columns, input_ids.shape[1]
        recent = self.recent_ids
        if recent is None or not read or length < read:
            return
        if torch.equal(recent, input_ids[:, read - recent.shape[1] : read].to(recent.device)):
            raise ValueError(
                f"input_ids begin with the {read} tokens that the state has read: pass only what "
                f"comes after them. If the text really repeats, pass an attention_mask of "
                f"{read + length} columns"
            )

    def forget_layers(self, first: int) -> None:
        """Drop what layers from `first` on saw; they must read a long enough tail again."""
        for window in self.windows[first:]:
            window.clear()
        self.current = [None] * len(self.current)

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Content tokens read of the longest row."""
        return max(self.num_tokens)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.cursors)

    def __len__(self) -> int:
        return len(self.windows)

    def __repr__(self) -> str:
        return f"DRTState(num_tokens={self.num_tokens}, chunks={list(self.memory.counts)})"

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by those with these numbers; none of the memory is moved.

        Args:
            beam_idx: (B',) int64 or int32, at least one.

        Raises:
            ValueError: anything else, or a row that there is not. The state is as it was.
        """
        rows = row_numbers(beam_idx, self.batch_size)
        if rows == list(range(self.batch_size)):
            return
        memory = self.memory.select_rows(rows)
        for window in self.windows:
            window.select_rows(beam_idx, rows)
        self.cursors = [self.cursors[row] for row in rows]
        width = max(cursor.opened for cursor in self.cursors)
        if self.opened is not None:
            self.opened = self.opened[beam_idx, self.opened.shape[1] - width :]
        if self.opened_ids is not None:
            self.opened_ids = self.opened_ids[beam_idx, self.opened_ids.shape[1] - width :]
        self.current = [held and held.select_rows(beam_idx) for held in self.current]
        if self.recent_ids is not None:
            self.recent_ids = self.recent_ids[beam_idx]
        self.memory = memory
