"""Rows, slabs, forks and selections of the memories against plain lists."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drt.memory import DeviceMemory, HostMemory

KINDS = [DeviceMemory, HostMemory]


def assert_same(memory: Any, wanted: Any) -> None:
    """Every chunk of every row, its length, and content bit for bit."""
    assert memory.counts == tuple(len(row) for row in wanted.rows)
    assert len(memory) == sum(memory.counts)
    most = max(memory.counts, default=0)
    numbers = torch.arange(most).expand(len(memory.counts), most)
    numbers = numbers.masked_fill(numbers >= torch.tensor(memory.counts)[:, None], -1)
    keys, values, lengths, indices = memory.gather(numbers[:, None].contiguous())
    assert keys.transpose(1, 2).is_contiguous()
    assert values.transpose(1, 2).is_contiguous()
    for b, row in enumerate(wanted.rows):
        assert indices[b, 0, len(row) :].eq(-1).all()
        for i, (_, key, value, length) in enumerate(row):
            m = indices[b, 0, i]
            assert length == (key.shape[0] if lengths is None else lengths[m])
            assert torch.equal(keys[m, :length], key[:length])
            assert torch.equal(values[m, :length], value[:length])
            assert not keys[m, length:].any()
            assert not values[m, length:].any()


def assert_search(memory: Any, wanted: Any, seed: int, topk: int, tolerance: float = 1e-5) -> None:
    """Scores as brute force in float64, ties in any order; indices that have these scores."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(wanted.rows)
    queries = torch.randn(batch, 4, 6, generator=generator)
    most = max(memory.counts, default=0)
    limits = torch.randint(0, most + 2, (batch, 4), generator=generator)
    firsts = torch.randint(-1, most + 1, (batch, 4), generator=generator)
    for lower in (None, firsts):
        indices, weights, scores = memory.search(queries, limits, topk=topk, firsts=lower)
        assert indices.shape == weights.shape == scores.shape == (batch, 4, topk)
        for b in range(batch):
            for i in range(4):
                first = 0 if lower is None else max(int(lower[b, i]), 0)
                limit = int(limits[b, i])
                expected = wanted.scores(b, queries[b, i], first, limit)[:topk]
                found = indices[b, i][indices[b, i] >= 0]
                assert len(found) == len(set(found.tolist())) == len(expected)
                assert all(first <= number < limit for number in found.tolist())
                got = scores[b, i, : len(expected)]
                # Sums of six products of numbers below ten, in float32.
                assert torch.allclose(got.double(), torch.tensor(expected).double(), atol=tolerance)
                assert scores[b, i, len(expected) :].eq(float("-inf")).all()
                assert weights[b, i, len(expected) :].eq(0).all()
                assert abs(float(weights[b, i].sum()) - bool(expected)) < 1e-5


@settings(max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=6),
    st.integers(1, 20),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_pieces_of_unequal_rows(
    oracle: Any, kind: Any, pieces: list[list[int]], slab_size: int, ragged: bool, seed: int
) -> None:
    memory, wanted = kind(slab_size=slab_size), oracle.memory()
    for i, counts in enumerate(pieces):
        made = oracle.make_chunks(counts, seed + i, ragged=ragged)
        memory.append(*made)
        wanted.append(made)
    assert_same(memory, wanted)
    assert_search(memory, wanted, seed, topk=3)


