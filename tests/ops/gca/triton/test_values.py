"""The kernels against the definition in float64: the output and every gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drt.ops.gca import grouped_cross_attention, invert_indices
from drt.testing import relative_error

SIZES = {
    "one-token-chunks": {"S": 1, "K": 5, "D": 16, "Q": 1, "B": 1},
    "odd": {"S": 7, "K": 3, "D": 20, "Q": 33, "H": 6, "G": 2, "B": 1},
    "model": {"S": 64, "K": 3, "D": 64, "Q": 65, "H": 3, "G": 1, "M": 4, "B": 1, "C": 2},
    "two-rows": {"S": 17, "K": 2, "D": 32, "Q": 18, "H": 4, "G": 4},
    "long-chunks": {"S": 130, "K": 2, "D": 16, "Q": 20, "H": 2, "G": 2, "B": 1, "C": 2},
    "split-backward": {"S": 100, "K": 2, "D": 24, "Q": 9, "H": 2, "G": 1, "B": 1, "C": 2},
    "wide-heads": {"S": 9, "K": 2, "D": 256, "Q": 4, "H": 2, "G": 1, "B": 1, "C": 2},
    "decoding": {"S": 64, "K": 4, "D": 64, "Q": 1, "C": 1, "H": 4, "G": 2, "B": 1},
}


def assert_agrees(
    case: Any, plain: Callable, dtype: torch.dtype, device: str, **options: bool
) -> None:
    """Every result is about as near to the truth as the plain computation in that dtype."""
    small = case.to(dtype, device)
    # The truth starts from the same rounded inputs, so that only the computation differs.
    truth = case.to(dtype).to(torch.float64).results(plain, **options)
    baseline = case.to(dtype).results(plain, **options)
    actual = small.results(grouped_cross_attention, backend="triton", **options)
    # Scores and sums are float32, of up to a few hundred numbers each, in an order of their own; a
    # plain computation over the few numbers of a small case may be lucky. The gradient of a weight
    # is a dot product: where its terms cancel, and it is the only one, 7 eps of it were seen.
    floor = 16 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    for name, expected in truth.items():
        assert actual[name].dtype == baseline[name].dtype
        budget = floor + 3 * relative_error(baseline[name], expected)
        assert relative_error(actual[name].cpu(), expected) <= budget, name


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_agrees_with_the_definition(
    make_case: Callable,
    plain_operator: Callable,
    device: str,
    dtype: torch.dtype,
    sizes: dict[str, int],
    ragged: bool,
) -> None:
    case = make_case(**sizes, ragged=ragged)
    assert_agrees(case, plain_operator, dtype, device, softmax_plus_one=ragged)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_softmax_with_and_without_plus_one(
    make_case: Callable, plain_operator: Callable, device: str, ragged: bool
) -> None:
    case = make_case(ragged=ragged)
    assert_agrees(case, plain_operator, torch.float32, device, softmax_plus_one=not ragged)


@settings(max_examples=8)
@given(data=st.data())
def test_agrees_on_any_shape(make_case: Callable, device: str, data: st.DataObject) -> None:
    size = st.integers(1, 3)
    kv_heads = data.draw(st.integers(1, 2))
    case = make_case(
        data.draw(st.integers(1, 2)),
        data.draw(size),
        data.draw(st.integers(1, 20)),
        kv_heads * data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 20)),
        data.draw(size),
        data.draw(st.integers(1, 20)),
        kv_heads,
        data.draw(size),
        ragged=data.draw(st.booleans()),
        full=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    options = {"softmax_plus_one": data.draw(st.booleans())}
    # Unlike the plain computation it takes calls in which nothing was retrieved.
    reference = partial(grouped_cross_attention, backend="reference")
    assert_agrees(case, reference, torch.float32, device, **options)


def test_a_chunk_that_everybody_retrieves(
    make_case: Callable, plain_operator: Callable, device: str
) -> None:
    """Its list is cut into segments, whose sums are added up."""
    case = make_case(B=2, C=36, Q=1, H=1, G=1, S=3, D=4, K=2, M=3, full=True)
    indices = case.indices.clone()
    indices[:, :, 0] = 1
    case = case._replace(indices=indices)
    assert_agrees(case, plain_operator, torch.float32, device, softmax_plus_one=True)


@pytest.mark.parametrize("ragged", [False, True])
def test_no_indices_stand_for_chunks_in_order(
    make_case: Callable, device: str, ragged: bool
) -> None:
    case = make_case(C=3, K=2, M=6, full=True, ragged=ragged).to(torch.float32, device)
    order = torch.arange(6, device=device).view(1, 3, 2).expand(2, 3, 2)
    options = {"backend": "triton", "softmax_plus_one": True}
    expected = case._replace(indices=order).results(grouped_cross_attention, **options)
    actual = case._replace(indices=None).results(grouped_cross_attention, **options)
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


def test_a_given_inverse_changes_nothing(make_case: Callable, device: str) -> None:
    case = make_case().to(torch.float32, device)
    inverse = invert_indices(case.indices, case.key.shape[1])
    expected = case.results(grouped_cross_attention, backend="triton")
    actual = case.results(grouped_cross_attention, backend="triton", inverse=inverse)
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


def test_two_runs_give_the_same_bits(make_case: Callable, device: str) -> None:
    case = make_case(B=1, C=12, M=1, Q=1, H=1, G=1).to(torch.float16, device)
    first = case.results(grouped_cross_attention, backend="triton")
    second = case.results(grouped_cross_attention, backend="triton")
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_what_is_unused_may_hold_anything(make_case: Callable, device: str) -> None:
    """NaN past the end of a chunk, in chunks of length 0 and in weights of unused slots."""
    case = make_case(ragged=True, seed=3).to(torch.float32, device)
    expected = case.results(grouped_cross_attention, backend="triton", softmax_plus_one=True)
    assert case.key_lengths is not None
    tokens = torch.arange(case.key.shape[2], device=device)
    hidden = (tokens >= case.key_lengths[..., None])[..., None, None]
    row = torch.arange(2, device=device)[:, None, None]
    unused = (case.indices < 0) | (case.key_lengths[row, case.indices] == 0)
    spoiled = case._replace(
        key=case.key.detach().masked_fill(hidden, float("nan")).requires_grad_(),
        value=case.value.detach().masked_fill(hidden, float("nan")).requires_grad_(),
        weights=case.weights.detach().masked_fill(unused, float("nan")).requires_grad_(),
    )
    assert unused.any()
    actual = spoiled.results(grouped_cross_attention, backend="triton", softmax_plus_one=True)
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name
    assert not actual["weights"][unused].any()


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, no two of them next to each other, dimensions stored in reverse."""
    reverse = tuple(range(tensor.ndim))[::-1]
    buffer = tensor.detach().permute(reverse).contiguous().repeat_interleave(2, -1)
    return buffer[..., ::2].permute(reverse)


