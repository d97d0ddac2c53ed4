"""First keys: hidden keys reach neither values nor gradients, for ragged rows and packed documents.

The reference is compared with a loop in `test_reference.py`; here the banded backend with it.
"""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from drt.ops.window import banded, plan, sliding_window_attention

both = pytest.mark.parametrize("backend", ["banded", "reference"])


class Case(NamedTuple):
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    window: int

    def draw(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Query, key, value and a gradient of the output."""
        generator = torch.Generator().manual_seed(hash(self))
        query = (self.batch, self.queries, self.heads, self.width)
        key = (self.batch, self.keys, self.kv_heads, self.width)
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in (query, key, key, query)
        ]

    def first_keys(self, kind: str) -> Tensor:
        """(B, T): one per row, rising along each row, or any."""
        generator = torch.Generator().manual_seed(1 + hash(self))
        if kind == "rows":
            firsts = torch.randint(self.keys, (self.batch, 1), generator=generator)
            return firsts.expand(-1, self.queries)
        firsts = torch.randint(self.keys, (self.batch, self.queries), generator=generator)
        return firsts.sort(-1).values if kind == "rising" else firsts

    def slopes(self) -> Tensor:
        return torch.logspace(-3, 0, self.heads, base=2.0, dtype=torch.float64)


def values_and_gradients(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    *leaves, grad = (x.detach() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = sliding_window_attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_equal_in_float64(case: Case, first_keys: Tensor, *, alibi: bool) -> None:
    tensors = case.draw()
    slopes = case.slopes() if alibi else None
    options: dict[str, Any] = {
        "window": case.window,
        "first_keys": first_keys,
        "alibi_slopes": slopes,
    }
    actual, expected = (
        values_and_gradients(tensors, backend=backend, **options)
        for backend in ("banded", "reference")
    )
    # without gradient a few queries take another path
    actual.append(sliding_window_attention(*tensors[:3], **options))
    for x, y in zip(actual, [*expected, expected[0]], strict=True):
        # both are float64: sums of some hundred terms of order 1 in another order
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("kind", ["rows", "rising", "any"])
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 200, 200, 2, 2, 8, 64),
        Case(2, 130, 150, 3, 1, 8, 200),
        Case(3, 257, 300, 6, 2, 4, 33),
        Case(2, 70, 90, 3, 3, 5, 1),
        Case(2, 5, 400, 2, 1, 4, 130),
        Case(1, 40, 40, 3, 1, 4, 10**9),
        Case(3, 1, 20, 6, 2, 4, 16),
        Case(2, 4, 40, 6, 2, 4, 64),
    ],
    ids=str,
)
def test_banded_equals_reference(case: Case, kind: str, alibi: bool) -> None:
    assert_equal_in_float64(case, case.first_keys(kind), alibi=alibi)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.one_of(st.integers(1, 4), st.integers(5, 100)),
    cached=st.integers(0, 100),
    kv_heads=st.integers(1, 3),
    ratio=st.integers(1, 3),
    window=st.one_of(st.integers(1, 8), st.integers(9, 250)),
    kind=st.sampled_from(["rows", "rising", "any"]),
    alibi=st.booleans(),
)
def test_banded_equals_reference_for_any_sizes(
    batch: int,
    queries: int,
    cached: int,
    kv_heads: int,
    ratio: int,
    window: int,
    kind: str,
    alibi: bool,
) -> None:
    case = Case(batch, queries, queries + cached, kv_heads * ratio, kv_heads, 3, window)
    assert_equal_in_float64(case, case.first_keys(kind), alibi=alibi)


@pytest.mark.parametrize("tile_bytes", [1, 3000, 100_000])
def test_any_cut_of_batch_and_heads_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tile_bytes: int
) -> None:
    monkeypatch.setattr(plan, "TILE_BYTES", {8: tile_bytes})
    case = Case(5, 70, 90, 14, 7, 4, 20)
    assert_equal_in_float64(case, case.first_keys("any"), alibi=True)


@pytest.mark.parametrize("queries", [3, 70])
def test_where_the_host_cannot_read_them(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    monkeypatch.setattr(plan, "can_read", lambda tensor: False)
    case = Case(2, queries, queries + 20, 6, 2, 4, 20)
    assert_equal_in_float64(case, case.first_keys("any"), alibi=True)


@pytest.mark.parametrize("queries", [3, 40])
def test_gradcheck(queries: int) -> None:
    case = Case(1, queries, queries + 3, 3, 1, 1, 4)
    query, key, value, _ = case.draw()
    first_keys = case.first_keys("any")

    def attend(*leaves: Tensor) -> Tensor:
        return sliding_window_attention(*leaves, window=case.window, first_keys=first_keys)

    # gradcheck compares with finite differences at its own float64 tolerances
    assert gradcheck(attend, [x.requires_grad_() for x in (query, key, value)])


@both
@pytest.mark.parametrize("queries", [1, 4, 90])
def test_a_first_key_after_the_query_leaves_the_query_itself(backend: str, queries: int) -> None:
    case = Case(2, queries, queries + 12, 6, 2, 5, 8)
    tensors = case.draw()
    last = torch.full((2, queries), case.keys - 1)
    out, *_ = values_and_gradients(tensors, window=8, first_keys=last, backend=backend)
    # the only weight is exp(0) / exp(0) = 1, so equality is exact
    assert torch.equal(out, tensors[2][:, -queries:].repeat_interleave(3, dim=2))
    with torch.no_grad():
        again = sliding_window_attention(*tensors[:3], window=8, first_keys=last, backend=backend)
    assert torch.equal(again, out)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 4, 90])
@pytest.mark.parametrize("window", [30, 200])
def test_a_row_after_unused_places_equals_the_row_alone(
    backend: str, dtype: torch.dtype, queries: int, window: int
) -> None:
    """Whatever finite numbers are there: products with the largest ones overflow."""
    unused = [0, 10, 25]
    case = Case(3, queries, queries + 25, 6, 2, 8, window)
    tensors = case.draw(dtype)
    for row, count in enumerate(unused):
        for x in tensors[1:3]:
            x[row, :count] = torch.finfo(dtype).max
    first_keys = torch.tensor(unused)[:, None].expand(-1, queries)
    options: dict[str, Any] = {"window": window, "backend": backend}
    together = values_and_gradients(tensors, first_keys=first_keys, **options)
    with torch.no_grad():
        together.append(sliding_window_attention(*tensors[:3], first_keys=first_keys, **options))
    tolerance = 8 * torch.finfo(dtype).eps
    for row, count in enumerate(unused):
        query, key, value, grad = (x[row : row + 1] for x in tensors)
        alone = [query, key[:, count:], value[:, count:], grad]
        expected = values_and_gradients(alone, **options)
        for x, y in zip(together, [*expected, expected[0]], strict=True):
            # gradients of the unused places
            short = x.shape[1] - y.shape[1]
            assert not x[row, :short].any()
            found = x[row, short:]
            # Sums of up to 115 terms in another order, some of them of rounded probabilities.
            error = torch.linalg.vector_norm((found - y[0]).double())
            assert error <= tolerance * torch.linalg.vector_norm(y.double())


@both
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("lengths", [(130, 170), (7, 60), (1, 2), (100, 3)])
@pytest.mark.parametrize("window", [20, 500])
def test_packed_documents_equal_each_alone(
    backend: str, lengths: tuple[int, int], window: int, alibi: bool
) -> None:
    total = sum(lengths)
    case = Case(2, total, total, 6, 2, 4, window)
    tensors = case.draw()
    border = lengths[0]
    first_keys = (torch.arange(total) >= border).long().mul(border).expand(2, -1)
    options: dict[str, Any] = {
        "window": window,
        "backend": backend,
        "alibi_slopes": case.slopes() if alibi else None,
    }
    together = values_and_gradients(tensors, first_keys=first_keys, **options)
    for document in (slice(0, border), slice(border, total)):
        alone = values_and_gradients([x[:, document] for x in tensors], **options)
        for x, y in zip(together, alone, strict=True):
            # float64 sums of some hundred terms of order 1 in another order
            torch.testing.assert_close(x[:, document], y, rtol=1e-11, atol=1e-11)


@both
@pytest.mark.parametrize("window", [5, 500])
def test_keys_hidden_from_all_queries_get_exactly_no_gradient(backend: str, window: int) -> None:
    case = Case(2, 100, 110, 3, 1, 4, window)
    tensors = case.draw()
    # nobody looks back over the borders 50 and 90, and row 1 begins with 8 unused places
    firsts = torch.arange(10, 110) // 50 * 50
    first_keys = torch.stack([firsts, firsts.clamp(min=8)])
    first_keys[:, 70:80] = 90
    position = torch.arange(110)
    distance = position[10:, None] - position
    seen = (distance >= 0) & (distance < window) & (position >= first_keys[..., None])
    seen[:, 70:80] |= distance[70:80] == 0
    alone = seen.sum(1) == 0
    assert alone[1, :8].all() if window == 500 else alone.any()
    results = values_and_gradients(tensors, window=window, first_keys=first_keys, backend=backend)
    for grad in results[2:]:
        assert not grad[alone].any()
    assert results[3][~alone].all()


class Masks(NamedTuple):
    """Which leading columns of a block were masked."""

    keys: slice
    columns: int


def masks_of_a_call(case: Case, first_keys: Tensor | None) -> list[Masks]:
    query, key, *_ = case.draw()
    band = plan.Band(case.window, 1.0, None, first_keys)
    found = plan.make_plan(query, key, band)
    return [
        Masks(block.keys, 0 if block.hidden is None else block.hidden.shape[-1])
        for part, part_plan in plan.parts((query, key), found)
        for block in plan.blocks(part[0], part[1], part_plan)
    ]


def test_only_blocks_with_hidden_keys_are_masked() -> None:
    case = Case(1, 600, 600, 1, 1, 2, 64)
    first_keys = (torch.arange(600) >= 250).long().mul(250)[None]
    masks = masks_of_a_call(case, first_keys)
    assert [mask.columns for mask in masks] == [
        max(250 - mask.keys.start, 0) if mask.keys.stop > 250 else 0 for mask in masks
    ]
    assert 0 < sum(mask.columns > 0 for mask in masks) < len(masks) / 2
    assert not any(mask.columns for mask in masks_of_a_call(case, torch.zeros(1, 600).long()))
    assert not any(mask.columns for mask in masks_of_a_call(case, None))


@pytest.mark.parametrize("queries", [3, 100])
def test_first_keys_that_hide_nothing_change_no_bit(queries: int) -> None:
    case = Case(2, queries, queries + 50, 6, 2, 4, 16)
    query, key, value, _ = tensors = case.draw(torch.float32)
    # the window hides the keys before: for a few queries, the caller drops most of them
    first_keys = torch.arange(35, queries + 35).expand(2, -1)
    for firsts in (first_keys, torch.zeros_like(first_keys)):
        plain = values_and_gradients(tensors, window=16)
        given_firsts = values_and_gradients(tensors, window=16, first_keys=firsts)
        assert all(torch.equal(x, y) for x, y in zip(given_firsts, plain, strict=True))
        plain = sliding_window_attention(query, key, value, window=16)
        assert torch.equal(
            sliding_window_attention(query, key, value, window=16, first_keys=firsts), plain
        )


def test_no_first_keys_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plan, banded):
        monkeypatch.setattr(module, "hidden_keys", None)
    for queries in (3, 100):
        query, key, value, _ = tensors = Case(2, queries, 150, 6, 2, 4, 16).draw()
        values_and_gradients(tensors, window=16)
        sliding_window_attention(query, key, value, window=16)
