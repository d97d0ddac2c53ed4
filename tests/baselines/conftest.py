"""Arithmetic of a decoder on one vector at a time, apart from the package's own."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def feed_forward(x: Tensor, part: dict[str, Tensor], eps: float) -> Tensor:
    y = norm(x, part["post_attention_layernorm.weight"], eps)
    gate = part["mlp.gate_proj.weight"] @ y
    inner = gate / (1 + (-gate).exp()) * (part["mlp.up_proj.weight"] @ y)
    return x + part["mlp.down_proj.weight"] @ inner


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """(D,) rotated to a position, pair by pair, as complex numbers."""
    half = x.shape[0] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag])


def layer_weights(model: torch.nn.Module, number: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{number}."
    return {
        name.removeprefix(prefix): weight.detach()
        for name, weight in model.named_parameters()
        if name.startswith(prefix)
    }


@pytest.fixture
def plain() -> SimpleNamespace:
    return SimpleNamespace(
        norm=norm, feed_forward=feed_forward, turned=turned, layer_weights=layer_weights
    )
