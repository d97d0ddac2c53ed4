"""The oracle: against loops over positions, and its derivatives."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from drt.ops.window import sliding_window_attention


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def attend_position_by_position(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    slopes: list[float],
    scale: float,
    first_keys: Tensor | None = None,
) -> Tensor:
    batch, queries, heads, _ = query.shape
    keys, kv_heads = key.shape[1:3]
    out = torch.zeros_like(query)
    for b in range(batch):
        for t in range(queries):
            for h in range(heads):
                g, position = h // (heads // kv_heads), keys - queries + t
                first = 0 if first_keys is None else min(int(first_keys[b, t]), position)
                reach = range(max(first, position - window + 1), position + 1)
                weights = [
                    math.exp(
                        scale * float(query[b, t, h] @ key[b, j, g]) - slopes[h] * (position - j)
                    )
                    for j in reach
                ]
                for j, weight in zip(reach, weights, strict=True):
                    out[b, t, h] += weight / sum(weights) * value[b, j, g]
    return out


@pytest.mark.parametrize("with_first_keys", [False, True])
@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (4, 9)])
def test_reference_equals_loops(
    window: int, queries: int, keys: int, with_first_keys: bool
) -> None:
    query, key, value = draw(2, queries, 4, 3), draw(2, keys, 2, 3, seed=1), draw(2, keys, 2, 3)
    slopes = [0.7, 0.1, 0.0, 1.3]
    first_keys = None
    if with_first_keys:
        generator = torch.Generator().manual_seed(2)
        first_keys = torch.randint(keys, (2, queries), generator=generator)
    expected = attend_position_by_position(
        query, key, value, window=window, slopes=slopes, scale=0.4, first_keys=first_keys
    )
    out = sliding_window_attention(
        query,
        key,
        value,
        window=window,
        first_keys=first_keys,
        alibi_slopes=torch.tensor(slopes, dtype=torch.float64),
        scale=0.4,
        backend="reference",
    )
    # float64 sums of at most 9 terms of order 1
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("first_keys", [None, torch.tensor([[4, 2, 3]])])
@pytest.mark.parametrize("window", [1, 3, 50])
def test_gradients_of_the_reference(window: int, first_keys: Tensor | None) -> None:
    tensors = [x.requires_grad_() for x in (draw(1, 3, 2, 2), draw(1, 5, 1, 2), draw(1, 5, 1, 2))]

    def attend(*tensors: Tensor) -> Tensor:
        slopes = torch.tensor([0.5, 0.1])
        return sliding_window_attention(
            *tensors,
            window=window,
            first_keys=first_keys,
            alibi_slopes=slopes,
            backend="reference",
        )

    # gradcheck compares with finite differences at its own float64 tolerances
    assert gradcheck(attend, tensors)
    assert gradgradcheck(attend, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_computes_half_precision_in_float32(dtype: torch.dtype) -> None:
    query, key, value = (
        x.to(dtype) for x in (draw(1, 9, 2, 4), draw(1, 9, 1, 4), draw(1, 9, 1, 4))
    )
    out = sliding_window_attention(query, key, value, window=4, backend="reference")
    widened = sliding_window_attention(
        query.float(), key.float(), value.float(), window=4, backend="reference"
    )
    assert torch.equal(out, widened.to(dtype))
