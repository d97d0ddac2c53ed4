"""The banded backend against the reference: values, gradients, memory, and its special paths."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from drt.ops.window import banded, plan, sliding_window_attention
from drt.testing import assert_within_budget


class Case(NamedTuple):
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    window: int

    def draw(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Query, key, value and a gradient of the output, all exact in `dtype`."""
        generator = torch.Generator().manual_seed(hash(self))
        query = (self.batch, self.queries, self.heads, self.width)
        key = (self.batch, self.keys, self.kv_heads, self.width)
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in (query, key, key, query)
        ]

    def slopes(self) -> Tensor:
        return torch.logspace(-3, 0, self.heads, base=2.0, dtype=torch.float64)


def values_and_gradients(
    tensors: list[Tensor], *, window: int, slopes: Tensor | None, backend: str
) -> list[Tensor]:
    *leaves, grad = (x.detach() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = sliding_window_attention(*leaves, window=window, alibi_slopes=slopes, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_equal_in_float64(case: Case, *, alibi: bool) -> None:
    slopes = case.slopes() if alibi else None
    tensors = case.draw()
    actual, expected = (
        values_and_gradients(tensors, window=case.window, slopes=slopes, backend=backend)
        for backend in ("banded", "reference")
    )
    for x, y in zip(actual, expected, strict=True):
        # both are float64: sums of some hundred terms of order 1 in another order
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 300, 300, 2, 2, 8, 64),
        Case(2, 130, 150, 4, 1, 8, 200),
        Case(3, 257, 300, 6, 2, 4, 33),
        Case(2, 65, 128, 4, 4, 8, 64),
        Case(2, 70, 70, 3, 3, 5, 1),
        Case(1, 5, 400, 2, 1, 4, 130),
        Case(1, 40, 40, 2, 1, 4, 10**9),
    ],
    ids=str,
)
def test_banded_equals_reference(case: Case, alibi: bool) -> None:
    assert_equal_in_float64(case, alibi=alibi)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(0, 100),
    cached=st.integers(0, 100),
    kv_heads=st.integers(1, 3),
    ratio=st.integers(1, 3),
    width=st.integers(1, 9),
    window=st.one_of(st.integers(1, 8), st.integers(9, 250)),
    alibi=st.booleans(),
)
def test_banded_equals_reference_for_any_sizes(
    batch: int,
    queries: int,
    cached: int,
    kv_heads: int,
    ratio: int,
    width: int,
    window: int,
    alibi: bool,
) -> None:
    case = Case(batch, queries, queries + cached, kv_heads * ratio, kv_heads, width, window)
    assert_equal_in_float64(case, alibi=alibi)


def attend_eagerly(
    query: Tensor, key: Tensor, value: Tensor, *, window: int, slopes: Tensor | None
) -> Tensor:
    """Dense attention with every step in the dtype of the inputs, as a model without kernels."""
    ratio = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(ratio, dim=2) for x in (key, value))
    scores = torch.einsum("bthd,bnhd->bhtn", query, key) * query.shape[-1] ** -0.5
    distance = torch.arange(key.shape[1])[-query.shape[1] :, None] - torch.arange(key.shape[1])
    bias = torch.zeros(()) if slopes is None else -slopes[:, None, None] * distance
    bias = bias.masked_fill((distance < 0) | (distance >= window), float("-inf"))
    return torch.einsum("bhtn,bnhd->bthd", (scores + bias.to(scores.dtype)).softmax(-1), value)


@pytest.mark.parametrize("sharpness", [1, 4])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case", [Case(2, 150, 200, 4, 2, 24, 64), Case(1, 300, 300, 4, 4, 64, 128)], ids=str
)
def test_rounding_errors(case: Case, dtype: torch.dtype, alibi: bool, sharpness: int) -> None:
    query, *rest = case.draw(dtype)
    tensors = [query * sharpness, *rest]
    slopes = case.slopes() if alibi else None
    exact = values_and_gradients(
        [x.double() for x in tensors], window=case.window, slopes=slopes, backend="reference"
    )
    actual = values_and_gradients(tensors, window=case.window, slopes=slopes, backend="banded")
    leaves = [x.requires_grad_() for x in tensors[:3]]
    eager = attend_eagerly(*leaves, window=case.window, slopes=slopes)
    eager = [eager.detach(), *torch.autograd.grad(eager, leaves, tensors[3])]
    for name, *three in zip(("out", "dq", "dk", "dv"), actual, exact, eager, strict=True):
        result, truth, baseline = three
        assert result.dtype == dtype
        # Both round at the same places, in another order; measured between 0.5 and 1.1 times.
        assert_within_budget(result, truth, baseline=baseline, factor=1.5, name=name)


