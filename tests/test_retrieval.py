"""Choosing chunks: causal, top-k by score, noise on the choice only, weights from clean scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drt.retrieval import gumbel_noise, select_chunks


def test_a_hand_computed_choice() -> None:
    scores = torch.tensor([[[0.0, 9.0, 9.0], [1.0, 3.0, 9.0], [2.0, 1.0, 2.5]]])
    made = select_chunks(scores, torch.tensor([0, 2, 3]), topk=2)
    assert made.indices.tolist() == [[[-1, -1], [1, 0], [2, 0]]]
    assert made.weights[0, 0].tolist() == [0.0, 0.0]
    higher = 1 / (1 + math.exp(-2.0))
    assert made.weights[0, 1].tolist() == pytest.approx([higher, 1 - higher])
    assert made.scores[0, 0].tolist() == [-math.inf, -math.inf]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 12), st.integers(0, 10**6))
def test_top_k_of_the_candidates(count: int, chunks: int, topk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, count, chunks, generator=generator)
    limits = torch.randint(0, chunks + 1, (count,), generator=generator)
    made = select_chunks(scores, limits, topk=topk)
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
    clean = select_chunks(scores, limits, topk=4)
    noisy = select_chunks(
        scores, limits, topk=4, noise=1.0, generator=torch.Generator().manual_seed(1)
    )
    again = select_chunks(
        scores, limits, topk=4, noise=1.0, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(noisy.indices, again.indices)
    assert not torch.equal(noisy.indices, clean.indices)
    expected = scores.gather(-1, noisy.indices).softmax(-1)
    assert torch.allclose(noisy.weights, expected)


def test_gumbel_noise_makes_the_best_choice_a_sample_of_the_softmax() -> None:
    # Gumbel-max: argmax(score + noise) is distributed as softmax(score).
    scores = torch.tensor([0.0, 1.0, 2.0]).expand(1, 20000, 3)
    made = select_chunks(scores, torch.full((20000,), 3), topk=1, noise=1.0)
    shares = torch.bincount(made.indices.flatten(), minlength=3) / 20000
    # Three standard deviations of a share of 20,000 draws.
    assert torch.allclose(shares, scores[0, 0].softmax(-1), atol=3 * 0.5 / math.sqrt(20000))


def test_gradient_reaches_the_scores_of_the_chosen_only() -> None:
    scores = torch.randn(1, 3, 6, requires_grad=True)
    made = select_chunks(scores, torch.tensor([0, 1, 6]), topk=2)
    made.weights[..., 0].sum().backward()
    assert scores.grad is not None
    touched = torch.zeros(1, 3, 6, dtype=torch.bool)
    touched[0, 2, made.indices[0, 2]] = True
    assert torch.equal(scores.grad != 0, touched)


def test_gumbel_noise_is_finite_and_centred_on_eulers_constant() -> None:
    noise = gumbel_noise(torch.empty(100_000))
    assert noise.isfinite().all()
    # Mean 0.5772, standard deviation pi / sqrt(6); three standard errors.
    assert noise.mean() == pytest.approx(0.5772, abs=3 * 1.283 / math.sqrt(100_000))
