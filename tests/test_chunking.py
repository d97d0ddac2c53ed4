"""Layouts of segments, against rows written out token by token."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drt.chunking import ChunkRules, Cursor, GridLayout, Marks, SegmentLayout, plan_segment

CPU = torch.device("cpu")
LANDMARK = -1.0


@dataclass
class WrittenRow:
    """A row as a walk over its tokens makes it, all positions absolute."""

    size: int
    onset: bool
    window: int
    positions: list[float] = field(default_factory=list)
    """The token's number at each position, -1 at a landmark."""
    chunk: list[float] = field(default_factory=list)
    chunk_start: int = 0
    chunks: list[list[float]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    source: int = -1
    """The landmark whose retrieval holds, -1 = none."""
    sources: list[int] = field(default_factory=list)
    document: int | None = None
    document_start: int = 0
    document_starts: list[int] = field(default_factory=list)
    first_chunk: int = 0
    predictions: dict[float, int] = field(default_factory=dict)

    def put(self, value: float) -> None:
        self.positions.append(value)
        self.sources.append(self.source)
        self.document_starts.append(self.document_start)

    def close(self, predicts: bool) -> None:
        if not self.chunk:
            return
        number = len(self.chunks)
        position = len(self.positions)
        inside = [j for j, start in enumerate(self.starts) if start >= position - self.window + 1]
        self.limits.append(min([number, *inside]) if self.window else number)
        self.firsts.append(self.first_chunk)
        if self.onset:
            self.source = number
            if predicts:
                self.predictions[self.chunk[-1]] = position
        self.put(LANDMARK)
        self.source = number
        self.chunks.append([*self.chunk, LANDMARK])
        self.starts.append(self.chunk_start)
        self.chunk = []

    def read(self, token: float, *, end: bool = False, document: int | None = None) -> None:
        if document is not None and document != self.document and self.positions:
            self.close(predicts=False)
            self.first_chunk, self.source = len(self.chunks), -1
            self.document_start = len(self.positions)
        if document is not None:
            self.document = document
        if not self.chunk:
            self.chunk_start = len(self.positions)
        self.predictions[token] = len(self.positions)
        self.put(token)
        self.chunk.append(token)
        if end or len(self.chunk) == self.size:
            self.close(predicts=True)


rules = st.builds(
    ChunkRules,
    chunk_size=st.integers(1, 9),
    landmark_starts_block=st.booleans(),
    excluded_window=st.sampled_from([0, 0, 1, 5, 20]),
)


@st.composite
def cases(draw: Any) -> tuple[ChunkRules, list[dict[str, np.ndarray | None]], int]:
    """Rules, segments of columns with marks, and the number of rows."""
    batch = draw(st.integers(1, 3))
    padded, ended, documented = (draw(st.booleans()) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    documents = np.sort(rng.integers(0, 4, (batch, 200)), axis=1) if documented else None
    segments, begin = [], 0
    for length in draw(st.lists(st.integers(0, 30), min_size=1, max_size=4)):
        part = slice(begin, begin + length)
        segments.append(
            {
                "tokens": np.tile(np.arange(begin, begin + length, dtype=float), (batch, 1)),
                "content": rng.random((batch, length)) < 0.7 if padded else None,
                "chunk_ends": rng.random((batch, length)) < 0.15 if ended else None,
                "document_ids": None if documents is None else documents[:, part],
                "closing": rng.random(batch) < (0.3 if ended else 0.0),
            }
        )
        begin += length
    return draw(rules), segments, batch


def lay_out(
    case: tuple[ChunkRules, list[dict[str, Any]], int],
) -> list[tuple[SegmentLayout, list[Cursor], list[WrittenRow], list[WrittenRow], dict[str, Any]]]:
    """Per segment: the layout, cursors before, written rows before and after, the segment."""
    rules, segments, batch = case
    cursors = [Cursor()] * batch
    rows = [WrittenRow(rules[0], rules[1], rules[2]) for _ in range(batch)]
    made = []
    for segment in segments:
        cursors = [
            c._replace(closing=bool(closing))
            for c, closing in zip(cursors, segment["closing"], strict=True)
        ]
        before = [copy_of(row) for row in rows]
        for row, closing in zip(rows, segment["closing"], strict=True):
            if closing:
                row.close(predicts=False)
        for b, row in enumerate(rows):
            for t, token in enumerate(segment["tokens"][b]):
                if segment["content"] is not None and not segment["content"][b, t]:
                    continue
                ends, ids = segment["chunk_ends"], segment["document_ids"]
                end = ends is not None and bool(ends[b, t])
                row.read(token, end=end, document=None if ids is None else int(ids[b, t]))
        marks = Marks(segment["content"], segment["chunk_ends"], segment["document_ids"])
        count = segment["tokens"].shape[1]
        layout, after = plan_segment(cursors, count, rules=rules, marks=marks, device=CPU)
        made.append((layout, cursors, before, [copy_of(row) for row in rows], segment))
        cursors = after
    for cursor, row in zip(cursors, rows, strict=True):
        assert cursor.position == len(row.positions)
        assert cursor.chunks == len(row.chunks)
        assert cursor.opened == len(row.chunk)
        assert cursor.first_chunk == row.first_chunk
        assert cursor.first_position == row.document_start
    return made


def copy_of(row: WrittenRow) -> WrittenRow:
    lists = {k: list(v) for k, v in vars(row).items() if isinstance(v, list)}
    return replace(row, **lists, predictions=dict(row.predictions))


@settings(max_examples=150)
@given(cases())
def test_positions_chunks_and_candidates_agree_with_a_walk(case: Any) -> None:
    opened = torch.zeros(case[2], 0, 1)
    for layout, _, before, after, segment in lay_out(case):
        tokens = torch.from_numpy(segment["tokens"]).float()[..., None]
        hidden = layout.to_positions(tokens, torch.tensor([LANDMARK]))
        closed, opened = layout.split_chunks(hidden, opened)
        landmarks = layout.take_landmarks(hidden)
        assert hidden.shape[1] == layout.num_positions
        for b, (old, new) in enumerate(zip(before, after, strict=True)):
            wanted = new.positions[len(old.positions) :]
            assert hidden[b, : layout.counts[b], 0].tolist() == wanted
            assert layout.first_positions[b] == len(old.positions)
            chunks = new.chunks[len(old.chunks) :]
            for number, chunk in enumerate(chunks):
                got = closed[b, number, : len(chunk), 0].tolist()
                assert got == chunk
                lengths = layout.chunk_lengths
                length = case[0].chunk_size if lengths is None else int(lengths[b, number])
                assert length == len(chunk) - 1
                assert landmarks[b, number, 0] == LANDMARK
                assert layout.limits[b, number] == new.limits[len(old.chunks) + number]
                first = 0 if layout.firsts is None else layout.firsts[b, number]
                assert first == new.firsts[len(old.chunks) + number]
            if layout.chunk_lengths is not None:
                assert not layout.chunk_lengths[b, len(chunks) :].any()
            assert (layout.limits[b, len(chunks) :] == 0).all()
            open_now = len(new.chunk)
            assert opened[b, opened.shape[1] - open_now :, 0].tolist() == new.chunk


@settings(max_examples=150)
@given(cases())
def test_blocks_documents_and_predictions_agree_with_a_walk(case: Any) -> None:
    for layout, _, before, after, segment in lay_out(case):
        batch = len(before)
        marked = torch.arange(1.0, layout.num_positions + 1).expand(batch, -1)[..., None]
        blocks = layout.to_blocks(marked)
        back = layout.from_blocks(blocks)
        sources = layout.block_sources.expand(batch, -1)
        for b, (old, new) in enumerate(zip(before, after, strict=True)):
            count, known = layout.counts[b], len(old.chunks)
            assert torch.equal(back[b, :count], marked[b, :count])
            offset = len(old.positions)
            for position in range(count):
                block = (blocks[b, :, :, 0] == position + 1).any(1).nonzero().item()
                wanted = new.sources[offset + position]
                # 0 = what held before the segment.
                named = int(sources[b, int(block)])
                resolved = {0: old.source, -1: -1}.get(named, known + named - 1)
                assert resolved == wanted
            final = int(layout.final_sources.expand(batch)[b])
            assert {0: old.source, -1: -1}.get(final, known + final - 1) == new.source
            if layout.document_starts is not None:
                got = layout.document_starts[b, :count].tolist()
                assert got == new.document_starts[offset:]
            else:
                assert set(new.document_starts[offset:]) <= {0}
            predicted = layout.take_predictions(marked, slice(None))[b, :, 0]
            for t, token in enumerate(segment["tokens"][b]):
                if segment["content"] is None or segment["content"][b, t]:
                    assert int(predicted[t]) - 1 == new.predictions[token] - offset


@given(rules, st.integers(0, 40), st.integers(0, 40))
def test_rows_on_the_grid_need_no_index(rules: ChunkRules, before: int, length: int) -> None:
    cursors = [Cursor()] * 2
    marks = Marks()
    for count in (before, length):
        layout, cursors = plan_segment(cursors, count, rules=rules, marks=marks, device=CPU)
        assert isinstance(layout, GridLayout)
        assert layout.chunk_lengths is None


def test_ends_on_the_grid_stay_on_the_grid() -> None:
    ends = np.zeros((1, 12), dtype=np.bool_)
    ends[0, 7] = True
    rules = ChunkRules(chunk_size=4, landmark_starts_block=True)
    layout, _ = plan_segment([Cursor()], 12, rules=rules, marks=Marks(None, ends), device=CPU)
    assert isinstance(layout, GridLayout)
    assert layout.num_closed == 3
