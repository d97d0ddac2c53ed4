"""All backends on a CUDA device: values, gradients, compilation, and what the default chooses."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from drt.ops.window import BACKENDS, sliding_window_attention
from drt.ops.window.call import Call
from drt.testing import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    # FlexAttention compiles each kind of call, and PyTorch limits how often.
    torch._dynamo.reset()


class Case(NamedTuple):
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    window: int

    def draw(self, dtype: torch.dtype) -> list[Tensor]:
        """Query, key, value and a gradient of the output, all exact in `dtype`."""
        generator = torch.Generator().manual_seed(hash(self))
        query = (self.batch, self.queries, self.heads, self.width)
        key = (self.batch, self.keys, self.kv_heads, self.width)
        return [
            torch.randn(shape, generator=generator).to("cuda", dtype)
            for shape in (query, key, key, query)
        ]

    def options(self, *, alibi: bool, documents: bool) -> dict[str, Any]:
        """Window, slopes, and first keys of documents of 100 positions behind 7 unused places."""
        slopes = torch.logspace(-6, 0, self.heads, base=2.0, device="cuda")
        own = torch.arange(self.keys - self.queries, self.keys, device="cuda")
        firsts = (own // 100 * 100).clamp(min=7).expand(self.batch, -1)
        return {
            "window": self.window,
            "alibi_slopes": slopes if alibi else None,
            "first_keys": firsts if documents else None,
        }


CASES = [
    Case(2, 512, 512, 4, 4, 64, 128),
    Case(2, 300, 427, 8, 2, 128, 128),
    Case(1, 1000, 1511, 12, 12, 64, 512),
    Case(3, 257, 257, 6, 1, 32, 10**6),
    Case(2, 130, 300, 4, 2, 64, 1),
]


def attend_eagerly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    alibi_slopes: Tensor | None,
    first_keys: Tensor | None,
) -> Tensor:
    """Dense attention with every step in the dtype of the inputs, as a model without kernels."""
    ratio = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(ratio, dim=2) for x in (key, value))
    scores = torch.einsum("bthd,bnhd->bhtn", query, key) * query.shape[-1] ** -0.5
    position = torch.arange(key.shape[1], device="cuda")
    own = position[-query.shape[1] :]
    distance = own[:, None] - position
    if alibi_slopes is not None:
        scores = scores - (alibi_slopes[:, None, None] * distance).to(scores.dtype)
    hidden = (distance < 0) | (distance >= window)
    if first_keys is not None:
        hidden = hidden | (position < torch.minimum(first_keys, own)[:, None, :, None])
    probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhtn,bnhd->bthd", probs, value)


def values_and_gradients(attend: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    *leaves, grad = (x.detach() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = attend(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def skip_if_unavailable(backend: str, tensors: list[Tensor], options: dict[str, Any]) -> None:
    query = tensors[0].detach().requires_grad_()
    call = Call(query, *tensors[1:3], scale=1.0, **options)
    reason = BACKENDS[backend].unavailable(call)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def assert_close_to_float64(
    actual: list[Tensor], tensors: list[Tensor], options: dict[str, Any]
) -> None:
    exact = values_and_gradients(
        sliding_window_attention, [x.double() for x in tensors], backend="reference", **options
    )
    eager = values_and_gradients(attend_eagerly, tensors, **options)
    for name, *three in zip(("out", "dq", "dk", "dv"), actual, exact, eager, strict=True):
        result, truth, baseline = three
        assert result.dtype == tensors[0].dtype
        # Fused kernels round less than eager steps; twice leaves room for another order of sums.
        assert_within_budget(result, truth, baseline=baseline, factor=2.0, name=name)


backends = pytest.mark.parametrize("backend", ["banded", "flex", "varlen", None])
cases = pytest.mark.parametrize("case", CASES, ids=str)


@backends
@cases
@pytest.mark.parametrize(
    ("alibi", "documents"), [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_and_gradients(
    backend: str | None, case: Case, dtype: torch.dtype, alibi: bool, documents: bool
) -> None:
    tensors = case.draw(dtype)
    options = case.options(alibi=alibi, documents=documents)
    if backend is not None:
        skip_if_unavailable(backend, tensors, options)
    actual = values_and_gradients(sliding_window_attention, tensors, backend=backend, **options)
    assert_close_to_float64(actual, tensors, options)
    with torch.no_grad():
        again = sliding_window_attention(*tensors[:3], backend=backend, **options)
    assert again.is_contiguous()
    truth = sliding_window_attention(
        *(x.double() for x in tensors[:3]), backend="reference", **options
    )
    baseline = attend_eagerly(*tensors[:3], **options)
    # as above
    assert_within_budget(again, truth, baseline=baseline, factor=2.0, name="without gradient")


@backends
@pytest.mark.parametrize("queries", [1, 2, 4, 5, 33])
def test_a_few_queries_over_a_cache(backend: str | None, queries: int) -> None:
    case = Case(2, queries, queries + 511, 8, 2, 64, 512)
    tensors = case.draw(torch.bfloat16)[:3]
    # caches are head-major
    tensors[1:] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[1:]]
    options = case.options(alibi=False, documents=False)
    with torch.no_grad():
        actual = sliding_window_attention(*tensors, backend=backend, **options)
        truth = sliding_window_attention(
            *(x.double() for x in tensors), backend="reference", **options
        )
        baseline = attend_eagerly(*tensors, **options)
    # as above
    assert_within_budget(actual, truth, baseline=baseline, factor=2.0)


@pytest.mark.parametrize("backend", ["banded", "flex"])
def test_unused_places_reach_neither_values_nor_gradients(backend: str) -> None:
    case = Case(2, 300, 350, 4, 2, 64, 512)
    tensors = case.draw(torch.bfloat16)
    # products with the largest numbers overflow
    tensors[1][1, :40] = tensors[2][1, :40] = torch.finfo(torch.bfloat16).max
    first_keys = torch.tensor([[0], [40]], device="cuda").expand(-1, 300)
    results = values_and_gradients(
        sliding_window_attention, tensors, window=512, first_keys=first_keys, backend=backend
    )
    for found in results:
        assert found.isfinite().all()
    for grad in results[2:]:
        assert not grad[1, :40].any()


@backends
@pytest.mark.parametrize("alibi", [False, True])
def test_inductor_compiles_the_whole_call(backend: str | None, alibi: bool) -> None:
    case = CASES[0]
    tensors = case.draw(torch.bfloat16)
    options = case.options(alibi=alibi, documents=False)
    if backend is not None:
        skip_if_unavailable(backend, tensors, options)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sliding_window_attention(query, key, value, backend=backend, **options)

    compiled = torch.compile(attend, fullgraph=True)
    assert_close_to_float64(values_and_gradients(compiled, tensors), tensors, options)


@pytest.mark.parametrize("backend", ["banded", "flex", "varlen"])
def test_the_host_never_waits(backend: str) -> None:
    case = Case(2, 512, 512, 4, 2, 64, 128)
    tensors = case.draw(torch.bfloat16)
    options = case.options(alibi=False, documents=backend != "varlen")
    values_and_gradients(sliding_window_attention, tensors, backend=backend, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values_and_gradients(sliding_window_attention, tensors, backend=backend, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
