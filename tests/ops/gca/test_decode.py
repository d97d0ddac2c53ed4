"""A few queries over a memory that holds what they retrieve, in order: read where it lies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drt.ops.gca import blocked, grouped_cross_attention
from drt.testing import assert_within_budget

both_softmaxes = pytest.mark.parametrize("softmax_plus_one", [False, True])

# As in test_agreement: float64 results that differ by more did not come from rounding.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}

SIZES = {
    "decoding": {"B": 1, "C": 1, "Q": 1, "K": 8, "S": 32, "H": 4, "G": 2, "D": 24},
    "five-rows": {"B": 1, "C": 5, "Q": 1, "K": 8, "S": 16, "H": 12, "G": 12, "D": 16},
    "four-queries": {"B": 1, "C": 3, "Q": 4, "K": 3, "S": 7, "H": 3, "G": 1},
    "two-memories": {"B": 2, "C": 3, "Q": 2, "K": 2, "S": 6, "H": 6, "G": 2},
    "one-token-chunks": {"B": 1, "C": 2, "Q": 3, "K": 4, "S": 1},
}
all_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def in_order(make_case: Callable, *, ragged: bool = False, seed: int = 0, **sizes: int) -> Any:
    """A case whose chunks of queries retrieved all of their memory, one after the other."""
    count, topk = sizes["C"], sizes["K"]
    case = make_case(**sizes, M=count * topk, ragged=ragged, full=True, seed=seed)
    indices = torch.arange(count * topk).view(count, topk).expand_as(case.indices)
    lengths = case.key_lengths.clamp(min=1) if ragged else None
    return case._replace(indices=indices, key_lengths=lengths)


@pytest.fixture
def in_place_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other way through the blocked backend fails."""
    monkeypatch.setattr(blocked, "_Blocked", None)


@pytest.fixture
def in_place_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "attend_in_order", None)


@pytest.mark.usefixtures("in_place_only")
@all_sizes
@both_softmaxes
@pytest.mark.parametrize("ragged", [False, True])
def test_float64_agrees_with_the_reference(
    make_case: Callable, sizes: dict[str, int], softmax_plus_one: bool, ragged: bool
) -> None:
    case = in_order(make_case, **sizes, ragged=ragged)
    options = {"softmax_plus_one": softmax_plus_one, "scale": 0.7}
    with torch.no_grad():
        actual = case.run(grouped_cross_attention, backend="blocked", **options)
        expected = case.run(grouped_cross_attention, backend="reference", **options)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, **FLOAT64)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(make_case: Callable, data: st.DataObject) -> None:
    size, kv_heads = st.integers(1, 5), data.draw(st.integers(1, 3))
    sizes = {name: data.draw(size) for name in "BCQDSK"}
    sizes |= {"G": kv_heads, "H": kv_heads * data.draw(st.integers(1, 3))}
    case = in_order(make_case, **sizes, ragged=data.draw(st.booleans()))
    options = {"softmax_plus_one": data.draw(st.booleans())}
    with torch.no_grad():
        actual = case.run(grouped_cross_attention, backend="blocked", **options)
        expected = case.run(grouped_cross_attention, backend="reference", **options)
    torch.testing.assert_close(actual, expected, **FLOAT64)


@pytest.mark.usefixtures("in_place_only")
@all_sizes
@both_softmaxes
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_stay_within_budget(
    make_case: Callable,
    plain_operator: Callable,
    dtype: torch.dtype,
    sizes: dict[str, int],
    softmax_plus_one: bool,
    ragged: bool,
) -> None:
    options = {"softmax_plus_one": softmax_plus_one}
    # Three draws are pooled: the few numbers of one draw may come out exact by luck.
    cases = [in_order(make_case, **sizes, ragged=ragged, seed=seed).to(dtype) for seed in range(3)]

    def pooled(operator: Callable, to: torch.dtype, **backend: str) -> Tensor:
        draws = [case.to(to).run(operator, **options, **backend) for case in cases]
        return torch.stack(draws)

    with torch.no_grad():
        actual = pooled(grouped_cross_attention, dtype, backend="blocked")
        # The truth starts from the same rounded inputs, so that only the computation differs.
        truth, baseline = pooled(plain_operator, torch.float64), pooled(plain_operator, dtype)
    assert actual.dtype == dtype
    assert_within_budget(actual, truth, baseline=baseline, name="output")


@pytest.mark.usefixtures("in_place_only")
@both_softmaxes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e38])
def test_tokens_past_the_end_of_a_chunk_are_not_read(
    make_case: Callable, softmax_plus_one: bool, dtype: torch.dtype, filler: float
) -> None:
    case = in_order(make_case, **SIZES["two-memories"], ragged=True).to(dtype)
    options = {"softmax_plus_one": softmax_plus_one, "backend": "blocked"}
    past = torch.arange(case.key.shape[2]) >= case.key_lengths[..., None]
    assert past.any()
    with torch.no_grad():
        clean = case.run(grouped_cross_attention, **options)
        case.key[past], case.value[past] = filler, filler
        # The same operations on the same numbers: bit for bit.
        assert torch.equal(case.run(grouped_cross_attention, **options), clean)


