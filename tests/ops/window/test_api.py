"""Validation, choice of backend and the contract that every backend keeps."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drt.ops.window import sliding_window_attention

both = pytest.mark.parametrize("backend", ["banded", "reference"])


def inputs(
    batch: int = 2, queries: int = 6, keys: int = 9, heads: int = 4, kv_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * queries + 100 * keys)
    shapes = [(batch, queries, heads, 5)] + 2 * [(batch, keys, kv_heads, 5)]
    query, key, value = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes
    )
    return query, key, value


@pytest.mark.parametrize(
    ("query", "key", "value", "message"),
    [
        ((2, 3, 8), (2, 3, 4, 8), (2, 3, 4, 8), r"\(2, 3, 8\)"),
        ((2, 3, 4, 8), (2, 3, 8), (2, 3, 8), r"\(2, 3, 8\)"),
        ((2, 3, 4, 8), (2, 3, 4, 8), (2, 4, 4, 8), r"value \(2, 4, 4, 8\)"),
        ((1, 3, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8), "agree in B and D"),
        ((2, 3, 4, 8), (2, 3, 4, 6), (2, 3, 4, 6), "agree in B and D"),
        ((2, 5, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8), "5 queries .* N is 3"),
        ((2, 3, 4, 8), (2, 3, 3, 8), (2, 3, 3, 8), "H = 4 .* G = 3"),
        ((2, 3, 2, 8), (2, 3, 4, 8), (2, 3, 4, 8), "H = 2 .* G = 4"),
        ((2, 3, 4, 8), (2, 3, 0, 8), (2, 3, 0, 8), "G = 0"),
        ((2, 3, 4, 0), (2, 3, 4, 0), (2, 3, 4, 0), "D = 0"),
    ],
)
def test_wrong_shapes_are_refused(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(torch.ones(query), torch.ones(key), torch.ones(value), window=2)


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_without_positions_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window is {window}"):
        sliding_window_attention(*inputs(), window=window)


@pytest.mark.parametrize("dtypes", [("float32", "float32", "bfloat16"), 3 * ("int64",)])
def test_wrong_dtypes_are_refused(dtypes: tuple[str, ...]) -> None:
    tensors = [torch.ones(1, 3, 2, 4, dtype=getattr(torch, name)) for name in dtypes]
    with pytest.raises(ValueError, match=dtypes[-1]):
        sliding_window_attention(*tensors, window=2)


def test_tensors_on_two_devices_are_refused() -> None:
    query, key, value = inputs()
    with pytest.raises(ValueError, match="cpu, cpu, meta"):
        sliding_window_attention(query, key, value.to("meta"), window=2)


@pytest.mark.parametrize(
    ("slopes", "message"),
    [
        (torch.ones(3), r"shape \(4,\); got torch.float32 \(3,\)"),
        (torch.ones(4, 1), r"\(4, 1\)"),
        (torch.ones(4, dtype=torch.int64), "int64"),
        (torch.ones(4, device="meta"), "meta"),
        (torch.ones(4, requires_grad=True), "gradient"),
    ],
)
def test_wrong_slopes_are_refused(slopes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(*inputs(), window=2, alibi_slopes=slopes)


@pytest.mark.parametrize(
    ("first_keys", "message"),
    [
        (torch.zeros(2, 9).long(), r"\(B, T\) = \(2, 6\); got torch.int64 \(2, 9\)"),
        (torch.zeros(6).long(), r"\(6,\)"),
        (torch.zeros(2, 6).int(), "torch.int32"),
        (torch.zeros(2, 6, device="meta").long(), "on meta, query on cpu"),
        (torch.full((2, 6), 9), r"in \[0, 8\]; got values in \[9, 9\]"),
        (torch.tensor([2 * [-1, 0, 2], 6 * [3]]), r"got values in \[-1, 3\]"),
    ],
)
def test_wrong_first_keys_are_refused(first_keys: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(*inputs(), window=2, first_keys=first_keys)


@pytest.mark.parametrize("window", [2, 9])
def test_first_keys_without_numbers_are_not_read(window: int) -> None:
    tensors = [x.to("meta") for x in inputs()]
    first_keys = torch.zeros(2, 6, dtype=torch.int64, device="meta")
    out = sliding_window_attention(*tensors, window=window, first_keys=first_keys)
    assert out.shape == (2, 6, 4, 5)


@both
@pytest.mark.parametrize("queries", [1, 3, 6])
def test_a_device_without_autocast_is_served(backend: str, queries: int) -> None:
    tensors = [x.to("meta", torch.float32) for x in inputs(queries=queries)]
    out = sliding_window_attention(*tensors, window=3, backend=backend)
    assert out.shape == (2, queries, 4, 5)
    assert out.dtype == torch.float32


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'flash' does not exist.*banded.*reference"):
        sliding_window_attention(*inputs(), window=2, backend="flash")


def test_the_default_backend_is_banded() -> None:
    tensors = inputs()
    expected = sliding_window_attention(*tensors, window=3, backend="banded")
    assert torch.equal(sliding_window_attention(*tensors, window=3), expected)


@both
def test_three_positions_by_hand(backend: str) -> None:
    # With a window of 2 and scale 1, position p weighs its own value by sigmoid(s_pp - s_p,p-1).
    query = torch.tensor([1.0, 2.0, -1.0]).double().view(1, 3, 1, 1)
    key = torch.tensor([0.5, 1.0, 3.0]).double().view(1, 3, 1, 1)
    value = torch.tensor([10.0, 20.0, 40.0]).double().view(1, 3, 1, 1)
    out = sliding_window_attention(query, key, value, window=2, scale=1.0, backend=backend)
    own = torch.tensor([2.0 * 0.5, -1.0 * 2.0]).double().sigmoid()
    expected = torch.stack([value[0, 0, 0, 0], 10 + 10 * own[0], 20 + 20 * own[1]])
    # rounding of a few float64 operations on numbers up to 40
    torch.testing.assert_close(out.flatten(), expected, rtol=1e-14, atol=0)


@both
def test_alibi_by_hand(backend: str) -> None:
    # Equal keys: only the distance decides. Head 0 loses ln 2 a position, head 1 loses ln 3.
    value = torch.tensor([1.0, 2.0, 4.0]).double().view(1, 3, 1, 1)
    out = sliding_window_attention(
        torch.zeros(1, 1, 2, 1).double(),
        torch.zeros(1, 3, 1, 1).double(),
        value,
        window=3,
        alibi_slopes=torch.tensor([2.0, 3.0]).double().log(),
        backend=backend,
    )
    expected = torch.tensor(
        [(1 / 4 + 2 / 2 + 4) / 1.75, (1 / 9 + 2 / 3 + 4) * 9 / 13], dtype=torch.float64
    )
    # rounding of a few float64 operations
    torch.testing.assert_close(out.flatten(), expected, rtol=1e-14, atol=0)


@both
def test_a_window_of_one_returns_the_value_of_the_head_group(backend: str) -> None:
    query, key, value = inputs()
    out = sliding_window_attention(query, key, value, window=1, backend=backend)
    # the only weight is exp(0) / exp(0) = 1, so equality is exact
    assert torch.equal(out, value[:, -6:].repeat_interleave(2, dim=2))


@both
@pytest.mark.parametrize(("batch", "queries", "keys"), [(2, 0, 4), (2, 0, 0), (0, 3, 5)])
def test_no_queries_and_no_rows_give_empty_outputs_and_zero_gradients(
    backend: str, batch: int, queries: int, keys: int
) -> None:
    tensors = [x.requires_grad_() for x in inputs(batch, queries, keys)]
    for first_keys in (None, torch.zeros(batch, queries, dtype=torch.int64)):
        out = sliding_window_attention(*tensors, window=3, first_keys=first_keys, backend=backend)
        assert out.shape == (batch, queries, 4, 5)
        for tensor, grad in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
            assert torch.equal(grad, torch.zeros_like(tensor))
        with torch.no_grad():
            assert torch.equal(
                sliding_window_attention(
                    *tensors, window=3, first_keys=first_keys, backend=backend
                ),
                out,
            )


@both
@pytest.mark.parametrize("queries", [1, 2, 40])
def test_keys_out_of_reach_are_not_read(backend: str, queries: int) -> None:
    window, out_of_reach = 7, 5
    query, key, value = inputs(queries=queries, keys=queries + window - 1 + out_of_reach)
    key[:, :out_of_reach], value[:, :out_of_reach] = float("nan"), float("nan")
    tensors = [x.requires_grad_() for x in (query, key, value)]
    out = sliding_window_attention(*tensors, window=window, backend=backend)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out, tensors, torch.ones_like(out)):
        assert grad.isfinite().all()
        if grad.shape == key.shape:
            assert not grad[:, :out_of_reach].any()
            assert grad[:, out_of_reach:].all()


@both
def test_rows_of_a_batch_do_not_touch(backend: str) -> None:
    query, key, value = inputs(batch=3, queries=20, keys=25)
    clean = sliding_window_attention(query, key, value, window=4, backend=backend)
    key[1], value[1] = float("nan"), float("nan")
    out = sliding_window_attention(query, key, value, window=4, backend=backend)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@both
def test_outputs_do_not_depend_on_later_keys(backend: str) -> None:
    query, key, value = inputs(queries=50, keys=60)
    before = sliding_window_attention(query, key, value, window=9, backend=backend)
    key[:, 41:] += 1.0
    value[:, 41:] += 1.0
    after = sliding_window_attention(query, key, value, window=9, backend=backend)
    # key 41 belongs to query 31; masked probabilities are exactly 0, so equality is exact
    assert torch.equal(after[:, :31], before[:, :31])
    assert (after[:, 31:] != before[:, 31:]).all()


@both
@settings(max_examples=20, deadline=None)
@given(data=st.data(), window=st.integers(1, 12), cached=st.integers(0, 15))
def test_pieces_with_a_cache_equal_one_call(
    backend: str, data: st.DataObject, window: int, cached: int
) -> None:
    total = 40
    borders = sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=8)))
    query, key, value = inputs(queries=total, keys=total + cached)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0])
    whole = sliding_window_attention(
        query, key, value, window=window, alibi_slopes=slopes, backend=backend
    )
    pieces = []
    for start, stop in pairwise([0, *borders, total]):
        kept = slice(max(start + cached - window + 1, 0), stop + cached)
        piece = (query[:, start:stop], key[:, kept], value[:, kept])
        pieces.append(
            sliding_window_attention(*piece, window=window, alibi_slopes=slopes, backend=backend)
        )
    # float64 sums over the same <= 12 terms, grouped otherwise: a few units of 2e-16
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-13, atol=1e-13)
