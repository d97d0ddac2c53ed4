"""Joint attention and the residual stream against plain loops in float64."""

import math
from typing import Any

import pytest
import torch

from drt.baselines.joint_attention import joint_cross_attention
from drt.retrieval import RetrievedChunks

NUM_CHUNKS, S, G, H, D, K = 5, 4, 2, 4, 3, 3
# Both are float64, sums of some ten terms in another order.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def inputs(*, ragged: bool) -> tuple[torch.Tensor, RetrievedChunks]:
    """Two rows of two blocks of three queries; one block retrieves nothing, one slot weighs 0."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    indices = torch.tensor([[[0, 1, 4], [-1, -1, -1]], [[3, -1, -1], [2, 0, 1]]])
    weights = torch.rand(2, 2, K, generator=g, dtype=torch.float64).masked_fill(indices < 0, 0.0)
    weights[1, 1, 2] = 0.0
    lengths = torch.tensor([4, 1, 3, 2, 4]) if ragged else None
    memory = normal(NUM_CHUNKS, S, G, D), normal(NUM_CHUNKS, S, G, D)
    chunks = RetrievedChunks(*memory, lengths, indices, weights.requires_grad_())
    return normal(4, 3, H, D), chunks


def by_loops(
    query: torch.Tensor, chunks: RetrievedChunks, weighted: bool, plus_one: bool
) -> torch.Tensor:
    rows = []
    for n, (indices, weights) in enumerate(
        zip(chunks.indices.flatten(0, 1).tolist(), chunks.weights.flatten(0, 1), strict=True)
    ):
        for q in range(query.shape[1]):
            for h in range(H):
                total = torch.tensor(1.0 if plus_one else 0.0, dtype=torch.float64)
                out = torch.zeros(D, dtype=torch.float64)
                for j, w in zip(indices, weights, strict=True):
                    if j < 0 or w == 0:
                        continue
                    for t in range(S if chunks.lengths is None else int(chunks.lengths[j])):
                        score = query[n, q, h] @ chunks.keys[j, t, h // (H // G)] / math.sqrt(D)
                        e = score.exp() * (w if weighted else 1.0)
                        total, out = total + e, out + e * chunks.values[j, t, h // (H // G)]
                rows.append(out / total if total > 0 else out)
    return torch.stack(rows).view(query.shape)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("plus_one", [False, True])
def test_one_softmax_over_all_tokens(ragged: bool, weighted: bool, plus_one: bool) -> None:
    query, chunks = inputs(ragged=ragged)
    wanted = by_loops(query, chunks, weighted, plus_one)
    out = joint_cross_attention(query, chunks, weighted=weighted, softmax_plus_one=plus_one)
    assert torch.allclose(out, wanted, **TOLERANCE)
    # The second block retrieved nothing.
    assert not out[1].any()
    leaves: list[Any] = [query, chunks.keys, chunks.values, *([chunks.weights] if weighted else [])]
    upstream = torch.randn(out.shape, dtype=torch.float64)
    for got, expected in zip(
        torch.autograd.grad(out, leaves, upstream),
        torch.autograd.grad(wanted, leaves, upstream),
        strict=True,
    ):
        assert torch.allclose(got, expected, **TOLERANCE)
    with torch.no_grad():
        again = joint_cross_attention(query, chunks, weighted=weighted, softmax_plus_one=plus_one)
    assert torch.equal(again, out)


def test_weights_do_not_enter_where_they_should_not() -> None:
    query, chunks = inputs(ragged=True)
    doubled = chunks._replace(weights=2 * chunks.weights.detach())
    kwargs = {"softmax_plus_one": True}
    plain = joint_cross_attention(query, chunks, weighted=False, **kwargs)
    assert torch.equal(joint_cross_attention(query, doubled, weighted=False, **kwargs), plain)
    heavier = joint_cross_attention(query, doubled, weighted=True, **kwargs)
    lighter = joint_cross_attention(query, chunks, weighted=True, **kwargs)
    assert not torch.allclose(heavier, lighter)
