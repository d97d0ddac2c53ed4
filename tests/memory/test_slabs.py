"""The slab memory against one tensor that holds everything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drt.memory import SlabMemory, TrainingMemory


def chunks(batch: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    landmarks = torch.randn(batch, count, 6, generator=generator)
    keys = torch.randn(batch, count, 3, 2, 4, generator=generator)
    return landmarks, keys, torch.randn(batch, count, 3, 2, 4, generator=generator)


def filled(pieces: list[int], slab_size: int, seed: int) -> tuple[SlabMemory, TrainingMemory]:
    total = sum(pieces)
    landmarks, keys, values = chunks(2, total, seed)
    slabs, whole = SlabMemory(slab_size=slab_size), TrainingMemory()
    whole.append(landmarks, keys, values)
    start = 0
    for size in pieces:
        part = slice(start, start + size)
        slabs.append(landmarks[:, part], keys[:, part], values[:, part])
        start += size
    return slabs, whole


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 7),
    st.integers(1, 10),
    st.integers(0, 10**6),
)
def test_search_and_gather_agree_with_whole_tensors(
    pieces: list[int], slab_size: int, topk: int, seed: int
) -> None:
    slabs, whole = filled(pieces, slab_size, seed)
    total = sum(pieces)
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, 5, 6, generator=generator)
    limits = torch.randint(0, total + 1, (5,), generator=generator)
    got, wanted = (m.search(queries, limits, topk=topk) for m in (slabs, whole))
    assert len(slabs) == total
    assert torch.equal(got.indices, wanted.indices)
    # One dot product of 6 terms, summed in another order.
    assert torch.allclose(got.weights, wanted.weights, atol=1e-6)
    from_slabs, from_whole = slabs.gather(got.indices), whole.gather(got.indices)
    for row, i, k in (got.indices >= 0).nonzero().tolist():
        here, there = from_slabs.indices[row, i, k], from_whole.indices[row, i, k]
        assert torch.equal(from_slabs.keys[row, here], from_whole.keys[row, there])
        assert torch.equal(from_slabs.values[row, here], from_whole.values[row, there])
    assert torch.equal(from_slabs.indices < 0, got.indices < 0)


def test_a_fork_shares_full_slabs_and_never_disturbs_the_other() -> None:
    slabs, _ = filled([5], 4, seed=0)
    fork = slabs.fork()
    before = slabs.gather(torch.arange(5).view(1, 1, 5).expand(2, 1, 5)).keys
    left, right = chunks(2, 2, seed=1), chunks(2, 2, seed=2)
    slabs.append(*left)
    fork.append(*right)
    index = torch.tensor([0, 1, 2, 3, 4, 5, 6]).view(1, 1, 7).expand(2, 1, 7)
    kept, forked = slabs.gather(index).keys, fork.gather(index).keys
    assert torch.equal(kept, torch.cat([before, left[1]], dim=1))
    assert torch.equal(forked, torch.cat([before, right[1]], dim=1))
    assert slabs._slabs[0].keys.data_ptr() == fork._slabs[0].keys.data_ptr()


def test_a_fork_of_a_full_memory_appends_without_copying() -> None:
    slabs, _ = filled([8], 4, seed=0)
    fork = slabs.fork()
    fork.append(*chunks(2, 1, seed=3))
    assert (len(slabs), len(fork)) == (8, 9)
    for ours, theirs in zip(slabs._slabs, fork._slabs, strict=False):
        assert ours.keys.data_ptr() == theirs.keys.data_ptr()


def test_keys_are_stored_in_the_asked_for_dtype() -> None:
    slabs = SlabMemory(slab_size=4, dtype=torch.bfloat16)
    slabs.append(*chunks(1, 3, seed=0))
    assert slabs.gather(torch.tensor([[[0]]])).keys.dtype == torch.bfloat16
    assert slabs.num_bytes == 4 * (6 * 4 + 2 * 3 * 2 * 4 * 2)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="slab_size must be at least 1, got 0"):
        SlabMemory(slab_size=0)
    with pytest.raises(ValueError, match="empty"):
        SlabMemory().gather(torch.zeros(1, 1, 1, dtype=torch.int64))
    memory = TrainingMemory()
    memory.append(*chunks(1, 2, seed=0))
    with pytest.raises(ValueError, match="written once"):
        memory.append(*chunks(1, 2, seed=0))