@settings(max_examples=30, deadline=None)
@given(
    queries=st.integers(0, 6),
    cached=st.integers(0, 40),
    window=st.integers(1, 30),
    heads_first=st.booleans(),
)
def test_a_few_queries_without_gradient(
    queries: int, cached: int, window: int, heads_first: bool
) -> None:
    case = Case(2, queries, queries + cached, 4, 2, 3, window)
    query, key, value, _ = case.draw()
    if heads_first:
        key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    for slopes in (None, case.slopes()):
        actual, expected = (
            sliding_window_attention(
                query, key, value, window=window, alibi_slopes=slopes, backend=backend
            )
            for backend in ("banded", "reference")
        )
        # both are float64: sums of some ten terms of order 1 in another order
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 4, 4, 2, 1, 2, 2),
        Case(2, 3, 6, 2, 2, 3, 4),
        Case(1, 3, 3, 4, 2, 2, 1),
        Case(1, 3, 4, 2, 1, 2, 9),
        Case(1, 33, 35, 1, 1, 1, 3),
    ],
    ids=str,
)
def test_gradcheck(case: Case, alibi: bool) -> None:
    query, key, value, _ = case.draw()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    slopes = case.slopes() if alibi else None

    def attend(*leaves: Tensor) -> Tensor:
        return sliding_window_attention(*leaves, window=case.window, alibi_slopes=slopes)

    # gradcheck compares with finite differences at its own float64 tolerances
    assert gradcheck(attend, leaves)


@pytest.mark.parametrize("tile_bytes", [1, 3000, 100_000])
def test_any_cut_of_batch_and_heads_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tile_bytes: int
) -> None:
    monkeypatch.setattr(plan, "TILE_BYTES", {8: tile_bytes})
    assert_equal_in_float64(Case(5, 70, 90, 14, 7, 4, 20), alibi=True)


def test_heads_first_in_memory_and_expanded_tensors() -> None:
    case = Case(3, 70, 90, 4, 2, 5, 20)
    tensors = case.draw()
    expected = values_and_gradients(tensors, window=20, slopes=None, backend="reference")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    actual = values_and_gradients(strided, window=20, slopes=None, backend="banded")
    for x, y in zip(actual, expected, strict=True):
        # both are float64: sums of some ten terms of order 1 in another order
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    leaves = [x.requires_grad_() for x in strided[:3]]
    # sum() hands back a gradient without memory of its own
    from_sum = torch.autograd.grad(sliding_window_attention(*leaves, window=20).sum(), leaves)
    ones = [*tensors[:3], torch.ones_like(tensors[3])]
    expected = values_and_gradients(ones, window=20, slopes=None, backend="reference")[1:]
    for x, y in zip(from_sum, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_gradients_of_some_inputs_only(
    monkeypatch: pytest.MonkeyPatch, wanted: tuple[int, ...]
) -> None:
    case = Case(2, 40, 50, 4, 2, 3, 12)
    tensors = case.draw()
    expected = values_and_gradients(tensors, window=12, slopes=None, backend="reference")
    leaves = [x.requires_grad_(i in wanted) for i, x in enumerate(tensors[:3])]
    if wanted == (2,):
        # the gradient of the scores is no part of the value gradient
        monkeypatch.setattr(banded, "_softmax_backward", None)
    sliding_window_attention(*leaves, window=12).backward(tensors[3])
    for i, leaf in enumerate(leaves):
        if i not in wanted:
            assert leaf.grad is None
            continue
        # both are float64: sums of some ten terms of order 1 in another order
        torch.testing.assert_close(leaf.grad, expected[i + 1], rtol=1e-12, atol=1e-12)


def test_double_backward_is_refused() -> None:
    query, key, value, grad = Case(1, 9, 9, 2, 1, 3, 4).draw()
    query.requires_grad_()
    out = sliding_window_attention(query, key, value, window=4)
    (first,) = torch.autograd.grad(out, query, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("queries", [2, 40])
def test_autocast_leaves_float32_in_float32(queries: int) -> None:
    case = Case(1, queries, queries, 2, 1, 8, 12)
    tensors = case.draw(torch.float32)
    expected = values_and_gradients(tensors, window=12, slopes=None, backend="banded")
    with torch.no_grad():
        plain = sliding_window_attention(*tensors[:3], window=12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = values_and_gradients(tensors, window=12, slopes=None, backend="banded")
        with torch.no_grad():
            assert torch.equal(sliding_window_attention(*tensors[:3], window=12), plain)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    largest = []
    for length in (512, 4096):
        tensors = Case(1, length, length, 1, 1, 2, 16).draw(torch.float32)
        with LargestResult() as mode:
            values_and_gradients(tensors, window=16, slopes=torch.ones(1), backend="banded")
        largest.append(mode.numel)
    assert largest[1] <= 8 * largest[0]
    assert largest[1] < 4096 * 64
