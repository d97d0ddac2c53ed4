"""The flex backend on the CPU: its masks, its bias and its blocks against the definition.

Uncompiled, FlexAttention computes with all T x N scores, in the precision of float64 inputs; what
its compiled kernels do on a GPU is in `test_gpu.py`.
"""

import shutil
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from drt.ops.window import flex, sliding_window_attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    # Uncompiled, FlexAttention still traces: a graph for each kind of shapes.
    torch._dynamo.reset()


class Case(NamedTuple):
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    window: int

    def draw(self, dtype: torch.dtype = torch.float64, width: int = 8) -> list[Tensor]:
        """Query, key and value."""
        generator = torch.Generator().manual_seed(hash(self))
        query = (self.batch, self.queries, self.heads, width)
        key = (self.batch, self.keys, self.kv_heads, width)
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in (query, key, key)
        ]

    def first_keys(self, kind: str) -> Tensor | None:
        """(B, T): none, one per row, rising along each row, or any."""
        generator = torch.Generator().manual_seed(1 + hash(self))
        if kind == "none":
            return None
        if kind == "rows":
            firsts = torch.randint(self.keys, (self.batch, 1), generator=generator)
            return firsts.expand(-1, self.queries)
        firsts = torch.randint(self.keys, (self.batch, self.queries), generator=generator)
        return firsts.sort(-1).values if kind == "rising" else firsts

    def seen(self, first_keys: Tensor | None) -> Tensor:
        """(B or 1, T, N): whom each query sees, from the definition."""
        position = torch.arange(self.keys)
        own = position[self.keys - self.queries :, None]
        seen = (position <= own) & (position > own - self.window)
        if first_keys is None:
            return seen[None]
        return seen & (position >= torch.minimum(first_keys[..., None], own))