@pytest.mark.parametrize("scan", ["float32", "bfloat16"])
def test_rows_without_chunks_beside_others(oracle: Any, scan: Any) -> None:
    memory, wanted = DeviceMemory(scan=scan), oracle.memory()
    made = oracle.make_chunks([0, 5, 3], 0)
    memory.append(*made)
    wanted.append(made)
    assert_same(memory, wanted)
    # As many candidates as chunks: the rounded scan misses none.
    assert_search(memory, wanted, seed=0, topk=3)


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(1, 40))
def test_forks_and_selections_between_appends(
    oracle: Any, kind: Any, seed: int, slab_size: int
) -> None:
    choose = random.Random(seed)
    family = [(kind(slab_size=slab_size), oracle.memory())]
    for step in range(12):
        memory, wanted = choose.choice(family)
        if step < 1 or choose.random() < 0.6:
            rows = len(wanted.rows) or 2
            counts = [choose.randint(0, 20) for _ in range(rows)]
            made = oracle.make_chunks(counts, seed + step, ragged=choose.random() < 0.5)
            memory.append(*made)
            wanted.append(made)
        elif choose.random() < 0.5:
            family.append((memory.fork(), wanted.select_rows(range(len(wanted.rows)))))
        else:
            rows = choose.choices(range(len(wanted.rows)), k=choose.randint(1, 3))
            family.append((memory.select_rows(rows), wanted.select_rows(rows)))
    for memory, wanted in family:
        assert_same(memory, wanted)
        assert_search(memory, wanted, seed, topk=4)


def test_a_fork_copies_no_chunk_and_its_own_slab_is_small(oracle: Any) -> None:
    memory = DeviceMemory(slab_size=4096)
    memory.append(*oracle.make_chunks([3000], 0))
    before = memory.bytes_by_tier()["host"]
    fork = memory.fork()
    assert fork.bytes_by_tier()["host"] == before
    memory.append(*oracle.make_chunks([1], 1))
    fork.append(*oracle.make_chunks([1], 2))
    slabs = [[view.slab for view in m._rows[0].views] for m in (memory, fork)]
    assert slabs[0][0] is slabs[1][0]
    assert slabs[1][1].capacity == 16


def test_forks_that_are_thrown_away_cost_no_more_than_a_small_slab(oracle: Any) -> None:
    memory = DeviceMemory(slab_size=4096)
    for turn in range(40):
        memory.append(*oracle.make_chunks([3], turn))
        memory.fork().append(*oracle.make_chunks([1], 100 + turn))
    capacities = [view.slab.capacity for view in memory._rows[0].views]
    assert len(memory) == 120
    assert max(capacities) == 16
    assert len(capacities) <= 40


def test_the_first_to_append_keeps_the_slab_and_a_dropped_branch_is_gone(oracle: Any) -> None:
    memory = DeviceMemory(slab_size=64)
    memory.append(*oracle.make_chunks([3], 0))
    beams = memory.select_rows([0, 0, 0])
    beams.append(*oracle.make_chunks([1, 1, 1], 1))
    assert [len(row.views) for row in beams._rows] == [1, 2, 2]
    kept = beams.select_rows([1])
    assert kept.bytes_by_tier()["host"] < beams.bytes_by_tier()["host"]


def test_slabs_grow_up_to_the_largest(oracle: Any) -> None:
    memory = DeviceMemory(slab_size=100)
    for i in range(300):
        memory.append(*oracle.make_chunks([1], i))
    capacities = [view.slab.capacity for view in memory._rows[0].views]
    assert capacities == [16, 32, 64, 100, 100]


def test_rows_that_share_a_chunk_gather_it_once(oracle: Any) -> None:
    memory = DeviceMemory()
    memory.append(*oracle.make_chunks([5], 0))
    beams = memory.select_rows([0, 0])
    beams.append(*oracle.make_chunks([1, 1], 1))
    keys, _, _, indices = beams.gather(torch.tensor([[[0, 5, -1]], [[5, 0, 3]]]))
    assert keys.shape[0] == 4
    assert indices[0, 0, 0] == indices[1, 0, 1]
    assert indices[0, 0, 1] != indices[1, 0, 0]


