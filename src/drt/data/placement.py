"""Where needles and questions go in a row of content tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Sizes(NamedTuple):
    """What must fit in a row, in tokens."""

    hidden: int
    """All needles."""
    question: int
    """The longest question."""
    answer: int
    """The longest answer."""


def place(
    rng: np.random.Generator,
    sizes: Sequence[int],
    *,
    space: int,
    in_order: Sequence[Sequence[int]] = (),
) -> list[int]:
    """Return random starts for blocks of ``sizes`` tokens in ``space`` tokens.

    Blocks do not overlap; their order and the gaps before, between and after them are random.

    Args:
        rng: the source of the places.
        sizes: tokens of each block.
        space: tokens that there are.
        in_order: disjoint sets of blocks, by number, each to be placed in the order given.

    Raises:
        ValueError: the blocks have more than ``space`` tokens.
    """
    slack = space - sum(sizes)
    if slack < 0:
        raise ValueError(f"blocks of {sum(sizes)} tokens in all do not fit in {space} tokens")
    gaps = np.sort(rng.integers(slack + 1, size=len(sizes))).tolist()
    order = rng.permutation(len(sizes)).tolist()
    for numbers in in_order:
        where = [slot for slot, number in enumerate(order) if number in numbers]
        for slot, number in zip(where, numbers, strict=True):
            order[slot] = number
    starts, used = [0] * len(sizes), 0
    for gap, number in zip(gaps, order, strict=True):
        starts[number] = gap + used
        used += sizes[number]
    return starts


def move(starts: Sequence[int], sizes: Sequence[int], moved: int, *, target: int) -> list[int]:
    """Return ``starts`` with block ``moved`` taken out and put in again at ``target``.

    Where another block is in the way, the block goes to the nearer end of that one instead. Blocks
    between the two places shift by its size. The space that all blocks take up stays the same if
    ``target`` is inside it.
    """
    size = sizes[moved]
    closed = [start - size * (start > starts[moved]) for start in starts]
    for number, start in enumerate(closed):
        end = start + sizes[number]
        if number != moved and start < target < end:
            target = start if target - start < end - target else end
            break
    opened = [start + size * (start >= target) for start in closed]
    opened[moved] = target
    return opened


def question_ends(
    rng: np.random.Generator,
    sizes: Sizes,
    *,
    num_questions: int,
    length: int,
    chunk_size: int,
    zone: float,
) -> np.ndarray:
    """Return where the questions of a row end: at chunk ends, after the needles, spread out.

    The questions share the last ``zone`` of the row evenly, each at a random place of its part, so
    far as the needles fit before the first of them. If they do not, the zone shrinks; if questions
    do not fit in it, it grows.

    Args:
        rng: the source of the places.
        sizes: the needles, questions and answers.
        num_questions: how many questions there are, 1 or more.
        length: tokens of the row.
        chunk_size: tokens of a chunk.
        zone: share of the row from 0 to 1.

    Returns:
        Ascending multiples of ``chunk_size``, int64, shape (num_questions,).

    Raises:
        ValueError: not all fits, or an answer exceeds a chunk.
    """
    hidden, question, answer = sizes
    _check_answer(answer, chunk_size)
    # Chunks from here on: from one question's end to the next, the first end, the last one.
    stride = _ceil_div(question + answer, chunk_size)
    earliest = _ceil_div(hidden + question, chunk_size)
    needed = earliest + (num_questions - 1) * stride
    last = (length - answer) // chunk_size
    if needed > last:
        raise ValueError(
            f"needles of {hidden} tokens in all and {num_questions} questions of {question} tokens "
            f"with answers of {answer} need {needed * chunk_size + answer} tokens "
            f"at chunk_size {chunk_size}; length is {length}"
        )
    latest = last - (num_questions - 1) * stride
    first = min(max(earliest, round(last * (1 - zone))), latest)
    numbers = np.arange(num_questions)
    spread = (latest + 1 - first) * (numbers + rng.random(num_questions)) / num_questions
    return (first + numbers * stride + spread.astype(np.int64)) * chunk_size


def context_length(sizes: Sizes, *, length: int, chunk_size: int) -> int:
    """Return how many of ``length`` tokens are context if the question takes whole chunks.

    Raises:
        ValueError: ``length`` is no multiple of ``chunk_size``, the needles do not fit in the
            context, or an answer exceeds a chunk.
    """
    hidden, question, answer = sizes
    _check_answer(answer, chunk_size)
    if length % chunk_size:
        raise ValueError(f"length is {length}; it must be a multiple of chunk_size {chunk_size}")
    padded = _ceil_div(question, chunk_size) * chunk_size
    if length - padded < hidden:
        needed = padded + _ceil_div(hidden, chunk_size) * chunk_size
        raise ValueError(
            f"needles of {hidden} tokens in all and a question of {question} tokens need {needed} "
            f"tokens at chunk_size {chunk_size}; length is {length}"
        )
    return length - padded


def _check_answer(answer: int, chunk_size: int) -> None:
    # One retrieval serves the tokens of one chunk.
    if answer > chunk_size:
        raise ValueError(f"an answer of {answer} tokens exceeds chunk_size {chunk_size}")


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
