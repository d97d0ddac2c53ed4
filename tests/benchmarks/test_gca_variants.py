"""What grouped cross-attention is measured against computes the same; its inputs are as said."""

from typing import Any

import pytest
import torch

import gca_variants
import operators_decode
from common import forward_backward, full_causal
from gca_variants import Sizes

SIZES = [
    Sizes(chunks=3, num_queries=5, chunk_size=4, topk=2, heads=4, kv_heads=4, width=8),
    Sizes(chunks=3, num_queries=5, chunk_size=4, topk=2, heads=6, kv_heads=2, width=8),
]


def by_hand(query: Any, key: Any, value: Any, indices: Any, weights: Any) -> torch.Tensor:
    """The definition, a head and a slot at a time."""
    out = torch.zeros_like(query)
    per_kv_head = query.shape[3] // key.shape[3]
    for c in range(query.shape[1]):
        for k, chunk in enumerate(indices[0, c].tolist()):
            for h in range(query.shape[3]):
                g = h // per_kv_head
                scores = query[0, c, :, h] @ key[0, chunk, :, g].T / query.shape[4] ** 0.5
                attended = scores.softmax(-1) @ value[0, chunk, :, g]
                out[0, c, :, h] += weights[0, c, k] * attended
    return out


@pytest.mark.parametrize("operator", [gca_variants.chunk_sdpa, gca_variants.grouped_einsum])
@pytest.mark.parametrize("sizes", SIZES, ids=["MHA", "GQA"])
def test_plain_forms_are_the_operator(operator: Any, sizes: Sizes) -> None:
    inputs = gca_variants.make_inputs(torch.float64, sizes).to_float64()
    wanted = forward_backward(by_hand, inputs)
    for found, expected in zip(forward_backward(operator, inputs), wanted, strict=True):
        # The same sums in another order, in float64.
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", SIZES, ids=["MHA", "GQA"])
def test_slots_in_order_are_the_operator(sizes: Sizes) -> None:
    inputs = operators_decode.make_step(sizes, torch.device("cpu")).to_float64()
    in_order = torch.arange(sizes.topk)[None, None]
    wanted = by_hand(*(x.detach() for x in inputs._replace(indices=in_order)))
    found = operators_decode.slots_sdpa(*inputs[:3], inputs.weights)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_indices_are_causal_and_reach_everywhere() -> None:
    indices = gca_variants.causal_indices(torch.zeros(1, 50, 400, dtype=torch.int64))[0]
    chunk = torch.arange(50)[:, None]
    assert bool((indices[1:] < chunk[1:]).all())
    assert bool((indices[0] == 0).all())
    # 400 draws of at most 10 numbers miss one with probability 10 * 0.9 ** 400 < 1e-17.
    assert all(set(indices[n].tolist()) == set(range(n)) for n in range(1, 11))


def test_full_attention_takes_fewer_key_heads() -> None:
    query, key = torch.randn(1, 7, 4, 8), torch.randn(1, 7, 2, 8)
    repeated = key.repeat_interleave(2, dim=2)
    torch.testing.assert_close(full_causal(query, key, key), full_causal(query, repeated, repeated))