def test_nothing_to_gather_is_a_pool_of_one_chunk_of_zeros(oracle: Any) -> None:
    memory = DeviceMemory()
    memory.append(*oracle.make_chunks([2], 0))
    keys, values, lengths, indices = memory.gather(torch.full((1, 2, 3), -1))
    assert keys.shape == values.shape == (1, 3, 2, 4)
    assert not keys.any()
    assert lengths is None
    assert indices.eq(-1).all()
    assert memory.gather(torch.empty(1, 0, 3, dtype=torch.int64)).indices.shape == (1, 0, 3)


def test_an_empty_memory_can_be_searched() -> None:
    found = DeviceMemory().search(torch.randn(2, 3, 6), torch.zeros(2, 3).long(), topk=4)
    assert found.indices.eq(-1).all()
    assert found.weights.eq(0).all()
    memory = DeviceMemory()
    memory.append(torch.ones(1, 0, 6), torch.ones(1, 0, 3, 2, 4), torch.ones(1, 0, 3, 2, 4))
    assert memory.counts == (0,)
    found = memory.search(torch.randn(1, 3, 6), torch.full((1, 3), 9), topk=4)
    assert found.scores.eq(float("-inf")).all()
    found = memory.search(torch.randn(1, 0, 6), torch.zeros(1, 0).long(), topk=4)
    assert found.indices.shape == (1, 0, 4)


def test_rows_can_be_selected_before_there_are_chunks(oracle: Any) -> None:
    never = DeviceMemory().select_rows([0, 0, 1])
    assert never.counts == ()
    memory = DeviceMemory()
    memory.append(*oracle.make_chunks([0, 0], 0))
    beams = memory.select_rows([0, 0, 1])
    for one in (never, beams):
        one.append(*oracle.make_chunks([1, 2, 3], 1))
        assert one.counts == (1, 2, 3)


def test_chunks_leave_the_graph_and_inference_mode(oracle: Any) -> None:
    memory, wanted = DeviceMemory(), oracle.memory()
    first, second = oracle.make_chunks([2], 0), oracle.make_chunks([2], 1)
    with torch.inference_mode():
        memory.append(*first)
    memory.append(*(x.requires_grad_() for x in second[:3]))
    wanted.append(first)
    wanted.append(second)
    assert_same(memory, wanted)
    assert not memory.gather(torch.zeros(1, 1, 1).long()).keys.requires_grad
    query = torch.randn(1, 1, 6, requires_grad=True)
    assert not memory.search(query, torch.tensor([[4]]), topk=2).scores.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_counted_once_and_closing_ends_use(oracle: Any, kind: Any) -> None:
    with kind(slab_size=16, dtype=torch.bfloat16) as memory:
        memory.append(*oracle.make_chunks([16], 0))
        # 16 landmarks of 6 float32, 16 records of 2 x 24 bfloat16 in whole 64 bytes.
        size = 16 * 6 * 4 + 16 * 128
        assert memory.bytes_by_tier() == {"device": 0, "host": size, "disk": 0}
        assert memory.select_rows([0, 0]).bytes_by_tier()["host"] == size
        fork = memory.fork()
    memory.close()
    with pytest.raises(ValueError, match="the memory is closed"):
        memory.append(*oracle.make_chunks([1], 0))
    assert fork.gather(torch.tensor([[[15]]])).keys.shape == (1, 3, 2, 4)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="slab_size must be at least 1, got 0"):
        DeviceMemory(slab_size=0)
    with pytest.raises(ValueError, match="dtype must be one of"):
        HostMemory(dtype=torch.float64)
    with pytest.raises(ValueError, match="landmark_dtype must be float32 or bfloat16"):
        HostMemory(landmark_dtype=torch.float16)
    with pytest.raises(ValueError, match="scan must be"):
        DeviceMemory(scan="int8")  # pyright: ignore[reportArgumentType]


