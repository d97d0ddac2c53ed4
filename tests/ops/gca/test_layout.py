"""Memory layouts: any strides are right, head-major ones are not copied."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from drt.ops.gca import grouped_cross_attention
from drt.ops.gca.slots import head_major_rows

# As in test_agreement: float64 results that differ by more did not come from rounding.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}


def head_major(memory: Tensor) -> Tensor:
    return memory.transpose(2, 3).contiguous().transpose(2, 3)


def token_major(memory: Tensor) -> Tensor:
    return memory.contiguous()


def preallocated(memory: Tensor) -> Tensor:
    """The first chunks of a larger buffer, as a growing memory keeps them."""
    B, M, S, G, D = memory.shape
    buffer = memory.new_full((B, 2 * M, G, S, D), float("nan"))
    buffer[:, :M] = memory.transpose(2, 3)
    return buffer[:, :M].transpose(2, 3)


def packed(memory: Tensor) -> Tensor:
    """Half of the heads of a buffer."""
    doubled = torch.cat([memory.transpose(2, 3)] * 2, dim=2)
    return doubled[:, :, memory.shape[3] :].transpose(2, 3)


def odd_stride(memory: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(memory.transpose(2, 3), (0, 1))
    return padded[..., :-1].transpose(2, 3)


def gapped(memory: Tensor) -> Tensor:
    """Contiguous planes that are not a whole number of planes apart."""
    planes = torch.nn.functional.pad(memory.transpose(2, 3).flatten(3), (0, 1))
    return planes[..., :-1].unflatten(3, (memory.shape[2], -1)).transpose(2, 3)


def chunks_first(memory: Tensor) -> Tensor:
    """Dense, but rows and chunks do not merge."""
    return memory.transpose(0, 1).contiguous().transpose(0, 1)


def assert_gradient_layout(gradient: Tensor, memory: Tensor) -> None:
    dense = gradient if memory.is_contiguous() else gradient.transpose(2, 3)
    assert dense.is_contiguous()


LAYOUTS = [head_major, token_major, preallocated, packed, odd_stride, gapped, chunks_first]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_chunks", [1, 5, 30], ids=["one", "few", "many"])
def test_results_do_not_depend_on_the_layout(
    make_case: Callable, layout: Callable, num_chunks: int
) -> None:
    case = make_case(M=num_chunks, ragged=True)
    expected = case.results(grouped_cross_attention, backend="reference")
    moved = case._replace(
        query=case.query.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_(),
        key=layout(case.key.detach()).requires_grad_(),
        value=layout(case.value.detach()).requires_grad_(),
    )
    actual = moved.results(grouped_cross_attention, backend="blocked")
    torch.testing.assert_close(actual, expected, **FLOAT64)
    for name in ("key", "value"):
        assert_gradient_layout(actual[name], getattr(moved, name))


@pytest.mark.parametrize("layout", [head_major, preallocated, packed])
def test_head_major_memory_is_not_copied(make_case: Callable, layout: Callable) -> None:
    memory = layout(make_case().key.detach())
    batch, chunks = torch.tensor([1, 0]), torch.tensor([[2, 0, 4], [1, 1, 3]])
    found = head_major_rows(memory, batch, chunks)
    assert found.rows.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    expected = memory.transpose(2, 3)[batch[:, None], chunks].transpose(1, 2)
    assert torch.equal(found.rows[found.index].view(expected.shape), expected)


@pytest.mark.parametrize(("topk", "copied"), [(2, 4), (3, 5)], ids=["retrieved", "memory"])
def test_the_smaller_copy_is_made(make_case: Callable, topk: int, copied: int) -> None:
    """M = 5 chunks of memory, 2 chunks of queries of `topk` slots."""
    memory = token_major(make_case(B=1, M=5).key.detach())
    chunks = torch.tensor([[4, 0, 2], [1, 3, 3]])[:, :topk]
    found = head_major_rows(memory, torch.tensor([0, 0]), chunks)
    assert len(found.rows) == copied * memory.shape[3]
    expected = memory[0, chunks].transpose(2, 3).transpose(1, 2)
    assert torch.equal(found.rows[found.index].view(expected.shape), expected)


def test_memory_shared_by_the_rows(make_case: Callable) -> None:
    case = make_case()
    key, value = case.key.detach()[:1], case.value.detach()[:1]
    shared = case._replace(key=key.expand(2, -1, -1, -1, -1), value=value.expand(2, -1, -1, -1, -1))
    copied = case._replace(key=key.repeat(2, 1, 1, 1, 1), value=value.repeat(2, 1, 1, 1, 1))
    torch.testing.assert_close(
        shared.run(grouped_cross_attention), copied.run(grouped_cross_attention), **FLOAT64
    )


def test_expanded_gradient(make_case: Callable) -> None:
    """sum() hands its backward a gradient of stride 0."""
    case = make_case()
    (found,) = torch.autograd.grad(case.run(grouped_cross_attention).sum(), case.key)
    output = case.run(grouped_cross_attention)
    (expected,) = torch.autograd.grad(output, case.key, torch.ones_like(output))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chunks_that_retrieve_themselves(
    make_case: Callable, layout: Callable, ragged: bool, dtype: torch.dtype
) -> None:
    """Self-attention inside each chunk reads the memory in order, without an index."""
    case = make_case(C=4, M=4, K=1, H=4, G=4).to(dtype)
    case = case._replace(
        key=layout(case.key.detach()).requires_grad_(),
        value=layout(case.value.detach()).requires_grad_(),
        indices=torch.arange(4).view(1, 4, 1).expand(2, -1, -1),
        key_lengths=torch.tensor([[1, 6, 3, 6], [6, 2, 6, 6]]) if ragged else None,
    )
    # The same chunks named through an index, as row 0 of a memory of all chunks.
    indexed = case._replace(
        query=case.query.flatten(0, 1)[None],
        key=case.key.flatten(0, 1)[None].flip(1),
        value=case.value.flatten(0, 1)[None].flip(1),
        indices=torch.arange(7, -1, -1).view(1, 8, 1),
        weights=case.weights.flatten(0, 1)[None],
        key_lengths=case.key_lengths.flatten()[None].flip(1) if ragged else None,
    )
    expected = indexed.results(grouped_cross_attention, backend="blocked")
    actual = case.results(grouped_cross_attention, backend="blocked")
    for name in ("key", "value"):
        expected[name] = expected[name].flip(1)
        assert_gradient_layout(actual[name], getattr(case, name))
    for name, found in actual.items():
        # The same operations on the same numbers.
        assert torch.equal(found.flatten(0, 1), expected[name][0]), name
