"""Choosing chunks: causal, top-k by score, noise on the choice only, weights from clean scores."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drt.retrieval import SCORE_BYTES, Retrieval, gumbel_noise, retrieve_chunks


def choose(scores: Tensor, limits: Tensor, **kwargs: Any) -> Retrieval:
    """Choose by given (B, n, M) scores: those of queries against unit vectors."""
    chunks = scores.shape[-1]
    landmarks = torch.eye(chunks, dtype=scores.dtype).expand(len(scores), -1, -1)
    limits = limits.expand(scores.shape[:2])
    return retrieve_chunks(scores * math.sqrt(chunks), landmarks, limits, **kwargs)


def test_a_hand_computed_choice() -> None:
    scores = torch.tensor([[[0.0, 9.0, 9.0], [1.0, 3.0, 9.0], [2.0, 1.0, 2.5]]])
    made = choose(scores, torch.tensor([0, 2, 3]), topk=2)
    assert made.indices.tolist() == [[[-1, -1], [1, 0], [2, 0]]]
    assert made.weights[0, 0].tolist() == [0.0, 0.0]
    higher = 1 / (1 + math.exp(-2.0))
    assert made.weights[0, 1].tolist() == pytest.approx([higher, 1 - higher])
    assert made.scores[0, 0].tolist() == [-math.inf, -math.inf]
    assert made.scores[0, 2].tolist() == pytest.approx([2.5, 2.0])


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 12), st.integers(0, 10**6))
def test_top_k_of_the_candidates(count: int, chunks: int, topk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, count, chunks, generator=generator)
    limits = torch.randint(0, chunks + 1, (count,), generator=generator)
    made = choose(scores, limits, topk=topk)
    assert made.indices.shape == (2, count, topk)
    for row in range(2):
        for i, limit in enumerate(limits.tolist()):
            wanted = scores[row, i, :limit].sort(descending=True).indices[:topk].tolist()
            got = made.indices[row, i].tolist()
            assert got == wanted + [-1] * (topk - len(wanted))
            assert made.weights[row, i].sum() == pytest.approx(1.0 if wanted else 0.0)


def test_noise_moves_the_choice_and_not_the_weights() -> None:
    scores = torch.randn(1, 200, 30)
    limits = torch.full((200,), 30)
    clean = choose(scores, limits, topk=4)
    noisy = choose(scores, limits, topk=4, noise=1.0, generator=torch.Generator().manual_seed(1))
    again = choose(scores, limits, topk=4, noise=1.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noisy.indices, again.indices)
    assert not torch.equal(noisy.indices, clean.indices)
    expected = scores.gather(-1, noisy.indices).softmax(-1)
    assert torch.allclose(noisy.weights, expected)


@pytest.mark.parametrize("score_bytes", [SCORE_BYTES, 4 * 20000 * 2, 4])
def test_the_choice_with_noise_is_a_sample_without_replacement(score_bytes: int) -> None:
    # Gumbel top-k: i, then j, with probability p_i * p_j / (1 - p_i), p = softmax(score / noise).
    draws, noise = 20000 if score_bytes > 4 else 300, 2.0
    scores = torch.tensor([0.0, 1.0, 2.0, 9.0]).expand(1, draws, 4)
    made = choose(
        scores, torch.full((draws,), 3), topk=2, noise=noise, score_bytes=score_bytes
    ).indices[0]
    p = (scores[0, 0, :3] / noise).softmax(-1)
    wanted = p[:, None] * p / (1 - p[:, None])
    wanted.fill_diagonal_(0.0)
    shares = torch.bincount(3 * made[:, 0] + made[:, 1], minlength=9).view(3, 3) / draws
    # Four standard deviations of a share of so many draws, at most; nine shares.
    assert torch.allclose(shares, wanted, atol=4 * 0.5 / math.sqrt(draws))


def test_gradient_reaches_the_scores_of_the_chosen_only() -> None:
    scores = torch.randn(1, 3, 6, requires_grad=True)
    made = choose(scores, torch.tensor([0, 1, 6]), topk=2)
    made.weights[..., 0].sum().backward()
    assert scores.grad is not None
    touched = torch.zeros(1, 3, 6, dtype=torch.bool)
    touched[0, 2, made.indices[0, 2]] = True
    assert torch.equal(scores.grad != 0, touched)


class Vectors(NamedTuple):
    queries: Tensor
    landmarks: Tensor
    limits: Tensor
    firsts: Tensor


def make_vectors(batch: int, count: int, chunks: int, seed: int, width: int = 5) -> Vectors:
    generator = torch.Generator().manual_seed(seed)
    limits = torch.randint(0, chunks + 1, (batch, count), generator=generator)
    return Vectors(
        torch.randn(batch, count, width, generator=generator, dtype=torch.float64),
        torch.randn(batch, chunks, width, generator=generator, dtype=torch.float64),
        limits.sort(1).values,
        torch.randint(0, chunks + 1, (batch, count), generator=generator).sort(1).values // 2,
    )


def materialized(made: Vectors, topk: int, noise: Tensor | None = None) -> Retrieval:
    """All scores at once, in the dtype of the vectors, by another way to mask and to choose."""
    scores = torch.einsum("bnl,bml->bnm", made.queries, made.landmarks)
    scores = scores / made.queries.shape[-1] ** 0.5
    number = torch.arange(scores.shape[-1])
    closed = (number < made.firsts[..., None]) | (number >= made.limits[..., None])
    keys = (scores if noise is None else scores + noise).detach().masked_fill(closed, -math.inf)
    keys = torch.cat([keys, keys.new_full((*keys.shape[:2], topk), -math.inf)], -1)
    best, order = (x[..., :topk] for x in keys.sort(dim=-1, descending=True))
    none = best == -math.inf
    index = order.masked_fill(none, 0)
    chosen = scores.gather(-1, index).masked_fill(none, -math.inf)
    greatest = chosen.detach().amax(-1, keepdim=True).clamp_min(-1e9)
    exponents = (chosen - greatest).exp()
    total = exponents.sum(-1, keepdim=True)
    return Retrieval(order.masked_fill(none, -1), exponents / total.where(total > 0, 1.0), chosen)


def gradients(made: Vectors, retrieval: Retrieval) -> tuple[Tensor, ...]:
    """Of a sum in which each weight, and each score that is one, has a factor of its own."""
    generator = torch.Generator().manual_seed(1)
    factors = torch.rand(retrieval.weights.shape, generator=generator, dtype=torch.float64)
    scores = retrieval.scores.where(retrieval.indices >= 0, 0.0)
    total = ((retrieval.weights + scores**2) * factors).sum()
    return torch.autograd.grad(total, (made.queries, made.landmarks))


def assert_same(made: Vectors, got: Retrieval, wanted: Retrieval) -> None:
    assert torch.equal(got.indices, wanted.indices)
    # float64 sums of few terms in another order.
    assert torch.allclose(got.scores, wanted.scores, rtol=1e-12, atol=1e-12)
    assert torch.allclose(got.weights, wanted.weights, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(made, got), gradients(made, wanted), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def track(made: Vectors) -> Vectors:
    return made._replace(
        queries=made.queries.requires_grad_(), landmarks=made.landmarks.requires_grad_()
    )


@settings(max_examples=150)
@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from([1, 40, 100, 500, 2000, SCORE_BYTES]),
    st.integers(0, 10**6),
)
def test_tiles_choose_and_learn_as_all_scores_do(
    batch: int, count: int, chunks: int, topk: int, score_bytes: int, seed: int
) -> None:
    made = track(make_vectors(batch, count, chunks, seed))
    got = retrieve_chunks(
        made.queries,
        made.landmarks,
        made.limits,
        topk=topk,
        firsts=made.firsts,
        score_bytes=score_bytes,
    )
    assert_same(made, got, materialized(made, topk))


@pytest.mark.parametrize("score_bytes", [4 * 2 * 40 * 300, 4 * 2 * 256 * 256, SCORE_BYTES])
def test_tiles_of_many_chunks(score_bytes: int) -> None:
    made = track(make_vectors(2, 700, 1500, 0))
    # A row beside a much shorter one, as in a ragged batch.
    made.limits[1] //= 3
    got = retrieve_chunks(
        made.queries,
        made.landmarks,
        made.limits,
        topk=8,
        firsts=made.firsts,
        score_bytes=score_bytes,
    )
    assert_same(made, got, materialized(made, 8))


def test_the_noise_is_added_before_the_choice() -> None:
    made = track(make_vectors(2, 30, 50, 0))
    noise = 0.7 * gumbel_noise(
        torch.empty(2, 30, 50, dtype=torch.float64), generator=torch.Generator().manual_seed(5)
    )
    got = retrieve_chunks(
        made.queries,
        made.landmarks,
        made.limits,
        topk=4,
        firsts=made.firsts,
        noise=0.7,
        generator=torch.Generator().manual_seed(5),
    )
    assert_same(made, got, materialized(made, 4, noise))


def test_what_no_query_may_retrieve_is_not_read() -> None:
    made = make_vectors(1, 10, 2000, 0)
    landmarks = made.landmarks.clone()
    landmarks[:, :512], landmarks[:, 1024:] = math.nan, math.nan
    made = track(made._replace(landmarks=landmarks))
    limits, firsts = torch.full((1, 10), 1000), torch.full((1, 10), 600)
    got = retrieve_chunks(made.queries, made.landmarks, limits, topk=3, firsts=firsts)
    assert got.scores.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(made, got))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_under_autocast_too(dtype: torch.dtype) -> None:
    made = make_vectors(2, 40, 40, 0, width=64)
    queries, landmarks = (x.to(dtype).requires_grad_() for x in made[:2])
    truth = track(made._replace(queries=queries.detach().double(), landmarks=landmarks.double()))
    truth = truth._replace(landmarks=truth.landmarks.detach().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        got = retrieve_chunks(queries, landmarks, made.limits, topk=40, firsts=made.firsts)
        got.weights[..., 0].sum().backward()
    wanted = materialized(truth, 40)
    assert got.scores.dtype == torch.float32
    some = wanted.scores.isfinite()
    # Sums of 64 float32 products of order 1; those of bfloat16 would be off by 1e-2.
    assert torch.allclose(got.scores[some].double(), wanted.scores[some], atol=1e-5)
    wanted.weights[..., 0].sum().backward()
    for mine, exact in ((queries, truth.queries), (landmarks, truth.landmarks)):
        assert mine.grad is not None
        assert exact.grad is not None
        # Rounded once to the dtype of the vectors.
        limit = torch.finfo(dtype).eps + 1e-5
        assert torch.allclose(mine.grad.double(), exact.grad, rtol=limit, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("score_bytes", [4 * 2 * 40 * 300, SCORE_BYTES])
def test_a_gpu_chooses_and_learns_the_same(score_bytes: int) -> None:
    made = track(make_vectors(2, 700, 1500, 0))
    vectors = [x.detach().cuda().requires_grad_() for x in made[:2]]
    on_device = Vectors(*vectors, made.limits, made.firsts)
    found = retrieve_chunks(*on_device[:3], topk=8, firsts=made.firsts, score_bytes=score_bytes)
    got, wanted = Retrieval(*(x.cpu() for x in found)), materialized(made, 8)
    assert torch.equal(got.indices, wanted.indices)
    assert torch.allclose(got.weights, wanted.weights, rtol=1e-12, atol=1e-12)
    grads = zip(gradients(on_device, got), gradients(made, wanted), strict=True)
    assert all(torch.allclose(one.cpu(), other, rtol=1e-12, atol=1e-12) for one, other in grads)


def test_scores_of_a_long_row_are_never_held_all_at_once(largest_tensor: Any) -> None:
    chunks = 8192
    made = make_vectors(1, chunks, chunks, 0, width=8)
    queries, landmarks = (x.float().requires_grad_() for x in made[:2])
    limits = torch.arange(chunks)[None]
    with largest_tensor:
        got = retrieve_chunks(queries, landmarks, limits, topk=8, noise=1.0)
        got.weights[..., 0].sum().backward()
    # All scores would be sixteen times that.
    assert SCORE_BYTES / 2 < largest_tensor.num_bytes <= SCORE_BYTES
    assert (got.indices[0, 8:] >= 0).all()
    assert (got.indices[0] < limits[0, :, None]).all()


def test_gumbel_noise_is_finite_and_centred_on_eulers_constant() -> None:
    noise = gumbel_noise(torch.empty(100_000))
    assert noise.isfinite().all()
    # Mean 0.5772, standard deviation pi / sqrt(6); three standard errors.
    assert noise.mean() == pytest.approx(0.5772, abs=3 * 1.283 / math.sqrt(100_000))
