"""A decoding state whose tensors stay where they are: what a plain step reads and writes.

See `decoding_graph.py` for what it is for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from drt.chunking import SegmentLayout
from drt.configuration import DRTConfig
from drt.retrieval import RetrievedChunks
from drt.state import CurrentRetrieval, DRTState, WindowCache, WindowKeys


class RowCounts:
    """Where each row stands, on the device, and what follows from it for one step.

    Args:
        batch_size: rows.
        window: positions that self-attention sees W, the places of a ring.
        in_order: whether attention wants the keys in order.
        device: where the model is.
    """

    def __init__(
        self, batch_size: int, window: int, *, in_order: bool, device: torch.device
    ) -> None:
        self._window, self._in_order = window, in_order
        # Next position, positions written to the rings
        self._counts = torch.zeros(2, batch_size, dtype=torch.int64, device=device)
        self.active = torch.ones(batch_size, dtype=torch.int64, device=device)
        """(B,) 1 for rows that read a token in this step, 0 for those that have ended."""
        self.place: Tensor
        """(B, 1, 1, 1) int64: where in the rings this step is written."""
        self.order: Tensor | None = None
        """(B, 1, W, 1) int64: the places of the rings, oldest first; None = as they are."""
        self.first_keys: Tensor | None = None
        """(B, 1) int64: see `WindowKeys`."""

    def load(self, positions: list[int], lengths: list[int]) -> None:
        """Begin at these positions, with this many positions in the rings."""
        self._counts.copy_(torch.tensor([positions, lengths]), non_blocking=True)

    @property
    def positions(self) -> Tensor:
        """(B,) int64: the position of this step."""
        return self._counts[0]

    def begin_step(self, *, has_short_rows: bool) -> None:
        """Work out what this step reads and writes; short rows have fewer than W - 1 positions."""
        unused = self._window - 1 - self._counts[1]
        self.place = unused.remainder(self._window).view(-1, 1, 1, 1)
        self.order = self.places(self._window, ahead=1) if self._in_order else None
        self.first_keys = unused.clamp_min(0)[:, None] if has_short_rows else None

    def end_step(self) -> None:
        """Count what this step wrote."""
        self._counts += self.active

    def places(self, count: int, *, ahead: int = 0) -> Tensor:
        """(B, 1, count, 1) int64: places of the last positions, oldest first.

        Args:
            count: how many; those that a row has not may be any.
            ahead: 1 counts the position that this step writes.
        """
        age = torch.arange(count - 1, -1, -1, device=self._counts.device)
        newest = self._window - ahead - self._counts[1]
        return (newest[:, None] + age).remainder(self._window)[:, None, :, None]

    def sources(self, count: int) -> Tensor:
        """(B, 1, W, 1) int64: which of the last `count` positions belongs into each place."""
        place = torch.arange(self._window, device=self._counts.device)
        age = (place - (self._window - self._counts[1, :, None])).remainder(self._window)
        return (count - 1 - age).clamp_min(0)[:, None, :, None]


class RingWindow(WindowCache):
    """Keys and values of the last W positions of one layer, written in place.

    Args:
        like: (B, G, W, D), for its shape, dtype and device.
        counts: which places to write and to read.
    """

    def __init__(self, like: Tensor, counts: RowCounts) -> None:
        super().__init__()
        self._counts = counts
        # Hidden places must hold finite numbers.
        self._buffers = torch.zeros_like(like), torch.zeros_like(like)

    def extend(
        self, key: Tensor, value: Tensor, *, window: int, layout: SegmentLayout
    ) -> WindowKeys:
        """As `WindowCache.extend` for (B, 1, G, D); the keys may be in any order."""
        counts = self._counts
        for buffer, new in zip(self._buffers, (key, value), strict=True):
            place = counts.place.expand(-1, buffer.shape[1], -1, buffer.shape[3])
            buffer.scatter_(2, place, new.transpose(1, 2))
        keys, values = self._buffers if counts.order is None else self._taken(counts.order)
        return WindowKeys(keys.transpose(1, 2), values.transpose(1, 2), counts.first_keys)

    def load(self, cache: WindowCache, sources: Tensor) -> None:
        """Copy what a cache holds; `sources` as `RowCounts.sources` gives them."""
        for buffer, held in zip(self._buffers, (cache.keys, cache.values), strict=True):
            if held is not None and held.shape[2]:
                buffer.copy_(_take(held, sources))

    def store(self, cache: WindowCache, places: Tensor, lengths: list[int]) -> None:
        """Give a cache new tensors with what these places hold, and the rows' lengths."""
        cache.keys, cache.values = self._taken(places)
        cache.lengths = lengths

    def _taken(self, places: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._buffers
        return _take(keys, places), _take(values, places)


class StepState(DRTState):
    """A `DRTState` of fixed tensors: one plain step reads and writes the same memory as the next.

    Args:
        model: the `DRTForCausalLM` whose steps they are.
        batch_size: rows.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        config = model.config
        assert isinstance(config, DRTConfig)
        super().__init__(config, batch_size)
        kind = {"dtype": model.dtype, "device": model.device}
        self._window = config.sliding_window
        self._lengths: list[int] = []
        self.counts = RowCounts(
            batch_size,
            self._window,
            in_order=config.position_embedding == "alibi",
            device=model.device,
        )
        heads, width = config.num_key_value_heads, config.head_dim
        assert heads is not None
        assert width is not None
        ring = torch.empty(batch_size, heads, self._window, width, **kind)
        self._rings = [RingWindow(ring, self.counts) for _ in self._windows]
        self._windows = list(self._rings)
        self._opened = torch.zeros(batch_size, config.chunk_size, config.hidden_size, **kind)
        self._retrieved = [_empty_chunks(config, batch_size, **kind) for _ in self.current]
        self._active = [True] * batch_size

    @property
    def has_short_rows(self) -> bool:
        """Whether some row has read less than its window."""
        return min(self._lengths) < self._window - 1

    @property
    def variant(self) -> tuple[object, ...]:
        """What a capture depends on besides the numbers in the tensors."""
        return self.has_short_rows, *(
            None if current is None else current.chunks.lengths is not None
            for current in self.current
        )

    def load(self, state: DRTState) -> None:
        """Copy in what a step reads of a state; its layers must have windows of one length."""
        windows = state.windows
        self._lengths = windows[0].lengths or [0] * self.batch_size
        self.counts.load([cursor.position for cursor in state.cursors], self._lengths)
        if windows[0].keys is not None:
            sources = self.counts.sources(windows[0].keys.shape[2])
            for ring, window in zip(self._rings, windows, strict=True):
                ring.load(window, sources)
        if state.opened is not None and state.opened.shape[1]:
            assert self._opened is not None
            self._opened[:, -state.opened.shape[1] :].copy_(state.opened)
        for group, current in enumerate(state.current):
            self.current[group] = current and self._load_retrieval(group, current)

    def _load_retrieval(self, group: int, current: CurrentRetrieval) -> CurrentRetrieval:
        held, chunks = current.chunks, self._retrieved[group]
        # An empty slot has weight 0, whatever it holds.
        index = held.indices.flatten().clamp_min(0)
        chunks.keys.copy_(held.keys.transpose(1, 2)[index].transpose(1, 2))
        chunks.values.copy_(held.values.transpose(1, 2)[index].transpose(1, 2))
        chunks.weights.copy_(held.weights)
        assert chunks.lengths is not None
        if held.lengths is None:
            return CurrentRetrieval(chunks.indices, chunks._replace(lengths=None))
        chunks.lengths.copy_(held.lengths[index])
        return CurrentRetrieval(chunks.indices, chunks)

    def store(self, state: DRTState) -> None:
        """Give a state, whose cursors count the steps, new tensors with what they changed."""
        lengths = [min(length, self._window - 1) for length in self._lengths]
        places = self.counts.places(max(lengths))
        for ring, window in zip(self._rings, state.windows, strict=True):
            ring.store(window, places, lengths)
        width = max(cursor.opened for cursor in state.cursors)
        if width:
            assert self._opened is not None
            state.opened = self._opened[:, -width:].clone()

    def set_active(self, active: list[bool]) -> None:
        """Say which rows read a token in the steps that follow."""
        if active != self._active:
            self.counts.active.copy_(torch.tensor(active), non_blocking=True)
            self._active = active

    def count_step(self) -> None:
        """Count on the host what the step counts on the device."""
        self._lengths = [
            length + active for length, active in zip(self._lengths, self._active, strict=True)
        ]

    # What the model asks of a state.

    def extend_opened(self, hidden: Tensor, layout: SegmentLayout) -> Tensor:
        """As `DRTState.extend_opened` where no chunk closes."""
        closed, _ = layout.split_chunks(hidden, hidden[:, :0])
        assert self._opened is not None
        moved = torch.cat([self._opened[:, 1:], hidden], dim=1)
        is_active = self.counts.active[:, None, None] > 0
        self._opened.copy_(torch.where(is_active, moved, self._opened))
        return closed

    def extend_opened_ids(self, ids: Tensor, layout: SegmentLayout) -> Tensor:
        """Refused: the steps keep no ids."""
        raise ValueError(
            "a decoding graph does not keep the ids that a retriever of text reads: "
            "decode without one"
        )

    def next_positions(self, layout: SegmentLayout) -> Tensor:
        """(B,) int64, on the device."""
        return self.counts.positions

    def note_ids(self, input_ids: Tensor) -> None:
        """Nothing: the state that is stepped has noted them, and is unfinished after an error."""


def _take(held: Tensor, index: Tensor) -> Tensor:
    """(B, G, n, D) at (B, 1, m, 1) -> (B, G, m, D), a new tensor."""
    return held.gather(2, index.expand(-1, held.shape[1], -1, held.shape[3]))


def _empty_chunks(
    config: DRTConfig, batch_size: int, *, dtype: torch.dtype, device: torch.device
) -> RetrievedChunks:
    """Room for what a block of each row retrieves, stored head-major."""
    heads, width = config.num_key_value_heads, config.head_dim
    assert heads is not None
    assert width is not None
    topk, size = config.retrieval_topk, config.chunk_size
    count = batch_size * topk
    keys, values = (
        torch.zeros(count, heads, size, width, dtype=dtype, device=device).transpose(1, 2)
        for _ in range(2)
    )
    return RetrievedChunks(
        keys,
        values,
        torch.full((count,), size, device=device),
        torch.arange(count, device=device).view(batch_size, 1, topk),
        torch.zeros(batch_size, 1, topk, device=device),
        in_order=True,
    )
