"""Gradients: against finite differences, in part, and only once."""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch.autograd import gradcheck

from drt.ops.gca import grouped_cross_attention

both_backends = pytest.mark.parametrize("backend", ["reference", "blocked"])
both_softmaxes = pytest.mark.parametrize("softmax_plus_one", [False, True])


@both_backends
@both_softmaxes
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (4, 2), (3, 1)])
def test_gradcheck(
    make_case: Callable,
    backend: str,
    softmax_plus_one: bool,
    ragged: bool,
    heads: int,
    kv_heads: int,
) -> None:
    # M = 3 < K: a chunk of queries retrieves some chunk twice.
    case = make_case(2, 3, 2, heads, 2, M=3, S=3, G=kv_heads, K=4, ragged=ragged)

    def operator(*tensors: torch.Tensor) -> torch.Tensor:
        query, key, value, weights = tensors
        return grouped_cross_attention(
            query,
            key,
            value,
            case.indices,
            weights,
            key_lengths=case.key_lengths,
            softmax_plus_one=softmax_plus_one,
            backend=backend,
        )

    # torch's own tolerances for float64 (atol 1e-5, rtol 1e-3 at eps 1e-6).
    assert gradcheck(operator, (case.query, case.key, case.value, case.weights))


NAMES = ("query", "key", "value", "weights")


@pytest.mark.parametrize(
    "wanted", [names for count in range(1, 5) for names in combinations(NAMES, count)], ids="+".join
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_do_not_depend_on_which_are_wanted(
    make_case: Callable, wanted: tuple[str, ...], dtype: torch.dtype
) -> None:
    case = make_case(ragged=True).to(dtype)
    everything = case.results(grouped_cross_attention, backend="blocked", softmax_plus_one=True)
    for name in NAMES:
        getattr(case, name).requires_grad_(name in wanted)
    output = case.run(grouped_cross_attention, backend="blocked", softmax_plus_one=True)
    grad = torch.linspace(-1.0, 1.5, output.numel(), dtype=torch.float64).cos()
    inputs = [getattr(case, name) for name in wanted]
    grads = torch.autograd.grad(output, inputs, grad.view(output.shape).to(dtype))
    for name, found in zip(wanted, grads, strict=True):
        # The same operations on the same numbers.
        assert torch.equal(found, everything[name]), name


def test_no_gradient_wanted(make_case: Callable) -> None:
    case = make_case()
    detached = case._replace(**{name: getattr(case, name).detach() for name in NAMES})
    output = detached.run(grouped_cross_attention)
    assert not output.requires_grad
    assert torch.equal(output, case.run(grouped_cross_attention))


def test_second_derivatives_are_refused(make_case: Callable) -> None:
    case = make_case()
    output = case.run(grouped_cross_attention, backend="blocked")
    (grad,) = torch.autograd.grad(output.square().sum(), case.query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_inputs_are_kept_for_backward(make_case: Callable) -> None:
    case = make_case(ragged=True)
    inputs = {tensor.data_ptr() for tensor in case if tensor is not None}
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.run(grouped_cross_attention, backend="blocked")
    assert kept
    assert set(kept) <= inputs


def test_weights_keep_their_dtype(make_case: Callable) -> None:
    case = make_case().to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        weights = case.weights.detach().to(dtype).requires_grad_()
        output = case._replace(weights=weights).run(grouped_cross_attention)
        output.float().sum().backward()
        assert output.dtype == torch.bfloat16
        assert weights.grad is not None
        assert weights.grad.dtype == dtype