def test_chunks_that_do_not_fit_are_refused_and_change_nothing(oracle: Any) -> None:
    memory = DeviceMemory()
    landmarks, keys, values, _ = oracle.make_chunks([2, 2], 0)
    memory.append(landmarks, keys, values)
    full = torch.full((2, 2), 3)
    wrong = {
        "keys and values must both": (landmarks, keys[:, :1], values),
        "landmarks must be": (landmarks[:, :1], keys, values),
        "must be floating point": (landmarks, keys.long(), values.long()),
        "the memory has \\(3, 2, 4, 6\\)": (landmarks[:, :, :5], keys, values),
        "there are 2": (landmarks[:1], keys[:1], values[:1]),
        "lengths must be \\(2, 2\\)": (landmarks, keys, values, full[:1]),
        "lengths must be 0 to 3": (landmarks, keys, values, full + 1),
        "after one of length 0": (landmarks, keys, values, torch.tensor([[3, 3], [0, 1]])),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            memory.append(*arguments)
    assert memory.counts == (2, 2)


def test_questions_that_do_not_fit_are_refused(oracle: Any) -> None:
    with pytest.raises(ValueError, match="the memory is empty"):
        DeviceMemory().gather(torch.zeros(1, 1, 1, dtype=torch.int64))
    memory = DeviceMemory()
    memory.append(*oracle.make_chunks([2, 2], 0))
    query, limits = torch.randn(2, 1, 6), torch.ones(2, 1).long()
    for number in (2, -2):
        with pytest.raises(ValueError, match=f"chunk number {number}: the row has 2 chunks"):
            memory.gather(torch.tensor([[[0]], [[number]]]))
    with pytest.raises(ValueError, match="indices must be"):
        memory.gather(torch.zeros(1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="queries of 1 rows; there are 2"):
        memory.search(query[:1], limits[:1], topk=1)
    with pytest.raises(ValueError, match="5 wide; landmarks are 6 wide"):
        memory.search(query[..., :5], limits, topk=1)
    with pytest.raises(ValueError, match="limits must be"):
        memory.search(query, limits[0], topk=1)
    with pytest.raises(ValueError, match="topk must be at least 1"):
        memory.search(query, limits, topk=0)
    with pytest.raises(ValueError, match="rows must be 0 to 1"):
        memory.select_rows([2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan", ["float32", "bfloat16"])
def test_a_gpu_holds_landmarks_and_gets_what_is_gathered(oracle: Any, kind: Any, scan: Any) -> None:
    ours, theirs = kind(slab_size=16, scan=scan), DeviceMemory(slab_size=16)
    made = oracle.make_chunks([40, 25], 0, ragged=True)
    theirs.append(*made)
    ours.append(*(x.cuda() for x in made[:3]), made.lengths)
    queries, limits = torch.randn(2, 3, 6), torch.tensor([[40, 20, 0], [3, 25, 25]])
    found = ours.search(queries.cuda(), limits, topk=4)
    wanted = theirs.search(queries, limits, topk=4)
    # Another order of summation; products in full float32 unless TF32 was asked for.
    assert torch.allclose(found.scores.cpu(), wanted.scores, atol=1e-5)
    mine, others = ours.gather(found.indices), theirs.gather(found.indices.cpu())
    assert mine.keys.is_cuda
    assert torch.equal(mine.indices.cpu(), others.indices)
    assert torch.equal(mine.keys.cpu(), others.keys)
    assert torch.equal(mine.values.cpu(), others.values)
    tiers = ours.bytes_by_tier()
    assert tiers["device"] > 0
    assert (tiers["host"] > 0) == (kind is HostMemory)


def test_a_run_of_another_precision_may_go_on() -> None:
    memory = DeviceMemory()
    keys = torch.randn(1, 2, 3, 2, 4)
    memory.append(torch.randn(1, 2, 6), keys, keys)
    memory.append(torch.randn(1, 2, 6), keys.bfloat16(), keys.bfloat16())
    found = memory.gather(torch.tensor([[[0, 2]]])).keys
    assert found.dtype == torch.float32
    assert torch.equal(found[1], keys[0, 0].bfloat16().float())