def test_strides_do_not_matter(make_case: Callable, device: str) -> None:
    case = make_case(ragged=True).to(torch.float32, device)
    expected = case.results(grouped_cross_attention, backend="triton")
    moved = {name: strided(getattr(case, name)) for name in ("query", "key", "value", "weights")}
    case = case._replace(
        **{name: tensor.requires_grad_() for name, tensor in moved.items()},
        indices=strided(case.indices),
        key_lengths=strided(case.key_lengths),
    )
    actual = case.results(grouped_cross_attention, backend="triton")
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("wanted", ["query", "key", "value", "weights"])
def test_one_gradient_alone(make_case: Callable, device: str, wanted: str) -> None:
    case = make_case().to(torch.float32, device)
    expected = case.results(grouped_cross_attention, backend="triton")
    alone = case._replace(
        **{
            name: getattr(case, name).detach()
            for name in ("query", "key", "value", "weights")
            if name != wanted
        }
    )
    output = alone.run(grouped_cross_attention, backend="triton")
    grad = torch.linspace(-1.0, 1.5, output.numel(), dtype=torch.float64).cos()
    grad = grad.view(output.shape).to(output)
    (result,) = torch.autograd.grad(output, [getattr(alone, wanted)], grad)
    assert torch.equal(result, expected[wanted])
