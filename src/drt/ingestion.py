"""Reading texts of any size into a memory on disk, so that it can be stopped at any moment.

Tokens are read in segments counted from where a reading begins. After some segments everything is
committed: the memory, the log of passages, and last the state with the place in the input. Who goes
on reads the same segments again, so the result is that of a reading that was never stopped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from drt.chunking.cursor import plan_row
from drt.data.streaming import STDIN, InputStream, TextInput, TextPiece
from drt.data.tokenization import encode_with_offsets, tokenizer_fingerprint
from drt.memory import DiskMemory
from drt.modeling import DRTForCausalLM
from drt.passages import PassageLog
from drt.saved_state import MANIFEST_FILE, PARTIAL_FILE, STATE_FILE, load_state, save_state
from drt.state import DRTState

_BEGUN = {"lock", PARTIAL_FILE, f"{MANIFEST_FILE}.new"}
"""What a memory may leave in its folder that died before its first state."""


class Progress(NamedTuple):
    """How far a reading is."""

    tokens: int
    """Tokens read in this call."""
    bytes: int
    """Bytes taken from the input in this call, as they are on disk."""


@dataclass(frozen=True)
class Place:
    """Where in the input the next token to be read stands."""

    input: str
    """The input's name."""
    size: int | None
    """Its bytes."""
    source: str
    """The text in it."""
    start: int
    """Byte at which the piece of it begins that was cut for tokenization."""
    tokens: int
    """Tokens of that piece that have been read."""


@dataclass
class Notes:
    """What a reading keeps in the saved state."""

    finished: dict[str, int | None] = field(default_factory=dict)
    """Name and size of the inputs that have been read to their end."""
    place: Place | None = None
    """Where an unfinished reading goes on; None = all was read."""
    unreadable: list[str] = field(default_factory=list)
    """Inputs that could not be read to their end."""
    ahead: list[str] = field(default_factory=list)
    """The inputs that must follow that of the place, for the state to be exact in the end."""
    num_sources: int = 0
    """Texts begun."""
    source: str | None = None
    """The last of them."""
    chunk_start: int = 0
    """Byte of the last text at which the open chunk begins."""
    last_end: int = 0
    """Byte of the last text up to which tokens have been read."""

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Notes:
        """From what JSON gives back."""
        place = saved.get("place")
        return cls(**{**saved, "place": None if place is None else Place(**place)})


class _Block(NamedTuple):
    """Tokens of one piece that wait to be read."""

    ids: np.ndarray
    """(n,) int64."""
    ends: np.ndarray
    """(n,) byte of the source's text at which each token ends."""
    place: Place
    """Where the first of them stands."""
    closes: bool
    """Whether the source ends with them."""

    def cut(self, count: int) -> tuple[_Block, _Block]:
        """The first tokens, and the others."""
        place = replace(self.place, tokens=self.place.tokens + count)
        return (
            _Block(self.ids[:count], self.ends[:count], self.place, False),
            _Block(self.ids[count:], self.ends[count:], place, self.closes),
        )


class _Unreadable(NamedTuple):
    """Why an input cannot be read on."""

    item: TextInput
    error: ValueError


