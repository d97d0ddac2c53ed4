"""The kernels as PyTorch operators: registered, compiled, and in 64 bits."""

import mmap
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from drt.ops.gca import grouped_cross_attention, invert_indices


def operator_arguments(case: Any, *, inverse: bool) -> tuple:
    lists = list(invert_indices(case.indices, case.key.shape[1])) if inverse else []
    return (*case[:5], case.key_lengths, lists, 0.5, True)


@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck(make_case: Callable, device: str, inverse: bool) -> None:
    from drt.ops.gca.triton.operator import attend

    case = make_case(1, 2, 2, 2, 4, 3, 3, 1, 2, ragged=True).to(torch.float32, device)
    torch.library.opcheck(attend, operator_arguments(case, inverse=inverse))


def test_opcheck_of_the_backward(make_case: Callable, device: str) -> None:
    from drt.ops.gca.triton.operator import attend_backward

    case = make_case(1, 2, 2, 2, 4, 3, 3, 1, 2).to(torch.float32, device)
    detached = [
        None if x is None else x.detach() for x in operator_arguments(case, inverse=False)[:6]
    ]
    grad = torch.ones_like(detached[0])
    for memory in (False, True):
        torch.library.opcheck(attend_backward, (grad, *detached, [], 0.5, True, memory))


@pytest.mark.parametrize("ragged", [False, True])
def test_compiles_as_one_graph(make_case: Callable, device: str, ragged: bool) -> None:
    case = make_case(B=1, ragged=ragged).to(torch.float32, device)
    compiled = torch.compile(grouped_cross_attention, fullgraph=True, backend="aot_eager")
    expected = case.results(grouped_cross_attention, backend="triton")
    actual = case.results(compiled, backend="triton")
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


def test_a_second_derivative_is_refused(make_case: Callable, device: str) -> None:
    case = make_case(B=1).to(torch.float32, device)
    output = case.run(grouped_cross_attention, backend="triton")
    (grad,) = torch.autograd.grad(output.square().sum(), case.query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|derivative|autograd"):
        torch.autograd.grad(grad.sum(), case.query)


def test_no_gathered_copy_exists(make_case: Callable, device: str, largest_tensor: Any) -> None:
    """With K = 8 a gathered copy of the keys would have 8 times the numbers of the query."""
    case = make_case(B=1, C=4, Q=8, H=2, G=2, S=8, D=16, K=8, M=4, full=True)
    case = case.to(torch.float32, device)
    with largest_tensor:
        case.results(grouped_cross_attention, backend="triton")
    assert case.query.numel() == case.key.numel()
    assert largest_tensor.numel == case.query.numel()


def far_apart(memory: Tensor, stride: int) -> Tensor:
    """The same (1, M, S, G, D) memory in `stride` numbers a chunk, most of them never touched."""
    numbers = stride * memory.shape[1]
    # Linux's MAP_NORESERVE, which Python names from 3.13 on: address space, not memory.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    space = mmap.mmap(-1, numbers * memory.itemsize, flags=flags)
    flat = torch.frombuffer(space, dtype=memory.dtype)
    inner = memory.shape[2:]
    strides = (numbers, stride, inner[1] * inner[2], inner[2], 1)
    far = flat.as_strided(memory.shape, strides)
    return far.copy_(memory)


@pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux", reason="reads Linux's address space"
)
def test_offsets_beyond_32_bits(make_case: Callable) -> None:
    case = make_case(B=1, C=3, M=5, full=True).to(torch.float32)
    expected = case.results(grouped_cross_attention, backend="triton")
    # The last chunk begins at number 2 ** 32.
    moved = {name: far_apart(getattr(case, name).detach(), 2**30) for name in ("key", "value")}
    assert (case.indices >= 3).any()
    far = case._replace(**{name: tensor.requires_grad_() for name, tensor in moved.items()})
    actual = far.results(grouped_cross_attention, backend="triton")
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_queries", [1, 4])
def test_decoding_replays_as_a_cuda_graph(make_case: Callable, num_queries: int) -> None:
    case = make_case(B=1, C=2, Q=num_queries, K=4, M=8, S=64, D=64, full=True)
    case = case.to(torch.bfloat16, "cuda")._replace(indices=None)
    case = case._replace(**{name: getattr(case, name).detach() for name in case._fields[:3]})
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            case.run(grouped_cross_attention, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = case.run(grouped_cross_attention, backend="triton")
    case.query.copy_(torch.randn_like(case.query))
    graph.replay()
    with torch.no_grad():
        expected = case.run(grouped_cross_attention, backend="triton")
    assert torch.equal(output, expected)
