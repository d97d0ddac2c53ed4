"""The layout of a segment, against a layout written out token by token."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drt.chunking import SegmentLayout


class Written(NamedTuple):
    content: list[int]
    landmarks: list[int]
    predictions: list[int]
    blocks: list[int]


def write_out(start: int, length: int, size: int, onset: bool) -> Written:
    """Walk over the whole row; keep what falls into the segment, counted from its start."""
    content, landmarks, predictions, blocks, position = [], [], [], [], 0
    for token in range(start + length):
        closes = token % size == size - 1
        if token >= start:
            content.append(position)
            blocks.append(token // size)
            predictions.append(position + (closes and onset))
        position += 1
        if closes:
            if token >= start:
                landmarks.append(position)
                blocks.append(token // size + onset)
            position += 1
    first = content[0] if content else 0
    return Written(
        [p - first for p in content],
        [p - first for p in landmarks],
        [p - first for p in predictions],
        [b - blocks[0] for b in blocks],
    )


layouts = st.tuples(st.integers(0, 50), st.integers(1, 60), st.integers(1, 12), st.booleans())


@given(layouts)
def test_positions_agree_with_a_walk(layout: tuple[int, int, int, bool]) -> None:
    made, written = SegmentLayout(*layout), write_out(*layout)
    assert made.content_positions.tolist() == written.content
    assert made.landmark_positions.tolist() == written.landmarks
    assert made.prediction_positions.tolist() == written.predictions
    assert made.num_positions == len(written.blocks)
    assert made.num_blocks == written.blocks[-1] + 1


@given(layouts)
def test_blocks_hold_the_positions_that_share_a_retrieval(
    layout: tuple[int, int, int, bool],
) -> None:
    made, written = SegmentLayout(*layout), write_out(*layout)
    marked = torch.arange(1.0, made.num_positions + 1).view(1, -1, 1)
    blocks = made.to_blocks(marked)
    for position, block in enumerate(written.blocks):
        assert (blocks[0, block] == position + 1).sum() == 1
    assert torch.equal(made.from_blocks(blocks), marked)


@settings(max_examples=50)
@given(layouts)
def test_chunks_split_across_segments_come_out_whole(layout: tuple[int, int, int, bool]) -> None:
    start, length, size, onset = layout
    # Embedding = token number, landmark = -1, so a whole chunk is recognized by its numbers.
    tokens = torch.arange(float(start + length)).view(1, -1, 1)
    landmark = torch.tensor([-1.0])
    opened, chunks = tokens[:, :0], []
    for begin, end in ((0, start), (start, start + length)):
        made = SegmentLayout(begin, end - begin, size, onset)
        hidden = made.insert_landmarks(tokens[:, begin:end], landmark)
        closed, opened = made.split_chunks(hidden, opened)
        chunks += closed[0, :, :, 0].tolist()
    expected = [
        [*range(number * size, (number + 1) * size), -1]
        for number in range((start + length) // size)
    ]
    assert chunks == expected
    assert opened[0, :, 0].tolist() == list(range(len(expected) * size, start + length))


def test_an_empty_segment_has_nothing() -> None:
    made = SegmentLayout(5, 0, 4)
    assert made.num_positions == made.num_blocks == made.num_closed == 0


def test_a_layout_without_landmarks_never_closes_a_chunk() -> None:
    made = SegmentLayout.without_landmarks(10**9, 5)
    assert made.num_closed == 0
    assert made.content_positions.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("onset", [True, False])
def test_positions_count_landmarks_from_the_start_of_the_row(onset: bool) -> None:
    assert SegmentLayout(33, 1, 16, onset).first_position == 35
