"""Inputs for grouped cross-attention, and the plain computation that error budgets come from."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)


class Case(NamedTuple):
    """The tensors of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    indices: Tensor
    weights: Tensor
    key_lengths: Tensor | None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Case":
        """Fresh leaves in another dtype; weights stay at float32 or better."""
        wide = torch.promote_types(dtype, torch.float32)

        def leaf(tensor: Tensor, target: torch.dtype) -> Tensor:
            return tensor.detach().to(device, target).requires_grad_()

        return Case(
            query=leaf(self.query, dtype),
            key=leaf(self.key, dtype),
            value=leaf(self.value, dtype),
            indices=self.indices.to(device),
            weights=leaf(self.weights, wide),
            key_lengths=None if self.key_lengths is None else self.key_lengths.to(device),
        )

    def run(self, operator: Callable[..., Tensor], **options: object) -> Tensor:
        return operator(*self[:5], key_lengths=self.key_lengths, **options)

    def results(self, operator: Callable[..., Tensor], **options: object) -> dict[str, Tensor]:
        """The output and the four gradients for a fixed, uneven gradient of the output."""
        output = self.run(operator, **options)
        grad = torch.linspace(-1.0, 1.5, output.numel(), dtype=torch.float64).cos()
        grad = grad.to(output.device)
        inputs = [self.query, self.key, self.value, self.weights]
        grads = torch.autograd.grad(output, inputs, grad.view(output.shape).to(output.dtype))
        return dict(
            zip(("output", "query", "key", "value", "weights"), (output, *grads), strict=True)
        )


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """Float64 inputs with every kind of slot: repeated, unused, and chunks of queries with none."""

    def make(
        B: int = 2,
        C: int = 3,
        Q: int = 4,
        H: int = 4,
        D: int = 8,
        M: int = 5,
        S: int = 6,
        G: int = 2,
        K: int = 3,
        *,
        ragged: bool = False,
        full: bool = False,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        indices = torch.randint(0 if full else -1, M, (B, C, K), generator=generator)
        if not full and C > 1:
            indices[:, 0] = -1
        lengths = torch.randint(0, S + 1, (B, M), generator=generator) if ragged else None
        return Case(
            normal(B, C, Q, H, D).requires_grad_(),
            normal(B, M, G, S, D).transpose(2, 3).requires_grad_(),
            normal(B, M, G, S, D).transpose(2, 3).requires_grad_(),
            indices,
            torch.rand((B, C, K), generator=generator, dtype=torch.float64).requires_grad_(),
            lengths,
        )

    return make


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    key_lengths: Tensor | None,
    softmax_plus_one: bool,
) -> Tensor:
    """The definition, slot by slot, every product and softmax in the dtype of the inputs."""
    repeats = query.shape[3] // key.shape[3]
    output = []
    for b, c in torch.cartesian_prod(*map(torch.arange, query.shape[:2])).tolist():
        total = torch.zeros_like(query[b, c], dtype=weights.dtype)
        for chunk, weight in zip(indices[b, c].tolist(), weights[b, c], strict=True):
            length = key.shape[2] if key_lengths is None else int(key_lengths[b, chunk])
            if chunk < 0 or length == 0:
                continue
            keys = key[b, chunk, :length].repeat_interleave(repeats, dim=1)
            values = value[b, chunk, :length].repeat_interleave(repeats, dim=1)
            scores = torch.einsum("qhd,shd->hqs", query[b, c], keys) * query.shape[-1] ** -0.5
            if softmax_plus_one:
                scores = torch.nn.functional.pad(scores, (0, 1))
            p = scores.softmax(-1)[..., :length]
            total = total + weight * torch.einsum("hqs,shd->qhd", p, values)
        output.append(total.to(query.dtype))
    return torch.stack(output).view(query.shape)


@pytest.fixture(scope="session")
def plain_operator() -> Callable[..., Tensor]:
    return plain
