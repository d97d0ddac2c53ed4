"""What the varlen backend hands to FlashAttention; `test_gpu.py` runs it."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen as torch_varlen

from drt.ops.window import sliding_window_attention, varlen
from drt.ops.window.varlen import Packed, pack


def draw(batch: int, queries: int, keys: int, *, heads_first: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + 1000 * keys)
    shapes = [(batch, queries, 4, 8), (batch, keys, 2, 8), (batch, keys, 2, 8)]
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    if heads_first:
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    return tensors


def attend_by_sequence(packed: Packed) -> Tensor:
    """What FlashAttention documents, a query and a head at a time.

    Of a sequence, query i of n stands at key i + m - n of its m keys, and sees `left` keys before
    that (all, where that is negative) and none after.
    """
    left, right = packed.window_size
    assert right == 0
    ratio = packed.query.shape[1] // packed.key.shape[1]
    out = torch.full_like(packed.query, float("nan"))
    borders = zip(packed.query_borders.tolist(), packed.key_borders.tolist(), strict=True)
    for (query_start, key_start), (query_end, key_end) in pairwise(borders):
        assert query_end - query_start <= packed.num_queries
        assert key_end - key_start <= packed.num_keys
        for row in range(query_start, query_end):
            own = key_end - (query_end - row)
            first = key_start if left < 0 else max(own - left, key_start)
            for head in range(packed.query.shape[1]):
                keys = packed.key[first : own + 1, head // ratio]
                values = packed.value[first : own + 1, head // ratio]
                out[row, head] = (keys @ packed.query[row, head] * 0.3).softmax(0) @ values
    return out


@pytest.mark.parametrize("expand_heads", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("window", [1, 6, 24, 25, 26, 10**12])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(3, 20, 25), (1, 25, 25), (2, 1, 25)])
def test_packed_arguments_mean_the_same_attention(
    batch: int, queries: int, keys: int, window: int, heads_first: bool, expand_heads: bool
) -> None:
    tensors = draw(batch, queries, keys, heads_first=heads_first)
    packed = pack(*tensors, window=window, expand_heads=expand_heads)
    assert packed.key.shape[1] == packed.value.shape[1] == (4 if expand_heads else 2)
    assert packed.query_borders.dtype == packed.key_borders.dtype == torch.int32
    out = attend_by_sequence(packed).view(batch, queries, 4, 8)
    expected = sliding_window_attention(*tensors, window=window, scale=0.3, backend="reference")
    # both are float64: sums of at most 25 terms of order 1 in another order
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("takes_groups", [False, True])
def test_the_installed_operator_takes_the_arguments(
    monkeypatch: pytest.MonkeyPatch, takes_groups: bool
) -> None:
    """On tensors without numbers, which need no GPU."""
    if takes_groups and not varlen._takes_groups():
        pytest.skip("this PyTorch has no enable_gqa")
    monkeypatch.setattr(varlen, "_takes_groups", lambda: takes_groups)
    seen: dict[str, Any] = {}
    original = torch_varlen.varlen_attn

    def recorder(*arguments: Any, **options: Any) -> Any:
        seen.update(options, key_heads=arguments[1].shape[1])
        return original(*arguments, **options)

    monkeypatch.setattr(torch_varlen, "varlen_attn", recorder)
    with FakeTensorMode(), torch.no_grad():
        query, key, value = (
            torch.empty(2, length, heads, 8, dtype=torch.bfloat16, device="cuda")
            for length, heads in ((20, 4), (25, 2), (25, 2))
        )
        out = varlen.varlen_window_attention(
            query, key, value, window=6, first_keys=None, alibi_slopes=None, scale=0.3
        )
    assert out.shape == query.shape
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous()
    assert seen["key_heads"] == (2 if takes_groups else 4)
    assert seen.get("enable_gqa", False) == takes_groups
    assert seen["window_size"] == (5, 0)
    assert seen["scale"] == 0.3
