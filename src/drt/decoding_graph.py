"""Plain steps of decoding as one CUDA graph.

A *plain step* reads one token a row, closes no chunk and begins no document: S - 1 of S tokens. It
is the same few hundred small kernels each time, and an eager step spends its time launching them.
Replayed as a graph they are one launch; what a step does must then be the same in every shape and
every address, and the host must not wait for any number.

There is no second model here. The step is `DRTForCausalLM.forward`, given a `StepState`: a
`DRTState` whose tensors stay where they are and are written in place.

* The window of a layer is a ring of W places, `RingWindow`. The position that is the n-th of its
  row goes to place (W - 1 - n) mod W, so the unused places of a row that has read little come
  first, and `first_keys` hides them. Attention with rotary positions takes keys in any order; for
  ALiBi they are put in order.
* Where rows stand is counted on the device, `RowCounts`. A row that has ended does not count: what
  it writes comes to a place that nothing needs, and is overwritten.
* The open chunks move left in their buffer by one position a step.
* What the open block attends to is copied in when it changes, once a chunk.

A `DecodingGraph` takes the plain steps of one `DRTState` at a time, from `attach` to `detach`.
Every other step (a chunk closes, a document begins, several tokens, a gradient is wanted) is the
ordinary forward: it asks the state for its windows, and the state has the graph write them back,
into new tensors. So has a fork. The next plain step copies the state in again. The tensors of a
state are thus replaced and never written to, attached or not.

On other devices than CUDA the same steps run eagerly, which is how they are tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from drt.chunking import Cursor, Marks, SegmentLayout, plan_segment, stays_open
from drt.configuration import DRTConfig
from drt.retrieval import RetrievedChunks
from drt.state import CurrentRetrieval, DRTState, WindowCache, WindowKeys

if TYPE_CHECKING:
    from drt.modeling import DRTForCausalLM

# Eager steps before a capture: they allocate, compile and choose what a capture must not.
_NUM_WARM_UP = 3


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
        self._counts.copy_(torch.tensor([positions, lengths]))

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
        model: whose steps they are.
        batch_size: rows.
    """

    def __init__(self, model: DRTForCausalLM, batch_size: int) -> None:
        config = model.config
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
            self.counts.active.copy_(torch.tensor(active))
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

    def next_positions(self, layout: SegmentLayout) -> Tensor:
        """(B,) int64, on the device."""
        return self.counts.positions

    def note_ids(self, input_ids: Tensor) -> None:
        """Nothing: the state that is stepped has noted them."""


