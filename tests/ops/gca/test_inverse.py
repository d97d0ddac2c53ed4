"""The inverse of an index tensor: every slot is in the list of the chunk it reads, once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from drt.ops.gca import InverseIndex, invert_indices
from drt.ops.gca.inverse import SEGMENT, inverse_of_order
from drt.ops.gca.order import in_order


def slots_of_segments(inverse: InverseIndex) -> list[tuple[int, list[int]]]:
    """(source, slots) of each segment, read as the kernels read them."""
    order, starts, sources, segments, _ = (tensor.tolist() for tensor in inverse)
    num_sources = len(starts) - 1
    found = []
    for segment, source in enumerate(sources):
        if source < num_sources:
            begin = starts[source] + (segment - segments[source]) * SEGMENT
            end = min(begin + SEGMENT, starts[source + 1])
            found.append((source, order[begin:end]))
    return found


@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99)
)
def test_lists_hold_every_used_slot_in_order(
    rows: int, count: int, topk: int, chunks: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, chunks, (rows, count, topk), generator=generator)
    inverse = invert_indices(indices, chunks)
    lists: list[list[int]] = [[] for _ in range(rows * chunks)]
    segments = slots_of_segments(inverse)
    for source, slots in segments:
        assert len(slots) <= SEGMENT
        lists[source] += slots
    expected: list[list[int]] = [[] for _ in range(rows * chunks)]
    for slot, index in enumerate(indices.flatten().tolist()):
        if index >= 0:
            expected[slot // (count * topk) * chunks + index].append(slot)
    assert lists == expected
    # Every source has a segment, and what shares a list has a place of its own to write to.
    assert {source for source, _ in segments} == set(range(rows * chunks))
    numbers = [len([1 for other, _ in segments if other == source]) for source in range(len(lists))]
    shared = [number if number > 1 else 0 for number in numbers]
    assert inverse.partials.diff().tolist() == shared
    assert sum(shared) <= inverse.num_partials


def test_chunks_in_order_are_inverted_directly() -> None:
    weights = torch.zeros(2, 3, 4)
    expected = invert_indices(in_order(weights), 12)
    for actual, wanted in zip(inverse_of_order(weights), expected, strict=True):
        assert torch.equal(actual[: len(wanted)], wanted)
