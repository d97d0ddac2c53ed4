"""What a backend is asked for, and what a backend is."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """A validated call of `sliding_window_attention`, without the keys that no query reaches."""

    query: Tensor
    """(B, T, H, D)."""
    key: Tensor
    """(B, N, G, D)."""
    value: Tensor
    """(B, N, G, D)."""
    window: int
    first_keys: Tensor | None
    """(B, T) int64 in [0, p] for the query at key position p."""
    alibi_slopes: Tensor | None
    scale: float

    @property
    def is_empty(self) -> bool:
        """Whether there is no query: no row, or none in any row."""
        return min(self.query.shape[:2]) == 0

    @property
    def wants_grad(self) -> bool:
        """Whether autograd will ask for a gradient of query, key or value."""
        tensors = (self.query, self.key, self.value)
        return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class Backend(NamedTuple):
    """One implementation of the operator."""

    run: Callable[..., Tensor]
    """Called with the fields of a `Call`: query, key and value by position, the rest by name."""
    unavailable: Callable[[Call], str | None]
    """Why the backend cannot serve this call and what would help, or None if it can."""