def without_a_slot(case: Any) -> Any:
    indices = case.indices.clone()
    indices[0, 1, 0] = -1
    return case._replace(indices=indices)


def without_tokens(case: Any) -> Any:
    lengths = torch.full(case.key.shape[:2], case.key.shape[2])
    lengths[0, 2] = 0
    return case._replace(key_lengths=lengths)


def reordered(case: Any) -> Any:
    return case._replace(indices=case.indices.flip(-1))


def with_other_chunks(case: Any) -> Any:
    key, value = (torch.cat([x.transpose(2, 3)] * 2, 1) for x in (case.key, case.value))
    return case._replace(key=key.transpose(2, 3), value=value.transpose(2, 3))


def token_major(case: Any) -> Any:
    return case._replace(value=case.value.contiguous())


def many_queries(case: Any) -> Any:
    return case._replace(query=case.query.repeat(1, 1, 3, 1, 1))


@pytest.mark.usefixtures("in_place_never")
@pytest.mark.parametrize(
    "change",
    [without_a_slot, without_tokens, reordered, with_other_chunks, token_major, many_queries],
)
def test_other_calls_take_the_general_way(make_case: Callable, change: Callable) -> None:
    case = change(in_order(make_case, **SIZES["two-memories"]))
    with torch.no_grad():
        actual = case.run(grouped_cross_attention, backend="blocked")
        expected = case.run(grouped_cross_attention, backend="reference")
    torch.testing.assert_close(actual, expected, **FLOAT64)


@pytest.mark.usefixtures("in_place_never")
@pytest.mark.parametrize("wanted", ["query", "key", "value", "weights"])
def test_gradients_take_the_general_way(make_case: Callable, wanted: str) -> None:
    case = in_order(make_case, **SIZES["two-memories"])
    expected = case.results(grouped_cross_attention, backend="reference")[wanted]
    leaf = getattr(case, wanted)
    case = type(case)(*(x if x is None else x.detach() for x in case))
    case = case._replace(**{wanted: leaf})
    output = case.run(grouped_cross_attention, backend="blocked")
    grad = torch.linspace(-1.0, 1.5, output.numel(), dtype=torch.float64).cos()
    (actual,) = torch.autograd.grad(output, leaf, grad.view(output.shape))
    torch.testing.assert_close(actual, expected, **FLOAT64)


@pytest.mark.usefixtures("in_place_only")
def test_without_leaves_that_want_gradients_grad_mode_does_not_matter(make_case: Callable) -> None:
    case = in_order(make_case, **SIZES["decoding"])
    case = type(case)(*(x if x is None else x.detach() for x in case))
    assert not case.run(grouped_cross_attention, backend="blocked").requires_grad


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, views of given ones aside."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.numel = 0
        self.known = {x.untyped_storage().data_ptr() for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            is_view = result.untyped_storage().data_ptr() in self.known
            self.numel = max(self.numel, 0 if is_view else result.numel())
        return result


@pytest.mark.usefixtures("in_place_only")
@pytest.mark.parametrize("ragged", [False, True])
def test_the_memory_is_not_copied(make_case: Callable, ragged: bool) -> None:
    case = in_order(make_case, **SIZES["five-rows"], ragged=ragged)
    with torch.no_grad(), LargestResult(case.key, case.value) as mode:
        case.run(grouped_cross_attention, backend="blocked")
    # S = D = 16 numbers per slot and head, of S * D in the memory, or a few more
    assert 0 < mode.numel <= case.key.numel() / 15


@pytest.mark.usefixtures("in_place_only")
def test_autocast_does_not_reach_inside(make_case: Callable) -> None:
    case = in_order(make_case, **SIZES["decoding"]).to(torch.float32)
    with torch.no_grad():
        expected = case.run(grouped_cross_attention, backend="blocked")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = case.run(grouped_cross_attention, backend="blocked")
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("empty", ["B", "Q", "S"])
def test_empty_dimensions(make_case: Callable, empty: str) -> None:
    case = in_order(make_case, **{**SIZES["two-memories"], empty: 0})
    with torch.no_grad():
        output = case.run(grouped_cross_attention, backend="blocked")
    assert output.shape == case.query.shape
    assert not output.any()


@pytest.mark.usefixtures("in_place_only")
def test_strides_of_the_other_tensors_do_not_matter(make_case: Callable) -> None:
    case = in_order(make_case, **SIZES["two-memories"], ragged=True)

    def strided(x: Tensor) -> Tensor:
        return x.detach().transpose(0, -1).contiguous().transpose(0, -1)

    moved = case._replace(
        query=strided(case.query),
        indices=strided(case.indices),
        weights=strided(case.weights),
        key_lengths=strided(case.key_lengths),
    )
    with torch.no_grad():
        expected = case.run(grouped_cross_attention, backend="blocked")
        assert torch.equal(moved.run(grouped_cross_attention, backend="blocked"), expected)
