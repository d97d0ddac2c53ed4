"""Without indices the memory holds what is retrieved, in order: the same as with their numbers."""

import pytest
import torch

from drt import grouped_cross_attention


def case(num_queries: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {
        "query": randn(2, 3, num_queries, 4, 8),
        # Head-major, as memories are.
        "key": randn(2, 12, 2, 5, 8).transpose(2, 3),
        "value": randn(2, 12, 2, 5, 8).transpose(2, 3),
        "weights": randn(2, 3, 4).softmax(-1),
    }


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("num_queries", [1, 4, 7])
@pytest.mark.parametrize("ragged", [False, True])
def test_values_and_gradients_are_those_of_the_numbers(
    backend: str, num_queries: int, ragged: bool
) -> None:
    lengths = torch.randint(1, 6, (2, 12)) if ragged else None
    indices = torch.arange(12).view(1, 3, 4).expand(2, 3, 4)
    found = []
    for given in (None, indices):
        tensors = {name: x.requires_grad_() for name, x in case(num_queries).items()}
        out = grouped_cross_attention(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            given,
            tensors["weights"],
            key_lengths=lengths,
            softmax_plus_one=True,
            backend=backend,
        )
        out.square().sum().backward()
        found.append([out, *(x.grad for x in tensors.values())])
        with torch.no_grad():
            plain = {name: x.detach() for name, x in tensors.items()}
            again = grouped_cross_attention(
                **plain, indices=given, key_lengths=lengths, softmax_plus_one=True, backend=backend
            )
        # float64, perhaps summed in another order.
        assert torch.allclose(again, out, atol=1e-12)
    for without, with_numbers in zip(*found, strict=True):
        assert torch.equal(without, with_numbers)


def test_a_memory_of_another_size_is_refused() -> None:
    tensors = case(1)
    tensors["key"], tensors["value"] = tensors["key"][:, :11], tensors["value"][:, :11]
    with pytest.raises(ValueError, match=r"M must be C \* K = 3 \* 4, the memory has 11"):
        grouped_cross_attention(**tensors, indices=None)
