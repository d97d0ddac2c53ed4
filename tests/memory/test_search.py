"""Exact search against brute force in float64, for any tiles, bounds and ties."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drt.memory import DeviceMemory
from drt.memory.search import BLOCK, Best, Bounds, rescored, search_tiles
from drt.retrieval import Retrieval


def brute_force(landmarks: Tensor, queries: Tensor, bounds: Bounds, topk: int) -> Tensor:
    """(n, K) float64 scores, -inf where there are fewer."""
    scores = queries.double() @ landmarks.double().t()
    numbers = torch.arange(len(landmarks))
    closed = (numbers < bounds.firsts[:, None]) | (numbers >= bounds.limits[:, None])
    scores = scores.masked_fill(closed, float("-inf"))
    padding = torch.full((len(queries), topk), float("-inf"), dtype=torch.float64)
    return torch.cat([scores, padding], 1).topk(topk, dim=1).values


def assert_best(found: Best, landmarks: Tensor, queries: Tensor, bounds: Bounds) -> None:
    """Scores are the best ones, and each index is a different one with its score."""
    wanted = brute_force(landmarks, queries, bounds, found.scores.shape[1])
    # Whole numbers below 2 ** 24: float32 has them exactly.
    assert torch.equal(found.scores.double(), wanted)
    assert torch.equal(found.indices < 0, wanted == float("-inf"))
    # One landmark more, for those that found none.
    scores = queries @ torch.cat([landmarks, torch.zeros(1, landmarks.shape[1])]).t()
    scores = scores.gather(1, found.indices.clamp(min=0))
    assert torch.equal(scores.masked_fill(found.indices < 0, float("-inf")), found.scores)
    for row in found.indices.tolist():
        real = [number for number in row if number >= 0]
        assert len(set(real)) == len(real)


def whole_numbers(shape: tuple[int, ...], seed: int, largest: int = 3) -> Tensor:
    """Small whole numbers: products are exact and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=6),
    st.integers(0, 5),
    st.integers(1, 70),
    st.sampled_from([0, 1, 7, BLOCK, 2 * BLOCK, 4 * BLOCK]),
    st.integers(0, 10**6),
)
def test_any_segments_tiles_and_bounds(
    sizes: list[int], num_queries: int, topk: int, tile: int, seed: int
) -> None:
    total = sum(sizes)
    landmarks, queries = whole_numbers((total, 5), seed), whole_numbers((num_queries, 5), seed + 1)
    generator = torch.Generator().manual_seed(seed)
    limits, firsts = torch.randint(0, total + 1, (2, num_queries), generator=generator)
    for lower in (torch.zeros_like(firsts), firsts):
        bounds = Bounds(lower, limits)
        segments = list(landmarks.split(sizes))
        found = search_tiles(segments, queries, bounds, topk=topk, tile=tile)
        assert_best(found, landmarks, queries, bounds)


def test_many_queries_with_causal_limits_in_documents() -> None:
    landmarks, queries = whole_numbers((3000, 8), 0), whole_numbers((700, 8), 1)
    limits = torch.arange(700) * 4
    firsts = limits // 500 * 500
    for bounds in (Bounds(torch.zeros_like(firsts), limits), Bounds(firsts, limits)):
        found = search_tiles(landmarks.split(256), queries, bounds, topk=8, tile=256)
        assert_best(found, landmarks, queries, bounds)


def test_nothing_beyond_the_bounds_is_read() -> None:
    landmarks = whole_numbers((40, 4), 0)
    landmarks[:10], landmarks[30:] = float("nan"), float("nan")
    queries, bounds = (
        whole_numbers((2, 4), 1),
        Bounds(torch.tensor([10, 12]), torch.tensor([30, 25])),
    )
    found = search_tiles([landmarks], queries, bounds, topk=4, tile=8)
    assert_best(found, landmarks.nan_to_num(), queries, bounds)


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 20), st.integers(0, 10**6))
def test_rescoring_ranks_candidates_in_float32(
    total: int, num_queries: int, topk: int, seed: int
) -> None:
    landmarks, queries = whole_numbers((total, 5), seed), whole_numbers((num_queries, 5), seed + 1)
    zeros = torch.zeros(num_queries, dtype=torch.int64)
    bounds = Bounds(zeros, torch.full_like(zeros, total))
    # All are candidates: bfloat16 need only find them, in any order.
    many = max(total, topk)
    found = search_tiles([landmarks.bfloat16()], queries.bfloat16(), bounds, topk=many)
    best = rescored(list(landmarks.split(37)), queries, found, topk=topk)
    assert_best(best, landmarks, queries, bounds)


@pytest.mark.parametrize("landmark_dtype", [torch.float32, torch.bfloat16])
def test_a_bfloat16_scan_finds_nearly_all(landmark_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    landmarks = torch.randn(1, 20000, 32, generator=generator)
    kinds = ("float32", "bfloat16")
    memories = [DeviceMemory(landmark_dtype=landmark_dtype, scan=kind) for kind in kinds]
    empty = torch.zeros(1, 20000, 1, 1, 1)
    queries = torch.randn(1, 50, 32, generator=generator)
    for memory in memories:
        memory.append(landmarks, empty, empty)
    limits = torch.full((1, 50), 20000)
    exact, scanned = (memory.search(queries, limits, topk=8) for memory in memories)
    found = (exact.indices[..., None] == scanned.indices[..., None, :]).any(-1)
    # Measured 1.000; bfloat16 alone ranks 0.9.
    assert found.float().mean() >= 0.99
    # One sum of 32 products in another order, of landmarks as they are kept.
    assert torch.allclose(exact.scores[found], _same(exact, scanned)[found], atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        under = memories[1].search(queries, limits, topk=8)
    assert all(torch.equal(*pair) for pair in zip(under, scanned, strict=True))


def _same(exact: Retrieval, scanned: Retrieval) -> Tensor:
    """Scanned scores at the exact search's indices, NaN where it did not find them."""
    match = exact.indices[..., None] == scanned.indices[..., None, :]
    scores = torch.where(match, scanned.scores[..., None, :], 0.0).sum(-1)
    return scores.masked_fill(~match.any(-1), float("nan"))


def test_scores_are_best_first() -> None:
    landmarks, queries = whole_numbers((500, 5), 0), whole_numbers((3, 5), 1)
    bounds = Bounds(torch.zeros(3).long(), torch.full((3,), 500))
    found = search_tiles([landmarks], queries, bounds, topk=9, tile=64)
    assert all((left >= right).all() for left, right in pairwise(found.scores.unbind(1)))
