"""How a call is cut into tiles, by its sizes alone.

The limits were chosen by what compiles for sm_80, sm_90 and sm_100 with few or no spilled registers
(`python -m drt.ops.gca.triton.report`); not yet measured on a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

# `tl.dot` wants at least so many numbers along each side of a tile.
_SMALLEST = 16
# Shared memory that the compiler takes beside the tiles, at most.
_OTHER_BYTES = 1024
_MOST_STAGES = 3


class Gpu(NamedTuple):
    """What a GPU sets limits by."""

    shared_memory: int = 232448
    """Bytes of shared memory that a program may take; an H100's."""
    reads_shared: bool = True
    """Whether matrix instructions read shared memory (sm_90, sm_100) and not registers only."""


class Sizes(NamedTuple):
    """What decides about tiles."""

    rows: int
    """Queries of a chunk that read one key/value head, Q * R."""
    size: int
    """Tokens of a chunk S."""
    width: int
    """Head width D."""
    itemsize: int
    """Bytes of a number."""
    gpu: Gpu


class Kernel(NamedTuple):
    """What tells one kernel over the queries from the other."""

    operands: int
    """Row tiles that are kept beside each accumulator: the queries, and the gradient."""
    few: int
    """Float32 accumulators that 4 warps hold without spilling."""
    many: int
    """Float32 accumulators that 8 warps hold without spilling."""


FORWARD = Kernel(operands=1, few=12288, many=34816)
QUERY = Kernel(operands=2, few=12288, many=16384)


class Tiles(NamedTuple):
    """The tiles of one kernel launch."""

    blocks: tuple[int, ...]
    """Rows of each tile of a program."""
    parts: int
    """Programs that share the rows of a chunk of queries."""
    block_size: int
    """Tokens of a tile of keys."""
    splits: int
    """Such tiles in a chunk."""
    block_width: int
    """Head width, rounded up to a power of two."""
    num_warps: int
    num_stages: int
    """Loads in flight, and one in use."""


@cache
def query_tiles(sizes: Sizes, kernel: Kernel) -> Tiles:
    """Tiles of a kernel that goes over the slots of a chunk of queries."""
    rows, size, width, itemsize, gpu = sizes
    block_width = _power(width)
    block_size = _block_size(size, block_width, itemsize, most=128)
    blocks, parts, num_warps = row_blocks(rows, 64), 1, 4
    # Operands in registers leave fewer for accumulators.
    few, many = (kernel.few, kernel.many) if gpu.reads_shared else (4096, kernel.many // 2)
    if block_size > 64 or itemsize > 2 or sum(blocks) * block_width > few:
        num_warps = 8
        most, spare = max(1, many // block_width // 64) * 64, _SMALLEST
        if itemsize > 2:
            # Float32 products are emulated with registers of their own, and what does not fit there
            # passes through shared memory, on top of what is kept in it.
            most, spare = 32 if gpu.reads_shared or block_width <= 128 else 16, 0
        # A little more is taken along rather than left to a program of its own.
        parts = max(1, -(-(rows - spare) // most))
        blocks = row_blocks(-(-rows // parts), min(most, 128))
        parts = -(-rows // sum(blocks))
    kept = kernel.operands * sum(blocks) * block_width * itemsize
    block_size, stages = _stages(gpu.shared_memory - kept, block_size, 2 * block_width * itemsize)
    return Tiles(blocks, parts, block_size, -(-size // block_size), block_width, num_warps, stages)


@cache
def memory_tiles(sizes: Sizes) -> Tiles:
    """Tiles of the kernel that goes over those who retrieved a chunk.

    Its `blocks` are (full, last): a chunk of queries is walked in tiles of `full` rows and ends
    with a smaller one of `last`, or with none where that is 0.
    """
    rows, size, width, itemsize, gpu = sizes
    block_width = _power(width)
    block_size = _block_size(size, block_width, itemsize, most=64)
    kept = 2 * block_size * block_width * itemsize
    wanted, num_warps = _memory_block(block_width, itemsize, gpu)
    full, stages = _stages(
        gpu.shared_memory - kept, min(wanted, _power(rows)), 2 * block_width * itemsize
    )
    last = _power(rows % full) if rows % full else 0
    blocks = (full, last if last < full else 0)
    splits = -(-size // block_size)
    return Tiles(blocks, 1, block_size, splits, block_width, num_warps, min(stages, 2))


def _memory_block(block_width: int, itemsize: int, gpu: Gpu) -> tuple[int, int]:
    """Rows of a full tile of `memory_tiles`, and warps."""
    if block_width > 128 or itemsize > 2:
        return 32 if gpu.reads_shared else 16, 8
    if gpu.reads_shared:
        return 64, 4
    return (64, 8) if block_width > 64 else (32, 4)


def row_blocks(rows: int, most: int) -> tuple[int, ...]:
    """Powers of two, at most `most` each, that together hold the rows with little to spare."""
    full, rest = divmod(rows, most)
    blocks = (most,) * full
    if rest == 0:
        return blocks
    largest = 1 << (rest.bit_length() - 1)
    if _SMALLEST <= largest < rest <= largest + _SMALLEST:
        return (*blocks, largest, _SMALLEST)
    return (*blocks, _power(rest))


def _power(number: int) -> int:
    return max(_SMALLEST, 1 << (number - 1).bit_length())


def _block_size(size: int, block_width: int, itemsize: int, *, most: int) -> int:
    """Tokens of a tile: the whole chunk where it is small enough."""
    most_bytes = 32768 if itemsize == 2 else 16384
    fitting = max(_SMALLEST, most_bytes // (block_width * itemsize))
    return min(_power(size), most if size <= most else 64, fitting)


def _stages(available: int, block: int, row_bytes: int) -> tuple[int, int]:
    """Rows of a tile that is loaded again and again, and how many such tiles there is room for."""
    while block > _SMALLEST and block * row_bytes > available - _OTHER_BYTES:
        block //= 2
    fitting = (available - _OTHER_BYTES) // (block * row_bytes)
    return block, max(1, min(_MOST_STAGES, fitting))
