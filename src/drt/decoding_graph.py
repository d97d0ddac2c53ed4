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

from drt.chunking import Cursor, Marks, advance_open, stays_open
from drt.precision import uses_autocast
from drt.state import DRTState, WindowCache
from drt.step_state import StepState

if TYPE_CHECKING:
    from drt.modeling import DRTForCausalLM

# Eager steps before a capture: they allocate, compile and choose what a capture must not.
_NUM_WARM_UP = 3


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
    parameters where they are: changes in place are seen, after a move it takes a new object.

    Args:
        model: on one device, without hooks: a replay calls no Python.
        batch_size: rows of the states it will be attached to.

    Raises:
        ValueError: the model is spread over devices, or a module of it has hooks.
    """

    def __init__(self, model: DRTForCausalLM, batch_size: int = 1) -> None:
        _check_hooks(model)
        _check_device(model)
        self.model = model
        """Whose steps it takes."""
        self._addresses = _addresses(model)
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
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
            ValueError: a state of other rows, one of the two is attached already, or the model has
                got hooks or other parameters since this object was made.
        """
        _check_hooks(self.model)
        if _addresses(self.model) != self._addresses:
            raise ValueError("the model's parameters were moved or replaced: make a new graph")
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
        if uses_autocast(self._ids.device.type):
            return False
        if any(cursor.closing for cursor in state.cursors):
            # Padding closes the chunk of a row that has ended, too.
            return False
        active, rules = self._active_rows(marks), self.model.model.rules
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
        rules = self.model.model.rules
        state.cursors = [
            advance_open(cursor, 1, rules) if reads else cursor
            for cursor, reads in zip(state.cursors, active, strict=True)
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
        out = self.model(self._ids, past_key_values=steps, logits_to_keep=1)
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


def _have_one_length(windows: list[WindowCache]) -> bool:
    return all(window.lengths == windows[0].lengths for window in windows)


def _addresses(model: DRTForCausalLM) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def _check_device(model: DRTForCausalLM) -> None:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1:
        raise ValueError(f"a decoding graph needs a model on one device, it is on {devices}")


def _check_hooks(model: DRTForCausalLM) -> None:
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"module {name!r} has forward hooks, which a replayed graph would not call: "
                "remove them or decode without a decoding graph"
            )