class _Capture(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    """(B, 1, vocab_size), where a replay leaves them."""


class DecodingGraph:
    """Takes the plain steps of decoding of a `DRTState`, on a GPU by replaying a CUDA graph.

    `model.generate(..., decoding_graph=True)` makes and uses one. In a loop of one's own:

        graph = DecodingGraph(model, batch_size=1)
        with graph.attached(state):
            for ...:
                logits = model(token, past_key_values=state).logits

    Which steps it takes is said at `covers`; all others are the ordinary forward. What the state
    holds is the same either way, and can be read, forked and saved at any time. A graph is captured
    in the fourth step of its kind and kept: use one object for many states and calls. It reads the
    parameters where they were at that time: make a new one after moving or replacing them (changes
    in place are seen).

    Args:
        model: on one device, without hooks: a replay calls no Python.
        batch_size: rows of the states it will be attached to.

    Raises:
        ValueError: the model is spread over devices, or a module of it has hooks.
    """

    def __init__(self, model: DRTForCausalLM, batch_size: int = 1) -> None:
        _check_model(model)
        self._model = model
        self._steps = StepState(model, batch_size)
        self._ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        self._state: DRTState | None = None
        self._is_loaded = False
        self._is_cuda = model.device.type == "cuda"
        self._side: torch.cuda.Stream | None = None
        self._captures: dict[tuple[object, ...], _Capture] = {}
        self._num_warm: dict[tuple[object, ...], int] = {}

    @property
    def batch_size(self) -> int:
        """Rows of the states it can be attached to."""
        return self._steps.batch_size

    def attach(self, state: DRTState) -> None:
        """Take the plain steps of this state from here on, until `detach`.

        Raises:
            ValueError: a state of other rows, or one of the two is attached already.
        """
        if state.batch_size != self.batch_size:
            raise ValueError(
                f"the decoding graph is for {self.batch_size} rows, the state has "
                f"{state.batch_size}"
            )
        if self._state is not None or state.decoding_graph is not None:
            raise ValueError("the decoding graph or the state is attached already: detach it first")
        self._state, state.decoding_graph = state, self

    def detach(self) -> None:
        """Leave the state to the ordinary forward; nothing happens where none is attached."""
        if self._state is not None:
            self.settle()
            self._state.decoding_graph = None
            self._state = None

    @contextmanager
    def attached(self, state: DRTState) -> Iterator[None]:
        """`attach` on entering, `detach` on leaving."""
        self.attach(state)
        try:
            yield
        finally:
            self.detach()

    @torch.no_grad()
    def settle(self) -> None:
        """Write what the last steps changed back to the state; it is copied in again when needed.

        A state asks for this by itself when its windows or open chunks are read.
        """
        if self._is_loaded and self._state is not None:
            # First, as the state is read below.
            self._is_loaded = False
            self._steps.store(self._state)

    def covers(self, input_ids: Tensor, marks: Marks) -> bool:
        """Whether a forward of the attached state is a plain step.

        It is where each row is given one token or, having ended, padding; no chunk closes; no row
        is in a second or later document; no gradient is wanted and autocast is off; and all layers
        have windows of one length, as they have but after `model.read(..., complete=False)`.

        Args:
            input_ids: (B, T) int64.
            marks: what else is given for them.
        """
        state = self._state
        # A reordered state may have other rows than when it was attached.
        if state is None or input_ids.shape != self._ids.shape or torch.is_grad_enabled():
            return False
        if marks.chunk_ends is not None or marks.document_ids is not None:
            return False
        if torch.is_autocast_enabled(self._ids.device.type):
            return False
        active, rules = self._active_rows(marks), self._model.model.rules
        rows = [cursor for cursor, reads in zip(state.cursors, active, strict=True) if reads]
        if not rows or not all(stays_open(cursor, 1, rules) for cursor in rows):
            return False
        return self._is_loaded or _have_one_length(state.windows)

    def step(self, input_ids: Tensor, marks: Marks) -> Tensor:
        """Read one token a row: a step that `covers` has found to be plain.

        Args:
            input_ids: (B, 1) int64.
            marks: says which rows have ended.

        Returns:
            (B, 1, vocab_size) logits, the caller's to keep.
        """
        state, steps = self._state, self._steps
        assert state is not None
        if not self._is_loaded:
            steps.load(state)
            self._is_loaded = True
        active = self._active_rows(marks)
        steps.set_active(active)
        self._ids.copy_(input_ids)
        logits = self._replayed() if self._is_cuda else self._run()
        steps.count_step()
        rules, device = self._model.model.rules, self._ids.device
        _, after = plan_segment(state.cursors, 1, rules=rules, marks=Marks(), device=device)
        state.cursors = [
            new if reads else old
            for new, old, reads in zip(after, state.cursors, active, strict=True)
        ]
        return logits

    def _active_rows(self, marks: Marks) -> list[bool]:
        if marks.content is None:
            return [True] * self.batch_size
        return marks.content[:, 0].tolist()

    def _run(self) -> Tensor:
        """The step itself: all that a graph replays."""
        steps = self._steps
        # Of the layout of a plain step nothing depends on where the rows stand.
        steps.cursors = [Cursor()] * self.batch_size
        steps.counts.begin_step(has_short_rows=steps.has_short_rows)
        out = self._model(self._ids, past_key_values=steps, logits_to_keep=1)
        steps.counts.end_step()
        assert out.logits is not None
        return out.logits

    def _replayed(self) -> Tensor:
        variant = self._steps.variant
        with torch.cuda.device(self._ids.device):
            warm = self._num_warm.get(variant, 0)
            if warm < _NUM_WARM_UP:
                self._num_warm[variant] = warm + 1
                return self._run_beside()
            if variant not in self._captures:
                self._captures[variant] = self._captured()
            capture = self._captures[variant]
            capture.graph.replay()
            # The next replay writes there.
            return capture.logits.clone()

    def _run_beside(self) -> Tensor:
        """A step on a stream of its own, as what is captured must have run before."""
        if self._side is None:
            self._side = torch.cuda.Stream()
        main, side = torch.cuda.current_stream(), self._side
        side.wait_stream(main)
        with torch.cuda.stream(side):
            logits = self._run()
        main.wait_stream(side)
        logits.record_stream(main)
        return logits

    def _captured(self) -> _Capture:
        graph = torch.cuda.CUDAGraph()
        # Captures never run at once, so they may share their memory.
        pool = next((held.graph.pool() for held in self._captures.values()), None)
        # Other threads may go on allocating, say to load data.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self._run()
        return _Capture(graph, logits)


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


def _have_one_length(windows: list[WindowCache]) -> bool:
    return all(window.lengths == windows[0].lengths for window in windows)


def _check_model(model: DRTForCausalLM) -> None:
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1:
        raise ValueError(f"a decoding graph needs a model on one device, it is on {devices}")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"module {name!r} has forward hooks, which a replayed graph would not call: "
                "remove them or decode without a decoding graph"
            )