CASES = [
    Case(2, 128, 128, 2, 2, 64),
    Case(2, 300, 300, 4, 2, 64),
    Case(3, 257, 300, 6, 2, 33),
    Case(1, 384, 896, 2, 1, 300),
    Case(2, 130, 150, 3, 1, 10**9),
    Case(2, 5, 134, 4, 4, 130),
    Case(2, 1, 20, 6, 2, 20),
    Case(1, 70, 70, 3, 3, 1),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
kinds = pytest.mark.parametrize("kind", ["none", "rows", "rising", "any"])
with_alibi = pytest.mark.parametrize("alibi", [False, True])


def options_of(case: Case, *, kind: str, alibi: bool) -> dict[str, Any]:
    slopes = torch.logspace(-3, 0, case.heads, base=2.0, dtype=torch.float64)
    return {
        "window": case.window,
        "first_keys": case.first_keys(kind),
        "alibi_slopes": slopes if alibi else None,
    }


@cases
@kinds
@with_alibi
def test_flex_equals_reference(case: Case, kind: str, alibi: bool) -> None:
    tensors, options = case.draw(), options_of(case, kind=kind, alibi=alibi)
    actual, expected = (
        sliding_window_attention(*tensors, backend=backend, **options)
        for backend in ("flex", "reference")
    )
    assert actual.is_contiguous()
    # both are float64: sums of some hundred terms of order 1 in another order
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def blocks_of(listed: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """(B, 1, rows) counts and (B, 1, rows, columns) columns to (B, rows, columns) bool."""
    counts, columns = listed
    assert counts is not None
    assert columns is not None
    blocks = torch.zeros(columns.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in counts.shape)).tolist():
        blocks[(*place, columns[(*place,)][: counts[tuple(place)]].long())] = True
    return blocks[:, 0]


@cases
@kinds
def test_blocks_are_those_in_which_something_is_seen(case: Case, kind: str) -> None:
    own = torch.arange(case.keys - case.queries, case.keys)
    first_keys = case.first_keys(kind)
    if first_keys is not None:
        first_keys = torch.minimum(first_keys, own)
    mask = flex.window_block_mask(
        *case[1:3], case.window, first_keys=first_keys, device=torch.device("cpu")
    )
    seen = case.seen(first_keys)
    rows, columns = (-(-size // 128) for size in case[1:3])
    padded = torch.zeros(seen.shape[0], rows * 128, columns * 128, dtype=torch.bool)
    padded[:, : case.queries, : case.keys] = seen
    blocks = padded.unflatten(2, (columns, 128)).unflatten(1, (rows, 128))
    some, all_seen = blocks.any(4).any(2), blocks.all(4).all(2)
    partial = blocks_of((mask.kv_num_blocks, mask.kv_indices))
    whole = blocks_of((mask.full_kv_num_blocks, mask.full_kv_indices))
    assert torch.equal(whole, all_seen)
    assert torch.equal(partial, some & ~all_seen)
    # the backward reads the same blocks by keys
    assert torch.equal(blocks_of((mask.q_num_blocks, mask.q_indices)), partial.mT)
    assert torch.equal(blocks_of((mask.full_q_num_blocks, mask.full_q_indices)), whole.mT)
    assert tuple(mask.shape) == (seen.shape[0], 1, case.queries, case.keys)


def test_some_case_has_whole_blocks() -> None:
    case = Case(1, 384, 896, 2, 1, 300)
    mask = flex.window_block_mask(384, 896, 300, first_keys=None, device=torch.device("cpu"))
    assert mask.full_kv_num_blocks is not None
    assert case in CASES
    assert mask.full_kv_num_blocks.sum() > 0


def test_a_block_mask_is_made_once_for_its_sizes() -> None:
    flex._kept_block_mask.cache_clear()
    query = torch.zeros(1, 200, 2, 8)
    with torch.inference_mode():
        kept = flex._block_mask(query, 200, 64, None)
    assert flex._block_mask(query[:, :, :1], 200, 64, None) is kept
    assert flex._block_mask(query, 200, 65, None) is not kept
    assert flex._block_mask(query, 210, 64, None) is not kept
    # tensors made in inference mode could not be saved for a backward
    assert not kept.kv_indices.is_inference()
    first_keys = torch.zeros(1, 200, dtype=torch.int64)
    assert flex._block_mask(query, 200, 64, first_keys).mask_mod is not kept.mask_mod


@pytest.mark.parametrize("queries", [1, 90])
def test_a_row_after_unused_places_equals_the_row_alone(queries: int) -> None:
    """Whatever finite numbers are there: products with the largest ones overflow."""
    unused = [0, 10, 25]
    case = Case(3, queries, queries + 25, 6, 2, 200)
    query, key, value = case.draw()
    for row, count in enumerate(unused):
        key[row, :count] = value[row, :count] = torch.finfo(torch.float64).max
    first_keys = torch.tensor(unused)[:, None].expand(-1, queries)
    together = sliding_window_attention(
        query, key, value, window=200, first_keys=first_keys, backend="flex"
    )
    for row, count in enumerate(unused):
        rows = slice(row, row + 1)
        alone = sliding_window_attention(
            query[rows], key[rows, count:], value[rows, count:], window=200, backend="reference"
        )
        # both are float64: sums of some hundred terms of order 1 in another order
        torch.testing.assert_close(together[rows], alone, rtol=1e-12, atol=1e-12)


def test_leaves_that_require_a_gradient_are_served_where_none_is_wanted() -> None:
    tensors = [x.requires_grad_() for x in CASES[1].draw()]
    with torch.no_grad():
        actual, expected = (
            sliding_window_attention(*tensors, window=64, backend=backend)
            for backend in ("flex", "reference")
        )
    # both are float64: sums of some ten terms of order 1 in another order
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_autocast_leaves_float32_in_float32() -> None:
    tensors = CASES[1].draw(torch.float32)
    expected = sliding_window_attention(*tensors, window=64, backend="flex")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = sliding_window_attention(*tensors, window=64, backend="flex")
    assert torch.equal(actual, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
@pytest.mark.parametrize(("kind", "alibi"), [("none", False), ("any", True)])
def test_one_compilation_serves_all_lengths(
    monkeypatch: pytest.MonkeyPatch, kind: str, alibi: bool
) -> None:
    """What runs on CUDA, with the code that the compiler makes for the CPU."""
    monkeypatch.setattr(flex, "_flex_attention", lambda device_type: flex._compiled())
    torch._dynamo.utils.counters.clear()
    sizes = [(256, 256), (300, 300), (300, 363), (520, 583), (257, 257), (400, 430)]
    for queries, keys in sizes:
        case = Case(2, queries, keys, 4, 2, 64)
        tensors = case.draw(torch.float32, width=16)
        options = options_of(case, kind=kind, alibi=alibi)
        actual = sliding_window_attention(*tensors, backend="flex", **options)
        expected = sliding_window_attention(*tensors, backend="reference", **options)
        # float32 sums of at most 64 terms of order 1 in another order
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # one for the first sizes, one for all others
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