class Ingestion:
    """A memory on disk that texts are read into.

    Args:
        model: what reads, in evaluation mode.
        tokenizer: its tokenizer, a fast one.
        folder: where the memory is, or will be.
        dtype: storage dtype of keys and values if the folder has no chunks yet; None = as it was
            begun with, or as computed.
        segment_size: tokens of one forward.
        commit_seconds: how long a kill may throw a reading back.

    Raises:
        ValueError: the folder holds something else, a memory that this model or tokenizer did not
            make, or a damaged one.
        BlockingIOError: somebody else is reading into it.
    """

    def __init__(
        self,
        model: DRTForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        *,
        dtype: torch.dtype | None = torch.bfloat16,
        segment_size: int = 16384,
        commit_seconds: float = 10.0,
    ) -> None:
        if segment_size < 1:
            raise ValueError(f"segment_size must be at least 1, got {segment_size}")
        # Written so that NaN fails too.
        if not commit_seconds >= 0:
            raise ValueError(f"commit_seconds must be at least 0, got {commit_seconds}")
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.segment_size, self.commit_seconds = segment_size, commit_seconds
        self.fingerprint = {
            "model": model.fingerprint(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        with ExitStack() as opened:
            self.state, self.notes = self._open(dtype, opened)
            self.log = opened.enter_context(PassageLog(folder, writable=True))
            cursor = self.state.cursors[0]
            self.log.truncate(
                num_tokens=cursor.tokens,
                num_chunks=cursor.chunks,
                num_sources=self.notes.num_sources,
            )
            # From here on `close` does it.
            opened.pop_all()
        self._committed = time.monotonic()

    def _open(self, dtype: torch.dtype | None, opened: ExitStack) -> tuple[DRTState, Notes]:
        """The folder's state, or an empty one; its memory is closed with `opened`."""
        folder = self.folder
        if (folder / MANIFEST_FILE).exists() or (folder / STATE_FILE).exists():
            state, saved = load_state(
                folder,
                self.model.config,
                fingerprint=self.fingerprint,
                device=self.model.device,
                writable=True,
                dtype=dtype,
            )
            assert isinstance(state.memory, DiskMemory)
            opened.enter_context(state.memory)
            return state, Notes.of(saved)
        if folder.is_dir() and any(file.name not in _BEGUN for file in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no memory")
        memory = DiskMemory.create(folder, fingerprint=self.fingerprint, dtype=dtype)
        opened.enter_context(memory)
        state, notes = self.model.new_state(memory=memory), Notes()
        # Before the first chunk, so that a folder with chunks always has a state.
        self._save(state, notes)
        return state, notes

    @property
    def unread(self) -> Place | None:
        """Where an unfinished reading goes on."""
        return self.notes.place

    def remaining(self, inputs: Sequence[TextInput]) -> list[TextInput]:
        """Which of the inputs are still to be read, the unfinished one first.

        Raises:
            ValueError: an input has changed since, or the unfinished one is not among them, or one
                that the unfinished reading had begun to look at behind it.
        """
        place = self.notes.place
        known = dict(self.notes.finished)
        if place is not None:
            known[place.input] = place.size
        for item in inputs:
            if item.name in known and item.name != STDIN and known[item.name] != item.size:
                raise ValueError(
                    f"{item.name} has {item.size} bytes, it had {known[item.name]} when it was "
                    f"read into {self.folder}"
                )
        left = [item for item in inputs if item.name not in self.notes.finished]
        if place is None:
            return left
        # In this order: the state is exact when what was looked at ahead has been read.
        begun = {name: index for index, name in enumerate((place.input, *self.notes.ahead))}
        missing = [name for name in begun if name not in {item.name for item in left}]
        if missing:
            raise ValueError(f"{self.folder} has read part of {', '.join(missing)}: give it again")
        return sorted(left, key=lambda item: begun.get(item.name, len(begun)))

    @torch.no_grad()
    def read(
        self,
        inputs: Sequence[TextInput],
        *,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> int:
        """Read what is left of the inputs.

        Args:
            inputs: files and streams, in order; those that were read before are left out.
            on_progress: called after every segment.

        Returns:
            The tokens read.

        Raises:
            ValueError: as `remaining`, or a text that cannot be read: what came before it stays,
                as a text that ends there, and the input counts as not given.
            OSError: the disk is full or fails; what was committed stands.
        """
        meter = _Meter(on_progress)
        left = self.remaining(inputs)
        self._check_mended(left)
        open_inputs = deque(left)
        waiting: deque[_Block] = deque()
        # `reach` tokens wait, at least one, so that there is always a place to go on from.
        held, reach = 0, self.model.reach
        failure = None
        for block in self._blocks(left, meter):
            if isinstance(block, _Unreadable):
                failure = block
                break
            waiting.append(block)
            held += len(block.ids)
            while held >= self.segment_size + reach:
                self._feed(_take(waiting, self.segment_size), complete=False)
                self._go_on_from(waiting, open_inputs)
                held -= self.segment_size
                meter.add(self.segment_size)
                self._commit_if_due()
        if held:
            self._feed(_take(waiting, held), complete=True)
            meter.add(held)
        self.notes.place, self.notes.ahead = None, []
        self._finish(open_inputs, before=failure and failure.item.name)
        if failure is not None:
            self.notes.unreadable.append(failure.item.name)
        self.commit()
        if failure is not None:
            # What came before stays; the input is as if it had not been given.
            raise failure.error
        return meter.tokens

    def _check_mended(self, inputs: Sequence[TextInput]) -> None:
        """Raise the error of an input that could not be read, if it still cannot.

        Its beginning would be read again with each try.
        """
        for item in inputs:
            if item.name in self.notes.unreadable and item.name != STDIN:
                for _ in InputStream(item):
                    pass
                self.notes.unreadable.remove(item.name)

    def _blocks(self, inputs: Sequence[TextInput], meter: _Meter) -> Iterator[_Block | _Unreadable]:
        """The tokens of the inputs, from where they have not been read, or what ends them."""
        place = self.notes.place
        for item in inputs:
            source, start = (None, 0) if place is None else (place.source, place.start)
            stream = InputStream(item, source=source, start=start)
            held: _Block | None = None
            failure: _Unreadable | None = None
            pieces = iter(stream)
            while True:
                try:
                    piece = next(pieces, None)
                except ValueError as error:
                    if place is not None:
                        # It is not what it was: nothing has been read of it by now.
                        raise
                    piece, failure = None, _Unreadable(item, error)
                if piece is None:
                    break
                block = self._encode(piece, item)
                if place is not None:
                    block, place = block.cut(place.tokens)[1], None
                if held is not None:
                    # A last piece of nothing but what the tokenizer drops ends the one before.
                    ends = piece.is_last and not len(block.ids)
                    yield held._replace(closes=held.closes or ends)
                held = block if len(block.ids) else None
                meter.at(stream.bytes_read)
            if held is not None:
                # A text that cannot be read on ends where it can be read to.
                yield held._replace(closes=held.closes or failure is not None)
            if failure is not None:
                yield failure
            meter.finish(item)

    def _encode(self, piece: TextPiece, item: TextInput) -> _Block:
        ids, ends = encode_with_offsets(self.tokenizer, piece.text)
        place = Place(item.name, item.size, piece.source, piece.start, 0)
        return _Block(ids, piece.start + ends, place, piece.is_last)

    def _feed(self, blocks: list[_Block], *, complete: bool) -> None:
        """Read tokens into the state and the log."""
        ids = np.concatenate([block.ids for block in blocks])
        closes = np.zeros(len(ids), dtype=np.bool_)
        closes[np.cumsum([len(block.ids) for block in blocks]) - 1] = [b.closes for b in blocks]
        self._log(blocks, ids, closes)
        self.model.read(
            torch.from_numpy(ids)[None].to(self.model.device),
            self.state,
            chunk_ends=torch.from_numpy(closes)[None],
            segment_size=self.segment_size,
            complete=complete,
        )

    def _go_on_from(self, waiting: deque[_Block], open_inputs: deque[TextInput]) -> None:
        """Note where the next token stands, and which inputs are thereby at their end."""
        first, *behind = dict.fromkeys(block.place.input for block in waiting)
        self.notes.place, self.notes.ahead = waiting[0].place, behind
        self._finish(open_inputs, before=first)

    def _finish(self, open_inputs: deque[TextInput], *, before: str | None) -> None:
        """Take the inputs before one of this name, or all, as read to their end."""
        while open_inputs and open_inputs[0].name != before:
            item = open_inputs.popleft()
            if item.name != STDIN:
                self.notes.finished[item.name] = item.size

    def _log(self, blocks: list[_Block], ids: np.ndarray, closes: np.ndarray) -> None:
        """Note which bytes of which source the chunks are that these tokens close."""
        cursor, notes = self.state.cursors[0], self.notes
        starts, sources = np.empty_like(ids), np.empty_like(ids)
        ends = np.concatenate([block.ends for block in blocks])
        done = 0
        for block in blocks:
            name = block.place.source
            if name != notes.source or block.place.start == block.place.tokens == 0:
                self.log.add_source(name)
                notes.source, notes.last_end = name, 0
                notes.num_sources += 1
            here = slice(done, done + len(block.ids))
            starts[here] = np.concatenate([[notes.last_end], block.ends[:-1]])
            sources[here] = notes.num_sources - 1
            notes.last_end, done = int(block.ends[-1]), here.stop
        if not cursor.opened:
            notes.chunk_start = int(starts[0])
        size = self.model.config.chunk_size
        plan = plan_row(cursor, len(ids), chunk_size=size, ends=closes)
        first = cursor.tokens - cursor.opened
        for cut in plan.cuts.tolist():
            end = cursor.tokens + cut
            self.log.add_chunk(
                token=first,
                length=end - first,
                start=notes.chunk_start,
                end=int(ends[cut - 1]),
                source=int(sources[cut - 1]),
            )
            first = end
            notes.chunk_start = int(starts[cut]) if cut < len(ids) else 0
        self.log.add_tokens(ids)

    def _commit_if_due(self) -> None:
        if time.monotonic() - self._committed >= self.commit_seconds:
            self.commit()

    def commit(self) -> None:
        """Make what has been read survive whatever comes."""
        self.log.commit()
        self._save(self.state, self.notes)
        self._committed = time.monotonic()

    def _save(self, state: DRTState, notes: Notes) -> None:
        save_state(state, self.folder, fingerprint=self.fingerprint, notes=asdict(notes))

    def close(self) -> None:
        """Let another reader in; what was not committed is lost."""
        self.log.close()
        memory = self.state.memory
        assert isinstance(memory, DiskMemory)
        memory.close()


class _Meter:
    """Counts tokens, and bytes over all inputs."""

    def __init__(self, on_progress: Callable[[Progress], object] | None) -> None:
        self.tokens = 0
        self._before, self._here = 0, 0
        self._on_progress = on_progress

    def at(self, bytes_read: int) -> None:
        """The current input has given this many bytes."""
        self._here = bytes_read

    def finish(self, item: TextInput) -> None:
        """The current input is at its end."""
        self._before += item.size or self._here
        self._here = 0

    def add(self, tokens: int) -> None:
        """Tokens have been read."""
        self.tokens += tokens
        if self._on_progress is not None:
            self._on_progress(Progress(self.tokens, self._before + self._here))


def _take(waiting: deque[_Block], count: int) -> list[_Block]:
    """Take tokens from the front."""
    taken = []
    while count:
        block = waiting.popleft()
        if len(block.ids) > count:
            block, rest = block.cut(count)
            waiting.appendleft(rest)
        taken.append(block)
        count -= len(block.ids)
    return taken
