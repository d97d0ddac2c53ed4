from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drt.data.placement import Sizes, context_length, move, place, question_ends

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=12)
ROW = {
    "sizes": st.builds(Sizes, st.integers(0, 300), st.integers(1, 90), st.integers(1, 16)),
    "num_questions": st.integers(1, 8),
    "chunk_size": st.sampled_from([16, 17, 32, 64]),
    "zone": st.floats(0, 1),
}


def assert_apart(starts: list[int], sizes: list[int], space: int) -> None:
    blocks = sorted(zip(starts, sizes, strict=True))
    ends = [start + size for start, size in blocks]
    assert blocks[0][0] >= 0
    assert ends[-1] <= space
    assert all(one[0] + one[1] <= two[0] for one, two in pairwise(blocks))


@given(SIZES, st.integers(0, 200), st.integers(0))
def test_placed_blocks_do_not_overlap(sizes: list[int], slack: int, seed: int) -> None:
    space = sum(sizes) + slack
    starts = place(np.random.default_rng(seed), sizes, space=space)
    assert_apart(starts, sizes, space)


def test_places_cover_the_space_evenly(rng: np.random.Generator) -> None:
    starts = np.array([place(rng, [10], space=30)[0] for _ in range(4200)])
    counts = np.bincount(starts, minlength=21)
    # 21 places, 200 expected in each with a standard deviation of 14; 5 deviations are 70.
    assert len(counts) == 21
    assert (abs(counts - 200) < 70).all()


def test_any_block_may_come_first(rng: np.random.Generator) -> None:
    firsts = {int(np.argmin(place(rng, [3, 5, 4], space=12))) for _ in range(100)}
    assert firsts == {0, 1, 2}


def test_blocks_without_room_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="blocks of 12 tokens in all do not fit in 11 tokens"):
        place(rng, [5, 7], space=11)


@given(SIZES, st.integers(0, 200), st.integers(0), st.data())
def test_moved_block_goes_to_its_target_or_beside_what_is_there(
    sizes: list[int], slack: int, seed: int, data: st.DataObject
) -> None:
    space = sum(sizes) + slack
    starts = place(np.random.default_rng(seed), sizes, space=space)
    moved = data.draw(st.integers(0, len(sizes) - 1))
    target = data.draw(st.integers(0, space - sizes[moved]))
    after = move(starts, sizes, moved, target=target)
    assert_apart(after, sizes, space)
    others = [number for number in range(len(sizes)) if number != moved]
    order = sorted(others, key=lambda number: starts[number])
    assert order == sorted(others, key=lambda number: after[number])
    # The nearer end of a block in the way is at most half of that block away.
    assert abs(after[moved] - target) <= max([sizes[number] for number in others], default=0) / 2


@given(st.fixed_dictionaries(ROW), st.integers(0, 2000), st.integers(0))
def test_questions_end_at_chunk_ends_with_room_for_everything(
    row: dict[str, Any], spare: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    with pytest.raises(ValueError, match="length is 0") as refused:
        question_ends(rng, **row, length=0)
    needed = int(str(refused.value).split(" need ")[1].split()[0])
    with pytest.raises(ValueError, match=f"need {needed} tokens"):
        question_ends(rng, **row, length=needed - 1)
    ends = question_ends(rng, **row, length=needed + spare)
    assert (ends % row["chunk_size"] == 0).all()
    assert ends.shape == (row["num_questions"],)
    hidden, question, answer = row["sizes"]
    assert ends[0] - question >= hidden
    assert (np.diff(ends) >= question + answer).all()
    assert ends[-1] + answer <= needed + spare


def test_questions_share_the_zone_evenly(rng: np.random.Generator) -> None:
    row = {"num_questions": 4, "length": 1024 + 32, "chunk_size": 32, "zone": 0.5}
    drawn = np.stack([question_ends(rng, Sizes(30, 20, 5), **row) for _ in range(400)])
    # Chunk ends 16 to 32 are in the zone; 3 strides of a chunk leave 14 places for 4 questions:
    # 3.5 each, from 16 + number * (3.5 + 1) on.
    for number in range(4):
        ends = drawn[:, number] // 32
        assert ends.min() == 16 + int(3.5 * number) + number
        assert ends.max() == 16 + int(3.5 * (number + 1) - 1e-9) + number


def test_zone_gives_way_to_needles_and_questions(rng: np.random.Generator) -> None:
    row = {"length": 1024 + 32, "chunk_size": 32, "zone": 0.1}
    many = question_ends(rng, Sizes(0, 20, 5), num_questions=20, **row)
    assert many.min() < 0.5 * 1024
    full = question_ends(rng, Sizes(1000, 20, 5), num_questions=1, **row)
    assert full.tolist() == [1024]


def test_answer_longer_than_a_chunk_is_refused(rng: np.random.Generator) -> None:
    row, sizes = {"length": 500, "chunk_size": 16}, Sizes(1, 1, 17)
    with pytest.raises(ValueError, match="an answer of 17 tokens exceeds chunk_size 16"):
        question_ends(rng, sizes, num_questions=1, zone=0.5, **row)
    with pytest.raises(ValueError, match="an answer of 17 tokens exceeds chunk_size 16"):
        context_length(sizes, **row)


def test_context_leaves_whole_chunks_for_the_question() -> None:
    assert context_length(Sizes(40, 32, 5), length=96, chunk_size=32) == 64
    assert context_length(Sizes(40, 33, 5), length=128, chunk_size=32) == 64
    with pytest.raises(ValueError, match="length is 100; it must be a multiple of chunk_size 32"):
        context_length(Sizes(40, 32, 5), length=100, chunk_size=32)
    with pytest.raises(ValueError, match="need 96 tokens at chunk_size 32; length is 64"):
        context_length(Sizes(40, 32, 5), length=64, chunk_size=32)
