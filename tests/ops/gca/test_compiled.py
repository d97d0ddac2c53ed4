"""The blocked backend inside `torch.compile`: one operator, forward and backward."""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from drt.ops.gca import grouped_cross_attention
from drt.ops.gca.blocked import attend, attend_backward


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(make_case: Callable, ragged: bool) -> None:
    case = make_case(1, 2, 2, 2, 4, 3, 3, 1, 2, ragged=ragged)
    torch.library.opcheck(attend, (*case, 0.5, True))


@pytest.mark.parametrize("in_order", [False, True])
def test_opcheck_of_the_backward(make_case: Callable, in_order: bool) -> None:
    """With each gradient wanted and not, in a memory of either layout."""
    case = make_case(1, 2, 2, 2, 4, 4, 3, 1, 2)
    query, key, value, indices, weights, _ = (x if x is None else x.detach() for x in case)
    grad = torch.ones_like(query)
    indices = None if in_order else indices
    for wants in ([True, False, True, False], [False, True, False, True]):
        arguments = (grad, query, key, value.contiguous(), indices, weights, None, 0.5, True, wants)
        torch.library.opcheck(attend_backward, arguments)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_the_function(
    make_case: Callable, ragged: bool, dtype: torch.dtype
) -> None:
    case = make_case(ragged=ragged).to(dtype)
    compiled = torch.compile(grouped_cross_attention, fullgraph=True, backend="aot_eager")
    expected = case.results(grouped_cross_attention, softmax_plus_one=True)
    for name, result in case.results(compiled, softmax_plus_one=True).items():
        # The same code on the same numbers.
        assert torch.equal(result, expected[name]), name


def test_only_what_is_wanted_is_computed(
    make_case: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drt.ops.gca import blocked

    wanted = []
    backward = blocked._backward

    def note(inputs: tuple, grad: Tensor, wants: list[bool]) -> tuple:
        wanted.append(list(wants))
        return backward(inputs, grad, wants)

    monkeypatch.setattr(blocked, "_backward", note)
    case = make_case()
    case.key.requires_grad_(False)
    case.weights.requires_grad_(False)
    compiled = torch.compile(grouped_cross_attention, fullgraph=True, backend="aot_eager")
    leaves = [case.query, case.value]
    grads = [
        torch.autograd.grad(case.run(call).square().sum(), leaves)
        for call in (grouped_cross_attention, compiled)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    assert wanted == [[True, False, True, False]] * 2


def test_one_graph_serves_memories_of_any_size(make_case: Callable) -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(grouped_cross_attention, fullgraph=True, backend=graphs, dynamic=True)
    # No two sizes of a case are equal: what is equal at first would have to stay so.
    for chunks, memory in ((3, 13), (5, 14), (7, 19)):
        case = make_case(2, chunks, 9, 4, 8, memory, 6, 2, 10, ragged=True).to(torch.float32)
        expected = case.results(grouped_cross_attention)
        actual = case.results(compiled)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert graphs.frame_count == 1


def test_a_second_derivative_is_refused(make_case: Callable) -> None:
    case = make_case()
    compiled = torch.compile(grouped_cross_attention, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(case.run(compiled).square().sum(), case.query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|double backward"):
        torch.autograd.grad(grad.sum(), case.query)
